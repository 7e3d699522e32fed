"""The tile table: which rows of which pool a kernel reads, in which order.

Attention does not care about the order of keys, so the table puts tiles whose rows all count first
and those that need a mask last, and leaves out what does not count: an empty partition has no tile.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pf_jax.types import Array

ALIGNMENT = 8  # rows; TMA copies of swizzled tiles begin at multiples of them
COLUMNS = 64  # of two-byte numbers in a swizzled row of 128 bytes; heads are whole ones


class Pool(NamedTuple):
  """Blocks that are attended, out of one array that holds many.

  Attributes:
    k: [r, n * T, N * H], r rows of videos, perhaps of several layers; half precision or 8 bits.
    v: [r, n * T, N * H], likewise.
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
    video: [B, n] int32, row of the pool.
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
  start: Array
  low: Array
  high: Array
  valid: Array
  slot: Array
  masked: np.ndarray  # [t]


def _cut(pool: Pool, keys: int) -> _Cut:
  rows = pool.block_rows
  aligned = rows % ALIGNMENT == 0
  # A block that begins anywhere is read from up to seven rows earlier on.
  count = -(-(rows if aligned else rows + ALIGNMENT - 1) // keys)
  numbers = np.arange(count)
  first = pool.chosen[..., None] * rows
  begin = first if aligned else first // ALIGNMENT * ALIGNMENT
  start = begin + numbers * keys
  low, high = jnp.maximum(first - start, 0), jnp.minimum(first + rows - start, keys)
  valid = pool.valid[..., None] & (high > low)
  video = pool.first + jnp.arange(start.shape[0])[:, None, None]
  slot, masked = pool.slot[..., None], (numbers >= rows // keys) | (not aligned)
  video, slot = (jnp.broadcast_to(x, start.shape) for x in (video, slot))
  return _Cut(video, start, low, high, valid, slot, masked)


def tile_table(pools: Sequence[Pool], batch: int, keys: int) -> TileTable:
  """Cuts the blocks of all pools into tiles.

  Args:
    pools: their batch may be smaller than `batch` by a whole factor.
    batch: videos.
    keys: rows of a tile.
  """
  def flat(x: Array) -> Array:
    return jnp.repeat(x.reshape(x.shape[0], -1), batch // x.shape[0], axis=0)

  cuts = [_cut(pool, keys) for pool in pools]
  fields = [[flat(x) for x in (cut.video, cut.start, cut.low, cut.high, cut.valid, cut.slot,
                               jnp.broadcast_to(cut.masked, cut.start.shape))] for cut in cuts]
  pool = np.repeat(np.arange(len(pools)), [field[0].shape[1] for field in fields])
  video, start, low, high, valid, slot, masked = (
      jnp.concatenate(parts, axis=1) for parts in zip(*fields, strict=True))
  order = jnp.argsort(jnp.where(valid, masked.astype(jnp.int32), 2), axis=1, stable=True)
  video, start, low, high, slot = (jnp.take_along_axis(x, order, axis=1)
                                   for x in (video, start, low, high, slot))
  before = jnp.pad(slot[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  return TileTable(jnp.asarray(pool, jnp.int32)[order], video.astype(jnp.int32), start, low, high,
                   slot, jnp.where(slot == before, -1, slot),
                   jnp.sum(valid & ~masked, axis=1, dtype=jnp.int32),
                   jnp.sum(valid, axis=1, dtype=jnp.int32))
