"""The tile table: which rows of which pool a kernel reads, in which order.

Attention does not care about the order of keys, so the table puts tiles whose rows all count first
and those that need a mask last, and leaves out what does not count: an empty partition has no tile.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.types import Array

ALIGNMENT = 8  # rows; TMA copies of swizzled tiles begin at multiples of them
COLUMNS = 64  # of two-byte numbers in a swizzled row of 128 bytes; heads are whole ones


class Pool(NamedTuple):
  """Blocks that are attended, out of one array that holds many.

  Attributes:
    k: [r, n * T, N * H], r rows of videos, perhaps of several layers; half precision or 8 bits.
    v: [r, n * T, N * H], likewise; or `transposed`.
    block_rows: T.
    chosen: [b, s] int32, the attended blocks of 0 .. n-1.
    valid: [b, s] bool, which of them count.
    slot: [b, s] int32, the attended blocks of all pools, numbered: rows of tables.
    first: int32 [], the first of the b rows of k and v that are attended.
  """

  k: Array
  v: Array
  block_rows: int
  chosen: Array
  valid: Array
  slot: Array
  first: Array | int = 0

  @property
  def quantized(self) -> bool:
    """Whether keys and values are stored in 8 bits."""
    return self.k.dtype.itemsize == 1


class TileTable(NamedTuple):
  """Tiles in the order in which they are attended; what follows them is arbitrary.

  Attributes:
    pool: [B, n] int32.
    video: [B, n] int32, row of the pool's keys.
    own: [B, n] int32, the same counted from the first that is attended.
    place: [B, n] int32, number of the tile in its row, over all attended blocks.
    start: [B, n] int32, first row of it, a multiple of `ALIGNMENT`.
    low: [B, n] int32, first row of the tile that counts.
    high: [B, n] int32, the end of those.
    slot: [B, n] int32, the attended block that the tile is of.
    turn: [B, n] int32, that slot if it is another one than the last tile's, else -1.
    plain: [B] int32, how many tiles need no mask.
    total: [B] int32, how many tiles there are.
  """

  pool: Array
  video: Array
  own: Array
  place: Array
  start: Array
  low: Array
  high: Array
  slot: Array
  turn: Array
  plain: Array
  total: Array


class _Cut(NamedTuple):
  """Tiles of one pool's blocks [b, s, t], and whether each needs a mask."""

  video: Array
  own: Array
  place: Array
  start: Array
  low: Array
  high: Array
  slot: Array
  valid: Array
  masked: Array


def _starts(pool: Pool, keys: int) -> Array:
  """First row of each tile of each attended block, [b, s, t]."""
  rows, first = pool.block_rows, pool.chosen[..., None] * pool.block_rows
  # A block that begins anywhere is read from up to seven rows earlier on.
  spare = 0 if rows % ALIGNMENT == 0 else ALIGNMENT - 1
  return first // ALIGNMENT * ALIGNMENT + np.arange(-(-(rows + spare) // keys)) * keys


def _cut(pool: Pool, keys: int) -> _Cut:
  rows, start = pool.block_rows, _starts(pool, keys)
  videos, blocks, count = start.shape
  first = pool.chosen[..., None] * rows
  low, high = jnp.maximum(first - start, 0), jnp.minimum(first + rows - start, keys)
  valid = pool.valid[..., None] & (high > low)
  own = np.arange(videos)[:, None, None]
  place = np.arange(blocks * count).reshape(1, blocks, count)
  masked = (np.arange(count) >= rows // keys) | (rows % ALIGNMENT != 0)
  return _Cut(*(jnp.broadcast_to(x, start.shape) for x in (
      pool.first + own, own, place, start, low, high, pool.slot[..., None], valid, masked)))


def transposed(pool: Pool, keys: int) -> Array:
  """The values of a pool's attended blocks, channels first, as its tiles follow one another.

  Tensor cores contract numbers of 8 bits that lie side by side only.

  Args:
    pool: its v is [r, n * T, N * H].
    keys: rows of a tile.

  Returns:
    [b, N * H, tiles * keys]; what a tile has besides its block's rows is arbitrary.
  """
  start = _starts(pool, keys)
  rows = (start[..., None] + np.arange(keys)).reshape(start.shape[0], -1)
  videos = jax.lax.dynamic_slice_in_dim(pool.v, pool.first, start.shape[0])
  return jnp.swapaxes(jnp.take_along_axis(videos, rows[..., None], axis=1, mode='clip'), 1, 2)


def tile_table(pools: Sequence[Pool], batch: int, keys: int) -> TileTable:
  """Cuts the blocks of all pools into tiles.

  Args:
    pools: their batch may be smaller than `batch` by a whole factor.
    batch: videos.
    keys: rows of a tile.
  """
  def flat(x: Array) -> Array:
    return jnp.repeat(x.reshape(x.shape[0], -1), batch // x.shape[0], axis=0)

  cuts = [[flat(x) for x in _cut(pool, keys)] for pool in pools]
  pool = np.repeat(np.arange(len(pools)), [cut[0].shape[1] for cut in cuts])
  *columns, valid, masked = (jnp.concatenate(parts, axis=1) for parts in zip(*cuts, strict=True))
  order = jnp.argsort(jnp.where(valid, masked.astype(jnp.int32), 2), axis=1, stable=True)
  ordered = {name: jnp.take_along_axis(x, order, axis=1).astype(jnp.int32)
             for name, x in zip(_Cut._fields, columns, strict=False)}
  slot = ordered['slot']
  before = jnp.pad(slot[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  return TileTable(pool=jnp.asarray(pool, jnp.int32)[order], **ordered,
                   turn=jnp.where(slot == before, -1, slot),
                   plain=jnp.sum(valid & ~masked, axis=1, dtype=jnp.int32),
                   total=jnp.sum(valid, axis=1, dtype=jnp.int32))
