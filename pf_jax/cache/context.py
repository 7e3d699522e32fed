"""Context: the history that every pass of one block attends.

Which blocks of which partition, and where each of them starts: sink | mid | recent, without gaps.
Nothing is copied here. A backend of attention reads the blocks where they lie, or gathers them,
moves their keys in time and lays them side by side, anew in every layer of every pass: one copy of
the layer's rows, and no memory over layers.
"""

import jax.numpy as jnp

from pf_jax.cache import positions, state
from pf_jax.cache.spec import CacheSpec
from pf_jax.kernels.attention import Blocks
from pf_jax.types import Array


def context(layer: state.LayerCache | state.LayerView, selected: Array, blocks: Array,
            layout: positions.Layout, *, spec: CacheSpec) -> tuple[Blocks, ...]:
  """The history of one layer, ready to be attended by the current block.

  Keys are placed relative to the current block, whose own tokens keep the positions they have
  inside it: the model never needs to know where in the video it is.

  Args:
    layer: one layer's slice of the cache, or a view of it.
    selected: [B, K] archived blocks in time order, -1 for none (see `select`).
    blocks: blocks committed so far, int32 scalar.
    layout: where slots start and which count (see `positions.layout`).
    spec: static sizes.

  Returns:
    Sink, mid in time order, recent in time order: `spec.context_tokens` rows in all.
  """
  current = layout.current[:, None]
  mid_start = layout.mid
  if spec.positions == 'absolute':
    mid_start = selected * spec.frames_per_block
  ring = jnp.maximum(selected - spec.sink_blocks, 0) % max(spec.mid_capacity, 1)
  order = (blocks + jnp.arange(spec.recent_blocks)) % spec.recent_blocks
  mid_valid = layout.mid_valid & (selected >= 0)
  return (Blocks(*layer.sink, layout.sink - current, layout.sink_valid, None, layer.number),
          Blocks(*layer.archive, mid_start - current, mid_valid, ring, layer.number),
          Blocks(*layer.recent, layout.recent - current, layout.recent_valid, order[None],
                 layer.number))
