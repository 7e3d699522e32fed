"""Attention by the Mosaic GPU kernel of `pallas_gpu`: prepares its arguments, and its gradient.

Blocks are read out of the cache; what is made here are the queries a quarter turn further, tables
of rotations and scales, a row for each attended block, and the table of tiles.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pf_jax.kernels import rope, tuning
from pf_jax.kernels.attention import cudnn, reference
from pf_jax.kernels.attention.tiles import ALIGNMENT, COLUMNS, Pool
from pf_jax.kernels.context import Blocks, Segment, ready_made
from pf_jax.kernels.platform import target_platform
from pf_jax.kernels.quantization import Quantized, largest, quantize
from pf_jax.types import Array, PyTree

FLOAT8 = 'float8_e4m3fn'
SMALLEST_QUERY = 1e-10  # the smallest unit times the smallest scale of keys is no subnormal number
LIMITS = ('bfloat16 or float16, blocks also in 8 bits of one kind, heads of 64 or 128, blocks of a '
          f'cache whose rows are a multiple of {ALIGNMENT} in all, segments without empty slots')


def supports(q: Array, segments: Sequence[Segment | Blocks]) -> bool:
  """Whether the kernel computes this on a Hopper card: see `LIMITS`."""
  def fits(segment: Segment | Blocks) -> bool:
    if isinstance(segment, Segment):
      return segment.valid is None
    return (segment.k.shape[-4] * segment.k.shape[-3] % ALIGNMENT == 0
            and isinstance(segment.k, Quantized) == isinstance(segment.v, Quantized))

  arrays = [x for segment in segments for x in (segment.k, segment.v)]
  stored = {x.dtype for x in arrays if isinstance(x, Quantized)}
  whole = {q.dtype, *(x.dtype for x in arrays if not isinstance(x, Quantized))}
  return (whole in ({jnp.dtype('bfloat16')}, {jnp.dtype('float16')}) and len(stored) <= 1
          and q.shape[-1] in (COLUMNS, 2 * COLUMNS) and all(map(fits, segments)))


def attend(q: Array, segments: Sequence[Segment | Blocks], *, float8: bool = False,
           return_lse: bool = False, tiles: Any = None, interpret: Any = None) -> Any:
  """See `pf_jax.kernels.attention.api.attend`.

  Args:
    q: [B, T, N, H].
    segments: what is attended.
    float8: multiply in float8 (see `pallas_float8`).
    return_lse: as there.
    tiles: `pallas_gpu.TileSpec`; None for the tuned ones, else the default.
    interpret: parameters of Pallas' interpreter, on machines without the card.
  """
  return _attend(q, tuple(segments), float8, return_lse, tiles, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _attend(q: Array, segments: tuple[Segment | Blocks, ...], float8: bool, return_lse: bool,
            tiles: Any, interpret: Any) -> Any:
  from pf_jax.kernels.attention import pallas_gpu  # imports much that only cards need

  batch, tokens, heads, head_dim = q.shape
  columns = head_dim if float8 else COLUMNS
  pools: list[Pool] = []
  slots: list[_Slots] = []
  for segment in segments:
    pool, own = _pool(segment, sum(x.shift.shape[1] for x in slots), float8)
    pools.append(pool)
    slots.append(jax.tree.map(lambda x: jnp.repeat(x, batch // x.shape[0], axis=0), own))
  shift, k_scale, v_scale = (jnp.concatenate(parts, axis=1) for parts in zip(*slots, strict=True))
  out_scale = jnp.max(v_scale, axis=1)  # so that weights are multiplied by 1 at most
  v_scale = v_scale / out_scale[:, None]
  cos, sin = _rotations(shift, head_dim, columns)
  rows = _aligned(q)
  if float8:
    unit = _float8_unit(rows)
    rows = (rows / unit[:, None, :, None]).astype(q.dtype)
    k_scale = k_scale * unit[:, None]
  pairs = rows[..., :columns].reshape(*rows.shape[:3], columns // 2, 2)
  turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1)
  out, lse = pallas_gpu.attend_pools(
      rows.reshape(batch, -1, heads * head_dim), turned.reshape(batch, -1, heads * columns), cos,
      sin, pools, scales=pallas_gpu.Scales(k_scale, v_scale, out_scale), head_dim=head_dim,
      queries=tokens, float8=float8, return_lse=return_lse,
      tiles=tiles or tuned(q, segments, float8, return_lse), interpret=interpret)
  out = out[:, :tokens].reshape(q.shape)
  return out if lse is None else (out, jnp.swapaxes(lse[:, :, :tokens], 1, 2))


def shape_of(q: Array, segments: Sequence[Segment | Blocks]) -> str:
  """What tiles are tuned for: queries, and the number and rows of each partition's blocks.

  Such as 'bfloat16 1x6240x12x128 over 2x6240 16x182 1x6240 1x6240'; blocks in 8 bits say so:
  '2x6240:int8'.
  """
  blocks = ' '.join(f'{number}x{rows}' + f':{segment.k.dtype}' * isinstance(segment.k, Quantized)
                    for segment, (number, rows) in ((x, _blocks(x)) for x in segments))
  return f'{q.dtype} {"x".join(map(str, q.shape))} over {blocks}'


def problem(q: Array, segments: Sequence[Segment | Blocks], float8: bool) -> tuning.Problem:
  """What tiles are looked up by."""
  return tuning.Problem.here('attention in float8' if float8 else 'attention',
                             shape_of(q, segments))


def _blocks(segment: Segment | Blocks) -> tuple[int, int]:
  """How many are attended, and the rows of each."""
  if isinstance(segment, Segment):
    return 1, segment.k.shape[1]
  return segment.valid.shape[1], segment.k.shape[-3]


def tuned(q: Array, segments: Sequence[Segment | Blocks], float8: bool = False,
          return_lse: bool = False) -> Any:
  """`pallas_gpu.TileSpec` that was fastest for these shapes on this device, else the default."""
  from pf_jax.kernels import mosaic
  from pf_jax.kernels.attention import pallas_gpu

  quantized = any(isinstance(segment.k, Quantized) for segment in segments)
  default = pallas_gpu.default(quantized, float8, return_lse)
  found = tuning.sizes(problem(q, segments, float8), default)
  slots = sum(number for number, _ in map(_blocks, segments))
  needed = found.shared_bytes(q.shape[-1], slots, quantized=quantized, float8=float8,
                              return_lse=return_lse)
  return found if needed <= mosaic.SHARED_BYTES else default  # tuned without log-sum-exp


def _aligned(x: Array) -> Array:
  """[B, T, ...] with rows added up to the next multiple of `ALIGNMENT`."""
  missing = -x.shape[1] % ALIGNMENT
  return jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2))) if missing else x


class _Slots(NamedTuple):
  """What attended blocks are multiplied and moved by.

  Attributes:
    shift: [b, s], latent frames.
    k_scale: [b, s, N] float32, of keys in 8 bits; 1 elsewhere.
    v_scale: likewise; 0 where nothing counts.
  """

  shift: Array
  k_scale: Array
  v_scale: Array


def _pool(segment: Segment | Blocks, slots: int, float8: bool) -> tuple[Pool, _Slots]:
  """The blocks of a segment, its slots counted on from `slots`."""
  if isinstance(segment, Segment):  # one block that stays where it is
    k: Any
    v: Any
    k, v = (_aligned(x)[:, None] for x in (segment.k, segment.v))
    rows, one = segment.k.shape[1], (segment.k.shape[0], 1)
    if float8:
      k, v = quantize(k, FLOAT8), quantize(v, FLOAT8)
    segment = Blocks(k, v, jnp.zeros(one), jnp.ones(one, bool))
  else:
    rows = segment.k.shape[-3]
  batch, attended = segment.batch, segment.valid.shape[1]
  first = 0 if segment.layer is None else segment.layer * batch
  chosen = jnp.arange(attended)[None] if segment.chosen is None else segment.chosen
  chosen, valid, shift = (jnp.broadcast_to(x, (batch, attended))
                          for x in (chosen, segment.valid, segment.shift))
  k, v = (x.values if isinstance(x, Quantized) else x for x in (segment.k, segment.v))
  total, width = k.shape[-4] * k.shape[-3], k.shape[-2] * k.shape[-1]
  k, v = (x.reshape(-1, total, width) for x in (k, v))
  k_scale, v_scale = (_scales(x, first, chosen) for x in (segment.k, segment.v))
  v_scale = jnp.where(valid[..., None], v_scale, 0)  # what does not count sets no range for weights
  slot = jnp.broadcast_to(slots + jnp.arange(attended), chosen.shape)
  return Pool(k, v, rows, chosen, valid, slot, first), _Slots(shift, k_scale, v_scale)


def _scales(x: Array | Quantized, first: Array | int, chosen: Array) -> Array:
  """[b, s, N], of the blocks chosen [b, s] in the rows of videos from `first` on."""
  heads = x.shape[-2]
  if not isinstance(x, Quantized):
    return jnp.ones((*chosen.shape, heads), jnp.float32)
  scale = x.scale.reshape(-1, x.shape[-4], heads)
  return scale[(first + jnp.arange(chosen.shape[0]))[:, None], chosen]


def _float8_unit(q: Array) -> Array:
  """What queries [B, T, N, H] are divided by, [B, N], so that float8 holds them turned or not.

  A power of two, which rounds nothing.
  """
  pairs = q.astype(jnp.float32).reshape(*q.shape[:3], -1, 2)
  highest = jnp.sqrt(jnp.max(jnp.sum(jnp.square(pairs), axis=-1), axis=(1, 3)))
  return jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(highest, SMALLEST_QUERY) / largest(FLOAT8))))


def _rotations(shifts: Array, head_dim: int, columns: int) -> tuple[Array, Array]:
  """Cosines and sines [B, r, columns] that turn queries by the opposite of shifts [B, r]."""
  angles = rope.time_angles(-shifts, head_dim)
  missing = columns // 2 - angles.shape[-1]
  angles = jnp.repeat(jnp.pad(angles, ((0, 0), (0, 0), (0, missing))), 2, axis=-1)
  return jnp.cos(angles), jnp.sin(angles)


def _library(q: Array, segments: tuple[Segment | Blocks, ...], return_lse: bool) -> Any:
  """The same by a library that has a gradient."""
  packed = ready_made(segments, q.dtype)
  if return_lse:
    return reference.attend(q, packed, return_lse=True)
  fits = target_platform() == 'cuda' and cudnn.supports(q, packed)
  return (cudnn if fits else reference).attend(q, packed)


def _forward(q: Array, segments: tuple[Segment | Blocks, ...], *choices) -> tuple[Any, PyTree]:
  return _attend(q, segments, *choices), (q, segments)


def _backward(float8: bool, return_lse: bool, tiles: Any, interpret: Any, saved: PyTree,
              gradient: Any) -> PyTree:
  del float8, tiles, interpret
  return jax.vjp(functools.partial(_library, return_lse=return_lse), *saved)[1](gradient)


_attend.defvjp(_forward, _backward)
