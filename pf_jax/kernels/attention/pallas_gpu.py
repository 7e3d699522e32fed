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
from pf_jax.kernels.attention.tiles import ALIGNMENT, COLUMNS, Pool, TileTable, tile_table
from pf_jax.types import Array

ROWS = 64  # of queries that a warpgroup multiplies at once
MASKED = -1e30
SMALLEST = 1e-30  # sum of the weights, of a query without any key; the others' are at least 1
SHARED_BYTES = 227 * 1024 - 1024  # of a program on Hopper; the rest is for barriers
# Registers of a thread that (computes, fetches). A multiprocessor has 65,536, which is 512 for each
# of 128 places in a warpgroup; three warpgroups are launched with 168 each, 504 in all. A warpgroup
# that asks for more than the others leave waits for ever.
REGISTERS = {2: (232, 40), 3: (160, 32)}


@dataclasses.dataclass(frozen=True)
class TileSpec:
  """Sizes that are tuned for a card (`pf_jax.kernels.tuning`).

  By default what needs no more registers than there are; larger tiles spill (BENCHMARKS.md).

  Attributes:
    warpgroups: that compute, 64 queries each. Three of them share out a block of the 1.3B in whole
      rounds over a card's multiprocessors, two do not.
    keys: of a tile.
    stages: tiles of keys, and of values, in the ring.

  Raises:
    ValueError: sizes that the hardware cannot multiply.
  """

  warpgroups: int = 3
  keys: int = 64
  stages: int = 3

  def __post_init__(self):
    if self.warpgroups not in (2, 3):
      raise ValueError(f'warpgroups={self.warpgroups} must be 2 or 3: registers are shared out '
                       'between them.')
    if self.keys % 32 or not 32 <= self.keys <= 256:
      raise ValueError(f'keys={self.keys} must be a multiple of 32 within 32..256.')
    if self.stages < 2:
      raise ValueError(f'stages={self.stages} must be at least 2: one is read while another fills.')

  @property
  def queries(self) -> int:
    """Of a program."""
    return self.warpgroups * ROWS

  def shared_bytes(self, head_dim: int, rotations: int, return_lse: bool = False) -> int:
    """Shared memory of a program for so many attended blocks, without its barriers."""
    half, full = 2, 4
    queries = self.queries * (head_dim + 2 * COLUMNS) * half
    return (queries + 2 * self.stages * self.keys * head_dim * half
            + (2 * rotations * COLUMNS + self.queries * return_lse) * full)


def candidates() -> list[TileSpec]:
  """Tiles worth timing, the default first; not all fit any shape, nor into registers."""
  sizes = itertools.product((3, 2), (32, 64, 96, 128, 192), (2, 3, 4))
  return list(dict.fromkeys([TileSpec(), *(TileSpec(*size) for size in sizes)]))


def attend_pools(q: Array, turned: Array, cos: Array, sin: Array, pools: Sequence[Pool], *,
                 head_dim: int, queries: int, return_lse: bool = False,
                 tiles: TileSpec = TileSpec(), interpret: Any = None
                 ) -> tuple[Array, Array | None]:
  """One softmax over the blocks of all pools.

  Args:
    q: [B, T, N * H], half precision, T a multiple of `ALIGNMENT`.
    turned: [B, T, N * COLUMNS], the first columns of every head turned by a quarter: each pair
      (a, b) as (-b, a).
    cos: [B, r, COLUMNS] float32, for every rotation; 1 where nothing is rotated.
    sin: [B, r, COLUMNS] float32; 0 there.
    pools: their batch may be smaller by a whole factor.
    head_dim: H, a multiple of `COLUMNS`.
    queries: how many of the T are no padding, for the count of operations.
    return_lse: also return the log-sum-exp; a kernel without it does not compute it.
    tiles: sizes.
    interpret: parameters of Pallas' interpreter, on machines without the card.

  Returns:
    [B, T, N * H] in q's dtype; [B, N, T] float32, base e, or None.

  Raises:
    ValueError: more blocks than there is shared memory for.
  """
  needed = tiles.shared_bytes(head_dim, cos.shape[1], return_lse)
  if needed > SHARED_BYTES:
    raise ValueError(f'{cos.shape[1]} attended blocks with {tiles} take {needed} bytes of shared '
                     f'memory, of {SHARED_BYTES}; attend fewer, or use fewer stages.')
  batch, tokens, width = q.shape
  table = tile_table(pools, batch, tiles.keys)
  body = functools.partial(_program, pools=len(pools), head_dim=head_dim, tiles=tiles,
                           return_lse=return_lse, interpreted=interpret is not None)
  out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
  if return_lse:
    out_type.append(jax.ShapeDtypeStruct((batch, width // head_dim, tokens), jnp.float32))
  scratch = _scratch(q.dtype, head_dim, cos.shape[1], tiles, interpret is not None, return_lse)
  out, *lse = mosaic.kernel(
      body, name='attention', out_type=out_type, scratch_types=scratch,
      grid=(batch, width // head_dim, pl.cdiv(tokens, tiles.queries)),
      grid_names=('video', 'head', 'tile'),
      num_threads=tiles.warpgroups + 1, thread_name='warpgroup', interpret=interpret,
      cost=_cost(q, turned, pools, out_type, head_dim, queries))(
          q, turned, cos, sin, *table, *(x for pool in pools for x in (pool.k, pool.v)))
  return out, lse[0] if lse else None


def _cost(q: Array, turned: Array, pools: Sequence[Pool], out_type: Sequence[Any], head_dim: int,
          queries: int) -> pl.CostEstimate:
  """All slots count, empty ones included, as in `pf_jax.train.flops`."""
  batch, _, width = q.shape
  keys = sum(pool.chosen.shape[1] * pool.block_rows for pool in pools)
  attended = sum(2 * pool.chosen.size * pool.block_rows * width * pool.k.dtype.itemsize
                 for pool in pools)
  return pl.CostEstimate(
      flops=4 * batch * queries * keys * width,
      transcendentals=batch * queries * keys * width // head_dim,
      bytes_accessed=attended + sum(x.size * x.dtype.itemsize for x in (q, turned, *out_type)))


class _Scratch(NamedTuple):
  """Shared memory and barriers of a program.

  Attributes:
    q: [w, 64, H], queries as the next product reads them, turned.
    head: [w, 64, COLUMNS], their first columns as they came, to be turned anew for every block.
    turned: [w, 64, COLUMNS].
    k: [stages, keys, H].
    v: [stages, keys, H].
    p: [w, 64, keys], weights; for the interpreter, which multiplies from shared memory only.
    lse: [w, 64] float32, or None.
    cos: [r, COLUMNS] float32.
    sin: [r, COLUMNS] float32.
    table_ready: cosines and sines arrived.
    q_ready: a barrier for each warpgroup.
    k_ready: a barrier for each stage, likewise the rest.
    v_ready: values arrived.
    k_free: all warpgroups have read the keys.
    v_free: all warpgroups have read the values.
  """

  q: Any
  head: Any
  turned: Any
  k: Any
  v: Any
  p: Any
  lse: Any
  cos: Any
  sin: Any
  q_ready: Any
  table_ready: Any
  k_ready: Any
  v_ready: Any
  k_free: Any
  v_free: Any


def _scratch(dtype, head_dim: int, rotations: int, tiles: TileSpec, interpreted: bool,
             return_lse: bool) -> _Scratch:
  # The product with v contracts keys: a tile must hold whole swizzled groups of them.
  def room(*shape: int, swizzle: int = 128):
    columns = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(
        plgpu.TilingTransform((ALIGNMENT, columns)), plgpu.SwizzleTransform(swizzle)))

  groups, stages = tiles.warpgroups, tiles.stages
  return _Scratch(
      q=room(groups, ROWS, head_dim), head=room(groups, ROWS, COLUMNS),
      turned=room(groups, ROWS, COLUMNS), k=room(stages, tiles.keys, head_dim),
      v=room(stages, tiles.keys, head_dim, swizzle=64 if tiles.keys % COLUMNS else 128),
      p=room(groups, ROWS, tiles.keys, swizzle=64) if interpreted else None,
      lse=plgpu.SMEM((groups, ROWS), jnp.float32) if return_lse else None,
      cos=plgpu.SMEM((rotations, COLUMNS), jnp.float32),
      sin=plgpu.SMEM((rotations, COLUMNS), jnp.float32),
      q_ready=plgpu.Barrier(num_arrivals=3, num_barriers=groups),
      table_ready=plgpu.Barrier(num_arrivals=2),
      k_ready=plgpu.Barrier(num_barriers=stages), v_ready=plgpu.Barrier(num_barriers=stages),
      k_free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
      v_free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages))


def _program(q, turned, cos, sin, *refs, pools, head_dim, tiles, return_lse, interpreted):
  """What one program does; arguments are references to global memory, then to shared memory."""
  fields = len(TileTable._fields)
  inputs = fields + 2 * pools
  table, arrays = TileTable(*refs[:fields]), refs[fields:inputs]
  outputs, scratch = refs[inputs:inputs + 1 + return_lse], _Scratch(*refs[inputs + 1 + return_lse:])
  group = lax.axis_index('warpgroup')
  computing, fetching = REGISTERS[tiles.warpgroups]

  @pl.when(group < tiles.warpgroups)
  def _():
    plgpu.set_max_registers(computing, action='increase')
    _compute((q, turned), table, outputs, scratch, head_dim, tiles, interpreted)

  @pl.when(group == tiles.warpgroups)
  def _():
    plgpu.set_max_registers(fetching, action='decrease')
    video = lax.axis_index('video')
    plgpu.copy_gmem_to_smem(cos.at[video], scratch.cos, scratch.table_ready)
    plgpu.copy_gmem_to_smem(sin.at[video], scratch.sin, scratch.table_ready)
    _fetch(list(zip(arrays[::2], arrays[1::2], strict=True)), table, scratch, head_dim, tiles)


def _compute(queries, table, outputs, scratch, head_dim, tiles, interpreted):
  """One warpgroup: its 64 queries against all tiles."""
  (q, turned), (out, *lse) = queries, outputs
  group, video, head = (lax.axis_index(name) for name in ('warpgroup', 'video', 'head'))
  rows = pl.ds((lax.axis_index('tile') * tiles.warpgroups + group) * ROWS, ROWS)
  whole = pl.ds(head * head_dim, head_dim)
  q_s, head_s, turned_s = scratch.q.at[group], scratch.head.at[group], scratch.turned.at[group]
  ready = scratch.q_ready.at[group]
  plgpu.copy_gmem_to_smem(q.at[video, rows, whole], q_s, ready)
  plgpu.copy_gmem_to_smem(q.at[video, rows, pl.ds(head * head_dim, COLUMNS)], head_s, ready)
  plgpu.copy_gmem_to_smem(turned.at[video, rows, pl.ds(head * COLUMNS, COLUMNS)], turned_s, ready)
  plgpu.barrier_wait(ready)
  plgpu.barrier_wait(scratch.table_ready)
  scale = math.log2(math.e) / math.sqrt(head_dim)

  def turn_queries(rotation):
    """From the original: what was rounded once would be rounded again."""
    c, s = (lax.broadcast_in_dim(angles[rotation], (ROWS, COLUMNS), [1])
            for angles in (scratch.cos, scratch.sin))
    moved = head_s[...].astype(jnp.float32) * c + turned_s[...].astype(jnp.float32) * s
    q_s[:, pl.ds(0, COLUMNS)] = moved.astype(q_s.dtype)
    plgpu.commit_smem()

  def attend_tile(number, carry, *, masked):
    """Adds one tile to the running maximum, sum and weighted values."""
    acc, top, total = carry
    stage = lax.rem(number, jnp.int32(tiles.stages))
    turn = table.turn[video, number]
    pl.when(turn >= 0)(lambda: turn_queries(turn))
    plgpu.barrier_wait(scratch.k_ready.at[stage])
    logits = _multiply_keys(q_s, scratch.k.at[stage], tiles.keys)
    plgpu.barrier_arrive(scratch.k_free.at[stage])
    if masked:
      column = _columns(logits.shape, interpreted)
      counts = (column >= table.low[video, number]) & (column < table.high[video, number])
      logits = jnp.where(counts, logits, MASKED)
    highest = jnp.maximum(top, logits.max(axis=1) * scale)
    keep = jnp.exp2(top - highest)
    weights = jnp.exp2(logits * scale - lax.broadcast_in_dim(highest, logits.shape, [0]))
    total = total * keep + weights.sum(axis=1)
    acc = acc * lax.broadcast_in_dim(keep, acc.shape, [0])
    plgpu.barrier_wait(scratch.v_ready.at[stage])
    acc = _add_values(acc, weights.astype(q_s.dtype), scratch.v.at[stage],
                      scratch.p.at[group] if interpreted else None)
    plgpu.barrier_arrive(scratch.v_free.at[stage])
    return acc, highest, total

  carry = (jnp.zeros((ROWS, head_dim), jnp.float32), jnp.full((ROWS,), MASKED, jnp.float32),
           jnp.zeros((ROWS,), jnp.float32))
  plain, count = table.plain[video], table.total[video]
  carry = lax.fori_loop(0, plain, functools.partial(attend_tile, masked=False), carry)
  carry = lax.fori_loop(plain, count, functools.partial(attend_tile, masked=True), carry)
  places = [(q_s, out.at[video, rows, whole])]
  if lse:
    places.append((scratch.lse.at[group], lse[0].at[video, head, rows]))
  _write(carry, *places)


def _write(carry, place, lse_place=None):
  """What the loops leave, by way of shared memory; places are pairs (shared, global)."""
  acc, top, total = carry
  if lse_place is not None:
    total = jnp.maximum(total, SMALLEST)
    lse_place[0][...] = top * math.log(2) + jnp.log(total)
  shared = place[0]
  shared[...] = (acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])).astype(shared.dtype)
  plgpu.commit_smem()
  for pair in (place, lse_place):
    if pair is not None:
      plgpu.copy_smem_to_gmem(*pair)
  plgpu.wait_smem_to_gmem(0)


def _multiply_keys(q, k, keys: int) -> Array:
  """[64, keys] float32."""

  def product(acc):
    plgpu.wgmma(acc, q, k.transpose((1, 0)))
    return acc[...]

  return pl.run_scoped(product, plgpu.ACC((ROWS, keys), jnp.float32))


def _add_values(acc: Array, weights: Array, v, room) -> Array:
  """acc [64, H] plus weights [64, keys] times values; by way of `room` if it is there."""
  if room is None:
    def add(ref):
      plgpu.wgmma(ref, weights, v)

    return pl.run_state(add)(plgpu.ACC.init(acc))
  room[...] = weights
  plgpu.commit_smem()

  def product(ref):
    plgpu.wgmma(ref, room, v)
    return ref[...]

  return acc + pl.run_scoped(product, plgpu.ACC((ROWS, acc.shape[1]), jnp.float32))


def _columns(shape: tuple[int, ...], interpreted: bool) -> Array:
  if interpreted:
    return lax.broadcasted_iota(jnp.int32, shape, 1)
  return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def _fetch(pools, table, scratch, head_dim, tiles):
  """The fetching warpgroup: every tile in turn, as soon as all others are done with its place."""
  video = lax.axis_index('video')
  columns = pl.ds(lax.axis_index('head') * head_dim, head_dim)
  count = table.total[video]
  halves = ((scratch.k, scratch.k_ready, scratch.k_free),
            (scratch.v, scratch.v_ready, scratch.v_free))

  @pl.loop(0, count)
  def _(number):
    stage = lax.rem(number, jnp.int32(tiles.stages))
    rows = pl.ds(pl.multiple_of(table.start[video, number], ALIGNMENT), tiles.keys)
    pool = table.pool[video, number]
    for half, (buffer, ready, free) in enumerate(halves):

      @pl.when(number >= tiles.stages)
      def _(free=free):
        plgpu.barrier_wait(free.at[stage])

      for index, arrays in enumerate(pools):

        @pl.when(pool == index)
        def _(ref=arrays[half], buffer=buffer, ready=ready):
          plgpu.copy_gmem_to_smem(ref.at[table.video[video, number], rows, columns],
                                  buffer.at[stage], ready.at[stage])

  @pl.loop(jnp.maximum(count - tiles.stages, 0), count)
  def _(number):
    """Nobody may leave while others still arrive."""
    stage = lax.rem(number, jnp.int32(tiles.stages))
    plgpu.barrier_wait(scratch.k_free.at[stage])
    plgpu.barrier_wait(scratch.v_free.at[stage])
