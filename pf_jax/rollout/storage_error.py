"""What attention loses when its history is stored in fewer bits, on a video's own activations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from pf_jax import cache as cache_lib
from pf_jax.kernels import quantization
from pf_jax.kernels.attention import Blocks, attend
from pf_jax.kernels.context import assemble
from pf_jax.models.bundle import VideoModels
from pf_jax.rollout import block as block_lib
from pf_jax.rollout import step
from pf_jax.rollout.block import RolloutSpec, RolloutState
from pf_jax.types import Array, KeyValues

Store = Callable[[Any], Any]


def stored_in(dtype: str) -> Store:
  """As a cache keeps keys and values in a dtype of `quantization.DTYPES`, or e.g. 'bfloat16'."""
  if dtype in quantization.DTYPES:
    return lambda x: quantization.quantize(x, dtype)
  return lambda x: x.astype(dtype).astype(x.dtype)


def _stored(history: Sequence[Blocks], store: Store) -> list[Blocks]:
  return [blocks._replace(k=store(blocks.k), v=store(blocks.v)) for blocks in history]


def _rounded_products(q: Array, history: Sequence[Blocks], dtype: str) -> Array:
  """Attention with both factors of both products in `dtype`, sums and softmax in float32."""
  segment = assemble(history)
  assert segment.valid is not None  # as of all assembled ones
  q = quantization.dequantize(quantization.quantize(q, dtype), jnp.float32) * q.shape[-1]**-0.5
  logits = jnp.einsum('btnh,bsnh->bnts', q, segment.k)
  logits = jnp.where(segment.valid[:, None, None], logits, -jnp.inf)
  weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  total = jnp.swapaxes(jnp.sum(weights, axis=-1), 1, 2)[..., None]
  # One scale for all: weights are 1 at most.
  weights = quantization.dequantize(quantization.quantize(weights[:, None], dtype), jnp.float32)
  return jnp.einsum('bnts,bsnh->btnh', weights[:, 0], segment.v) / total


def relative(found: Array, exact: Array) -> Array:
  """Root mean square of the error over that of the exact result."""
  return jnp.sqrt(jnp.mean(jnp.square(found - exact)) / jnp.mean(jnp.square(exact)))


def attention_errors(models: VideoModels, state: RolloutState, text: KeyValues, keys: Array,
                     storages: Mapping[str, Store], *, spec: RolloutSpec,
                     products: Sequence[str] = ()) -> dict[str, Array]:
  """Error of attending the history in a block's first pass, by layer.

  Args:
    models: networks.
    state: of a rollout whose cache holds keys and values whole, best in float32.
    text: cross-attention keys/values [L, B, rows, N, H].
    keys: [B] typed random keys, one per video.
    storages: ways to store blocks [..., T, N, H] of keys or values, such as `stored_in('int8')`.
    spec: static choices.
    products: of the dtypes of 8 bits, those in which queries and weights are rounded too, as for
      'pallas_float8' (there queries anew for every block that they are turned to).

  Returns:
    [L] for each of `storages`, and for '... products' of each of `products`: see `relative`.
  """
  blocks = state.cache.blocks
  layout = cache_lib.layout(blocks, spec.cache)

  def context_fn(layer, q: Array):
    selected = cache_lib.select(layer, q, blocks, spec=spec.cache)
    history = cache_lib.context(layer, selected, blocks, layout, spec=spec.cache)
    exact = attend(q, history)
    errors = {name: relative(attend(q, _stored(history, store)), exact)
              for name, store in storages.items()}
    for name in products:
      found = _rounded_products(q, _stored(history, stored_in(name)), name)
      errors[f'{name} products'] = relative(found, exact)
    return history, errors

  noise = block_lib.block_noise(keys, blocks, 0, models.spec.video.block_latent_shape)
  level, next_level = spec.sampler.sigmas[:2]
  return step.denoise_step(models, noise, level, next_level, noise, text,
                           slices=state.cache.layers, context_fn=context_fn,
                           solver=spec.sampler.solver)[1]
