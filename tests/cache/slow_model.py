"""The cache as lists of blocks, the slow and obvious way; the oracle of the property tests."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Remembered:
  """One block: its number, and its full and compressed scoring material."""

  number: int
  value: float
  key_sum: np.ndarray  # [N, H]


class SlowCache:
  """Three lists. `commit` appends, ages and evicts; `attended` says who is seen, and where."""

  def __init__(self, spec):
    self.spec = spec
    self.sink: list[Remembered] = []
    self.recent: list[Remembered] = []
    self.archive: list[Remembered] = []
    self.evicted: list[int] = []

  def commit(self, block: Remembered):
    if len(self.sink) < self.spec.sink_blocks:
      self.sink.append(block)
      return
    self.recent.append(block)
    if len(self.recent) > self.spec.recent_blocks:
      self.archive.append(self.recent.pop(0))
    while len(self.archive) > self.spec.mid_capacity:
      self.evicted.append(self.archive.pop(0).number)

  def select(self, query: np.ndarray) -> list[int]:
    """Numbers of the top-k archived blocks, oldest first; `query` is the summed one, [N, H]."""
    if self.spec.selection == 'fifo':
      order = sorted(self.archive, key=lambda block: -block.number)
    else:
      order = sorted(self.archive, key=lambda block: -float(np.sum(query * block.key_sum)))
    return sorted(block.number for block in order[:self.spec.top_k])

  def attended(self, selected: list[int]) -> list[tuple[int, int]]:
    """(block number, start position) of everything attended, in order, then the current block."""
    frames, rows, at = self.spec.frames_per_block, [], 0
    mid = [block for block in self.archive if block.number in selected]
    for partition, stride in ((self.sink, frames), (mid, self.spec.mid_stride),
                              (self.recent, frames)):
      for block in partition:
        rows.append((block.number, at))
        at += stride
    current = len(self.sink) + len(self.recent) + len(self.archive) + len(self.evicted)
    rows.append((current, at))
    if self.spec.positions == 'absolute':
      rows = [(number, number * frames) for number, _ in rows]
    return rows
