"""RMS norm and rotation of queries or keys in one pass over the bytes, for NVIDIA's Hopper cards.

A program takes some rows of all heads into shared memory by TMA, sums their squares, scales and
rotates them where they lie and sends them off: one read, one write. XLA reads twice, since no
fusion of its rotates what it has just reduced (BENCHMARKS.md).

Pairs of adjacent half-precision numbers are rotated. Lanes own whole pairs, as one 32-bit word
each: bfloat16 is the upper half of float32, so a shift and a mask take a pair apart, without any
exchange between lanes. A warp reads a head of a row at once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pf_jax.kernels import mosaic
from pf_jax.types import Array, tree_bytes

LANES, WARPS = 32, 4
_LOW, _HIGH = 16, 0xFFFF0000  # of a word


@dataclasses.dataclass(frozen=True)
class RowSpec:
  """Sizes that are tuned for a card.

  Attributes:
    rows: of a program, as many for each of its 4 warps. With 8 of the 1.3B's five programs share a
      multiprocessor: some wait for their rows while others rotate theirs.

  Raises:
    ValueError: rows that warps cannot share out.
  """

  rows: int = 8

  def __post_init__(self):
    if self.rows % WARPS or not WARPS <= self.rows <= 256:
      raise ValueError(f'rows={self.rows} must be a multiple of {WARPS} within {WARPS}..256.')

  @classmethod
  def fitting(cls, heads: int, head_dim: int) -> 'RowSpec':
    """8 rows, or 4 where 8 would let fewer than three programs share a multiprocessor."""
    fits = 3 * cls().shared_bytes(heads, head_dim) <= mosaic.SHARED_BYTES
    return cls() if fits else cls(WARPS)

  def shared_bytes(self, heads: int, head_dim: int) -> int:
    """Shared memory of a program, without its barrier."""
    width = heads * head_dim
    half, full = 2, 4
    return self.rows * width * half + self.rows * head_dim * full + width * (half + full)


def norm_and_rotate(x: Array, bias: Array, scale: Array, cos: Array, sin: Array, *, first: int,
                    eps: float, spec: RowSpec = RowSpec(), interpret: Any = None) -> Array:
  """Adds a bias, divides by the root mean square of each row, scales and rotates.

  Args:
    x: [B, T, M, H/2] uint32, M >= N heads of pairs of bfloat16.
    bias: [N, H/2] uint32, the same.
    scale: [2, N, H/2] float32, of the pairs' first and second numbers.
    cos: [T, H/2] float32.
    sin: [T, H/2] float32.
    first: of the N heads that count.
    eps: added to the mean of squares.
    spec: sizes.
    interpret: parameters of Pallas' interpreter, on machines without the card.

  Returns:
    [B, T, N, H/2] uint32.

  Raises:
    ValueError: heads that are more than there is shared memory for.
  """
  batch, tokens, _, half = x.shape
  heads = bias.shape[0]
  needed = spec.shared_bytes(heads, 2 * half)
  if needed > mosaic.SHARED_BYTES:
    raise ValueError(f'{spec.rows} rows of {heads} heads of {2 * half} take {needed} bytes of '
                     f'shared memory, of {mosaic.SHARED_BYTES}; use fewer rows.')
  out_type = jax.ShapeDtypeStruct((batch, tokens, heads, half), x.dtype)
  cost = pl.CostEstimate(  # of x as much as of the result
      flops=0, transcendentals=batch * tokens,
      bytes_accessed=tree_bytes((out_type, out_type, bias, scale, cos, sin)))
  return mosaic.kernel(
      functools.partial(_program, first=first, eps=eps), name='norm_and_rotate', out_type=out_type,
      scratch_types=[plgpu.SMEM((spec.rows, heads, half), x.dtype),
                     plgpu.SMEM(bias.shape, bias.dtype), plgpu.SMEM(scale.shape, scale.dtype),
                     *[plgpu.SMEM((spec.rows, 1, half), jnp.float32)] * 2,
                     plgpu.Barrier(num_arrivals=5)],
      grid=(batch, pl.cdiv(tokens, spec.rows)), grid_names=('video', 'tile'), cost=cost,
      interpret=interpret)(x, bias, scale, cos[:, None], sin[:, None])


def _layout(half: int):
  """Of [rows, H/2]: a warp has a row, each lane as many neighbouring pairs of it."""
  return plgpu.Layout.TILED(plgpu.Tiling(((WARPS, half), (half // LANES,))), warp_dims=(-3,),
                            lane_dims=(-2,), vector_dim=-1)


def _program(x, bias, scale, cos, sin, out, x_s, bias_s, scale_s, cos_s, sin_s, ready, *, first,
             eps):
  """What one program does; arguments are references to global memory, then to shared memory."""
  video, (rows, heads, half) = lax.axis_index('video'), x_s.shape
  span = pl.ds(lax.axis_index('tile') * rows, rows)
  for source, target in ((x.at[video, span, pl.ds(first, heads)], x_s), (bias, bias_s),
                         (scale, scale_s), (cos.at[span], cos_s), (sin.at[span], sin_s)):
    plgpu.copy_gmem_to_smem(source, target, ready)
  plgpu.barrier_wait(ready)

  def every_row(vector):
    return lax.broadcast_in_dim(vector, (rows, half), [1])

  def pairs(head):
    words = plgpu.layout_cast(x_s[:, head], _layout(half))
    return [number + every_row(shift) for number, shift in zip(
        _apart(words), _apart(bias_s[head]), strict=True)]

  def add_squares(head, squares):
    a, b = pairs(head)
    return squares + a * a + b * b

  zeros = plgpu.layout_cast(jnp.zeros((rows, half), jnp.float32), _layout(half))
  squares = lax.fori_loop(0, heads, add_squares, zeros)
  norm = lax.rsqrt(squares.sum(axis=1) / (2 * heads * half) + eps)
  c, s = (plgpu.layout_cast(angles[:, 0], _layout(half)) * lax.broadcast_in_dim(
      norm, (rows, half), [0]) for angles in (cos_s, sin_s))

  @pl.loop(0, heads)
  def _(head):
    a, b = (number * every_row(scale_s[i, head]) for i, number in enumerate(pairs(head)))
    x_s[:, head] = _together(a * c - b * s, a * s + b * c)

  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(x_s, out.at[video, span])
  plgpu.wait_smem_to_gmem(0)


def _apart(words: Array) -> tuple[Array, Array]:
  """The two bfloat16 numbers of each word, float32."""
  return (lax.bitcast_convert_type(words << _LOW, jnp.float32),
          lax.bitcast_convert_type(words & jnp.uint32(_HIGH), jnp.float32))


def _together(a: Array, b: Array) -> Array:
  """Words of two float32 numbers, rounded to bfloat16."""
  a, b = (lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
          for x in (a, b))
  return a | (b << _LOW)
