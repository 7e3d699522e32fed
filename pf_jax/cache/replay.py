"""A cache at several moments without several caches: its newest blocks are kept beside it.

Training goes through a few blocks once more and must know what each of them saw. Full-resolution
keys/values are constants then, and the large part of a cache; only what is compressed has a
gradient and is carried from block to block.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pf_jax.cache import state
from pf_jax.cache.spec import CacheSpec
from pf_jax.types import Array, KeyValues


def newest_block(cache: state.PackCache, spec: CacheSpec) -> KeyValues:
  """Full-resolution keys/values [L, B, T, N, H] of the block that was committed last."""
  number = cache.blocks - 1

  def pick(sink: Array, recent: Array) -> Array:
    newest = jax.lax.dynamic_index_in_dim(recent, number % spec.recent_blocks, 2, keepdims=False)
    if not spec.sink_blocks:
      return newest
    slot = jnp.minimum(number, spec.sink_blocks - 1)
    return jnp.where(number < spec.sink_blocks,
                     jax.lax.dynamic_index_in_dim(sink, slot, 2, keepdims=False), newest)

  return jax.tree.map(pick, cache.layers.sink, cache.layers.recent)


def with_later_blocks(layer: state.LayerCache, kept: KeyValues, first: Array, blocks: Array,
                      spec: CacheSpec) -> state.LayerCache:
  """One layer's cache some blocks later, as far as full resolution goes.

  Args:
    layer: slice of a cache whose sink and recent are those before block `first`.
    kept: [B, n, T, N, H], full-resolution keys/values of the blocks from `first` on.
    first: int32 [].
    blocks: committed so far, from `first` to `first` + n.
    spec: static sizes.

  Returns:
    The slice with sink and recent as they are when `blocks` are committed.
  """

  def overlay(held: KeyValues, ids: Array) -> KeyValues:
    index = ids - first
    later = (index >= 0)[None, :, None, None, None]
    return jax.tree.map(
        lambda old, new: jnp.where(later, jnp.take(new, jnp.maximum(index, 0), axis=1), old),
        held, kept)

  slots = jnp.arange(spec.recent_blocks)
  recent = state.recent_ids(blocks, spec)[(slots - blocks) % spec.recent_blocks]
  return dataclasses.replace(layer, sink=overlay(layer.sink, state.sink_ids(blocks, spec)),
                             recent=overlay(layer.recent, recent))
