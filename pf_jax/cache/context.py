"""Context: the packed history that every pass of one block attends.

Gather the selected blocks, move each slot to its position, lay sink | mid | recent side by side. A
pass does this anew in every layer: it costs one copy of the layer's rows, which a fused attention
kernel needs in any case, and no memory over layers.
"""

import jax.numpy as jnp
import numpy as np

from pf_jax.cache import positions, state
from pf_jax.cache.spec import CacheSpec
from pf_jax.kernels import rope
from pf_jax.kernels.attention import Segment
from pf_jax.types import Array, KeyValues


def _rows(pair: KeyValues, start: Array) -> KeyValues:
  """Blocks [B, n, T, N, H] moved in time by start [B, n] and flattened to [B, n*T, N, H]."""
  batch, blocks, tokens, *heads = pair.k.shape
  k = rope.rotate_time(pair.k, start[:, :, None])
  return KeyValues(*(x.reshape(batch, blocks * tokens, *heads) for x in (k, pair.v)))


def valid_first(valid: Array, lengths: np.ndarray) -> Array:
  """An order of rows that begins with those of valid slots.

  Args:
    valid: [B, n] bool, slots.
    lengths: [n] rows of each slot.

  Returns:
    [B, sum of lengths] int32: the rows of valid slots, ascending, and then arbitrary ones.
  """
  ends = jnp.cumsum(valid * lengths, axis=1)  # of each slot once the invalid ones are taken out
  rows = jnp.arange(lengths.sum())
  slot = jnp.sum(rows[:, None] >= ends[:, None], axis=2)
  taken_out = np.cumsum(lengths) - ends
  order = rows + jnp.take_along_axis(taken_out, slot, axis=1, mode='clip')
  return jnp.minimum(order, lengths.sum() - 1)


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
  parts = [_rows(layer.sink, layout.sink - current), _rows(mid, mid_start - current),
           _rows(recent, layout.recent - current)]
  k, v = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
  assert k.shape[:2] == (batch, spec.context_tokens)
  flags = layout.sink_valid, layout.mid_valid & (selected >= 0), layout.recent_valid
  valid = jnp.concatenate([jnp.broadcast_to(flag, (batch, *flag.shape[1:])) for flag in flags],
                          axis=1)
  lengths = np.repeat([spec.block_tokens, spec.mid_tokens, spec.block_tokens],
                      [spec.sink_blocks, spec.top_k, spec.recent_blocks])
  slots = np.repeat(np.arange(len(lengths)), lengths)
  return Segment(k, v, valid[:, slots], valid_first(valid, lengths))
