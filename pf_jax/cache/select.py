"""Dynamic context selection: which archived blocks the current block attends.

The paper scores an archived block m by summing q.k / sqrt(H) over sampled queries, over some heads
and over the block's keys, without a softmax. That sum is bilinear, so

  score_m = (sum_i q_i) . (sum_j k_mj) / sqrt(H),

and one key-sum per block makes scoring exact over all queries and heads for the price of one small
product. Selection is per layer and per sample, made in a block's first denoising pass and reused by
all its later passes.

Source: arXiv:2603.25730, section on dynamic context selection.
"""

import jax
import jax.numpy as jnp

from pf_jax.cache import state
from pf_jax.cache.spec import CacheSpec
from pf_jax.kernels import rope
from pf_jax.types import Array


def key_sum(k: Array, spec: CacheSpec) -> Array:
  """Sum of a compressed block's scoring keys: [..., M, N, H] -> [..., N, H] float32."""
  k = k.astype(jnp.float32)
  if spec.score_keys == 'pre_rope':
    positions = rope.compressed_positions(spec.grid, spec.mid_grid, spec.mid_offsets)
    k = rope.rotate(k, rope.rope_table(positions, spec.head_dim).inverse())
  return jnp.sum(k, axis=-3)


def query_sum(q: Array, spec: CacheSpec) -> Array:
  """Sum of a block's scoring queries: [B, T, N, H] -> [B, N, H] float32."""
  q = q.astype(jnp.float32)
  if spec.score_keys == 'pre_rope':
    table = rope.rope_table(rope.block_positions(spec.grid), spec.head_dim)
    q = rope.rotate(q, table.inverse())
  return jnp.sum(q[:, ::spec.score_query_stride], axis=1)


def scores(key_sums: Array, q: Array, blocks: Array, spec: CacheSpec) -> Array:
  """Relevance of every archive slot to the current block.

  Args:
    key_sums: one layer's [B, C, N, H].
    q: this layer's queries [B, T, N, H] of the block's first pass, rotated inside the block.
    blocks: blocks committed so far (the current block's index).
    spec: static sizes and the scoring choices.

  Returns:
    [B, C] float32, -inf where a slot is empty.
  """
  ids = state.archive_ids(blocks, spec)
  sums = key_sums
  if spec.score_keys == 'absolute':
    sums = rope.rotate_time(sums, (ids - blocks) * spec.frames_per_block)
  heads = spec.score_heads or spec.num_heads
  score = jnp.einsum('bnh,bcnh->bc', query_sum(q, spec)[:, :heads], sums[:, :, :heads],
                     precision=jax.lax.Precision.HIGHEST)
  return jnp.where(ids >= 0, score / (heads * spec.head_dim ** 0.5), -jnp.inf)


def select(layer: state.LayerCache | state.LayerView, q: Array, blocks: Array, *, spec: CacheSpec
           ) -> Array:
  """The archived blocks that the current block attends in this layer.

  Args:
    layer: one layer's slice of the cache, or a view of it.
    q: queries [B, T, N, H] of the first pass, rotated inside the block.
    blocks: blocks committed so far, int32 scalar.
    spec: static sizes; `spec.selection` chooses top-k or the newest.

  Returns:
    [B, K] int32 block numbers in time order; fewer than K archived leaves -1 at the end.
  """
  ids = state.archive_ids(blocks, spec)
  if not spec.top_k:
    return jnp.zeros((q.shape[0], 0), jnp.int32)
  if spec.selection == 'fifo':
    score = jnp.broadcast_to(ids.astype(jnp.float32), (q.shape[0], spec.mid_capacity))
  else:
    score = scores(layer.key_sums, q, blocks, spec)
  chosen = ids[jax.lax.top_k(score, spec.top_k)[1]]
  last = jnp.iinfo(jnp.int32).max
  ordered = jnp.sort(jnp.where(chosen >= 0, chosen, last), axis=-1)
  return jnp.where(ordered == last, -1, ordered).astype(jnp.int32)
