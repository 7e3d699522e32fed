"""Fused kernels on several cards: each computes its own videos.

XLA may split any axis of an operand, and with weights split over cards it does: queries along
tokens or heads. cuDNN's call then fails to compile. Here every card is handed whole rows of the
batch, by the mesh that the program is traced under (`jax.set_mesh`); without one nothing changes.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from pf_jax.types import Array


def over_batch(attend: Callable[[Array, Sequence], Array], q: Array, segments: Sequence) -> Array:
  """Calls `attend(q, segments)` with the batch split over the mesh; all of it if it cannot be.

  Args:
    attend: an implementation of attention, or of anything else with a batch.
    q: [B, ...].
    segments: pytrees of arrays [b, ...] where b is 1 or divides B.
  """
  mesh = jax.sharding.get_abstract_mesh()
  sizes = {name: size for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes,
                                                  mesh.axis_types, strict=True)
           if kind == AxisType.Auto}
  cards, batch = math.prod(sizes.values()), q.shape[0]
  if cards == 1:
    return attend(q, segments)
  names = PartitionSpec(tuple(sizes))
  if batch % cards:
    specs = jax.tree.map(lambda x: PartitionSpec(), (q, list(segments)))
  else:
    segments = jax.tree.map(lambda x: _for_each_card(x, batch, cards), list(segments))
    specs = jax.tree.map(lambda x: PartitionSpec() if x.shape[0] == 1 else names, (q, segments))
  # Nothing is exchanged, so there is nothing for shard_map to check; cuDNN's call has no rule.
  return jax.shard_map(attend, in_specs=specs, out_specs=specs[0], axis_names=set(sizes),
                       check_vma=False)(q, list(segments))


def _for_each_card(x: Array, batch: int, cards: int) -> Array:
  """An array of a segment, its rows repeated for their queries if cards cannot share them out.

  One row is for all videos, on every card.
  """
  rows = x.shape[0]
  return x if rows == 1 or rows % cards == 0 else jnp.repeat(x, batch // rows, axis=0)
