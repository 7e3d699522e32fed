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
from pf_jax.bench.kernels import block_attentions, convolution_works, hopper
from pf_jax.bench.timing import Call
from pf_jax.kernels import conv3d, tuning
from pf_jax.kernels.attention import attend, pallas, pallas_float8
from pf_jax.kernels.quantization import Quantized
from pf_jax.types import Array

# Relative, in the norm. Backends in half precision differ by 0.5%; one tile less of the 1.3B's 436
# is 5%.
_ERROR = 0.02
_FLOAT8_ERROR = 0.1  # 3% on a video's own keys and values


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
    inputs = work.q, work.segments
    if not pallas.supports(*inputs):
      bench.say(f'nothing to tune for {name}: the kernel takes {pallas.LIMITS}.')
      continue
    quantized = any(isinstance(part.k, Quantized) for part in work.segments)
    wanted = attend(*inputs, implementation='cudnn')
    for backend, float8, error in ((pallas, False, _ERROR), (pallas_float8, True, _FLOAT8_ERROR)):
      if backend.supports(*inputs):
        problem = pallas.problem(*inputs, float8)
        bench.say(f'tuning {problem.kernel}, {name} ...')
        tuning.tune(problem, pallas_gpu.candidates(quantized, float8),
                    functools.partial(_compiled, backend.attend, inputs, wanted, error=error),
                    functools.partial(race, effort=bench.effort), say=bench.say)


def _convolutions(bench: Bench) -> None:
  from pf_jax.kernels.conv3d import pallas_gpu

  for name, make in convolution_works(bench.subject.models).items():
    work = make()
    arrays, (x, kernel) = (work.x, work.kernel, work.bias), (work.x, work.kernel)
    if not conv3d.pallas.supports(x, kernel, work.strides):
      bench.say(f'nothing to tune for {name}: the kernel takes {conv3d.pallas.LIMITS}.')
      continue
    shape = conv3d.pallas.shape_of(x, kernel, None, work.strides)
    bench.say(f'tuning conv3d, {name} ...')
    wanted = conv3d.conv3d(*arrays, **work.options, implementation='reference')
    function = functools.partial(conv3d.pallas.conv3d, past=None, **work.options)
    tuning.tune(tuning.Problem.here('conv3d', shape),
                pallas_gpu.candidates(conv3d.pallas.folded_shape(kernel, work.strides)),
                functools.partial(_compiled, function, arrays, wanted),
                functools.partial(race, effort=bench.effort), say=bench.say)


def _compiled(function: Callable, inputs: tuple, wanted: Array, tiles: Any, error: float = _ERROR
              ) -> Callable[[], Any]:
  """A kernel with these tiles, which was run once.

  Args:
    function: (*inputs, tiles=...) -> what is wanted.
    inputs: pytrees of arrays.
    wanted: by another implementation.
    tiles: of the kernel.
    error: that is allowed, relative, in the norm.

  Raises:
    Unfit: it spills, or computes something else.
  """
  with no_compilation_cache(), ptxas.captured() as lines:
    program = jax.jit(functools.partial(function, tiles=tiles)).lower(*inputs).compile()
  check_registers(lines)
  run = functools.partial(program, *inputs)
  found, exact = (np.asarray(x, np.float32) for x in (run(), wanted))
  off = np.linalg.norm(found - exact) / np.linalg.norm(exact)
  if not off <= error:  # NaN is no better
    raise Unfit(f'what it computes is off by {off:.1%}')
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


_TUNERS: dict[str, Callable[[Bench], None]] = {'attention': _attention, 'conv3d': _convolutions}
