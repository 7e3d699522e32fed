"""The vocabulary every layer of pf_jax shares: video geometry, keys/values, dtypes, shape checks.

Words (used everywhere in the package):
  pixel frame    one picture; latent frame: one frame of VAE latents (`temporal_stride` pixel
                 frames, except the very first latent frame, which holds a single one).
  block          `frames_per_block` latent frames that are denoised together.
  token          one `patch` of latents; layer: one transformer layer.

Array layout is channels last: pixels [B, T, H, W, 3] in [-1, 1], latents [B, F, h, w, C],
tokens [B, T, D], keys and values [B, T, N, H] (N heads of size H), a leading L when layers are
stacked.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any


class KeyValues(NamedTuple):
  """Keys and values of the same tokens, [..., T, N, H]."""

  k: Array
  v: Array


@dataclasses.dataclass(frozen=True)
class DTypes:
  """Precision policy of a network: how parameters, activations and cached keys/values are stored.

  What stays float32 whatever is chosen here, in every network: norms and their scales, softmax,
  RoPE angles, time embedding, time modulation and gates, the residual stream of transformer and
  text encoder, the transformer's head, latents between networks, and the sampler's state. Products
  accumulate in float32. Everything else (linear layers, convolutions, attention's operands) follows
  `compute`.

  Attributes:
    params: of stored parameters, those above excepted.
    compute: of activations.
    cache: of stored keys and values (transformer only).

  Raises:
    ValueError: a dtype that is not supported.
  """

  params: str = 'float32'
  compute: str = 'float32'
  cache: str = 'float32'

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value not in ('float32', 'bfloat16'):
        raise ValueError(f'{field.name}={value!r} is not a supported dtype; use float32 or '
                         f'bfloat16.')


@dataclasses.dataclass(frozen=True)
class VideoSpec:
  """Geometry of a video, from pixels to tokens. Everything else is derived from these sizes.

  Attributes:
    height: pixels.
    width: pixels.
    fps: pixel frames per second of playback.
    frames_per_block: latent frames denoised together.
    latent_channels: channels of the VAE latent.
    temporal_stride: pixel frames per latent frame.
    spatial_stride: pixels per latent cell, each axis.
    patch: latent cells per token along (frame, height, width).

  Raises:
    ValueError: a size is not positive, or the picture does not divide into tokens.
  """

  height: int = 64
  width: int = 64
  fps: int = 16
  frames_per_block: int = 4
  latent_channels: int = 8
  temporal_stride: int = 4
  spatial_stride: int = 8
  patch: tuple[int, int, int] = (1, 2, 2)

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      for size in value if isinstance(value, tuple) else (value,):
        if size < 1:
          raise ValueError(f'{field.name}={value} must be at least 1.')
    if len(self.patch) != 3 or self.patch[0] != 1:
      raise ValueError(f'patch={self.patch} must be (1, height, width): positions count single '
                       f'latent frames; use (1, 2, 2).')
    for name, size, patch in (('height', self.height, self.patch[1]),
                              ('width', self.width, self.patch[2])):
      multiple = self.spatial_stride * patch
      if size % multiple:
        below = size // multiple * multiple
        raise ValueError(
            f'{name}={size} is not a multiple of {multiple} (spatial stride {self.spatial_stride} '
            f'x patch {patch}); use {max(below, multiple)} or {below + multiple}.')

  @property
  def latent_height(self) -> int:
    return self.height // self.spatial_stride

  @property
  def latent_width(self) -> int:
    return self.width // self.spatial_stride

  @property
  def grid(self) -> tuple[int, int]:
    """Tokens per latent frame along (height, width)."""
    return self.latent_height // self.patch[1], self.latent_width // self.patch[2]

  @property
  def tokens_per_frame(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def tokens_per_block(self) -> int:
    return self.tokens_per_frame * self.frames_per_block

  @property
  def block_latent_shape(self) -> tuple[int, int, int, int]:
    """[F, h, w, C] of one block."""
    return self.frames_per_block, self.latent_height, self.latent_width, self.latent_channels

  @property
  def block_frames(self) -> int:
    """Pixel frames of every block but the first."""
    return self.temporal_stride * self.frames_per_block

  @property
  def first_block_frames(self) -> int:
    """Pixel frames of the first block: its first latent frame is a single picture."""
    return self.block_frames - self.temporal_stride + 1

  def pixel_frames(self, blocks: int) -> int:
    """Pixel frames of a video of `blocks` blocks."""
    return self.first_block_frames + (blocks - 1) * self.block_frames

  def blocks_for_seconds(self, seconds: float) -> int:
    """Blocks that cover `seconds` of video: ceil(seconds * fps / pixel frames per block).

    Raises:
      ValueError: `seconds` is not a positive finite number.
    """
    if not (math.isfinite(seconds) and seconds > 0):
      raise ValueError(f'{seconds=} must be a positive number of seconds.')
    # A product such as 0.1 * 160 lands a rounding error above a whole block; it is that block.
    return math.ceil(round(seconds * self.fps / self.block_frames, 9))


def check_shape(name: str, array: Array, pattern: str, **sizes: int) -> dict[str, int]:
  """Checks an array's shape against an einops pattern, at a public edge.

  Args:
    name: what the array is, for the message.
    array: anything with a shape.
    pattern: einops names, e.g. 'b f h w c'.
    **sizes: the sizes that are already known.

  Returns:
    The size of every name in the pattern.

  Raises:
    ValueError: the rank or a known size differs; says got and wanted.
  """
  try:
    return einops.parse_shape(array, pattern) | _known_sizes(array.shape, pattern, sizes)
  except (RuntimeError, ValueError) as error:
    wanted = ' '.join(f'{n}={sizes[n]}' if n in sizes else n for n in pattern.split())
    raise ValueError(f'{name} has shape {tuple(array.shape)}, wanted [{wanted}].') from error


def _known_sizes(shape: tuple[int, ...], pattern: str, sizes: dict[str, int]) -> dict[str, int]:
  for size, axis in zip(shape, pattern.split(), strict=True):
    if axis in sizes and sizes[axis] != size:
      raise ValueError(axis)
  return sizes


def tree_bytes(tree: PyTree) -> int:
  """Bytes of all arrays (or ShapeDtypeStructs) in a pytree."""
  return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
             for leaf in jax.tree.leaves(tree) if hasattr(leaf, 'shape'))
