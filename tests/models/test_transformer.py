"""Choices of the transformer that must not change what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.models.transformer import CausalTransformer, TransformerSpec
from pf_jax.testing import random_models, tiny_model_spec


def _recomputing(model: CausalTransformer) -> CausalTransformer:
  """The same parameters under `remat`."""
  spec = dataclasses.replace(model.spec, remat=True)
  leaves, _ = jax.tree.flatten(model)
  shapes = jax.eval_shape(lambda: random_models(
      dataclasses.replace(tiny_model_spec(), transformer=spec)).transformer)
  return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def test_remat_recomputes_and_keeps_values_and_gradients():
  model = random_models(tiny_model_spec(), 1).transformer
  latents = jax.random.normal(jax.random.key(0), (1, 2, 4, 6, 4))
  rows = jax.random.normal(jax.random.key(1), (1, 6, 12))

  def loss(model, latents):
    flow = model(latents, jnp.full((1, 2), 500.0), model.text_keys_values(rows)).flow
    return jnp.mean(flow**2)

  kept, recomputed = (jax.jit(jax.value_and_grad(loss))(m, latents)
                      for m in (model, _recomputing(model)))
  np.testing.assert_allclose(kept[0], recomputed[0], rtol=1e-6)
  for got, wanted in zip(*map(jax.tree.leaves, (recomputed[1], kept[1])), strict=True):
    np.testing.assert_allclose(got, wanted, atol=1e-6 * np.abs(wanted).max() + 1e-9)
  programs = [str(jax.make_jaxpr(jax.grad(loss))(m, latents)) for m in (model, _recomputing(model))]
  assert ['remat' in program or 'checkpoint' in program for program in programs] == [False, True]


def test_released_sizes():
  assert TransformerSpec.wan_1_3b().head_dim == TransformerSpec.wan_14b().head_dim == 128
