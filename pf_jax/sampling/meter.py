"""Measurements of a run: compilations, seconds per block, memory; and what is expected before."""

import dataclasses
import importlib.metadata
import platform
import resource
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

import pf_jax
from pf_jax.pipeline import Pipeline
from pf_jax.rollout.block import RolloutState
from pf_jax.rollout.stream import Programs
from pf_jax.types import tree_bytes

_COMPILE_EVENT = '/jax/core/compile/backend_compile_duration'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'av')
EARLY, LATE = (20, 40), (100, 120)  # block numbers, the second one excluded


class CompileCounter:
  """Counts the programs XLA is asked for, cached ones included. Use as a context manager.

  Attributes:
    count: so far.
    works: whether a compilation was noticed that was made for the purpose; another version of JAX
      may name its events differently.
  """

  def __init__(self) -> None:
    self.count, self.works = 0, False

  def _listen(self, event: str, duration_secs: float, **unused: str | int) -> None:
    del duration_secs, unused
    self.count += event == _COMPILE_EVENT

  def __enter__(self) -> 'CompileCounter':
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    jax.jit(lambda: 0)()  # a new function each time, so never compiled before
    self.works, self.count = self.count == 1, 0
    return self

  def __exit__(self, *details: object) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a run will take. Bytes of the cache are exact, programs' scratch is the compiler's plan.

  Attributes:
    cache_bytes: of each partition, by `CacheSpec`.
    context_bytes: packed history of one layer, working memory.
    state_bytes: everything a video carries from block to block, the cache included.
    parameter_bytes: of the networks.
    scratch_bytes: largest temporary memory of any program.
    block_seconds: one block, as timed.
    blocks: to sample, all batches together.
    basis: what `block_seconds` was measured on.
  """

  cache_bytes: dict[str, int]
  context_bytes: int
  state_bytes: int
  parameter_bytes: int
  scratch_bytes: int
  block_seconds: float
  blocks: int
  basis: str

  @property
  def seconds(self) -> float:
    return self.blocks * self.block_seconds

  def to_json(self) -> dict[str, Any]:
    """All fields and the total time."""
    return {**dataclasses.asdict(self), 'seconds': self.seconds}

  def __str__(self) -> str:
    parts = ', '.join(f'{name} {megabytes(size)}' for name, size in self.cache_bytes.items())
    return (f'estimate: memory {megabytes(self.parameter_bytes)} networks, '
            f'{megabytes(sum(self.cache_bytes.values()))} cache ({parts}), '
            f'{megabytes(self.state_bytes - sum(self.cache_bytes.values()))} decoder and kept '
            f'latents, {megabytes(self.context_bytes)} context, up to '
            f'{megabytes(self.scratch_bytes)} scratch; it does not grow with the length\n'
            f'estimate: time {duration(self.seconds)} for {self.blocks} blocks, from '
            f'{self.basis} ({self.block_seconds:.3g} s a block)')


def estimate(pipeline: Pipeline, programs: Programs, blocks: int) -> Estimate:
  """Times a block that is thrown away, and adds up memory.

  Args:
    pipeline: loaded.
    programs: compiled; a block costs the same whatever the cache holds.
    blocks: how many will be sampled.
  """
  batch, cache = programs.batch, pipeline.spec.cache
  spec = pipeline.models.spec.text
  text = programs.text_keys_values(jnp.zeros((batch, spec.max_tokens, spec.width)))
  keys = jax.random.split(jax.random.key(0), batch)
  state = programs.start()
  state_bytes = tree_bytes(state)
  for _ in range(2):  # the first execution of a program costs more than all others
    start = time.perf_counter()
    latents, selected = programs.denoise(state, text, keys)
    state, _ = jax.block_until_ready(programs.finish(1, state, latents, selected, text))
    seconds = time.perf_counter() - start
  return Estimate(
      cache_bytes=cache.partition_bytes(batch), context_bytes=cache.context_bytes(batch),
      state_bytes=state_bytes, parameter_bytes=tree_bytes(pipeline.models),
      scratch_bytes=programs.scratch_bytes, block_seconds=seconds, blocks=blocks,
      basis='a timed trial block, without writing files')


def partition_bytes(state: RolloutState) -> dict[str, int]:
  """Bytes of the arrays that each partition really holds, by the names of `CacheSpec`."""
  layers = state.cache.layers
  parts = {'sink': layers.sink, 'archive': layers.archive, 'pending': layers.pending,
           'recent': layers.recent, 'key_sums': layers.key_sums}
  return {name: sum(array.nbytes for array in jax.tree.leaves(part))
          for name, part in parts.items()}


class Meter:
  """Collects the measurements of a run while its blocks arrive."""

  def __init__(self, compilations: CompileCounter):
    """Starts without any block."""
    self._compilations = compilations
    self._after_block_1 = 0
    self._mark: int | None = None
    self._seconds: list[tuple[int, float]] = []
    self._partitions: list[dict[str, int]] = []
    self.replayed = 0

  def start_batch(self) -> None:
    """Compilations count from block 1 of each batch on."""
    self._mark = None

  def add(self, number: int, seconds: float, state: RolloutState, *, replayed: bool) -> None:
    """Takes one block that is finished, written, and took `seconds` in all."""
    if self._mark is not None:
      self._after_block_1 += self._compilations.count - self._mark
    if self._mark is not None or number >= 1:
      self._mark = self._compilations.count
    if replayed:
      self.replayed += 1
    else:
      self._seconds.append((number, seconds))
    sizes = partition_bytes(state)
    if sizes not in self._partitions:
      self._partitions.append(sizes)

  def _median(self, first: int, last: int) -> float | None:
    chosen = [seconds for number, seconds in self._seconds if first <= number < last]
    return statistics.median(chosen) if chosen else None

  def to_json(self) -> dict[str, Any]:
    """Everything measured; what could not be measured is None."""
    early, late = self._median(*EARLY), self._median(*LATE)
    total = sum(seconds for _, seconds in self._seconds)
    return {
        'sampled_blocks': len(self._seconds),
        'replayed_blocks': self.replayed,
        'sampling_seconds': total,
        'blocks_per_second': len(self._seconds) / total if total else None,
        'seconds_per_block': {
            'median': self._median(1, 1 << 62),
            'early': early, 'early_blocks': EARLY, 'late': late, 'late_blocks': LATE,
            'late_over_early': late / early if early and late else None},
        'cache_bytes': self._partitions[-1] if self._partitions else None,
        'cache_bytes_constant': len(self._partitions) == 1 if self._partitions else None,
        'compilations_after_block_1': self._after_block_1 if self._compilations.works else None,
        'peak_memory_bytes': peak_memory_bytes(),
    }


def peak_memory_bytes() -> int:
  """Largest resident memory of this process so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def versions() -> dict[str, str]:
  """What a bit-exact repetition needs to have alike."""
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  device = jax.devices()[0]
  return {'pf_jax': pf_jax.__version__, 'python': platform.python_version(), **found,
          'device': f'{device.platform} {device.device_kind}'}


def megabytes(size: int) -> str:
  """A size to read, such as '1.5 MB'."""
  return f'{size / 1e6:.3g} MB' if size < 1e9 else f'{size / 1e9:.3g} GB'


def duration(seconds: float) -> str:
  """A time to read, such as '1 min 20 s'."""
  whole = round(seconds)
  if whole < 1:
    return f'{seconds:.2g} s'
  if whole < 60:
    return f'{whole} s'
  hours, minutes = whole // 3600, whole // 60 % 60
  return f'{hours} h {minutes} min' if hours else f'{minutes} min {whole % 60} s'
