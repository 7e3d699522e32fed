"""Times the tiles of our own kernels on this card and keeps the fastest (`pf_jax.kernels.tuning`).

Candidates that do not compile, take too much shared memory, spill registers or compute something
else are skipped, and said so; the rest are timed in turn, like everything that is compared.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pf_jax.aot import ptxas
from pf_jax.aot.compile import no_compilation_cache
from pf_jax.bench import timing
from pf_jax.bench.case import Bench
from pf_jax.bench.config import Effort
from pf_jax.bench.kernels import BlockAttention, block_attentions, hopper
from pf_jax.bench.timing import Call
from pf_jax.kernels import tuning
from pf_jax.kernels.attention import attend, pallas

# Relative, in the norm. Backends in half precision differ by 0.5%; one tile less of the 1.3B's 436
# is 5%.
_ERROR = 0.02


class Unfit(Exception):
  """A candidate that is no use."""


def tune(bench: Bench, suites: Sequence[str]) -> None:
  """Fills the user's table for the shapes of these suites.

  Raises:
    BadTable, NotWritable, NothingFits: see `tuning.tune`.
  """
  if not hopper():
    bench.say('nothing to tune: kernels of our own run on Hopper cards, this is '
              f'{jax.devices()[0].device_kind}.')
    return
  tuners = [_TUNERS[name] for name in suites if name in _TUNERS]
  if not tuners:
    bench.say(f'nothing to tune in {", ".join(suites)}; suites with tiles: {", ".join(_TUNERS)}.')
  for tuner in tuners:
    tuner(bench)


def _attention(bench: Bench) -> None:
  from pf_jax.kernels.attention import pallas_gpu  # imports much that only cards need

  for name, work in block_attentions(bench.subject).items():
    if not pallas.supports(work.q, work.segments):
      bench.say(f'nothing to tune for {name}: the kernel takes {pallas.LIMITS}.')
      continue
    shape = pallas.shape_of(work.q, work.segments)
    bench.say(f'tuning attention, {name} ...')
    wanted = np.asarray(attend(work.q, work.segments, implementation='cudnn'), np.float32)
    tuning.tune(tuning.Problem.here('attention', shape), pallas_gpu.candidates(),
                functools.partial(_compiled, work, wanted),
                functools.partial(race, effort=bench.effort), say=bench.say)


def _compiled(work: BlockAttention, wanted: np.ndarray, tiles: Any) -> Callable[[], Any]:
  """The kernel with these tiles, which was run once.

  Raises:
    Unfit: it spills, or computes something else.
  """
  with no_compilation_cache(), ptxas.captured() as lines:
    function = jax.jit(functools.partial(pallas.attend, tiles=tiles))
    program = function.lower(work.q, work.segments).compile()
  check_registers(lines)
  run = functools.partial(program, work.q, work.segments)
  error = np.linalg.norm(np.asarray(run(), np.float32) - wanted) / np.linalg.norm(wanted)
  if not error <= _ERROR:  # NaN is no better
    raise Unfit(f'what it computes is off by {error:.1%}')
  return run


def check_registers(lines: Sequence[str]) -> None:
  """Raises `Unfit` if the assembler put registers aside in memory."""
  spilled = sum(kernel.spill_store_bytes for kernel in ptxas.parse('\n'.join(lines)))
  if spilled:
    raise Unfit(f'{spilled} bytes of registers are put aside in memory')


def race(ready: Mapping[Any, Callable[[], Any]], effort: Effort) -> dict[Any, float]:
  """Median seconds of each."""
  calls = {tiles: Call(run) for tiles, run in ready.items()}
  timings = timing.alternate(calls, seconds=effort.seconds, least=effort.least, most=effort.most)
  return {tiles: timed.summary.median for tiles, timed in timings.items()}


_TUNERS: dict[str, Callable[[Bench], None]] = {'attention': _attention}
