"""Commit: the only way a cache changes. Denoising steps read it and never write it."""

import dataclasses

import jax
import jax.numpy as jnp

from pf_jax.cache import state
from pf_jax.cache.select import key_sum
from pf_jax.cache.spec import CacheSpec
from pf_jax.kernels.quantization import dequantize, quantize
from pf_jax.types import Array, KeyValues, check_shape


def _put(buffer: Array, value: Array, slot: Array, keep: Array) -> Array:
  """Writes value into buffer[:, :, slot], or leaves that slot alone where `keep` is true."""
  if not buffer.shape[2]:
    return buffer
  slot = jnp.where(keep, 0, slot)
  old = jax.lax.dynamic_index_in_dim(buffer, slot, axis=2, keepdims=False)
  new = jnp.where(keep, old, value.astype(buffer.dtype))
  return jax.lax.dynamic_update_index_in_dim(buffer, new, slot, axis=2)


def _put_pair(buffers: KeyValues, values: KeyValues, slot: Array, keep: Array) -> KeyValues:
  return jax.tree.map(lambda buffer, value: _put(buffer, value, slot, keep), buffers, values)


def _stored(values: KeyValues, spec: CacheSpec) -> KeyValues:
  """Keys and values the way the cache keeps them."""
  if not spec.quantized:
    return values
  return jax.tree.map(lambda x: quantize(x, spec.storage), values)


def _age(layers: state.LayerCache, block: Array, spec: CacheSpec) -> state.LayerCache:
  """Moves the block that falls out of recent as `block` enters into the archive."""
  aged = block - spec.recent_blocks
  too_young = aged < spec.sink_blocks
  ring = jnp.maximum(aged - spec.sink_blocks, 0) % max(spec.mid_capacity, 1)
  waiting = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(
      x, jnp.maximum(aged, 0) % spec.recent_blocks, axis=2, keepdims=False), layers.pending)
  sums = key_sum(dequantize(waiting.k, jnp.float32), spec)
  return state.LayerCache(
      sink=layers.sink,
      archive=_put_pair(layers.archive, waiting, ring, too_young),
      key_sums=_put(layers.key_sums, sums, ring, too_young),
      pending=layers.pending,
      recent=layers.recent)


def commit(cache: state.PackCache, block: KeyValues, compressed: KeyValues, *,
           spec: CacheSpec) -> state.PackCache:
  """Appends one clean block; ages the oldest recent block into the archive, evicting if full.

  Shapes never change, so this may sit inside `jax.lax.scan`; with a donated cache every write is in
  place.

  Args:
    cache: the history before this block.
    block: clean full-resolution keys/values [L, B, T, N, H] of the clean pass.
    compressed: keys/values [L, B, M, N, H] of the block's compressed version, from the same pass.
      A sink block's are dropped.
    spec: the sizes `cache` was made with.

  Returns:
    A new cache with `blocks` one higher; `cache` is untouched.

  Raises:
    ValueError: not one whole block (at trace time).

  Source: arXiv:2603.25730, sections on the cache and dual-resolution shifting.
  """
  known = dict(l=spec.num_layers, n=spec.num_heads, h=spec.head_dim)
  check_shape('block keys', block.k, 'l b t n h', t=spec.block_tokens, **known)
  check_shape('compressed keys', compressed.k, 'l b m n h', m=spec.mid_tokens, **known)
  index = cache.blocks
  in_sink = index < spec.sink_blocks
  block, compressed = _stored(block, spec), _stored(compressed, spec)
  layers = _age(cache.layers, index, spec)
  slot = index % spec.recent_blocks
  layers = state.LayerCache(
      sink=_put_pair(layers.sink, block, jnp.minimum(index, spec.sink_blocks), ~in_sink),
      archive=layers.archive,
      key_sums=layers.key_sums,
      pending=_put_pair(layers.pending, compressed, slot, in_sink),
      recent=_put_pair(layers.recent, block, slot, in_sink))
  return state.PackCache(layers=layers, blocks=index + 1)


def replace_recent(cache: state.PackCache, order: int, block: KeyValues, compressed: KeyValues, *,
                   spec: CacheSpec) -> state.PackCache:
  """Overwrites the keys/values of one recent block, e.g. recomputed under a new prompt.

  Args:
    cache: the history.
    order: which recent block, in time order (0 is the oldest slot). One that holds no block, as at
      the start of a video, stays empty.
    block: full-resolution keys/values [L, B, T, N, H].
    compressed: keys/values [L, B, M, N, H] of its compressed version.
    spec: static sizes.

  Returns:
    A new cache with the same blocks in the same places.
  """
  index = cache.blocks - spec.recent_blocks + order
  slot, keep = index % spec.recent_blocks, index < spec.sink_blocks
  block, compressed = _stored(block, spec), _stored(compressed, spec)
  layers = dataclasses.replace(
      cache.layers,
      pending=_put_pair(cache.layers.pending, compressed, slot, keep),
      recent=_put_pair(cache.layers.recent, block, slot, keep))
  return state.PackCache(layers=layers, blocks=cache.blocks)
