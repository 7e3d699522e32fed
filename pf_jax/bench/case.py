"""One piece of work, done by us and by peers, and what became of it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pf_jax.bench import timing
from pf_jax.bench.ceilings import Ceilings
from pf_jax.bench.config import Effort
from pf_jax.bench.subject import Subject
from pf_jax.bench.timing import Call, Timing
from pf_jax.sampling.meter import CompileCounter

Say = Callable[[str], None]
Shapes = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Bench:
  """What every suite is given.

  Attributes:
    subject: the model.
    effort: how much is measured.
    ceilings: of this machine.
    compilations: counts since the start of the run.
    say: receives lines to show.
  """

  subject: Subject
  effort: Effort
  ceilings: Ceilings
  compilations: CompileCounter
  say: Say = print


@dataclasses.dataclass(frozen=True)
class Case:
  """One piece of work.

  Attributes:
    name: within its suite.
    calls: who does it; the first one is ours, the others are its peers.
    dtype: of its products.
    flops: operations, by formula if there is one.
    bytes: least that has to move.
    shapes: of what goes in.
    traced_flops: operations of our program's trace.
    absent: peers that cannot be measured here, and why.
    rounds: exactly so many, without a warm-up; None is as `Effort` says.
    notes: asked once it is measured.
  """

  name: str
  calls: Mapping[str, Call]
  dtype: str
  flops: int
  bytes: int
  shapes: Shapes
  traced_flops: int
  absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
  rounds: int | None = None
  notes: Callable[[], Mapping[str, Any]] = dict

  def measure(self, effort: Effort) -> dict[str, Timing]:
    """Times all calls in turn."""
    if self.rounds is not None:
      return timing.in_turn(self.calls, self.rounds)
    return timing.alternate(self.calls, seconds=effort.seconds, least=effort.least,
                            most=effort.most)

  def run_once(self) -> None:
    """Runs each call once, for a profile."""
    for name, call in self.calls.items():
      with jax.profiler.TraceAnnotation(f'{self.name}: {name}'):
        call.wait(call.run())


def record(case: Case, timings: Mapping[str, Timing], ceilings: Ceilings) -> dict[str, Any]:
  """A measured case, JSON-able.

  `of_limit` compares with the time that the ceilings leave at best: the longer one of moving the
  bytes and of doing the operations.
  """
  notes = dict(case.notes())  # before anything else is compiled
  copy, product = ceilings.copy(), ceilings.product(case.dtype)
  limit = max(case.bytes / copy, case.flops / product)
  ours = next(iter(timings.values()))
  calls = {}
  for name, measured in timings.items():
    seconds = measured.summary
    flops, bandwidth = case.flops / seconds.median, case.bytes / seconds.median
    calls[name] = {
        'seconds': seconds._asdict(), 'repeat': measured.repeat, 'samples': measured.samples,
        'flops_per_second': flops, 'bytes_per_second': bandwidth, 'of_product': flops / product,
        'of_copy': bandwidth / copy, 'of_limit': limit / seconds.median}
  return {
      'name': case.name, 'dtype': case.dtype, 'flops': case.flops,
      'traced_flops': case.traced_flops, 'bytes': case.bytes, 'limit_seconds': limit,
      'shapes': {name: list(shape) for name, shape in case.shapes.items()}, 'calls': calls,
      'ratios': {name: timing.ratio(ours, other)._asdict()
                 for name, other in timings.items() if other is not ours},
      'absent': dict(case.absent), 'notes': notes}
