"""Low-rank adapters: train two thin matrices beside each frozen one.

  W' = W + alpha / rank * a b        W [in, out], a [in, rank], b [rank, out]

`a` starts random and `b` at zero, so that training starts at the base model. Adapters are a plain
pytree apart from the module, {path of the linear layer: Adapter}, and the base is an ordinary
argument: gradients, optimizer, checkpoints and averages see the adapters only. There are two ways
to put them together, equal up to rounding:

  attach   the linear layers add x a b themselves: for losses. No gradient of the size of W is ever
           formed, and a change of W below its precision is not lost.
  merge    the product is added to W: for sampling, and for packages and exports, which know no
           adapters.

Optimizers need nothing special. Paths are `train.state`'s, so under `layers` an adapter counts as a
stack of matrices: AdamW decays both factors, `default_muon_axes` gives both to Muon (but for those
of embeddings and of the head, as with whole matrices).

Source: arXiv:2106.09685; the initial distribution is that of its reference code.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from pf_jax.train.state import STACKED, map_with_names
from pf_jax.types import Array

Module = TypeVar('Module', bound=nnx.Module)

_KERNEL = 'kernel'


@dataclasses.dataclass(frozen=True)
class LoraSpec:
  """Which matrices get adapters, and of which size.

  Attributes:
    rank: columns of `a` and rows of `b`; 0 trains all weights instead, without adapters.
    alpha: the product is scaled by alpha / rank; None: by 1.
    targets: linear layers, by the last parts of their paths: 'q' is that of every attention,
      'self_attn/q' that of the self-attention only.

  Raises:
    ValueError: a value out of range.
  """

  rank: int = 0
  alpha: float | None = None
  targets: tuple[str, ...] = ('q', 'k', 'v', 'o', 'ffn_in', 'ffn_out')

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(f'rank={self.rank} must be 0 (train all weights) or more.')
    if self.alpha is not None and not 0 < self.alpha < float('inf'):
      raise ValueError(f'alpha={self.alpha} must be positive, or None for a scale of 1.')
    targets: Any = self.targets
    if isinstance(targets, str) or not all(targets) or not targets:
      raise ValueError(f'targets={self.targets!r} must be a tuple of names of linear layers.')

  @property
  def scale(self) -> float:
    """What the product is multiplied by."""
    return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank


class Adapter(NamedTuple):
  """The factors beside one matrix, float32; a leading L where layers are stacked.

  Attributes:
    a: [in, rank].
    b: [rank, out].
  """

  a: Array
  b: Array


def _linears(module: nnx.Module) -> dict[str, Array]:
  """Path of each linear layer -> its kernel [in, out], stacked or not."""
  found = {}

  def visit(names: tuple[str, ...], leaf: Array) -> None:
    if names[-1] == _KERNEL and leaf.ndim == (3 if STACKED in names else 2):
      found['/'.join(names[:-1])] = leaf

  map_with_names(visit, module)
  return found


def _targeted(module: nnx.Module, spec: LoraSpec) -> dict[str, Array]:
  """The linear layers that the spec names."""
  linears = _linears(module)

  def matches(path: str, target: str) -> bool:
    return f'/{path}'.endswith(f'/{target}')

  unknown = [t for t in spec.targets if not any(matches(path, t) for path in linears)]
  if unknown:
    raise ValueError(f'targets {unknown} name no linear layer; there are {sorted(linears)}.')
  return {path: kernel for path, kernel in linears.items()
          if any(matches(path, target) for target in spec.targets)}


def init(module: nnx.Module, spec: LoraSpec, seed: int) -> dict[str, Adapter]:
  """Fresh adapters, under which the module is as before.

  Args:
    module: arrays or shapes; not changed.
    spec: see `LoraSpec`. What an adapter starts from does not depend on which others there are.
    seed: of `a`, which is uniform within 1 / sqrt(in).

  Returns:
    Path of the linear layer -> adapter; empty for rank 0.

  Raises:
    ValueError: a target that the module does not have, or a rank above one of its sizes.
  """
  if not spec.rank:
    return {}
  adapters = {}
  for path, kernel in sorted(_targeted(module, spec).items()):
    *stack, fan_in, fan_out = kernel.shape
    if spec.rank > min(fan_in, fan_out):
      raise ValueError(f'rank={spec.rank} exceeds {path} of [{fan_in}, {fan_out}]; use at most '
                       f'{min(fan_in, fan_out)}, or 0 to train all weights.')
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    bound = 1 / math.sqrt(fan_in)
    adapters[path] = Adapter(
        jax.random.uniform(key, (*stack, fan_in, spec.rank), minval=-bound, maxval=bound),
        jnp.zeros((*stack, spec.rank, fan_out)))
  return adapters


def _check(module: nnx.Module, adapters: Mapping[str, Adapter]) -> None:
  """Refuses adapters of another module."""
  linears = _linears(module)
  if missing := sorted(set(adapters) - set(linears)):
    raise ValueError(f'adapters of {missing} fit no linear layer; there are {sorted(linears)}.')
  for path, (a, b) in adapters.items():
    shape = linears[path].shape
    if (*a.shape[:-1], b.shape[-1]) != shape or (*b.shape[:-2], a.shape[-1]) != b.shape[:-1]:
      raise ValueError(f'the adapter of {path} is {a.shape} x {b.shape}, wanted factors of '
                       f'{shape}; it was made for another model.')


def merge(module: Module, adapters: Mapping[str, Adapter], spec: LoraSpec) -> Module:
  """The module with W + alpha / rank * a b for W; differentiable in module and adapters.

  The sum is float32 and rounded to W's dtype: of weights in half precision, changes too small for
  it are lost. Without adapters the module itself comes back.

  Raises:
    ValueError: adapters that do not fit the module.
  """
  if not adapters:
    return module
  _check(module, adapters)

  def add(names: tuple[str, ...], leaf: Array) -> Array:
    adapter = adapters.get('/'.join(names[:-1])) if names[-1] == _KERNEL else None
    if adapter is None:
      return leaf
    product = jnp.einsum('...ir,...ro->...io', adapter.a, adapter.b, precision='highest')
    return (leaf.astype(jnp.float32) + spec.scale * product).astype(leaf.dtype)

  return map_with_names(add, module)


class AdaptedLinear(nnx.Module):
  """A linear layer and what its adapter adds, in the layer's precision.

  Args:
    linear: the frozen layer.
    adapter: its factors.
    scale: of their product.
  """

  def __init__(self, linear: nnx.Linear, adapter: Adapter, scale: float):
    self.linear = linear
    self.a, self.b = nnx.Param(adapter.a), nnx.Param(adapter.b)
    self.scale = scale

  def __call__(self, x: Array) -> Array:
    y = self.linear(x)
    a, b = self.a[...].astype(y.dtype), self.b[...].astype(y.dtype)
    return y + self.scale * ((x.astype(y.dtype) @ a) @ b)


def attach(module: Module, adapters: Mapping[str, Adapter], spec: LoraSpec) -> Module:
  """A copy of the module whose adapted linear layers are `AdaptedLinear`; shares its arrays.

  It runs like the module, layers stacked or not, but is not made to be saved: see `merge`.

  Raises:
    ValueError: adapters that do not fit the module.
  """
  if not adapters:
    return module
  _check(module, adapters)
  module = jax.tree.map(lambda leaf: leaf, module)
  for path, adapter in adapters.items():
    *outer, name = path.split('/')
    owner = module
    for part in outer:
      owner = getattr(owner, part)
    setattr(owner, name, AdaptedLinear(getattr(owner, name), adapter, spec.scale))
  return module


def count(adapters: Mapping[str, Adapter]) -> int:
  """Numbers to train."""
  return sum(leaf.size for leaf in jax.tree.leaves(adapters))
