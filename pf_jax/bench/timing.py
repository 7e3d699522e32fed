"""Times calls in turn; medians with intervals.

What a machine does besides comes and goes within seconds. So everything that is to be compared runs
in rounds, one call after the other, in reverse in every second round, and ratios are taken round by
round: noise that lasts longer than a round hits both sides.

Intervals are order statistics: the median of n independent timings lies between the k-th smallest
and the k-th largest with a probability of 1 - 2 P(X < k), X ~ Binomial(n, 1/2), whatever their
distribution. Timings in a row are not quite independent, so the truth is a little wider.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

CONFIDENCE = 0.95
_SAMPLE_SECONDS = 0.005  # shorter calls are repeated: dispatch overlaps, the clock's grain is small
_MOST_REPEATS = 100
_WARM_UPS = 3  # the fastest says how often to repeat


class Call(NamedTuple):
  """Something to time.

  Attributes:
    run: starts it; may return before it is done.
    wait: waits for what `run` returned.
  """

  run: Callable[[], Any]
  wait: Callable[[Any], Any] = jax.block_until_ready


class Summary(NamedTuple):
  """Median of the rounds and the interval it lies in with 95%; all of them if under six."""

  median: float
  low: float
  high: float
  rounds: int


@dataclasses.dataclass(frozen=True)
class Timing:
  """Wall seconds of a call, one sample a round; each sample is the mean of `repeat` calls."""

  samples: tuple[float, ...]
  repeat: int = 1

  @property
  def summary(self) -> Summary:
    return summarise(self.samples)


def interval_rank(count: int, confidence: float = CONFIDENCE) -> int:
  """The largest k such that the k-th smallest and largest of `count` values hold the median.

  0 where even the extremes are too close to each other.
  """
  below, rank = 0, 0  # orders of `count` coins with fewer than rank heads
  while True:
    below += math.comb(count, rank)
    if 2 * below > (1 - confidence) * 2**count:
      return rank
    rank += 1


def summarise(values: Sequence[float]) -> Summary:
  """Median and interval.

  Raises:
    ValueError: there are no values.
  """
  if not values:
    raise ValueError('no values have no median; measure at least one round.')
  ordered, rank = sorted(values), max(interval_rank(len(values)), 1)
  return Summary(statistics.median(ordered), ordered[rank - 1], ordered[-rank], len(ordered))


def ratio(timing: Timing, other: Timing) -> Summary:
  """Of two calls of the same rounds: median of each round's ratio."""
  return summarise([a / b for a, b in zip(timing.samples, other.samples, strict=True)])


def _timed(call: Call, repeat: int, clock: Callable[[], float]) -> float:
  began = clock()
  for _ in range(repeat):
    result = call.run()
  call.wait(result)
  return (clock() - began) / repeat


def _warmed_up(call: Call, clock: Callable[[], float]) -> int:
  """Runs a call a few times and says how often one sample should repeat it."""
  seconds = min(_timed(call, 1, clock) for _ in range(_WARM_UPS))
  return max(1, min(_MOST_REPEATS, math.ceil(_SAMPLE_SECONDS / max(seconds, 1e-9))))


def alternate(calls: Mapping[str, Call], *, seconds: float, least: int, most: int,
              clock: Callable[[], float] = time.perf_counter) -> dict[str, Timing]:
  """Warms up, then times the calls in turn.

  Args:
    calls: by name.
    seconds: time to spend on each of them, roughly.
    least: rounds at least.
    most: rounds at most.
    clock: in seconds.
  """
  repeats = {name: _warmed_up(call, clock) for name, call in calls.items()}
  end = clock() + seconds * len(calls)
  return _rounds(calls, repeats, least, most, end, clock)


def in_turn(calls: Mapping[str, Call], rounds: int, *,
            clock: Callable[[], float] = time.perf_counter) -> dict[str, Timing]:
  """Times calls that must run exactly `rounds` times, such as the blocks of a video."""
  return _rounds(calls, dict.fromkeys(calls, 1), rounds, rounds, math.inf, clock)


def _rounds(calls: Mapping[str, Call], repeats: Mapping[str, int], least: int, most: int,
            end: float, clock: Callable[[], float]) -> dict[str, Timing]:
  samples: dict[str, list[float]] = {name: [] for name in calls}
  names = list(calls)
  for done in range(most):
    if done >= least and clock() >= end:
      break
    for name in reversed(names) if done % 2 else names:
      samples[name].append(_timed(calls[name], repeats[name], clock))
  return {name: Timing(tuple(values), repeats[name]) for name, values in samples.items()}
