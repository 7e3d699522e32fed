"""Kernels of Pallas' Mosaic GPU for Hopper cards: what one has room for, and what it costs.

Kernels say what they cost, so that their operations can be counted. `plgpu.kernel` takes an
estimate only in later versions of JAX than the oldest one that is supported; `kernel` is the same
by way of `pl.kernel`, whose trace keeps it (`pf_jax.train.flops` reads it there).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a product that a warpgroup computes at once
SHARED_BYTES = 227 * 1024 - 1024  # of a program; the rest is for barriers
# Registers of a thread that (computes, fetches), by how many warpgroups compute. A multiprocessor
# has 65,536, which is 512 for each of 128 places in a warpgroup; three warpgroups are launched with
# 168 each, 504 in all. A warpgroup that asks for more than the others leave waits for ever.
REGISTERS = {2: (232, 40), 3: (160, 32)}


def check_warpgroups(warpgroups: int) -> None:
  """Raises ValueError where registers cannot be shared out between so many that compute."""
  if warpgroups not in REGISTERS:
    raise ValueError(f'{warpgroups=} must be 2 or 3: registers are shared out between them.')


def kernel(body: Callable[..., None], *, name: str, out_type: Any, scratch_types: Sequence[Any],
           grid: tuple[int, ...], grid_names: tuple[str, ...], cost: pl.CostEstimate,
           num_threads: int | None = None, thread_name: str | None = None, interpret: Any = None
           ) -> Callable:
  """A function of arrays that runs `body` on references to them, to its results and to scratch.

  Args:
    body: a program of the grid.
    name: of the kernel, for profiles and reports.
    out_type: shapes of the results.
    scratch_types: shared memory and barriers of a program.
    grid: programs along each axis.
    grid_names: of the axes.
    cost: of the whole grid: operations of products without padding, bytes of global memory with
      each operand and result once.
    num_threads: warpgroups of a program; None: one.
    thread_name: the axis that tells them apart.
    interpret: parameters of Pallas' interpreter, on machines without the card.
  """
  mesh = plgpu.Mesh(grid=grid, grid_names=grid_names, num_threads=num_threads,
                    thread_name=thread_name)

  def with_scratch(*refs: Any) -> None:
    pl.run_scoped(functools.partial(body, *refs), *scratch_types, collective_axes=thread_name or ())

  return pl.kernel(
      with_scratch, out_type=out_type, mesh=mesh, name=name,
      compiler_params=plgpu.CompilerParams(
          approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
      cost_estimate=cost, **({} if interpret is None else {'interpret': interpret}))
