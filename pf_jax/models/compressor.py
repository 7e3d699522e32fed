"""The dual-branch compressor: one block of video to about 32 times fewer tokens.

  HR branch  the block's clean latents through strided 3-D convolutions; trained.
  LR branch  the block's pixels, pooled, re-encoded by the frozen VAE, embedded by the transformer's
             own patch embedding.
  tokens = HR + LR

At full scale (832x480, 4 latent frames) both give 2 x 7 x 13 = 182 tokens. The HR branch ends in a
1x1x1 convolution that starts at zero, so an untrained compressor is exactly the LR branch.

Source: arXiv:2603.25730, section on the dual-branch compressor. Kernel sizes are not published:
kernel 4, padding 1 on strided axes and kernel 3, padding 1 on the others centre every receptive
field where the LR branch and the compressed positions put it ("SAME" padding would give 208).
"""

import dataclasses
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from pf_jax.kernels.conv3d import Epilogue, conv3d, supports
from pf_jax.types import Array, VideoSpec, check_shape


@dataclasses.dataclass(frozen=True)
class CompressorSpec:
  """Sizes of the compressor; defaults are the shipped miniature's.

  Attributes:
    in_channels: latent channels.
    channels: of the HR convolutions; the first strides time, each further one strides space by 2.
    width: of the transformer's tokens.
    temporal_stride: latent frames per compressed frame, 2 (the paper) or 1.
    branches: 'both', or one branch alone: 'hr' or 'lr' (ablations).
    convolution: implementation of the HR convolutions that it fits, see
      `pf_jax.kernels.conv3d.conv3d`; 'pallas' computes them in bfloat16. None chooses.

  Raises:
    ValueError: no convolution, an unknown stride or branch.
  """

  in_channels: int = 8
  channels: tuple[int, ...] = (16, 32, 64, 128)
  width: int = 128
  temporal_stride: int = 2
  branches: str = 'both'
  convolution: str | None = None

  def __post_init__(self):
    if len(self.channels) < 2:
      raise ValueError(f'channels={self.channels} must name at least two convolutions: one strides '
                       f'time, the others space.')
    if self.temporal_stride not in (1, 2):
      raise ValueError(f'temporal_stride={self.temporal_stride} is not supported; use 2, or 1 for '
                       f'blocks with an odd number of latent frames.')
    if self.branches not in ('both', 'hr', 'lr', 'none'):
      raise ValueError(f'branches={self.branches!r} is unknown; use both, hr, lr or none.')

  @property
  def spatial_stride(self) -> int:
    """Latent cells per compressed token, each axis."""
    return 2 ** (len(self.channels) - 1)

  def mid_grid(self, video: VideoSpec) -> tuple[int, int, int]:
    """(frames, height, width) of a compressed block.

    Raises:
      ValueError: the block does not divide in time, or is too small to leave a token.
    """
    if video.frames_per_block % self.temporal_stride:
      raise ValueError(
          f'frames_per_block={video.frames_per_block} is not a multiple of the compressor stride '
          f'{self.temporal_stride}; use temporal_stride=1 or another block length.')
    grid = (video.frames_per_block // self.temporal_stride,
            video.latent_height // self.spatial_stride, video.latent_width // self.spatial_stride)
    if min(grid) < 1:
      raise ValueError(
          f'a block of {video.frames_per_block}x{video.latent_height}x{video.latent_width} latents '
          f'leaves {grid} compressed tokens; use fewer channels in {self.channels} or a larger '
          f'picture.')
    return grid


def pool_pixels(pixels: Array, video: VideoSpec, spec: CompressorSpec) -> Array:
  """What the LR branch re-encodes: a block's pixels, pooled so that the VAE sees all of them.

  The VAE maps 1 + 4n pixel frames to 1 + n latents and would ignore the rest, so the block's frames
  are pooled to exactly that: at stride 2, frames 0-7 to their mean and 8-15 to four pair means.

  Args:
    pixels: [B, T, H, W, 3] of one block; the video's first block has 3 frames fewer and repeats its
      first one.
    video: geometry.
    spec: strides.

  Returns:
    [B, 1 + temporal_stride_vae*(n - 1), H/p, W/p, 3] for n compressed frames, cut to whole latent
    cells: of 720 rows pooled to 180, the VAE takes 176. The rest would not fill a patch anyway.

  Raises:
    ValueError: not one block of pixels.
  """
  sizes = check_shape('pixels', pixels, 'b t y x rgb', y=video.height, x=video.width)
  if sizes['t'] == video.first_block_frames:
    first = jnp.repeat(pixels[:, :1], video.temporal_stride - 1, axis=1)
    pixels = jnp.concatenate([first, pixels], axis=1)
  check_shape('pixels', pixels, 'b t y x rgb', t=video.block_frames)
  space = spec.spatial_stride // video.patch[1]
  pixels = einops.reduce(pixels, 'b t (y p) (x q) c -> b t y x c', 'mean', p=space, q=space)
  cell = video.spatial_stride
  rows, columns = (size // cell * cell for size in pixels.shape[2:4])
  pixels = pixels[:, :, :rows, :columns]
  window = video.temporal_stride * spec.temporal_stride
  head = einops.reduce(pixels[:, :window], 'b t y x c -> b 1 y x c', 'mean')
  tail = einops.reduce(pixels[:, window:], 'b (t s) y x c -> b t y x c', 'mean',
                       s=spec.temporal_stride)
  return jnp.concatenate([head, tail], axis=1)


def _conv(fan_in: int, fan_out: int, kernel: tuple[int, int, int], stride: tuple[int, int, int],
          rngs: nnx.Rngs) -> nnx.Conv:
  return nnx.Conv(fan_in, fan_out, kernel, stride, padding=[(1, 1)] * 3, rngs=rngs,
                  kernel_init=nnx.initializers.he_normal())


class HrBranch(nnx.Module):
  """Strided 3-D convolutions with SiLU between, then a 1x1x1 one that starts at zero."""

  def __init__(self, spec: CompressorSpec, *, rngs: nnx.Rngs):
    time_kernel = 4 if spec.temporal_stride == 2 else 3
    convs = [_conv(spec.in_channels, spec.channels[0], (time_kernel, 3, 3),
                   (spec.temporal_stride, 1, 1), rngs)]
    for fan_in, fan_out in zip(spec.channels[:-1], spec.channels[1:], strict=True):
      convs.append(_conv(fan_in, fan_out, (3, 4, 4), (1, 2, 2), rngs))
    self.convs = nnx.List(convs)
    self.implementation = spec.convolution
    self.out = nnx.Linear(spec.channels[-1], spec.width, rngs=rngs,
                          kernel_init=nnx.initializers.zeros)

  def __call__(self, latents: Array) -> Array:
    """[B, F, h, w, C] -> [B, f, h', w', D]."""
    for conv in self.convs:
      latents = self._convolve(latents, conv)
    return self.out(latents)

  def _convolve(self, x: Array, conv: Any) -> Array:
    """One convolution and SiLU, in x's dtype."""
    half = x.astype(jnp.bfloat16) if self.implementation == 'pallas' else x
    kernel = conv.kernel[...]
    if self.implementation is None or not supports(self.implementation, half, kernel, conv.strides):
      return jax.nn.silu(conv(x))
    _, *space = conv.padding
    zeros = jnp.zeros_like(half[:, :1])
    out = conv3d(jnp.concatenate([half, zeros], axis=1), kernel, conv.bias[...], past=zeros,
                 strides=conv.strides, padding=tuple(space), epilogue=Epilogue(silu=True),
                 implementation=self.implementation)
    return out.astype(x.dtype)


class Compressor(nnx.Module):
  """Adds the two branches; see the module's docstring."""

  def __init__(self, spec: CompressorSpec, *, rngs: nnx.Rngs):
    self.spec = spec
    self.hr = HrBranch(spec, rngs=rngs)

  def __call__(self, latents: Array, lr_tokens: Array) -> Array:
    """Compresses one block.

    Args:
      latents: clean latents [B, F, h, w, C].
      lr_tokens: [B, M, D], the patch embedding of the re-encoded low-resolution latents.

    Returns:
      Tokens [B, M, D] in float32, width fastest.

    Raises:
      ValueError: the branches disagree about the number of tokens.
    """
    hr = einops.rearrange(self.hr(latents), 'b f h w d -> b (f h w) d')
    if hr.shape != lr_tokens.shape:
      raise ValueError(f'the HR branch gives tokens {hr.shape} and the LR branch '
                       f'{lr_tokens.shape}; both must cover the same block.')
    use = self.spec.branches
    return (jnp.where(use in ('both', 'hr'), hr, 0).astype(jnp.float32)
            + jnp.where(use in ('both', 'lr'), lr_tokens, 0).astype(jnp.float32))


def crop_to_patches(latents: Array, mid_grid: tuple[int, int, int],
                    patch: tuple[int, int, int]) -> Array:
  """Drops latent rows and columns that do not fill a patch: 15 x 26 -> 14 x 26 at full scale."""
  return latents[:, :, :mid_grid[1] * patch[1], :mid_grid[2] * patch[2]]
