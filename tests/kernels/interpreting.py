"""What scripts that run a kernel in Pallas' interpreter have in common.

The interpreter blocks a thread for every waiting warpgroup, so XLA needs more threads than a small
machine has cores (NPROC, set before jax is imported): that is why each of them is a process of its
own. A planted bug that makes a kernel wait for ever is ended by whoever started it.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu


def prepare(kernel: ModuleType, mutations: Mapping[str, Sequence], mutation: str) -> Any:
  """Plants a bug, if any, and says how to interpret.

  Args:
    kernel: the module that has it.
    mutations: name -> (what is replaced in the module's source, by what, how that shows).
    mutation: name of the bug, or ''.
  """
  # The interpreter computes with JAX itself, in callbacks: nothing may be queued before them.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  if mutation:
    mutate(kernel, mutation, *mutations[mutation][:2])
  return plgpu.InterpretGPUParams(detect_races=True)


def mutate(module: ModuleType, name: str, before: str, after: str) -> None:
  """Plants a bug in a module's source."""
  with open(str(module.__file__), encoding='utf-8') as file:
    source = file.read()
  if source.count(before) != 1:
    raise SystemExit(f'the planted bug {name!r} does not fit the source any more.')
  exec(compile(source.replace(before, after), str(module.__file__), 'exec'), vars(module))


def accept(name: str, error: np.ndarray, most: float, quantile: float) -> bool:
  """Says how far off a case is, and whether that is good enough: NaN is not."""
  print(f'{name}: {error.max():.5f} at most, {np.quantile(error, 0.99):.5f} for 99%', flush=True)
  good = error.max() <= most and np.quantile(error, 0.99) <= quantile
  if not good:
    print('wrong values')
  return bool(good)
