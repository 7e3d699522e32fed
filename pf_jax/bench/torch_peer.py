"""The same work in PyTorch, for comparison in the same run; PyTorch is imported when asked for.

Its attention is `scaled_dot_product_attention`, which picks its own fastest kernel. The layer is
written out operation by operation and runs eagerly, as public Wan code does; it has our weights and
inputs and gives the same numbers (tests/parity says so).
"""

import functools
import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pf_jax.bench.timing import Call
from pf_jax.models.transformer import EPS, Layer, TransformerSpec
from pf_jax.types import Array

if TYPE_CHECKING:
  from pf_jax.bench.block import LayerInputs


def find() -> ModuleType | str:
  """PyTorch on the kind of device that JAX runs on, or why there is none."""
  try:
    torch = importlib.import_module('torch')
  except ImportError as error:
    return f'cannot be imported ({error})'
  platform = jax.default_backend()
  if platform == 'gpu' and not torch.cuda.is_available():
    return f'torch {torch.__version__} sees no GPU'
  if platform not in ('cpu', 'gpu'):
    return f'torch is not compared on {platform}'
  return torch


def sorted_out(name: str, peer: Call | str) -> tuple[dict[str, Call], dict[str, str]]:
  """A peer among those that are there and those that are not, one of which is empty."""
  return ({}, {name: peer}) if isinstance(peer, str) else ({name: peer}, {})


def _device() -> str:
  return 'cuda' if jax.default_backend() == 'gpu' else 'cpu'


def _call(torch: Any, function) -> Call:
  """Times a function, without gradients."""

  def run() -> Any:
    with torch.inference_mode():
      return function()

  def wait(result: Any) -> None:
    if _device() == 'cuda':
      torch.cuda.synchronize()

  return Call(run, wait)


def attention(queries: tuple[int, ...], keys: tuple[int, ...], dtype: str) -> Call | str:
  """Attention over rows in one piece, laid out as PyTorch likes them.

  Args:
    queries: [1, T, N, H].
    keys: [1, S, N, H].
    dtype: of all of them.

  Returns:
    The call, or why there is none.
  """
  torch = find()
  if isinstance(torch, str):
    return torch
  generator = torch.Generator(_device()).manual_seed(0)

  def draw(shape: tuple[int, ...]) -> Any:
    batch, tokens, heads, size = shape
    return torch.randn((batch, heads, tokens, size), generator=generator,
                       dtype=getattr(torch, dtype), device=_device())

  q, k, v = draw(queries), draw(keys), draw(keys)
  return _call(torch, lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))


class TorchLayer:
  """One layer of the transformer; see `pf_jax.models.transformer.Layer`, name by name."""

  def __init__(self, torch: Any, layer: Layer, inputs: 'LayerInputs', spec: TransformerSpec):
    """Copies weights and inputs; linear weights are laid out [out, in] as in `torch.nn.Linear`."""
    self.torch, self.heads = torch, spec.num_heads
    self.dtype = getattr(torch, spec.dtypes.compute)
    tensor = functools.partial(_tensor, torch)
    self.weights = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(layer):
      name = '.'.join(str(getattr(key, 'name', getattr(key, 'key', key))) for key in path)
      value = tensor(leaf)
      self.weights[name.removesuffix('.value')] = (
          value.T.contiguous() if 'kernel' in name else value)
    self.x, self.modulation = tensor(inputs.x), tensor(inputs.modulation)
    self.rotation = torch.complex(tensor(inputs.table.cos), tensor(inputs.table.sin))[:, None]
    self.text, self.history = (tuple(tensor(x).transpose(1, 2).contiguous() for x in pair)
                               for pair in (inputs.text, inputs.history))

  def _linear(self, name: str, x: Any) -> Any:
    weights = self.weights
    return self.torch.nn.functional.linear(x.to(self.dtype), weights[f'{name}.kernel'],
                                           weights[f'{name}.bias'])

  def _split(self, x: Any) -> Any:
    """[1, T, D] -> [1, T, N, H]."""
    return x.unflatten(-1, (self.heads, -1))

  def _normed(self, name: str, x: Any) -> Any:
    """Root-mean-square norm over the full width, in float32."""
    wide = x.float()
    wide = wide * self.torch.rsqrt((wide * wide).mean(-1, keepdim=True) + EPS)
    return (wide * self.weights[f'{name}.scale']).to(x.dtype)

  def _layer_norm(self, x: Any) -> Any:
    return self.torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)

  def _rotate(self, x: Any) -> Any:
    """[1, T, N, H]; neighbours are a complex number."""
    pairs = self.torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return self.torch.view_as_real(pairs * self.rotation).flatten(-2).to(x.dtype)

  def _attend(self, q: Any, k: Any, v: Any) -> Any:
    """q [1, T, N, H], k and v [1, N, S, H] -> [1, T, D]."""
    out = self.torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v)
    return out.transpose(1, 2).flatten(-2)

  def _self_attention(self, x: Any) -> Any:
    q = self._rotate(self._split(self._normed('self_attn.norm_q', self._linear('self_attn.q', x))))
    k = self._rotate(self._split(self._normed('self_attn.norm_k', self._linear('self_attn.k', x))))
    v = self._split(self._linear('self_attn.v', x))
    k, v = (self.torch.cat([past, own.transpose(1, 2)], dim=2)
            for past, own in zip(self.history, (k, v), strict=True))
    return self._linear('self_attn.o', self._attend(q, k, v))

  def _cross_attention(self, x: Any) -> Any:
    x = self._layer_norm(x) * self.weights['norm3.scale'] + self.weights['norm3.bias']
    q = self._split(self._normed('cross_attn.norm_q', self._linear('cross_attn.q', x)))
    return self._linear('cross_attn.o', self._attend(q, *self.text))

  def __call__(self) -> Any:
    """The new residual stream [1, T, D]."""
    x = self.x
    per_frame = (self.weights['modulation'] + self.modulation).unbind(2)
    tokens = x.shape[1] // self.modulation.shape[1]
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        part.repeat_interleave(tokens, dim=1) for part in per_frame)
    x = x + self._self_attention(self._layer_norm(x) * (1 + scale1) + shift1).float() * gate1
    x = x + self._cross_attention(x).float()
    hidden = self._linear('ffn_in', self._layer_norm(x) * (1 + scale2) + shift2)
    hidden = self.torch.nn.functional.gelu(hidden, approximate='tanh')
    return x + self._linear('ffn_out', hidden).float() * gate2


def _tensor(torch: Any, array: Array) -> Any:
  """A copy on PyTorch's device; bfloat16, which NumPy lacks, by way of float32."""
  value = torch.from_numpy(np.array(array, np.float32))
  return value.to(_device(), getattr(torch, str(array.dtype)))


def layer(layer: Layer, inputs: 'LayerInputs', spec: TransformerSpec) -> Call | str:
  """One layer with the same weights and inputs, or why there is none."""
  torch = find()
  if isinstance(torch, str):
    return torch
  return _call(torch, TorchLayer(torch, layer, inputs, spec))
