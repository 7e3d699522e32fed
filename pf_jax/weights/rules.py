"""The vocabulary of the tables that tie released tensors to our parameters.

A rule names the tensor behind a parameter and says how to turn one into the other. Parameters
under `layers.` are stacked along a leading L: each is made of L tensors, and a rule converts one.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Convert = Callable[[np.ndarray], np.ndarray]


def _same(array: np.ndarray) -> np.ndarray:
  return array


class Rule(NamedTuple):
  """Where one parameter comes from.

  Attributes:
    name: of the released tensor; '{}' stands for the layer's number.
    read: released layout -> ours, of one layer.
    write: the inverse.
  """

  name: str
  read: Convert = _same
  write: Convert = _same

  @property
  def stacked(self) -> bool:
    """Whether the parameter is made of one tensor a layer."""
    return '{}' in self.name


def transposed(name: str) -> Rule:
  """A linear kernel: released as [out, in], ours is [in, out]."""
  return Rule(name, np.transpose, np.transpose)


def without_batch(name: str) -> Rule:
  """A table released with a leading axis of size 1 that ours does not have."""
  return Rule(name, lambda array: array[0], lambda array: array[None])


def linear(path: str, name: str) -> dict[str, Rule]:
  """The rules of a linear layer with bias."""
  return {f'{path}.kernel': transposed(f'{name}.weight'), f'{path}.bias': Rule(f'{name}.bias')}


def rename(name: str, table: Sequence[tuple[str, str]]) -> str:
  """Applies every (pattern, replacement) of a table to a name, in order."""
  for pattern, replacement in table:
    name = re.sub(pattern, replacement, name)
  return name


def dotted(path: tuple[Any, ...]) -> str:
  """A parameter's readable path, such as 'encoder.down.0.conv1.kernel'."""
  names = (getattr(key, 'name', getattr(key, 'key', getattr(key, 'idx', None))) for key in path)
  # A parameter's array sits in the `value` of its nnx.Param, a list's entries in its `_data`.
  return '.'.join(str(name) for name in names if name not in ('value', '_data'))
