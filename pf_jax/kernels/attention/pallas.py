"""Attention by the Mosaic GPU kernel of `pallas_gpu`: prepares its arguments, and its gradient.

Blocks are read out of the cache; what is made here are the queries a quarter turn further, a table
of rotations, one for each attended block, and the table of tiles.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pf_jax.kernels import rope, tuning
from pf_jax.kernels.attention import cudnn, reference
from pf_jax.kernels.attention.tiles import ALIGNMENT, COLUMNS, Pool
from pf_jax.kernels.context import Blocks, Segment, ready_made
from pf_jax.kernels.platform import target_platform
from pf_jax.types import Array, PyTree

LIMITS = ('bfloat16 or float16, heads of 64 or 128, blocks of a cache whose rows are a multiple of '
          f'{ALIGNMENT} in all, and segments without empty slots')


def supports(q: Array, segments: Sequence[Segment | Blocks]) -> bool:
  """Whether the kernel computes this on a Hopper card: see `LIMITS`."""
  def fits(segment: Segment | Blocks) -> bool:
    if isinstance(segment, Segment):
      return segment.valid is None
    return segment.k.shape[-4] * segment.k.shape[-3] % ALIGNMENT == 0

  dtypes = {q.dtype, *(x.dtype for segment in segments for x in (segment.k, segment.v))}
  return (dtypes in ({jnp.dtype('bfloat16')}, {jnp.dtype('float16')})
          and q.shape[-1] in (COLUMNS, 2 * COLUMNS) and all(map(fits, segments)))


def attend(q: Array, segments: Sequence[Segment | Blocks], *, return_lse: bool = False,
           tiles: Any = None, interpret: Any = None) -> Any:
  """See `pf_jax.kernels.attention.api.attend`.

  Args:
    q: [B, T, N, H].
    segments: what is attended.
    return_lse: likewise.
    tiles: `pallas_gpu.TileSpec`; None for the tuned ones, else the default.
    interpret: parameters of Pallas' interpreter, on machines without the card.
  """
  return _attend(q, tuple(segments), return_lse, tiles, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _attend(q: Array, segments: tuple[Segment | Blocks, ...], return_lse: bool, tiles: Any,
            interpret: Any) -> Any:
  from pf_jax.kernels.attention import pallas_gpu  # imports much that only cards need

  batch, tokens, heads, head_dim = q.shape
  pools: list[Pool] = []
  shifts: list[Array] = []
  for segment in segments:
    pool, shift = _pool(segment, sum(x.shape[1] for x in shifts))
    pools.append(pool)
    shifts.append(jnp.repeat(shift, batch // shift.shape[0], axis=0))
  cos, sin = _rotations(jnp.concatenate(shifts, axis=1), head_dim)
  rows = _aligned(q)
  pairs = rows[..., :COLUMNS].reshape(*rows.shape[:3], COLUMNS // 2, 2)
  turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1)
  out, lse = pallas_gpu.attend_pools(
      rows.reshape(batch, -1, heads * head_dim), turned.reshape(batch, -1, heads * COLUMNS), cos,
      sin, pools, head_dim=head_dim, queries=tokens, return_lse=return_lse,
      tiles=tiles or tuned(q, segments, return_lse), interpret=interpret)
  out = out[:, :tokens].reshape(q.shape)
  return out if lse is None else (out, jnp.swapaxes(lse[:, :, :tokens], 1, 2))


def shape_of(q: Array, segments: Sequence[Segment | Blocks]) -> str:
  """What tiles are tuned for: queries, and the number and rows of each partition's blocks.

  Such as 'bfloat16 1x6240x12x128 over 2x6240 16x182 1x6240 1x6240'.
  """
  blocks = ' '.join(f'{number}x{rows}' for number, rows in map(_blocks, segments))
  return f'{q.dtype} {"x".join(map(str, q.shape))} over {blocks}'


def _blocks(segment: Segment | Blocks) -> tuple[int, int]:
  """How many are attended, and the rows of each."""
  if isinstance(segment, Segment):
    return 1, segment.k.shape[1]
  return segment.valid.shape[1], segment.k.shape[-3]


def tuned(q: Array, segments: Sequence[Segment | Blocks], return_lse: bool = False) -> Any:
  """`pallas_gpu.TileSpec` that was fastest for these shapes on this device, else the default."""
  from pf_jax.kernels.attention import pallas_gpu

  default = pallas_gpu.TileSpec()
  found = tuning.sizes(tuning.Problem.here('attention', shape_of(q, segments)), default)
  rotations = sum(number for number, _ in map(_blocks, segments))
  fits = found.shared_bytes(q.shape[-1], rotations, return_lse) <= pallas_gpu.SHARED_BYTES
  return found if fits else default  # it was tuned without the log-sum-exp


def _aligned(x: Array) -> Array:
  """[B, T, ...] with rows added up to the next multiple of `ALIGNMENT`."""
  missing = -x.shape[1] % ALIGNMENT
  return jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2))) if missing else x


def _pool(segment: Segment | Blocks, rotations: int) -> tuple[Pool, Array]:
  """The blocks of a segment, their rotations counted on from `rotations`, and shifts [b, s]."""
  first: Array | int = 0
  if isinstance(segment, Segment):  # one block that stays where it is
    batch = segment.k.shape[0]
    k, v, rows = _aligned(segment.k), _aligned(segment.v), segment.k.shape[1]
    total = k.shape[1]
    chosen = jnp.zeros((batch, 1), jnp.int32)
    valid, shift = jnp.ones((batch, 1), bool), jnp.zeros((batch, 1))
  else:
    k, v, rows, batch = segment.k, segment.v, segment.k.shape[-3], segment.batch
    total = k.shape[-4] * rows
    if segment.layer is not None:
      first = segment.layer * batch
    blocks = segment.valid.shape[1]
    chosen = jnp.arange(blocks)[None] if segment.chosen is None else segment.chosen
    chosen, valid, shift = (jnp.broadcast_to(x, (batch, blocks))
                           for x in (chosen, segment.valid, segment.shift))
  width = k.shape[-2] * k.shape[-1]
  k, v = (x.reshape(-1, total, width) for x in (k, v))
  rotation = jnp.broadcast_to(rotations + jnp.arange(chosen.shape[1]), chosen.shape)
  return Pool(k, v, rows, chosen, valid, rotation, first), shift


def _rotations(shifts: Array, head_dim: int) -> tuple[Array, Array]:
  """Cosines and sines [B, r, COLUMNS] that turn queries by the opposite of shifts [B, r]."""
  angles = rope.time_angles(-shifts, head_dim)
  missing = COLUMNS // 2 - angles.shape[-1]
  angles = jnp.repeat(jnp.pad(angles, ((0, 0), (0, 0), (0, missing))), 2, axis=-1)
  return jnp.cos(angles), jnp.sin(angles)


def _library(q: Array, segments: tuple[Segment | Blocks, ...], return_lse: bool) -> Any:
  """The same by a library that has a gradient."""
  packed = ready_made(segments)
  if return_lse:
    return reference.attend(q, packed, return_lse=True)
  fits = target_platform() == 'cuda' and cudnn.supports(q, packed)
  return (cudnn if fits else reference).attend(q, packed)


def _forward(q: Array, segments: tuple[Segment | Blocks, ...], return_lse: bool, tiles: Any,
             interpret: Any) -> tuple[Any, PyTree]:
  return _attend(q, segments, return_lse, tiles, interpret), (q, segments)


def _backward(return_lse: bool, tiles: Any, interpret: Any, saved: PyTree, gradient: Any
              ) -> PyTree:
  del tiles, interpret
  return jax.vjp(functools.partial(_library, return_lse=return_lse), *saved)[1](gradient)


_attend.defvjp(_forward, _backward)
