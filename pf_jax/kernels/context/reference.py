"""Assembling a context in plain XLA: gather, move in time, lay side by side.

XLA fuses this into one pass over the bytes, out of the cache and into the row that a fused
attention kernel reads.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.kernels import rope
from pf_jax.kernels.context.segments import Blocks, Segment
from pf_jax.kernels.quantization import dequantize
from pf_jax.types import Array


def _gather(x: Array, chosen: Array | None) -> Array:
  """[B, n, T, N, H] -> [B, s, T, N, H]."""
  if chosen is None:
    return x
  if chosen.shape[0] == 1:
    return jnp.take(x, chosen[0], axis=1)
  return jnp.take_along_axis(x, chosen[:, :, None, None, None], axis=1)


def _rows(blocks: Blocks, dtype) -> tuple[Array, Array]:
  """Keys and values of the attended blocks, in their places in time, [B, s * T, N, H]."""
  stored = jax.tree.map(lambda x: _gather(x, blocks.chosen), (blocks.k, blocks.v))
  k, v = (dequantize(x, dtype) for x in stored)
  k = rope.rotate_time(k, blocks.shift[:, :, None])
  flat = k.shape[0], k.shape[1] * k.shape[2], *k.shape[3:]
  return k.reshape(flat), v.reshape(flat)


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


def assemble(parts: Sequence[Blocks], dtype='float32') -> Segment:
  """Lays the attended blocks of some partitions side by side.

  Args:
    parts: at least one; they share batch and heads.
    dtype: of what is stored in 8 bits; the rest keeps its own.

  Returns:
    `Segment` of all attended blocks' rows in the order of `parts`, valid or not, with `order`.
  """
  parts = [part.one_layer() for part in parts]
  batch = parts[0].batch
  k, v = (jnp.concatenate(part, axis=1) for part in zip(*(_rows(part, dtype) for part in parts),
                                                       strict=True))
  valid = jnp.concatenate([jnp.broadcast_to(part.valid, (batch, part.valid.shape[1]))
                           for part in parts], axis=1)
  lengths = np.concatenate([np.full(part.valid.shape[1], part.k.shape[2]) for part in parts])
  slots = np.repeat(np.arange(len(lengths)), lengths)
  return Segment(k, v, valid[:, slots], valid_first(valid, lengths))


def ready_made(attended: Sequence[Segment | Blocks], dtype='float32') -> list[Segment]:
  """What is attended, all blocks of it as one segment before the others; see `assemble`."""
  blocks = [part for part in attended if isinstance(part, Blocks)]
  rest = [part for part in attended if isinstance(part, Segment)]
  return [assemble(blocks, dtype), *rest] if blocks else rest
