"""Temporal positions of the history: re-alignment ("packed") and its absence ("absolute").

Packed positions leave no gap however far apart the attended blocks were generated:

  sink 0 .. | selected mid blocks in time order | recent | current

Every slot spans `frames_per_block` latent frames (mid slots `mid_position_stride`). RoPE is
relative, so only differences to the current block matter, and the largest packed position is
`CacheSpec.largest_position` at any length of video: nothing overflows.

Source: arXiv:2603.25730, section on temporal RoPE adjustment. The paper rotates cached keys in
place at each eviction, which drifts in bfloat16; here stored keys stay as they are and a slot's
position is applied when the slot is read.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pf_jax.cache import state
from pf_jax.cache.spec import CacheSpec
from pf_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
  """Where every slot of the context starts, in latent frames, and whether it counts.

  Batch axes of size 1 broadcast.

  Attributes:
    sink: [B, S] int32.
    mid: [B, K] int32, the slots that the selected blocks fill in time order.
    recent: [B, R] int32, in time order.
    current: [B] int32, where the current block starts.
    sink_valid: [B, S] bool.
    mid_valid: [B, K] bool.
    recent_valid: [B, R] bool.
  """

  sink: Array
  mid: Array
  recent: Array
  current: Array
  sink_valid: Array
  mid_valid: Array
  recent_valid: Array


def layout(blocks: Array, spec: CacheSpec, *, mid_slots: Array | None = None,
           num_mid_slots: Array | None = None, num_recent: int | None = None) -> Layout:
  """Positions of the context of block number `blocks`.

  Args:
    blocks: blocks committed so far, an int32 scalar (the current block's index).
    spec: static sizes; `spec.positions` chooses packed or absolute positions.
    mid_slots: [B, K] slots, ascending, that the selected blocks take; default 0, 1, 2, ….
      Training scatters the few blocks of a short clip over all slots that sampling will use.
    num_mid_slots: [B] slots that lie between sink and recent; default: one per selected block.
    num_recent: only the first so many recent slots count, in time order; the block after them is
      then the current one. A prompt switch recomputes the recent blocks one by one this way.

  Returns:
    A `Layout` with batch 1, or B where `mid_slots` is given.
  """
  frames = spec.frames_per_block
  sink_ids, recent_ids = state.sink_ids(blocks, spec)[None], state.recent_ids(blocks, spec)[None]
  selected = jnp.minimum(state.archived_blocks(blocks, spec), spec.top_k)
  slots = jnp.arange(spec.top_k)[None] if mid_slots is None else mid_slots
  between = selected[None] if num_mid_slots is None else num_mid_slots
  in_view = jnp.arange(spec.recent_blocks) < (spec.recent_blocks if num_recent is None
                                              else num_recent)
  valid = dict(sink_valid=sink_ids >= 0, mid_valid=jnp.arange(spec.top_k)[None] < selected,
               recent_valid=(recent_ids >= 0) & in_view)
  if spec.positions == 'absolute':
    # Mid positions depend on what is selected: `context` takes them from the block numbers.
    current = blocks - (0 if num_recent is None else spec.recent_blocks - num_recent)
    return Layout(sink=sink_ids * frames, mid=jnp.zeros_like(slots), recent=recent_ids * frames,
                  current=current[None] * frames, **valid)
  sinks = jnp.sum(valid['sink_valid'], axis=1)
  missing = spec.recent_blocks - jnp.sum(recent_ids >= 0, axis=1)
  recents = jnp.sum(valid['recent_valid'], axis=1)
  mid_start = sinks * frames
  recent_start = mid_start + between * spec.mid_stride
  # Missing recent blocks are the oldest ones: the slots before them hold nothing.
  recent_order = jnp.arange(spec.recent_blocks)[None] - missing[:, None]
  return Layout(sink=jnp.arange(spec.sink_blocks)[None] * frames,
                mid=mid_start[:, None] + slots * spec.mid_stride,
                recent=recent_start[:, None] + recent_order * frames,
                current=recent_start + recents * frames, **valid)
