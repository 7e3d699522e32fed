"""The text encoder: UMT5's encoder stack, at any size.

A layer of width D with N heads of size H:

  x = x + o( softmax(q k^T + bias(key - query) + mask) v ),   q, k, v from RMSNorm(x)
  x = x + fc2( fc1(y) * gelu(gate(y)) ),                      y = RMSNorm(x)

Three things differ from a usual transformer. The scores are *not* divided by sqrt(H): the scale
lives in the initialisation of q. There is no position embedding: every layer has its own table of
biases, indexed by the bucketed distance between key and query. No linear layer has a bias.

Layers are stacked along a leading L and run by one `jax.lax.scan`. Parameters correspond one to
one to the tensors of Wan2.1's text checkpoint (see `pf_jax.weights`).

Source: Raffel et al. 2020, arXiv:1910.10683 (T5) and Chung et al. 2023 (UMT5: a bias table per
layer, shared by none).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pf_jax.types import Array, DTypes, check_shape


@dataclasses.dataclass(frozen=True)
class TextSpec:
  """Sizes of the text encoder; defaults are the shipped miniature's. See also `umt5_xxl`.

  Attributes:
    vocab_size: rows of the embedding; at least the tokenizer's vocabulary.
    width: D, also the width of the text rows the transformer reads.
    num_layers: L.
    num_heads: N.
    head_dim: H; N * H need not equal D.
    ffn_width: hidden width of the gated feed-forward.
    num_buckets: rows of a relative-position table, half for keys after the query.
    max_distance: from here on all distances share the last bucket, tokens.
    max_tokens: text rows the tokenizer pads to. The encoder itself takes any length.
    dtypes: precision.

  Raises:
    ValueError: a size is not positive, or the buckets cannot be laid out.
  """

  vocab_size: int = 128
  width: int = 64
  num_layers: int = 2
  num_heads: int = 4
  head_dim: int = 16
  ffn_width: int = 128
  num_buckets: int = 32
  max_distance: int = 128
  max_tokens: int = 16
  dtypes: DTypes = DTypes()

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, int) and value < 1:
        raise ValueError(f'{field.name}={value} must be at least 1.')
    if self.num_buckets % 4:
      raise ValueError(f'num_buckets={self.num_buckets} is not a multiple of 4; two halves (before '
                       f'and after the query) are each half exact, half logarithmic.')
    if self.max_distance <= self.num_buckets // 4:
      raise ValueError(f'max_distance={self.max_distance} leaves no room for the logarithmic '
                       f'buckets; use more than {self.num_buckets // 4}.')

  @classmethod
  def umt5_xxl(cls, **choices) -> 'TextSpec':
    """Wan2.1's text encoder: 5,680,910,336 parameters, 512 rows; `choices` are other fields."""
    return cls(vocab_size=256384, width=4096, num_layers=24, num_heads=64, head_dim=64,
               ffn_width=10240, max_tokens=512, **choices)

  @property
  def attention_width(self) -> int:
    """N * H."""
    return self.num_heads * self.head_dim


def relative_buckets(length: int, *, num_buckets: int, max_distance: int) -> np.ndarray:
  """Which row of a bias table belongs to each (query, key) pair.

  Half of the buckets are for keys behind the query, half for keys ahead of it. In each half the
  first half is exact (distance 0, 1, 2, ...) and the rest grows logarithmically up to
  `max_distance`, where it saturates.

  Args:
    length: T, tokens.
    num_buckets: rows of the table.
    max_distance: tokens.

  Returns:
    int32 [T, T], query by key.

  Source: arXiv:1910.10683, section 2.1.
  """
  positions = np.arange(length)
  offset = positions[None, :] - positions[:, None]
  half, exact = num_buckets // 2, num_buckets // 4
  distance = np.abs(offset)
  # Distance 0 has no logarithm; it is exact anyway.
  octaves = np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact)
  logarithmic = np.minimum(exact + np.floor(octaves * (half - exact)).astype(np.int64), half - 1)
  bucket = np.where(distance < exact, distance, logarithmic)
  return (bucket + np.where(offset > 0, half, 0)).astype(np.int32)


class RMSNorm(nnx.Module):
  """Divides by the root mean square over the last axis, in float32, and scales."""

  def __init__(self, width: int):
    self.scale = nnx.Param(jnp.ones(width))

  def __call__(self, x: Array) -> Array:
    x = x.astype(jnp.float32)
    rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    return x * rms * self.scale[...]


class Attention(nnx.Module):
  """Unscaled multi-head self-attention with a table of relative-position biases."""

  def __init__(self, spec: TextSpec, *, rngs: nnx.Rngs):
    wide, inner, dtypes = spec.width, spec.attention_width, spec.dtypes
    # q carries the 1/sqrt(H) that the scores do not have.
    self.q = _linear(wide, inner, (wide * spec.head_dim) ** -0.5, dtypes, rngs)
    self.k = _linear(wide, inner, wide ** -0.5, dtypes, rngs)
    self.v = _linear(wide, inner, wide ** -0.5, dtypes, rngs)
    self.o = _linear(inner, wide, inner ** -0.5, dtypes, rngs)
    table = jax.random.normal(rngs.params(), (spec.num_buckets, spec.num_heads)) * wide ** -0.5
    self.position_bias = nnx.Param(table.astype(dtypes.params))
    self.num_heads = spec.num_heads

  def __call__(self, x: Array, mask: Array, buckets: Array) -> Array:
    """x [B, T, D], mask bool [B, T] (which keys count), buckets [T, T] -> [B, T, D]."""
    q, k, v = (self._heads(project(x)) for project in (self.q, self.k, self.v))
    scores = jnp.einsum('btnh,bsnh->bnts', q, k, preferred_element_type=jnp.float32)
    bias = self.position_bias[...].astype(jnp.float32)[buckets]
    scores = scores + jnp.einsum('tsn->nts', bias)[None]
    # A finite minimum, so that a row without any key stays a number.
    scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum('bnts,bsnh->btnh', weights, v)
    return self.o(mixed.reshape(*mixed.shape[:2], -1))

  def _heads(self, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], self.num_heads, -1)


class GatedFeedForward(nnx.Module):
  """fc2( fc1(x) * gelu(gate(x)) ), gelu in its tanh form."""

  def __init__(self, spec: TextSpec, *, rngs: nnx.Rngs):
    wide, hidden, dtypes = spec.width, spec.ffn_width, spec.dtypes
    self.gate = _linear(wide, hidden, wide ** -0.5, dtypes, rngs)
    self.fc1 = _linear(wide, hidden, wide ** -0.5, dtypes, rngs)
    self.fc2 = _linear(hidden, wide, hidden ** -0.5, dtypes, rngs)

  def __call__(self, x: Array) -> Array:
    return self.fc2(self.fc1(x) * jax.nn.gelu(self.gate(x), approximate=True))


class TextLayer(nnx.Module):
  """Attention and feed-forward, each on the normalised residual stream."""

  def __init__(self, spec: TextSpec, *, rngs: nnx.Rngs):
    self.norm1 = RMSNorm(spec.width)
    self.attn = Attention(spec, rngs=rngs)
    self.norm2 = RMSNorm(spec.width)
    self.ffn = GatedFeedForward(spec, rngs=rngs)

  def __call__(self, x: Array, mask: Array, buckets: Array) -> Array:
    """x [B, T, D] float32 residual stream -> the same."""
    x = x + self.attn(self.norm1(x), mask, buckets).astype(jnp.float32)
    return x + self.ffn(self.norm2(x)).astype(jnp.float32)


class UMT5Encoder(nnx.Module):
  """Token ids -> one vector per text row.

  Attributes:
    token_embedding: [V, D].
    layers: a TextLayer whose parameters carry a leading L.
    norm: the final RMSNorm.
  """

  def __init__(self, spec: TextSpec, *, rngs: nnx.Rngs):
    """Makes an encoder with T5's initialisation, which trains from scratch as it is."""
    dtypes = spec.dtypes
    self.spec = spec
    embedding = jax.random.normal(rngs.params(), (spec.vocab_size, spec.width))
    self.token_embedding = nnx.Param(embedding.astype(dtypes.params))
    keys = jax.random.split(rngs.params(), spec.num_layers)
    self.layers = jax.vmap(lambda key: TextLayer(spec, rngs=nnx.Rngs(key)))(keys)
    self.norm = RMSNorm(spec.width)

  def __call__(self, ids: Array, mask: Array) -> Array:
    """Encodes prompts.

    Args:
      ids: integers [B, T], padded on the right.
      mask: [B, T], true at real tokens (the closing </s> included).

    Returns:
      float32 [B, T, D]; rows outside the mask are exactly zero, as the transformer expects.

    Raises:
      ValueError: `ids` is not [B, T] or `mask` has another shape (at trace time).
    """
    sizes = check_shape('ids', ids, 'b t')
    check_shape('mask', mask, 'b t', **sizes)
    mask = jnp.asarray(mask, bool)
    buckets = jnp.asarray(relative_buckets(
        sizes['t'], num_buckets=self.spec.num_buckets, max_distance=self.spec.max_distance))

    def apply_layer(x, layer):
      return layer(x, mask, buckets), None

    x = self.token_embedding[...][ids].astype(jnp.float32)
    x, _ = jax.lax.scan(apply_layer, x, self.layers)
    return jnp.where(mask[..., None], self.norm(x), 0.0)


def _linear(inputs: int, outputs: int, stddev: float, dtypes: DTypes, rngs: nnx.Rngs) -> nnx.Linear:
  return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtypes.compute,
                    param_dtype=dtypes.params, rngs=rngs,
                    kernel_init=nnx.initializers.normal(stddev))
