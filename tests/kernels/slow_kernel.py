"""What `pallas_gpu.attend_pools` is to compute, slowly."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pf_jax.kernels.attention.pallas_gpu import FLOAT8_TOP
from pf_jax.kernels.attention.tiles import tile_table


def slow_kernel(q, turned, cos, sin, pools, *, scales, head_dim, queries, float8, return_lse, tiles,
                interpret):
  """Tile by tile in float32; see `attend_pools`."""
  del queries, interpret
  table = tile_table(pools, q.shape[0], tiles.keys)
  out = np.zeros(q.shape, np.float32)
  lse = np.full((q.shape[0], q.shape[2] // head_dim, q.shape[1]), -1e30, np.float32)
  for video, head in np.ndindex(*lse.shape[:2]):
    columns = slice(head * head_dim, (head + 1) * head_dim)
    tiles_of_head = list(_tiles(q, turned, cos, sin, pools, table, video, head, head_dim, float8))
    if tiles_of_head:
      out[video, :, columns], lse[video, head] = _attend(
          tiles_of_head, np.asarray(scales.k[video, :, head]) / head_dim**0.5,
          np.asarray(scales.v[video, :, head]), float8)
    if float8:
      out[video, :, columns] *= scales.out[video, head]
  return jnp.asarray(out, q.dtype), jnp.asarray(lse) if return_lse else None


def _rounded(x):
  return x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _tiles(q, turned, cos, sin, pools, table, video, head, head_dim, float8):
  """(slot, products of queries and keys, values) of each, without scales."""
  turned_columns = cos.shape[-1]
  columns = slice(head * head_dim, (head + 1) * head_dim)
  queries = np.array(q[video, :, columns], np.float32)
  first = queries[:, :turned_columns].copy()
  quarter = np.array(turned[video, :, head * turned_columns:(head + 1) * turned_columns],
                     np.float32)
  for i in range(int(table.total[video])):
    pool = pools[int(table.pool[video, i])]
    if (turn := int(table.turn[video, i])) >= 0:
      queries[:, :turned_columns] = first * cos[video, turn] + quarter * sin[video, turn]
      queries = _rounded(queries) if float8 else queries
    begin = int(table.start[video, i])
    rows = slice(begin + int(table.low[video, i]), begin + int(table.high[video, i]))
    k, v = (np.array(x[int(table.video[video, i]), rows, columns], np.float32)
            for x in (pool.k, pool.v))
    yield int(table.slot[video, i]), queries @ k.T, v


def _attend(tiles, k_scale, v_scale, float8):
  """Weighted values and log-sum-exp; weights are rounded as they are before the last maximum."""
  top, total, acc = -1e30, 0.0, 0.0
  for slot, products, v in tiles:
    logits = products * k_scale[slot]
    shift = FLOAT8_TOP * np.log(2) if float8 else 0
    highest = np.maximum(top, logits.max(axis=1) - shift)
    keep = np.exp(top - highest)
    weights = np.exp(logits - highest[:, None])
    total = total * keep + weights.sum(axis=1)
    weights = weights * v_scale[slot]
    acc = acc * keep[:, None] + (_rounded(weights) if float8 else weights) @ v
    top = highest
  return acc / total[:, None], top + np.log(total)
