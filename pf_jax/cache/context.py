"""Context: the packed history that every pass of one block attends.

The copy is written once per block: gather the selected blocks, move each slot to its position,
lay sink | mid | recent side by side. All passes of the block then read the same contiguous rows.
"""

import jax.numpy as jnp

from pf_jax.cache import positions, state
from pf_jax.cache.spec import CacheSpec
from pf_jax.kernels import rope
from pf_jax.kernels.attention import Segment
from pf_jax.types import Array, KeyValues


def _rows(pair: KeyValues, start: Array, valid: Array) -> Segment:
  """Blocks [B, n, T, N, H] moved in time by start [B, n] and flattened to [B, n*T, N, H]."""
  batch, blocks, tokens, *heads = pair.k.shape
  k = rope.rotate_time(pair.k, start[:, :, None])
  return Segment(k.reshape(batch, blocks * tokens, *heads),
                 pair.v.reshape(batch, blocks * tokens, *heads),
                 jnp.repeat(jnp.broadcast_to(valid, (batch, blocks)), tokens, axis=1))


def context(layer: state.LayerCache, selected: Array, blocks: Array, layout: positions.Layout, *,
            spec: CacheSpec) -> Segment:
  """The history of one layer, ready to be attended by the current block.

  Keys come out relative to the current block, whose own tokens keep the positions they have inside
  it: the model never needs to know where in the video it is.

  Args:
    layer: one layer's slice of the cache.
    selected: [B, K] archived blocks in time order, -1 for none (see `select`).
    blocks: blocks committed so far, int32 scalar.
    layout: where slots start and which count (see `positions.layout`).
    spec: static sizes.

  Returns:
    `Segment` of `spec.context_tokens` rows: sink | mid in time order | recent in time order.
  """
  batch = layer.sink.k.shape[0]
  current = layout.current[:, None]
  mid_start = layout.mid
  if spec.positions == 'absolute':
    mid_start = selected * spec.frames_per_block
  ring = jnp.maximum(selected - spec.sink_blocks, 0) % max(spec.mid_capacity, 1)
  take_ring = ring[:, :, None, None, None]
  mid = KeyValues(*(jnp.take_along_axis(x, take_ring, axis=1) for x in layer.archive))
  order = (blocks + jnp.arange(spec.recent_blocks)) % spec.recent_blocks
  recent = KeyValues(*(jnp.take(x, order, axis=1) for x in layer.recent))
  parts = [_rows(layer.sink, layout.sink - current, layout.sink_valid),
           _rows(mid, mid_start - current, layout.mid_valid & (selected >= 0)),
           _rows(recent, layout.recent - current, layout.recent_valid)]
  k, v, valid = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
  assert k.shape[:2] == (batch, spec.context_tokens)
  return Segment(k, v, valid)
