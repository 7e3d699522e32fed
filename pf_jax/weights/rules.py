"""Released tensors <-> our parameters, by one table of rules per network.

A rule names the tensor behind a parameter and says how to turn one into the other. Parameters
under `layers.` are stacked along a leading L: each is made of L tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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

  def names(self, num_layers: int) -> list[str]:
    """The tensors of all layers, or the single one."""
    return [self.name.format(i) for i in range(num_layers)] if '{}' in self.name else [self.name]


def transposed(name: str) -> Rule:
  """A linear kernel: released as [out, in], ours is [in, out]."""
  return Rule(name, np.transpose, np.transpose)


def without_batch(name: str) -> Rule:
  """A table released with a leading axis of size 1 that ours does not have."""
  return Rule(name, lambda array: array[0], lambda array: array[None])


def linear(path: str, name: str) -> dict[str, Rule]:
  """The rules of a linear layer with bias."""
  return {f'{path}.kernel': transposed(f'{name}.weight'), f'{path}.bias': Rule(f'{name}.bias')}


def read_module(tensors: Mapping[str, np.ndarray], shapes: Any, rules: Mapping[str, Rule],
                num_layers: int) -> Any:
  """Fills a module with released tensors.

  Args:
    tensors: flat dict under the released names; every one must be used.
    shapes: the module with `jax.ShapeDtypeStruct` leaves (from `jax.eval_shape`).
    rules: dotted parameter path -> rule.
    num_layers: L.

  Returns:
    The module with arrays in place of shapes.

  Raises:
    ValueError: tensors are missing, left over, or of another shape.
  """
  wanted = {name for rule in rules.values() for name in rule.names(num_layers)}
  hint = f'is {num_layers=} the checkpoint\'s, and are these the original names?'
  if missing := sorted(wanted - set(tensors)):
    raise ValueError(f'{len(missing)} tensors are missing, first {missing[0]!r}; {hint}')
  if extra := sorted(set(tensors) - wanted):
    raise ValueError(f'{len(extra)} tensors belong to no parameter, first {extra[0]!r}; {hint}')

  def fill(path, leaf):
    rule = rules[dotted(path)]
    sources = [np.asarray(tensors[name]) for name in rule.names(num_layers)]
    array = np.stack([rule.read(source) for source in sources])
    array = array if '{}' in rule.name else array[0]
    if array.shape != leaf.shape:
      raise ValueError(f'{rule.names(num_layers)[0]} of shape {sources[0].shape} makes '
                       f'{dotted(path)} {array.shape}, wanted {leaf.shape}; check the spec.')
    return jnp.asarray(array, leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def write_module(module: Any, rules: Mapping[str, Rule], num_layers: int) -> dict[str, np.ndarray]:
  """The inverse of `read_module`: every parameter under its released name and in its layout."""
  tensors: dict[str, np.ndarray] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(module):
    rule, array = rules[dotted(path)], np.asarray(leaf)
    parts = array if '{}' in rule.name else array[None]
    names = rule.names(num_layers)
    tensors |= {name: rule.write(part) for name, part in zip(names, parts, strict=True)}
  return tensors


def dotted(path: tuple[Any, ...]) -> str:
  """A parameter's readable path, such as 'encoder.down.0.conv1.kernel'."""
  names = (getattr(key, 'name', getattr(key, 'key', getattr(key, 'idx', None))) for key in path)
  # A parameter's array sits in the `value` of its nnx.Param, a list's entries in its `_data`.
  return '.'.join(str(name) for name in names if name not in ('value', '_data'))
