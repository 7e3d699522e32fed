"""Rotary position embedding (RoPE) over (time, height, width), as Wan2.1 defines it.

A head of size H holds H/2 pairs of *adjacent* elements, seen as complex numbers. They are divided
among the axes in the order time, height, width; each axis has a frequency ladder of its own:

  theta_j = 10000^(-2j / d_axis),  j = 0 .. d_axis/2 - 1,  rotated(x)_j = x_j * exp(i * p * theta_j)

where p is the token's position on that axis and d_axis counts reals. Rotations of one axis add up,
so a block can be rotated by its positions *inside itself* when it is stored and by its slot's
temporal position when it is read: `rotate_time` touches the temporal pairs only.

Source: Wan2.1 `rope_params`/`rope_apply` (facts: head size 128 splits into 22 + 21 + 21 pairs);
arXiv:2603.25730, section on temporal RoPE adjustment.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.types import Array

THETA = 10_000.0

MidOffsets = Literal['center', 'start', 'native']


class RopeTable(NamedTuple):
  """Cosines and sines of a token's rotation, [T, H/2] float32."""

  cos: Array
  sin: Array

  def inverse(self) -> 'RopeTable':
    """The table that undoes this rotation."""
    return RopeTable(self.cos, -self.sin)


def rope_pairs(head_dim: int) -> tuple[int, int, int]:
  """Complex pairs of a head that belong to (time, height, width): 128 -> (22, 21, 21).

  Raises:
    ValueError: `head_dim` is odd or leaves an axis without a pair.
  """
  side = head_dim // 6
  time = head_dim // 2 - 2 * side
  if head_dim % 2 or side < 1:
    raise ValueError(f'{head_dim=} cannot be split into pairs for time, height and width; use an '
                     f'even size of at least 6.')
  return time, side, side


def _frequencies(pairs: int) -> np.ndarray:
  return THETA ** (-np.arange(pairs, dtype=np.float64) / pairs)


def rope_table(positions: np.ndarray, head_dim: int) -> RopeTable:
  """Rotations of tokens at known positions; angles in float64 on the host.

  Args:
    positions: [T, 3] (time, height, width), in latent frames and tokens; fractions are allowed.
    head_dim: reals per head.
  """
  axes = [np.outer(positions[:, axis], _frequencies(pairs))
          for axis, pairs in enumerate(rope_pairs(head_dim))]
  angles = np.concatenate(axes, axis=1)
  return RopeTable(jnp.asarray(np.cos(angles), jnp.float32),
                   jnp.asarray(np.sin(angles), jnp.float32))


def _rotate_pairs(x: Array, cos: Array, sin: Array) -> Array:
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
  real, imag = pairs[..., 0], pairs[..., 1]
  rotated = jnp.stack([real * cos - imag * sin, real * sin + imag * cos], axis=-1)
  return rotated.reshape(x.shape).astype(x.dtype)


def rotate(x: Array, table: RopeTable) -> Array:
  """Rotates heads [..., T, N, H] by their tokens' table; computes in float32, keeps x's dtype."""
  return _rotate_pairs(x, table.cos[:, None], table.sin[:, None])


def norm_and_rotate(x: Array, scale: Array, table: RopeTable, bias: Array | None, *, first: int,
                    eps: float) -> Array:
  """See `pf_jax.kernels.rope.api.norm_and_rotate`."""
  x = x[..., first:first + scale.shape[0]]
  x = x if bias is None else x + bias
  x32 = x.astype(jnp.float32)
  norm = jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
  # XLA's fusions for cards can norm or rotate. Left alone, it writes what is normed and reads it
  # again; so it reads x twice, once for the sums alone, and writes nothing in between.
  norm = jax.lax.optimization_barrier(norm)
  normed = (x32 * norm * scale).astype(x.dtype)
  return rotate(normed.reshape(*x.shape[:-1], -1, 2 * table.cos.shape[-1]), table)


def time_angles(positions: Array, head_dim: int) -> Array:
  """Angles [..., temporal pairs] by which `rotate_time` turns, float32."""
  frequencies = jnp.asarray(_frequencies(rope_pairs(head_dim)[0]), jnp.float32)
  return positions.astype(jnp.float32)[..., None] * frequencies


def rotate_time(x: Array, positions: Array) -> Array:
  """Moves heads [..., N, H] in time: multiplies their temporal pairs by exp(i * position * theta).

  Args:
    x: keys or queries whose rotation so far lacks `positions`.
    positions: latent frames, any shape that broadcasts against x's leading axes `...`; traced
      values are welcome. Negative ones move into the past.
  """
  angles = time_angles(positions, x.shape[-1])[..., None, :]
  time = angles.shape[-1]
  head, tail = x[..., :2 * time], x[..., 2 * time:]
  return jnp.concatenate([_rotate_pairs(head, jnp.cos(angles), jnp.sin(angles)), tail], axis=-1)


def block_positions(grid: tuple[int, int, int]) -> np.ndarray:
  """Positions [T, 3] of a full-resolution block's tokens inside the block; width runs fastest."""
  axes = np.meshgrid(*(np.arange(size, dtype=np.float64) for size in grid), indexing='ij')
  return np.stack([axis.reshape(-1) for axis in axes], axis=-1)


def compressed_positions(grid: tuple[int, int, int], mid_grid: tuple[int, int, int],
                         mode: MidOffsets = 'center') -> np.ndarray:
  """Positions [M, 3] of a compressed block's tokens inside the block.

  A compressed token stands for a window of `grid // mid_grid` full-resolution tokens.

  Args:
    grid: (frames, height, width) of the full-resolution block, in tokens.
    mid_grid: the same of the compressed block.
    mode: 'center' of the window (time {0.5, 2.5}, space 4j + 1.5 at full scale), its 'start', or
      'native' indices of the compressed grid.

  Raises:
    ValueError: unknown mode.
  """
  native = block_positions(mid_grid)
  window = np.array([full // mid for full, mid in zip(grid, mid_grid, strict=True)], np.float64)
  if mode == 'native':
    return native
  if mode == 'start':
    return native * window
  if mode == 'center':
    return native * window + (window - 1) / 2
  raise ValueError(f'{mode=} is unknown; use center, start or native.')
