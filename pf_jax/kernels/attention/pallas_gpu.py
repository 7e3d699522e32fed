"""Flash attention over a cache's blocks, read where they lie, for NVIDIA's Hopper cards.

One softmax over several pools of keys/values: sink, archive, recent, the block itself. Any blocks
of a pool are attended, each moved in time by a shift of its own. By relativity

  < q, R(shift) k > = < R(-shift) q, k >

it is the queries that are rotated, anew from the original for every block and in shared memory:
no key is gathered, rotated or copied, and stored keys stay as they were rounded once.

A program computes 64 queries of one head for each of its warpgroups. One more warpgroup fetches
tiles of keys and values by TMA into a ring of buffers; the others multiply and keep a running
maximum and sum in base 2. A table says which tiles (`tiles.tile_table`): first those without a mask
and then the rest, none for what does not count.

Blocks stored in 8 bits are fetched as they are. The fetching warpgroup makes them half precision,
which loses nothing; their scales multiply logits and weights.

With `float8` both products are of 8 bits, at twice the rate. Keys are multiplied as they are
stored; queries are rounded each time they are turned, weights once a tile, on their way through
shared memory. Tensor cores contract 8 bits along neighbouring numbers only, so the attended values
are laid out anew before, channels first (`tiles.transposed`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pf_jax.kernels import mosaic
from pf_jax.kernels.attention.tiles import (
    ALIGNMENT,
    COLUMNS,
    Pool,
    TileTable,
    tile_table,
    transposed,
)
from pf_jax.kernels.mosaic import ROWS
from pf_jax.types import Array

LOWEST = -1e30  # maximum of no logits
FLOAT8_TOP = 8.0  # weights of 8 bits go up to 2 to that; the largest number is 448
WIDENED = 2048  # numbers that a warpgroup makes half precision at once
SMALLEST = 1e-30  # sum of the weights, of a query without any key; the others' are at least 1


@dataclasses.dataclass(frozen=True)
class TileSpec:
  """Sizes that are tuned for a card (`pf_jax.kernels.tuning`).

  By default what needs no more registers than there are; larger tiles spill (BENCHMARKS.md).

  Attributes:
    warpgroups: that compute, 64 queries each. Three of them share out a block of the 1.3B in whole
      rounds over a card's multiprocessors, two do not.
    keys: of a tile.
    stages: tiles of keys, and of values, in the ring.
    stored_stages: of tiles in 8 bits, which wait beside the ring.

  Raises:
    ValueError: sizes that the hardware cannot multiply.
  """

  warpgroups: int = 3
  keys: int = 64
  stages: int = 3
  stored_stages: int = 2

  def __post_init__(self):
    mosaic.check_warpgroups(self.warpgroups)
    if self.keys % 32 or not 32 <= self.keys <= 256:
      raise ValueError(f'keys={self.keys} must be a multiple of 32 within 32..256.')
    for name in ('stages', 'stored_stages'):
      if getattr(self, name) < 2:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 2: one is read while '
                         'another fills.')

  @property
  def queries(self) -> int:
    """Of a program."""
    return self.warpgroups * ROWS

  @property
  def v_swizzle(self) -> int:
    """Bytes; the product with v contracts keys, of which a tile holds whole swizzled groups."""
    return 64 if self.keys % COLUMNS else 128

  def shared_bytes(self, head_dim: int, slots: int, *, quantized: bool = False,
                   float8: bool = False, return_lse: bool = False) -> int:
    """Shared memory of a program for so many attended blocks, without its barriers."""
    half, full = 2, 4
    size, columns = (1, head_dim) if float8 else (half, COLUMNS)
    queries = self.queries * (head_dim * size + 2 * columns * half)
    ring = 2 * self.stages * self.keys * head_dim * size
    beside = (self.queries * self.keys if float8 else
              quantized * 2 * self.stored_stages * self.keys * head_dim)
    return queries + ring + beside + (2 * slots * columns + self.queries * return_lse) * full


def default(quantized: bool = False, float8: bool = False, return_lse: bool = False) -> TileSpec:
  """Tiles that spill nothing at the 1.3B's sizes. What waits in 8 bits takes a stage's place."""
  if float8:
    return TileSpec(warpgroups=2 if return_lse else 3, stages=4)
  return TileSpec(stages=2) if quantized else TileSpec()


def candidates(quantized: bool = False, float8: bool = False) -> list[TileSpec]:
  """Tiles worth timing, the default first; not all fit any shape, nor into registers."""
  sizes = itertools.product((3, 2), (32, 64, 96, 128, 192), (2, 3, 4))
  return list(dict.fromkeys([default(quantized, float8), *(TileSpec(*size) for size in sizes)]))


class Scales(NamedTuple):
  """What is multiplied by for what is stored in 8 bits, float32.

  Attributes:
    k: [B, r, N], of attended blocks.
    v: [B, r, N], 1 at most.
    out: [B, N], what the results are multiplied by.
  """

  k: Array
  v: Array
  out: Array


def attend_pools(q: Array, turned: Array, cos: Array, sin: Array, pools: Sequence[Pool], *,
                 scales: Scales, head_dim: int, queries: int, float8: bool = False,
                 return_lse: bool = False, tiles: TileSpec = TileSpec(), interpret: Any = None
                 ) -> tuple[Array, Array | None]:
  """One softmax over the blocks of all pools.

  Args:
    q: [B, T, N * H], half precision, T a multiple of `ALIGNMENT`.
    turned: [B, T, N * c], the first c columns of every head turned by a quarter: each pair (a, b)
      as (-b, a). c is COLUMNS, with float8 H.
    cos: [B, r, c] float32, for every attended block; 1 where nothing is rotated.
    sin: [B, r, c] float32; 0 there.
    pools: their batch may be smaller by a whole factor.
    scales: read where a pool has 8 bits.
    head_dim: H, a multiple of `COLUMNS`.
    queries: how many of the T are no padding, for the count of operations.
    float8: multiply in float8, in which all pools are; queries fit its numbers however they are
      turned.
    return_lse: also return the log-sum-exp; a kernel without it does not compute it.
    tiles: sizes.
    interpret: parameters of Pallas' interpreter, on machines without the card.

  Returns:
    [B, T, N * H] in q's dtype; [B, N, T] float32, base e, or None.

  Raises:
    ValueError: more blocks than there is shared memory for.
  """
  stored = next((pool.k.dtype for pool in pools if pool.quantized), None)
  kernel = _Kernel(q.dtype, stored, head_dim, tiles, float8, return_lse,
                   interpret is not None)
  needed = tiles.shared_bytes(head_dim, cos.shape[1], quantized=stored is not None,
                              float8=float8, return_lse=return_lse)
  if needed > mosaic.SHARED_BYTES:
    raise ValueError(f'{cos.shape[1]} attended blocks with {tiles} take {needed} bytes of shared '
                     f'memory, of {mosaic.SHARED_BYTES}; attend fewer, or use fewer stages.')
  batch, tokens, width = q.shape
  out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
  if return_lse:
    out_type.append(jax.ShapeDtypeStruct((batch, width // head_dim, tokens), jnp.float32))
  cost = _cost(q, turned, pools, out_type, head_dim, queries)
  if float8:
    pools = [pool._replace(v=transposed(pool, tiles.keys)) for pool in pools]
  out, *lse = mosaic.kernel(
      functools.partial(_program, pools=len(pools), kernel=kernel), name='attention',
      out_type=out_type, scratch_types=_scratch(kernel, cos.shape[1]),
      grid=(batch, width // head_dim, pl.cdiv(tokens, tiles.queries)),
      grid_names=('video', 'head', 'tile'),
      num_threads=tiles.warpgroups + 1, thread_name='warpgroup', interpret=interpret,
      cost=cost)(
          q, turned, cos, sin, *scales, *tile_table(pools, batch, tiles.keys),
          *(x for pool in pools for x in (pool.k, pool.v)))
  return out, lse[0] if lse else None


def _cost(q: Array, turned: Array, pools: Sequence[Pool], out_type: Sequence[Any], head_dim: int,
          queries: int) -> pl.CostEstimate:
  """All slots count, empty ones included, as in `pf_jax.train.flops`."""
  batch, _, width = q.shape
  keys = sum(pool.chosen.shape[1] * pool.block_rows for pool in pools)
  attended = sum(pool.chosen.size * pool.block_rows * width * (
      pool.k.dtype.itemsize + pool.v.dtype.itemsize) for pool in pools)
  return pl.CostEstimate(
      flops=4 * batch * queries * keys * width,
      transcendentals=batch * queries * keys * width // head_dim,
      bytes_accessed=attended + sum(x.size * x.dtype.itemsize for x in (q, turned, *out_type)))


class _Kernel(NamedTuple):
  """What a program is compiled for.

  Attributes:
    dtype: of queries, of the product with values, of the result.
    stored: dtype of the pools in 8 bits, None if there are none.
    head_dim: H.
    tiles: sizes.
    float8: multiply in 8 bits.
    return_lse: also write the log-sum-exp.
    interpreted: by Pallas' interpreter.
  """

  dtype: Any
  stored: Any
  head_dim: int
  tiles: TileSpec
  float8: bool
  return_lse: bool
  interpreted: bool

  @property
  def product(self) -> Any:
    """Dtype of what is multiplied."""
    return self.stored if self.float8 else self.dtype

  @property
  def columns(self) -> int:
    """Of a head, that are turned together."""
    return self.head_dim if self.float8 else COLUMNS


class _Scratch(NamedTuple):
  """Shared memory and barriers of a program.

  Attributes:
    q: [w, 64, H], queries as the next product reads them, turned.
    head: [w, 64, COLUMNS], their first columns as they came, to be turned anew for every block.
    turned: [w, 64, COLUMNS].
    k: [stages, keys, H].
    v: [stages, keys, H]; in 8 bits [stages, H, keys].
    stored_k: [stored_stages, keys, H], keys in 8 bits; None where there are none. Likewise
      stored_v.
    p: [w, 64, keys], weights in 8 bits; others for the interpreter only, which multiplies out of
      shared memory.
    lse: [w, 64] float32, or None.
    cos: [r, COLUMNS] float32.
    sin: [r, COLUMNS] float32.
    table_ready: cosines and sines arrived.
    q_ready: a barrier for each warpgroup.
    k_ready: a barrier for each stage, likewise the rest.
    v_ready: values arrived.
    stored_k_ready: a barrier for each stage in 8 bits; likewise stored_v_ready.
    k_free: all warpgroups have read the keys.
    v_free: all warpgroups have read the values.
  """

  q: Any
  head: Any
  turned: Any
  k: Any
  v: Any
  stored_k: Any
  stored_v: Any
  p: Any
  lse: Any
  cos: Any
  sin: Any
  q_ready: Any
  table_ready: Any
  k_ready: Any
  v_ready: Any
  stored_k_ready: Any
  stored_v_ready: Any
  k_free: Any
  v_free: Any


def _scratch(kernel: _Kernel, slots: int) -> _Scratch:
  def room(*shape: int, dtype=kernel.dtype, swizzle: int = 128):
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(swizzle, shape[-1] * itemsize)
    return plgpu.SMEM(shape, dtype, transforms=(
        plgpu.TilingTransform((ALIGNMENT, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)))

  tiles, head_dim, columns = kernel.tiles, kernel.head_dim, kernel.columns
  groups, stages = tiles.warpgroups, tiles.stages
  stored: Any = None
  stored_ready: Any = None
  if kernel.stored is not None and not kernel.float8:
    stored = plgpu.SMEM((tiles.stored_stages, tiles.keys, head_dim), kernel.stored)
    stored_ready = plgpu.Barrier(num_barriers=tiles.stored_stages)
  if kernel.float8:
    along = math.gcd(tiles.keys, 128)
    values = room(stages, head_dim, tiles.keys, dtype=kernel.stored, swizzle=along)
    weights = room(groups, ROWS, tiles.keys, dtype=kernel.stored, swizzle=along)
  else:
    values = room(stages, tiles.keys, head_dim, swizzle=tiles.v_swizzle)
    weights = room(groups, ROWS, tiles.keys, swizzle=64)
  return _Scratch(
      q=room(groups, ROWS, head_dim, dtype=kernel.product), head=room(groups, ROWS, columns),
      turned=room(groups, ROWS, columns),
      k=room(stages, tiles.keys, head_dim, dtype=kernel.product), v=values,
      stored_k=stored, stored_v=stored,
      p=weights if kernel.float8 or kernel.interpreted else None,
      lse=plgpu.SMEM((groups, ROWS), jnp.float32) if kernel.return_lse else None,
      cos=plgpu.SMEM((slots, columns), jnp.float32),
      sin=plgpu.SMEM((slots, columns), jnp.float32),
      q_ready=plgpu.Barrier(num_arrivals=2 if kernel.float8 else 3, num_barriers=groups),
      table_ready=plgpu.Barrier(num_arrivals=2),
      k_ready=plgpu.Barrier(num_barriers=stages), v_ready=plgpu.Barrier(num_barriers=stages),
      stored_k_ready=stored_ready, stored_v_ready=stored_ready,
      k_free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
      v_free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages))


def _program(q, turned, cos, sin, k_scale, v_scale, out_scale, *refs, pools: int,
             kernel: _Kernel):
  """What one program does; arguments are references to global memory, then to shared memory."""
  fields = len(TileTable._fields)
  inputs, outputs = fields + 2 * pools, 1 + kernel.return_lse
  table, arrays = TileTable(*refs[:fields]), refs[fields:inputs]
  results, scratch = refs[inputs:inputs + outputs], _Scratch(*refs[inputs + outputs:])
  group = lax.axis_index('warpgroup')
  groups = kernel.tiles.warpgroups
  computing, fetching = mosaic.REGISTERS[groups]

  @pl.when(group < groups)
  def _():
    plgpu.set_max_registers(computing, action='increase')
    scales = Scales(k_scale, v_scale, out_scale)
    _Computing(scales, table, scratch, kernel).all_tiles(q, turned, results)

  @pl.when(group == groups)
  def _():
    plgpu.set_max_registers(fetching, action='decrease')
    video = lax.axis_index('video')
    plgpu.copy_gmem_to_smem(cos.at[video], scratch.cos, scratch.table_ready)
    plgpu.copy_gmem_to_smem(sin.at[video], scratch.sin, scratch.table_ready)
    _Fetching(_halves(arrays, scratch, kernel), table, kernel).all_tiles()


class _Computing:
  """A computing warpgroup: its 64 queries against all tiles."""

  def __init__(self, scales: Scales, table: TileTable, scratch: _Scratch, kernel: _Kernel):
    self._scales, self._table, self._scratch, self._kernel = scales, table, scratch, kernel
    self._group, self._video, self._head = (lax.axis_index(name)
                                            for name in ('warpgroup', 'video', 'head'))

  def all_tiles(self, q, turned, results):
    """Attends them in turn and writes what comes out."""
    table, video, head_dim = self._table, self._video, self._kernel.head_dim
    tile = lax.axis_index('tile') * self._kernel.tiles.warpgroups + self._group
    rows = pl.ds(tile * ROWS, ROWS)
    self._fetch_queries(q, turned, rows)
    carry = (jnp.zeros((ROWS, head_dim), jnp.float32), jnp.full((ROWS,), LOWEST, jnp.float32),
             jnp.zeros((ROWS,), jnp.float32))
    plain, count = table.plain[video], table.total[video]
    carry = lax.fori_loop(0, plain, functools.partial(self._attend, masked=False), carry)
    carry = lax.fori_loop(plain, count, functools.partial(self._attend, masked=True), carry)
    self._write(carry, rows, *results)

  def _fetch_queries(self, q, turned, rows):
    scratch, columns = self._scratch, self._kernel.columns
    whole, first, of_turned = (pl.ds(self._head * size, part) for size, part in (
        (self._kernel.head_dim, self._kernel.head_dim), (self._kernel.head_dim, columns),
        (columns, columns)))
    copies = [(q, first, scratch.head), (turned, of_turned, scratch.turned)]
    if not self._kernel.float8:  # there no query is multiplied before it was turned
      copies.append((q, whole, scratch.q))
    ready = scratch.q_ready.at[self._group]
    for array, part, room in copies:
      plgpu.copy_gmem_to_smem(array.at[self._video, rows, part], room.at[self._group], ready)
    plgpu.barrier_wait(ready)
    plgpu.barrier_wait(scratch.table_ready)

  def _attend(self, number, carry, *, masked):
    """Adds one tile to the running maximum, sum and weighted values."""
    acc, top, total = carry
    scratch, tiles = self._scratch, self._kernel.tiles
    stage = lax.rem(number, jnp.int32(tiles.stages))
    turn = self._table.turn[self._video, number]
    pl.when(turn >= 0)(lambda: _turn_queries(scratch, self._group, turn))
    plgpu.barrier_wait(scratch.k_ready.at[stage])
    logits = _multiply_keys(scratch.q.at[self._group], scratch.k.at[stage], tiles.keys)
    plgpu.barrier_arrive(scratch.k_free.at[stage])
    weights, highest = self._weights(logits, top, number, masked)
    keep = jnp.exp2(top - highest)
    total = total * keep + weights.sum(axis=1)
    if self._kernel.stored is not None:
      weights = weights * self._scales.v[self._video, self._table.slot[self._video, number],
                                         self._head]
    acc = acc * lax.broadcast_in_dim(keep, acc.shape, [0])
    plgpu.barrier_wait(scratch.v_ready.at[stage])
    acc = _add_values(acc, weights, scratch.v.at[stage],
                      None if scratch.p is None else scratch.p.at[self._group], self._kernel)
    plgpu.barrier_arrive(scratch.v_free.at[stage])
    return acc, highest, total

  def _weights(self, logits, top, number, masked):
    """[64, keys] relative to a new maximum [64], in base 2."""
    table, video, kernel = self._table, self._video, self._kernel
    if masked:
      column = _columns(logits.shape, kernel.interpreted)
      counts = (column >= table.low[video, number]) & (column < table.high[video, number])
      logits = jnp.where(counts, logits, -jnp.inf)  # whatever scale it is multiplied by
    unit: Any = math.log2(math.e) / math.sqrt(kernel.head_dim)
    if kernel.stored is not None:
      unit = unit * self._scales.k[video, table.slot[video, number], self._head]
    highest = logits.max(axis=1) * unit
    if kernel.float8:
      highest = highest - FLOAT8_TOP
    highest = jnp.maximum(top, highest)
    return jnp.exp2(logits * unit - lax.broadcast_in_dim(highest, logits.shape, [0])), highest

  def _write(self, carry, rows, out, lse=None):
    """What the loops leave, by way of shared memory."""
    acc, top, total = carry
    scratch, kernel, whole = self._scratch, self._kernel, pl.ds(
        self._head * self._kernel.head_dim, self._kernel.head_dim)
    room = (scratch.head if kernel.float8 else scratch.q).at[self._group]
    copies = [(room, out.at[self._video, rows, whole])]
    if lse is not None:
      total = jnp.maximum(total, SMALLEST)
      lse_room = scratch.lse.at[self._group]
      lse_room[...] = top * math.log(2) + jnp.log(total)
      copies.append((lse_room, lse.at[self._video, self._head, rows]))
    scale: Any = 1.0
    if kernel.stored is not None:
      scale = self._scales.out[self._video, self._head]
    share = scale / total
    room[...] = (acc * lax.broadcast_in_dim(share, acc.shape, [0])).astype(room.dtype)
    plgpu.commit_smem()
    for source, target in copies:
      plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)


def _turn_queries(scratch, group, slot):
  """To a block's place, from the original: what was rounded once would be rounded again."""
  columns = scratch.cos.shape[1]
  c, s = (lax.broadcast_in_dim(angles[slot], (ROWS, columns), [1])
          for angles in (scratch.cos, scratch.sin))
  head, turned = (x[...].astype(jnp.float32) for x in (scratch.head.at[group],
                                                       scratch.turned.at[group]))
  scratch.q.at[group][:, pl.ds(0, columns)] = (head * c + turned * s).astype(scratch.q.dtype)
  plgpu.commit_smem()


def _multiply_keys(q, k, keys: int) -> Array:
  """[64, keys] float32."""

  def product(acc):
    plgpu.wgmma(acc, q, k.transpose((1, 0)))
    return acc[...]

  return pl.run_scoped(product, plgpu.ACC((ROWS, keys), jnp.float32))


def _add_values(acc: Array, weights: Array, v, room, kernel: _Kernel) -> Array:
  """acc [64, H] plus weights [64, keys] times values; by way of `room` if it is there."""
  weights = weights.astype(kernel.product)
  values = v.transpose((1, 0)) if kernel.float8 else v
  if room is not None:
    room[...] = weights
    plgpu.commit_smem()

  def add(ref):
    plgpu.wgmma(ref, weights if room is None else room, values)

  if not kernel.interpreted:
    return pl.run_state(add)(plgpu.ACC.init(acc))

  def product(ref):
    add(ref)
    return ref[...]

  return acc + pl.run_scoped(product, plgpu.ACC((ROWS, acc.shape[1]), jnp.float32))


def _columns(shape: tuple[int, ...], interpreted: bool) -> Array:
  if interpreted:
    return lax.broadcasted_iota(jnp.int32, shape, 1)
  return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


class _Half(NamedTuple):
  """Where the fetching warpgroup puts keys, or values.

  Attributes:
    room: the ring.
    ready: a barrier for each stage of it.
    free: likewise.
    stored_room: for tiles in 8 bits, beside the ring.
    stored_ready: a barrier for each stage of it.
    swizzle: of the ring, bytes.
    transposed: whether channels come first, tile after tile.
    whole: references to arrays by pool, of those that go straight into the ring.
    stored: of those that are made half precision on the way.
  """

  room: Any
  ready: Any
  free: Any
  stored_room: Any
  stored_ready: Any
  swizzle: int
  transposed: bool
  whole: dict[int, Any]
  stored: dict[int, Any]


def _halves(arrays, scratch, kernel: _Kernel) -> tuple[_Half, _Half]:
  """Of keys and of values; `arrays` are k and v of every pool in turn."""
  keys, values = dict(enumerate(arrays[::2])), dict(enumerate(arrays[1::2]))

  def sorted_out(pools: dict[int, Any], dtype) -> list[dict[int, Any]]:
    return [{index: pool for index, pool in pools.items() if (pool.dtype == dtype) == fits}
            for fits in (True, False)]

  return (_Half(scratch.k, scratch.k_ready, scratch.k_free, scratch.stored_k,
                scratch.stored_k_ready, 128, False, *sorted_out(keys, kernel.product)),
          _Half(scratch.v, scratch.v_ready, scratch.v_free, scratch.stored_v,
                scratch.stored_v_ready, kernel.tiles.v_swizzle, kernel.float8,
                *sorted_out(values, kernel.product)))


class _Fetching:
  """The fetching warpgroup: every tile in turn, as soon as all others are done with its place."""

  def __init__(self, halves: tuple[_Half, _Half], table, kernel: _Kernel):
    self._halves, self._table, self._kernel = halves, table, kernel
    self._video = lax.axis_index('video')

  def all_tiles(self):
    """Fetches them."""
    count, tiles = self._table.total[self._video], self._kernel.tiles
    if any(half.stored for half in self._halves):
      pl.loop(0, jnp.minimum(count, tiles.stored_stages))(self._start_stored)

    @pl.loop(0, count)
    def _(number):
      for half in self._halves:
        self._place(number, half)
      if any(half.stored for half in self._halves):
        ahead = number + tiles.stored_stages
        pl.when(ahead < count)(lambda: self._start_stored(ahead))

    @pl.loop(jnp.maximum(count - tiles.stages, 0), count)
    def _(number):
      """Nobody may leave while others still arrive."""
      for half in self._halves:
        plgpu.barrier_wait(half.free.at[lax.rem(number, jnp.int32(tiles.stages))])

  def _start(self, number, half: _Half, pools: dict[int, Any], room, ready):
    """Starts to fetch half a tile, if it is of one of these pools."""
    table, video, keys = self._table, self._video, self._kernel.tiles.keys
    columns = pl.ds(lax.axis_index('head') * self._kernel.head_dim, self._kernel.head_dim)
    if half.transposed:
      rows = pl.ds(pl.multiple_of(table.place[video, number] * keys, keys), keys)
      where = table.own[video, number], columns, rows
    else:
      rows = pl.ds(pl.multiple_of(table.start[video, number], ALIGNMENT), keys)
      where = table.video[video, number], rows, columns
    for index, ref in pools.items():

      @pl.when(table.pool[video, number] == index)
      def _(ref=ref):
        plgpu.copy_gmem_to_smem(ref.at[where], room, ready)

  def _start_stored(self, number):
    """The same for what waits in 8 bits."""
    place = lax.rem(number, jnp.int32(self._kernel.tiles.stored_stages))
    for half in self._halves:
      if half.stored:
        self._start(number, half, half.stored, half.stored_room.at[place],
                    half.stored_ready.at[place])

  def _place(self, number, half: _Half):
    """Half a tile into the ring."""
    tiles = self._kernel.tiles
    stage, place = (lax.rem(number, jnp.int32(size)) for size in (tiles.stages,
                                                                  tiles.stored_stages))

    @pl.when(number >= tiles.stages)
    def _():
      plgpu.barrier_wait(half.free.at[stage])

    self._start(number, half, half.whole, half.room.at[stage], half.ready.at[stage])
    if not half.stored:
      return
    stored = [self._table.pool[self._video, number] == index for index in half.stored]

    @pl.when(functools.reduce(jnp.logical_or, stored))
    def _():
      plgpu.barrier_wait(half.stored_ready.at[place])
      _widen(half.stored_room.at[place], half.room.at[stage],
             None if self._kernel.interpreted else half.swizzle)
      plgpu.barrier_arrive(half.ready.at[stage])


def _widen(stored, room, swizzle: int | None):
  """Copies a tile in 8 bits to one of half precision, some rows at a time for want of registers."""
  keys, width = stored.shape
  rows = WIDENED // width

  @pl.loop(0, keys // rows)
  def _(part):
    some = pl.ds(pl.multiple_of(part * rows, rows), rows)
    values = stored[some]
    if swizzle is not None:  # as a thread writes them without conflicts
      values = plgpu.layout_cast(
          values, plgpu.Layout.SMEM_GMEM_COPY((rows, width), room.dtype, swizzle))
    if (stored.dtype, room.dtype) != (jnp.int8, jnp.bfloat16):  # the one pair with a short way
      values = values.astype(jnp.float32)
    room[some] = values.astype(room.dtype)

  plgpu.commit_smem()
