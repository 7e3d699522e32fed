"""Fused kernels on several cards: each computes its own videos.

XLA may split any axis of an operand, and with weights split over cards it does: queries along
tokens or heads. cuDNN's call then fails to compile. Here every card is handed whole rows of the
batch, by the mesh that the program is traced under (`jax.set_mesh`); without one nothing changes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from pf_jax.types import Array


def cards() -> int:
  """Of the mesh, that share the batch out."""
  return math.prod(_axes().values())


def _axes() -> dict[str, int]:
  mesh = jax.sharding.get_abstract_mesh()
  return {name: size for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types,
                                                 strict=True) if kind == AxisType.Auto}


def over_batch(attend: Callable[[Array, Sequence], Any], q: Array, segments: Sequence) -> Any:
  """Calls `attend(q, segments)` with the batch split over the mesh; all of it if it cannot be.

  Args:
    attend: an implementation of attention, or of anything else with a batch; that is the first axis
      of all that it returns.
    q: [B, ...].
    segments: pytrees of arrays [b, ...] where b is 1 or divides B.
  """
  sizes = _axes()
  count, batch = math.prod(sizes.values()), q.shape[0]
  if count == 1:
    return attend(q, segments)
  names = PartitionSpec(tuple(sizes))
  if batch % count:
    specs = jax.tree.map(lambda x: PartitionSpec(), (q, list(segments)))
  else:
    segments = jax.tree.map(lambda x: _for_each_card(x, batch, count), list(segments))
    specs = jax.tree.map(lambda x: PartitionSpec() if x.shape[0] == 1 else names, (q, segments))
  # Nothing is exchanged, so there is nothing for shard_map to check; cuDNN's call has no rule.
  return jax.shard_map(attend, in_specs=specs, out_specs=specs[0], axis_names=set(sizes),
                       check_vma=False)(q, list(segments))


def _for_each_card(x: Array, batch: int, count: int) -> Array:
  """An array of a segment, its rows repeated for their queries if cards cannot share them out.

  One row is for all videos, on every card.
  """
  rows = x.shape[0]
  return x if rows == 1 or rows % count == 0 else jnp.repeat(x, batch // rows, axis=0)
