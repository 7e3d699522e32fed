"""Programs that are compiled ahead of their first call, with what that took."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from pf_jax.types import PyTree


class Program(NamedTuple):
  """A compiled function.

  Attributes:
    call: runs it.
    seconds: wall time of its compilation.
    scratch_bytes: temporary memory that the compiler planned; 0 where it does not say.
  """

  call: Callable
  seconds: float
  scratch_bytes: int


def compile_ahead(function: Callable, inputs: PyTree, donate: int | None = None) -> Program:
  """Compiles a function.

  Args:
    function: anything that `jax.jit` takes.
    inputs: a tuple of arrays or `jax.ShapeDtypeStruct`, one for each argument.
    donate: the argument whose memory the results may take over.
  """
  begun = time.perf_counter()
  donated = () if donate is None else (donate,)
  compiled = jax.jit(function, donate_argnums=donated).lower(*inputs).compile()
  seconds, plan = time.perf_counter() - begun, compiled.memory_analysis()
  return Program(compiled, seconds, plan.temp_size_in_bytes if plan else 0)
