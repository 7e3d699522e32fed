"""Traces some blocks of a run while they are sampled, see `pf_jax.profile`."""

import itertools
from collections.abc import Generator, Iterator

import jax

from pf_jax import profile
from pf_jax.rollout.stream import Block
from pf_jax.sampling.config import WARM_UP, TraceSpec
from pf_jax.sampling.plan import SampleError, Say


class BlockTracer:
  """Traces steady blocks: neither the first one nor the first calls of the programs.

  Attributes:
    numbers: of the blocks that were traced.
  """

  def __init__(self, spec: TraceSpec | None, blocks: int, say: Say):
    """Makes the directory.

    Args:
      spec: None traces nothing.
      blocks: of every video.
      say: receives a notice.

    Raises:
      SampleError: the videos end before the first block to trace.
      OutputExists, NotWritable: the directory cannot be used.
    """
    self.numbers: list[int] = []
    self._spec, self._blocks, self._say = spec, blocks, say
    if spec is None:
      return
    if spec.first >= blocks:
      raise SampleError(f'block {spec.first} is the first to trace, and the video has blocks 0..'
                        f'{blocks - 1}; make it longer or leave out --profile.')
    profile.new_directory(spec.directory)

  def over(self, blocks: Iterator[Block], *, replayed: int) -> Generator[Block, None, None]:
    """Passes on the blocks of a batch.

    A trace begins when its first block is asked for and ends when the block after it is, so that
    what is done with blocks in between is in it.

    Args:
      blocks: of a batch.
      replayed: how many of them are not sampled.
    """
    if self._spec is None or self.numbers:
      yield from blocks
      return
    first = max(self._spec.first, replayed + WARM_UP)
    yield from itertools.islice(blocks, first)
    if first < self._blocks:
      with profile.trace(self._spec.directory):
        for number in range(first, min(first + self._spec.blocks, self._blocks)):
          with jax.profiler.StepTraceAnnotation('block', step_num=number):
            block = jax.block_until_ready(next(blocks))
          self.numbers.append(number)
          yield block
    yield from blocks

  def say_where(self) -> None:
    """Says which blocks were traced and how to look at them."""
    if self._spec is None:
      return
    if not self.numbers:
      self._say('note: no block was traced: fewer than '
                f'{max(self._spec.first, WARM_UP) + 1} were left to sample.')
      return
    self._say(f'traced block{"s" * (len(self.numbers) > 1)} '
              f'{", ".join(map(str, self.numbers))}: {profile.where_to_look(self._spec.directory)}')
