"""What this machine can do: one large copy and one large product, measured beside all the rest.

The copy goes into memory that is there already: on a CPU, fresh pages cost more than the copy. A
ceiling is the fastest of its timings, everything that is compared with it a median.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pf_jax.bench import timing
from pf_jax.bench.config import Effort
from pf_jax.bench.subject import draw
from pf_jax.bench.timing import Call, Timing
from pf_jax.types import Array

_SMALLEST_COPY, _SMALLEST_PRODUCT = 1 << 22, 256


class _Copy:
  """Copies an array over another one."""

  def __init__(self, size: int):
    self.work = 2 * size  # bytes read and written
    self._source, self._target = (
        draw(jax.ShapeDtypeStruct((size // 4,), jnp.float32), seed) for seed in (0, 1))
    self._copy = jax.jit(lambda source, target: jnp.copy(source), donate_argnums=1,
                         keep_unused=True)

  def __call__(self) -> Array:
    self._target = self._copy(self._source, self._target)
    return self._target


class _Product:
  """Multiplies two square matrices."""

  def __init__(self, rows: int, dtype: str):
    self.work = 2 * rows**3  # operations
    shape = jax.ShapeDtypeStruct((rows, rows), jnp.dtype(dtype))
    self._matrices = [draw(shape, seed) for seed in (0, 1)]
    self._product = jax.jit(jnp.matmul)

  def __call__(self) -> Array:
    return self._product(*self._matrices)


def _large_enough(make: Callable[[int], Any], size: int, most: int, step: int, seconds: float
                  ) -> tuple[Any, int]:
  """Work of a size that takes some time, or of the largest size."""
  size = min(size, most)
  while True:
    work = make(size)
    taken = timing.alternate({'': Call(work)}, seconds=0, least=1, most=1)[''].samples[0]
    if size == most or taken >= seconds:
      return work, size
    size = min(size * step, most)


class Ceilings:
  """The two limits, each measured when it is first asked for.

  Args:
    effort: sizes and time.
  """

  def __init__(self, effort: Effort):
    self._effort = effort
    self._records: dict[str, dict[str, Any]] = {}
    self.copy = functools.cache(self._copy)
    self.product = functools.cache(self._product)

  def _measure(self, name: str, unit: str, make: Callable[[int], Any], size: int, most: int,
               step: int) -> float:
    effort = self._effort
    work, size = _large_enough(make, size, most, step, effort.ceiling_seconds)
    measured: Timing = timing.alternate({name: Call(work)}, seconds=effort.seconds,
                                        least=effort.least, most=effort.most)[name]
    rate = work.work / min(measured.samples)
    self._records[name] = {'size': size, unit: work.work, f'{unit}_per_second': rate,
                           'samples': measured.samples}
    return rate

  def _copy(self) -> float:
    """Bytes read and written per second."""
    most = self._effort.ceiling_bytes
    return self._measure('copy', 'bytes', _Copy, _SMALLEST_COPY, most, 4)

  def _product(self, dtype: str) -> float:
    """Operations per second of a product of matrices of a dtype."""
    return self._measure(f'product {dtype}', 'flops', lambda rows: _Product(rows, dtype),
                         _SMALLEST_PRODUCT, self._effort.ceiling_rows, 2)

  def to_json(self) -> dict[str, Any]:
    """Those measured so far; 'size' is bytes of the copied array, or rows of the matrices."""
    return dict(self._records)
