"""Provisional."""
import dataclasses
from collections.abc import Callable

import numpy as np


class WeightsError(ValueError):
  """Weights that cannot be used."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """A tensor on disk."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]
