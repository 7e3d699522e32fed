"""Looking into a cache from the host: which block is where, while another one is generated."""

import enum
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from pf_jax.cache import state
from pf_jax.cache.spec import CacheSpec


class Partition(enum.IntEnum):
  """Where a block's keys and values are while another block is generated."""

  ABSENT = 0  # not generated yet
  SINK = 1
  SELECTED = 2  # compressed, in the archive, chosen by this block
  ARCHIVED = 3  # compressed, in the archive, not chosen
  PENDING = 4  # compressed, waiting to enter the archive
  RECENT = 5
  GENERATED = 6  # the block being generated
  EVICTED = 7


def block_states(block: int, total: int, spec: CacheSpec,
                 selected: Iterable[int] = ()) -> np.ndarray:
  """Where every block of a video is while block number `block` is generated.

  The compressed version of a recent block is pending all the while; the block itself is shown.

  Args:
    block: the block being generated, from 0.
    total: blocks of the video.
    spec: sizes of the cache.
    selected: archived blocks that one layer chose; -1 entries are skipped.

  Returns:
    [total] int8 of `Partition`.

  Raises:
    ValueError: `block` is not one of `total`, or a selected block is not in the archive.
  """
  if not 0 <= block < total:
    raise ValueError(f'{block=} is not within 0..{total - 1}.')
  states = np.full(total, Partition.ABSENT, np.int8)
  states[:block] = Partition.EVICTED
  held = {Partition.SINK: state.sink_ids, Partition.ARCHIVED: state.archive_ids,
          Partition.RECENT: state.recent_ids}
  for partition, ids in held.items():
    blocks = np.asarray(ids(jnp.int32(block), spec))
    states[blocks[blocks >= 0]] = partition
  chosen = [int(number) for number in selected if number >= 0]
  if wrong := [number for number in chosen if states[number] != Partition.ARCHIVED]:
    raise ValueError(f'selected blocks {wrong} are not in the archive while {block=} is generated.')
  states[chosen] = Partition.SELECTED
  states[block] = Partition.GENERATED
  return states
