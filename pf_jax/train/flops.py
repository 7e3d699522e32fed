"""How many floating-point operations a function is, counted from its trace, and a device's peak.

Counted are the products: matrix products, convolutions and fused attention, 2 operations for each
multiply-add. Everything elementwise is left out, as is customary. What nobody reads is not counted
either: the compiler drops it.

Model FLOPs utilisation (MFU) asks what the model needs, so whatever is computed twice to save
memory does not count. Hardware FLOPs utilisation (HFU) asks what the device does:

  MFU   count(jax.value_and_grad(without_remat(loss)), ..., recomputation=False)    `of_step`
  HFU   count(jax.value_and_grad(loss), ...)

They differ by `jax.checkpoint`, and by fused attention, whose backward pass computes the logits
anew: 5 products of the size of the forward pass's 2, of which the model needs 4.

Attention is counted over all slots, empty ones included; convolutions over the taps that meet
data, not over padding or the zeros between dilated elements, so that a backward pass is as dear as
its forward pass for each of the two gradients.

`traffic_of_jaxpr` counts the bytes that the same products move, each operand and each result once.

Source: arXiv:2204.02311, appendix B (MFU and HFU); arXiv:2205.14135 (attention's recomputation).
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from pf_jax.types import Array, PyTree

# bfloat16, dense, FLOP/s: the first name that a `device_kind` contains. Sources: NVIDIA's data
# sheets of the cards (half of what they give "with sparsity") and Google Cloud's TPU pages.
_PEAKS = (
    ('H100 PCIe', 756e12), ('H100 NVL', 835e12), ('H100', 989e12), ('H200', 989e12),
    ('B200', 2250e12), ('A100', 312e12), ('L40S', 362e12), ('L4', 121e12),
    ('TPU v4', 275e12), ('TPU v5 lite', 197e12), ('TPU v5e', 197e12), ('TPU v5', 459e12),
    ('TPU v6', 918e12))
_MEASURED_SECONDS = 0.05
# Kernels of Pallas: what they do is their caller's to say, as `cost_estimate`.
_KERNELS = frozenset({'pallas_call', 'mpmd_map', 'core_map'})
# Primitives whose work is not to be seen in their parameters.
_UNKNOWN = frozenset({
    'ffi_call', 'ragged_dot_general', 'scaled_matmul', 'scaled_matmul_wrapper',
    'cudnn_fusion', 'cholesky', 'triangular_solve', 'eigh', 'svd', 'qr', 'fft', 'pure_callback'})


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...]]:
  return [variable.aval.shape for variable in variables]


def _dot_general(equation: core.JaxprEqn) -> int:
  (contracted, _), _ = equation.params['dimension_numbers']
  lhs, (out,) = _shapes(equation.invars)[0], _shapes(equation.outvars)
  return 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)


def _taps(out: int, size: int, kernel: int, stride: int, low: int, lhs_dilation: int,
          rhs_dilation: int) -> int:
  """Pairs of an output position and a tap that meets an element of the input, on one axis."""
  at = np.arange(out)[:, None] * stride + np.arange(kernel) * rhs_dilation - low
  inside = (at >= 0) & (at <= (size - 1) * lhs_dilation) & (at % lhs_dilation == 0)
  return int(inside.sum())


def _convolution(equation: core.JaxprEqn) -> int:
  params, numbers = equation.params, equation.params['dimension_numbers']
  (lhs, rhs), (out,) = _shapes(equation.invars[:2]), _shapes(equation.outvars)
  pairs = math.prod(
      _taps(out[o], lhs[i], rhs[k], stride, low, lhs_dilation, rhs_dilation)
      for o, i, k, stride, (low, _), lhs_dilation, rhs_dilation in zip(
          numbers.out_spec[2:], numbers.lhs_spec[2:], numbers.rhs_spec[2:],
          params['window_strides'], params['padding'], params['lhs_dilation'],
          params['rhs_dilation'], strict=True))
  batch, features = (out[axis] for axis in numbers.out_spec[:2])
  return 2 * batch * features * rhs[numbers.rhs_spec[1]] * pairs


def _attention(equation: core.JaxprEqn) -> int:
  """One of the products of cuDNN's fused attention, q k or weights v."""
  query, key = _shapes(equation.invars[:2])
  tokens = 2 if equation.params['layout'] else 1  # [B, N, T, H], or [B, T, N, H] for layout 0
  return 2 * math.prod(query) * key[tokens]


_PRODUCTS = {'dot_general': _dot_general, 'conv_general_dilated': _convolution}
_ATTENTION = 'dot_product_attention'


class _Counter:
  """Walks a jaxpr and sums what its products take; see `count`."""

  def __init__(self, recomputation: bool, trips: int | None):
    self._recomputation, self._trips = recomputation, trips

  def jaxpr(self, jaxpr: core.Jaxpr) -> int:
    """Of all equations."""
    return sum(self.equation(equation) for equation in jaxpr.eqns)

  def equation(self, equation: core.JaxprEqn) -> int:
    """Of one, with the functions inside it."""
    name = equation.primitive.name
    estimate = equation.params.get('cost_estimate') if name in _KERNELS else None
    if name in _UNKNOWN or (name in _KERNELS and estimate is None):
      raise ValueError(f'the operations of the primitive {name!r} are not to be seen in its trace; '
                       'count a function that does the same without it.')
    if estimate is not None:
      return self.estimated(estimate)
    if name in _PRODUCTS or name.startswith(_ATTENTION):
      return self.product(equation)
    inner: list[int] = [self.jaxpr(jaxpr) for jaxpr in _jaxprs(equation)]
    if name == 'scan':
      return int(equation.params['length']) * sum(inner)
    if name == 'cond':
      return max(inner)
    if name == 'while' and any(inner):
      if self._trips is None:
        raise ValueError(f'a loop of {sum(inner)} operations a turn has no known length; say how '
                         'many turns it takes with trips=.')
      return self._trips * sum(inner)
    if name == 'shard_map':
      return _shards(equation) * sum(inner)
    return sum(inner)

  def product(self, equation: core.JaxprEqn) -> int:
    """Operations of a matrix product, a convolution or fused attention."""
    name = equation.primitive.name
    if name in _PRODUCTS:
      return _PRODUCTS[name](equation)
    return _attention(equation) * (2 if '_fwd' in name else 5 if self._recomputation else 4)

  def estimated(self, estimate: Any) -> int:
    """Of a kernel, from its `pallas.CostEstimate`."""
    return estimate.flops


class _Traffic(_Counter):
  """The same for bytes; see `traffic_of_jaxpr`."""

  def product(self, equation: core.JaxprEqn) -> int:
    """Operands and results, each once."""
    arrays: list[Any] = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)

  def estimated(self, estimate: Any) -> int:
    return estimate.bytes_accessed if estimate.flops else 0


def _jaxprs(equation: core.JaxprEqn) -> list[core.Jaxpr]:
  """The functions among an equation's parameters: bodies, branches."""
  found = []
  for value in equation.params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.Jaxpr):
        found.append(item)
      elif isinstance(item, core.ClosedJaxpr):
        found.append(item.jaxpr)
  return found


def _shards(equation: core.JaxprEqn) -> int:
  """Devices that run the body of a `shard_map`, each on its own part."""
  sizes = equation.params['mesh'].shape
  return math.prod(sizes[axis] for axis in equation.params['newly_manual_axes'])


def count(function: Callable, *args: PyTree, recomputation: bool = True, trips: int | None = None
          ) -> int:
  """Floating-point operations of one call, on all devices together; nothing is computed.

  Loops count their body as often as it runs, conditions their dearest branch.

  Args:
    function: anything that JAX can trace.
    *args: arrays or `jax.ShapeDtypeStruct`s.
    recomputation: whether fused attention's backward pass counts the logits that it computes anew.
      (What `jax.checkpoint` repeats is part of the trace: see `without_remat`.)
    trips: turns of each `while` loop with products in it.

  Raises:
    ValueError: a `while` loop without `trips`, or a primitive that hides its work.
  """
  return count_jaxpr(jax.make_jaxpr(function)(*args), recomputation=recomputation, trips=trips)


def count_jaxpr(closed: Any, *, recomputation: bool = True, trips: int | None = None) -> int:
  """`count` of what was traced already."""
  return _Counter(recomputation, trips).jaxpr(_needed(closed))


def traffic_of_jaxpr(closed: Any, *, trips: int | None = None) -> int:
  """Bytes that the products of a traced function read and write, on all devices together.

  Each product reads its operands once and writes its result once; whatever is elementwise is taken
  to be computed by the product before or after it, and moves nothing, even if it is a kernel of its
  own. It is a lower bound, but for results that the compiler keeps from one product to the next.

  Args:
    closed: from `jax.make_jaxpr`, or traced for another machine.
    trips: turns of each `while` loop with products in it.

  Raises:
    ValueError: as `count`.
  """
  return _Traffic(True, trips).jaxpr(_needed(closed))


def _needed(closed: Any) -> core.Jaxpr:
  """Without what nobody reads."""
  used = [True] * len(closed.jaxpr.outvars)
  return partial_eval.dce_jaxpr(closed.jaxpr, used, instantiate=True)[0]


def _keep_everything(jaxpr: Any) -> Any:
  """The same jaxpr, whose checkpoints keep what they would compute again."""
  if type(jaxpr) is tuple:  # branches; not the named tuples that say how a gather works
    return tuple(_keep_everything(item) for item in jaxpr)
  if not isinstance(jaxpr, core.Jaxpr):  # JAX 0.12 has one kind, earlier versions also a closed one
    closed = isinstance(jaxpr, core.ClosedJaxpr)
    return jaxpr.replace(jaxpr=_keep_everything(jaxpr.jaxpr)) if closed else jaxpr
  equations = []
  for equation in jaxpr.eqns:
    params = {name: _keep_everything(value) for name, value in equation.params.items()}
    if equation.primitive is core.primitives.remat_p:
      params['policy'] = jax.checkpoint_policies.everything_saveable
    equations.append(equation.replace(params=params))
  return jaxpr.replace(eqns=equations)


def without_remat(function: Callable) -> Callable:
  """The same function as if nothing in it were under `jax.checkpoint`: for counting its gradient.

  What was differentiated inside the function itself stays as it is.
  """

  def plain(*args: PyTree) -> PyTree:
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    outputs = core.jaxpr_as_fun(_keep_everything(closed))(*jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), outputs)

  return plain


def of_step(loss: Callable, params: PyTree, *rest: PyTree, **turn: Any) -> int:
  """Model FLOPs of a loss with its gradient in `params`: the numerator of MFU.

  Args:
    loss: (params, *rest, **turn) -> (scalar, metrics), as `Objective.loss`.
    params: differentiated; arrays or shapes.
    *rest: batch and key, or their shapes.
    **turn: static arguments, such as `moving`.
  """
  plain = without_remat(functools.partial(loss, **turn))
  return count(jax.value_and_grad(plain, has_aux=True), params, *rest, recomputation=False)


class StepFlops:
  """Model FLOPs of an objective's steps, counted once for each kind of step.

  Args:
    loss: `Objective.loss`.
  """

  def __init__(self, loss: Callable):
    self._loss = loss
    self._known: dict[Any, int] = {}

  def __call__(self, params: PyTree, batch: PyTree, key: Array,
               moving: frozenset[str] | None = None) -> int:
    """Of a step on such a batch; reads shapes only, so the device is not waited for.

    Args:
      params, batch, key: the loss's arguments; donated arrays will do.
      moving: the parts that move, if the objective has players.
    """
    leaves, structure = jax.tree.flatten(batch)
    kind = moving, structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    if kind not in self._known:
      turn = {} if moving is None else {'moving': moving}
      shapes = jax.tree.map(_shape, (params, batch, key))
      self._known[kind] = of_step(self._loss, *shapes, **turn)
    return self._known[kind]


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def peak_flops(device: Any) -> tuple[float, str]:
  """What a device could do at best, in FLOP/s, and where the number is from.

  Args:
    device: a `jax.Device`.

  Returns:
    (dense bfloat16 peak, 'data sheet') of a known accelerator; else (rate of a float32 matrix
    product that takes about 50 ms, 'measured'), measured once a process.
  """
  kind = device.device_kind.lower()
  for name, peak in _PEAKS:
    if name.lower() in kind:
      return peak, 'data sheet'
  return _measured(device), 'measured'


@functools.cache
def _measured(device: Any) -> float:
  """FLOP/s of a product, the best of three after one to compile and warm up."""
  size, rate = 512, _rate(512, device)
  while size < 16384 and 2 * size**3 / rate < _MEASURED_SECONDS / 2:
    size = min(4 * size, int((rate * _MEASURED_SECONDS / 2) ** (1 / 3)) // 128 * 128 + 128)
    rate = _rate(size, device)
  return rate


def _rate(size: int, device: Any) -> float:
  matrix = jax.device_put(np.ones((size, size), np.float32), device)
  product = jax.jit(jnp.matmul)
  best = math.inf
  for _ in range(4):
    began = time.perf_counter()
    product(matrix, matrix).block_until_ready()
    best = min(best, time.perf_counter() - began)
  return 2 * size**3 / best
