"""Suite rollout: is a block late in a long video as dear as an early one?

Two videos of the same programs run side by side, one at its 20th block, the other beyond its
1,100th, a block of the one, a block of the other: whatever else the machine does hits both. Memory
is read from the longer video alone, at both places, with nothing else different.
"""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pf_jax.bench import block as block_suite
from pf_jax.bench.case import Bench, Case
from pf_jax.bench.timing import Call
from pf_jax.progress import Progress
from pf_jax.rollout.stream import Block, stream
from pf_jax.sampling import meter
from pf_jax.types import Array, tree_bytes

GOAL = 0.05  # how far from 1 the ratio of late to early may be


def live_bytes() -> int:
  """Of all arrays that JAX keeps on its devices."""
  gc.collect()
  return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


class Video:
  """A stream of blocks that is advanced by hand.

  Attributes:
    next_block: number of the block that comes next.
  """

  def __init__(self, bench: Bench, blocks: int, seed: int):
    """Nothing runs yet.

    Args:
      bench: model.
      blocks: most blocks that will be asked for.
      seed: of the noise.
    """
    subject = bench.subject
    keys = jax.random.split(jax.random.key(seed), 1)
    self._blocks: Iterator[Block] = stream(subject.programs, [subject.text], [0] * blocks, keys)
    self.next_block = 0

  def advance(self) -> Array:
    """Runs one block to its end and gives its latents."""
    block = next(self._blocks)
    jax.block_until_ready((block.frames, block.state))
    self.next_block += 1
    return block.latents

  def memory(self, block: int, show: Progress) -> dict[str, Any]:
    """Runs all blocks up to `block` with it: bytes of the state after it, and of all arrays."""
    self.go_to(block, show)
    state = next(self._blocks).state
    jax.block_until_ready(state)
    self.next_block += 1
    show.update()
    sizes = {'partitions': meter.partition_bytes(state), 'state': tree_bytes(state)}
    del state
    return {'block': block, **sizes, 'live': live_bytes()}

  def go_to(self, block: int, show: Progress) -> None:
    """Runs all blocks before `block`."""
    while self.next_block < block:
      self.advance()
      show.update()


class Race:
  """The two videos, brought to where they are to be timed."""

  def __init__(self, bench: Bench):
    """Runs all blocks before the windows: some minutes for a thousand of the miniature's."""
    self._bench, effort = bench, bench.effort
    spare = 2  # a last look, and a profile
    bench.subject.text  # noqa: B018 (compiles the programs)
    self.late = Video(bench, effort.late_block + effort.window + spare, seed=1)
    self.early = Video(bench, effort.early_block + effort.window + spare, seed=0)
    with contextlib.closing(Progress(effort.late_block + effort.early_block, unit='block',
                                     every_s=10)) as show:
      self.late.go_to(2, show)
      self._compiled = bench.compilations.count
      self.early_memory = self.late.memory(effort.early_block - 1, show)
      self.late_memory = self.late.memory(effort.late_block - 1, show)
      self.early.go_to(effort.early_block, show)

  def compiled(self) -> int | None:
    """Programs compiled since the second block of the first video; None if they go unnoticed."""
    if not self._bench.compilations.works:
      return None
    return self._bench.compilations.count - self._compiled

  def notes(self) -> dict[str, Any]:
    """Memory at both places, compilations, and whether the late latents are alive."""
    compiled = self.compiled()
    memory = {'early': self.early_memory, 'late': self.late_memory}
    same = all(self.early_memory[name] == self.late_memory[name]
               for name in ('partitions', 'state', 'live'))
    latents = np.asarray(self.late.advance(), np.float32)
    return {'memory': memory, 'memory_constant': same, 'compilations': compiled,
            'peak_resident_bytes': meter.peak_memory_bytes(), 'goal': [1 - GOAL, 1 + GOAL],
            'late_latents_std': float(latents.std())}


def rollout(bench: Bench) -> list[Case]:
  """Late blocks beside early ones; the ratio is late over early."""
  effort, race = bench.effort, Race(bench)
  counted = block_suite.work(bench.subject)['whole']

  def name(first: int) -> str:
    return f'blocks {first} to {first + effort.window - 1}'

  return [Case(
      'a block', {name(effort.late_block): Call(race.late.advance),
                  name(effort.early_block): Call(race.early.advance)}, bench.subject.dtype,
      counted.flops, counted.bytes,
      {'latents': (1, *bench.subject.models.spec.video.block_latent_shape)}, counted.traced_flops,
      rounds=effort.window, notes=race.notes)]
