"""What `pallas_gpu.attend_pools` is to compute, slowly."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pf_jax.kernels.attention.tiles import tile_table


def slow_kernel(q, turned, cos, sin, pools, *, scales, head_dim, queries, float8_keys,
                return_lse, tiles, interpret):
  """Tile by tile in float32; see `attend_pools`."""
  del queries, interpret
  batch, _, width = q.shape
  table = tile_table(pools, batch, tiles.keys)
  out = np.zeros(q.shape, np.float32)
  lse = np.full((batch, width // head_dim, q.shape[1]), -1e30, np.float32)
  columns = cos.shape[-1]
  for video in range(batch):
    for head in range(width // head_dim):
      queries = np.array(q[video, :, head * head_dim:(head + 1) * head_dim], np.float32)
      first = queries[:, :columns].copy()
      quarter = np.array(turned[video, :, head * columns:(head + 1) * columns], np.float32)
      logits, values = [], []
      for i in range(int(table.total[video])):
        pool = pools[int(table.pool[video, i])]
        if (turn := int(table.turn[video, i])) >= 0:
          queries[:, :columns] = first * cos[video, turn] + quarter * sin[video, turn]
          if float8_keys:
            queries = queries.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        begin = int(table.start[video, i])
        rows = slice(begin + int(table.low[video, i]), begin + int(table.high[video, i]))
        k, v = (np.array(x[int(table.video[video, i]), rows,
                           head * head_dim:(head + 1) * head_dim], np.float32)
                * (scale[video, table.slot[video, i], head] if pool.quantized else 1)
                for x, scale in zip((pool.k, pool.v), scales, strict=True))
        logits.append(queries @ k.T)
        values.append(v)
      if not logits:
        continue
      scaled = np.concatenate(logits, axis=1) / head_dim**0.5
      lse[video, head] = jax.nn.logsumexp(scaled, axis=-1)
      weights = np.exp(scaled - lse[video, head, :, None])
      out[video, :, head * head_dim:(head + 1) * head_dim] = weights @ np.concatenate(values)
  return jnp.asarray(out, q.dtype), jnp.asarray(lse) if return_lse else None
