"""Released tensors <-> our modules, for every network, one tensor at a time.

A network's parameters are made of *pieces*: one released tensor each, the parameters of stacked
layers of L. Everything that reads or writes weights walks over the same pieces: `from_released`
fills a module, `pf_jax.weights.convert` fills files, `to_released` goes back. `compare` says
beforehand, from names and shapes alone, everything that does not fit.

Released names are those of Wan2.1's own files; `Network.diffusers` renames them to the names that
diffusers and transformers use.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pf_jax.models.text import TextSpec, UMT5Encoder
from pf_jax.models.transformer import CausalTransformer, TransformerSpec
from pf_jax.models.vae import VaeSpec, WanVae
from pf_jax.weights import dit, umt5, vae
from pf_jax.weights.rules import Rule, dotted
from pf_jax.weights.tensors import LazyTensor, WeightsError, shown_name

NetworkSpec = TransformerSpec | VaeSpec | TextSpec
Tensors = Mapping[str, LazyTensor | np.ndarray]
_MOST_SHOWN = 300


class Piece(NamedTuple):
  """One released tensor and the parameter, or layer of a parameter, it becomes.

  Attributes:
    path: dotted path of the parameter.
    layer: its index along the leading L; None for a parameter that is not stacked.
    rule: the conversion.
    shape: released shape.
  """

  path: str
  layer: int | None
  rule: Rule
  shape: tuple[int, ...]

  @property
  def name(self) -> str:
    """Of the released tensor."""
    return self.rule.name.format(self.layer)


@dataclasses.dataclass(frozen=True)
class Network:
  """How one network corresponds to released files.

  Attributes:
    kind: 'transformer', 'vae' or 'text'.
    spec: sizes.
    shapes: the module with `jax.ShapeDtypeStruct` leaves.
    rules: dotted parameter path -> rule.
    diffusers: Wan2.1's name of a tensor -> its name in diffusers or transformers.
  """

  kind: str
  spec: NetworkSpec
  shapes: nnx.Module
  rules: Mapping[str, Rule]
  diffusers: Callable[[str], str]

  @property
  def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Parameters by dotted path."""
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(self.shapes)}

  def pieces(self) -> Iterator[Piece]:
    """All pieces, parameter by parameter."""
    for path, leaf in self.leaves.items():
      rule = self.rules[path]
      for layer in range(leaf.shape[0]) if rule.stacked else (None,):
        own = leaf.shape if layer is None else leaf.shape[1:]
        # No memory behind this array: only its shape is asked for.
        shape = rule.write(np.broadcast_to(np.zeros((), np.float32), own)).shape
        yield Piece(path, layer, rule, shape)

  @property
  def parameters(self) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))


def kind_of(spec: NetworkSpec) -> str:
  """'transformer', 'vae' or 'text'."""
  return {TransformerSpec: 'transformer', VaeSpec: 'vae', TextSpec: 'text'}[type(spec)]


def network(spec: NetworkSpec) -> Network:
  """The network that a spec describes."""
  if isinstance(spec, TransformerSpec):
    return Network('transformer', spec, _shapes(CausalTransformer, spec), dit.rules(spec),
                   dit.diffusers_name)
  if isinstance(spec, VaeSpec):
    shapes = _shapes(WanVae, spec)
    paths = [dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    return Network('vae', spec, shapes, {path: vae.rule_of(path) for path in paths},
                   functools.partial(vae.diffusers_name, spec=spec))
  return Network('text', spec, _shapes(UMT5Encoder, spec), umt5.RULES, umt5.transformers_name)


def _shapes(module: Callable[..., nnx.Module], spec: NetworkSpec) -> nnx.Module:
  return jax.eval_shape(lambda: module(spec, rngs=nnx.Rngs(0)))


@dataclasses.dataclass(frozen=True)
class Mismatch:
  """Everything that keeps tensors from becoming a network; empty (false) if they fit.

  Attributes:
    missing: names that are wanted and not there.
    unexpected: names that belong to no parameter.
    shapes: name, got, wanted.
    dtypes: name, got; floating point is wanted.
  """

  missing: tuple[str, ...] = ()
  unexpected: tuple[str, ...] = ()
  shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
  dtypes: tuple[tuple[str, str], ...] = ()

  def __bool__(self) -> bool:
    return bool(self.missing or self.unexpected or self.shapes or self.dtypes)

  def __str__(self) -> str:
    lines = [', '.join((f'{len(self.missing)} missing', f'{len(self.unexpected)} unexpected',
                        f'{len(self.shapes)} wrongly shaped', f'{len(self.dtypes)} wrongly typed'))]
    lines += [f'  missing: {name}' for name in self.missing]
    # Names come from a file, which may hold anything.
    lines += [f'  unexpected: {shown_name(name)}' for name in self.unexpected[:_MOST_SHOWN]]
    if (more := len(self.unexpected) - _MOST_SHOWN) > 0:
      lines.append(f'  unexpected: {more} more')
    lines += [f'  shape: {name} is {got}, wanted {wanted}' for name, got, wanted in self.shapes]
    lines += [f'  dtype: {name} is {got}, wanted floating point' for name, got in self.dtypes]
    return '\n'.join(lines)


def compare(tensors: Tensors, target: Network) -> Mismatch:
  """Compares tensors, by names, shapes and dtypes alone, with what a network is made of."""
  wanted = {piece.name: piece.shape for piece in target.pieces()}
  shared = [(name, tensors[name]) for name in wanted if name in tensors]
  return Mismatch(
      missing=tuple(name for name in wanted if name not in tensors),
      unexpected=tuple(name for name in tensors if name not in wanted),
      shapes=tuple((name, tuple(tensor.shape), wanted[name]) for name, tensor in shared
                   if tuple(tensor.shape) != wanted[name]),
      dtypes=tuple((name, str(tensor.dtype)) for name, tensor in shared
                   if not jnp.issubdtype(tensor.dtype, jnp.floating)))


def check(tensors: Tensors, target: Network, source: str = 'these tensors') -> None:
  """Raises what `compare` finds.

  Raises:
    WeightsError: all mismatches.
  """
  if mismatch := compare(tensors, target):
    raise WeightsError(f'{source} do not fit {target.kind} of {target.spec}: {mismatch}')


def read_piece(tensors: Tensors, piece: Piece) -> np.ndarray:
  """A released tensor in our layout, in its own dtype."""
  tensor = tensors[piece.name]
  return piece.rule.read(tensor.read() if isinstance(tensor, LazyTensor) else np.asarray(tensor))


def from_released(tensors: Tensors, spec: NetworkSpec, *,
                  progress: Callable[[str], None] | None = None) -> Any:
  """Builds a network from released tensors; beside the result, one parameter is held at a time.

  Args:
    tensors: under Wan2.1's names, all of them used.
    spec: sizes and precision.
    progress: told every released name that was read.

  Returns:
    The module.

  Raises:
    WeightsError: tensors that do not fit; all of them named.
  """
  target = network(spec)
  check(tensors, target)
  return fill(tensors, target, progress=progress)


def fill(tensors: Tensors, target: Network, *, progress: Callable[[str], None] | None = None
         ) -> Any:
  """As `from_released`, for tensors that are known to fit."""
  pieces: dict[str, list[Piece]] = {}
  for piece in target.pieces():
    pieces.setdefault(piece.path, []).append(piece)

  def parameter(path, leaf):
    parts = pieces[dotted(path)]
    array = np.empty(leaf.shape, leaf.dtype)
    for piece in parts:
      array[... if piece.layer is None else piece.layer] = read_piece(tensors, piece)
      if progress:
        progress(piece.name)
    return jnp.asarray(array)

  return jax.tree_util.tree_map_with_path(parameter, target.shapes)


def to_released(module: CausalTransformer | WanVae | UMT5Encoder) -> dict[str, np.ndarray]:
  """The inverse of `from_released`: every parameter under its released name and in its layout."""
  target = network(module.spec)
  values = {dotted(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(module)}
  return {piece.name: piece.rule.write(
      values[piece.path] if piece.layer is None else values[piece.path][piece.layer])
          for piece in target.pieces()}
