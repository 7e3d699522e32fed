"""Builds a module with one quickly compiled program."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

M = TypeVar('M', bound=nnx.Module)

# The program runs once, so optimising it costs far more than it saves.
_COMPILER_OPTIONS = {'xla_backend_optimization_level': 0}


def init_module(make: Callable[[nnx.Rngs], M], seed: int) -> M:
  """Calls `make` under jit.

  Args:
    make: builds the module from its random streams.
    seed: of the parameters.
  """
  # rbg: one instruction per tensor; threefry's arithmetic takes three times as long to compile.
  key = jax.random.key(seed, impl='rbg')
  return jax.jit(lambda key: make(nnx.Rngs(key)), compiler_options=_COMPILER_OPTIONS)(key)
