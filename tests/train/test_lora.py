"""Low-rank adapters: the sum by hand, where gradients go, which matrices, stacked layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pf_jax.models.transformer import CausalTransformer
from pf_jax.train import loop, lora, state
from pf_jax.train.lora import Adapter, LoraSpec
from tests.evals import micro
from tests.train import toy


@pytest.fixture(scope='module')
def transformer():
  """Random everywhere, so that no branch is silent; nothing is compiled for it."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(
      lambda: CausalTransformer(micro.spec().transformer, rngs=nnx.Rngs(0)))
  return jax.tree.map(lambda leaf: jnp.asarray(
      rng.standard_normal(leaf.shape) / 24**0.5, leaf.dtype), shapes)


def shaken(adapters, seed=0):
  """Adapters whose b is not zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32),
                      adapters)


def linear(kernel):
  module = nnx.Linear(2, 3, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
  module.kernel[...] = jnp.asarray(kernel, jnp.float32)
  return module


class Holder(nnx.Module):
  def __init__(self, kernel):
    self.q = linear(kernel)


def test_the_sum_of_small_matrices():
  base = Holder([[1, 2, 3], [4, 5, 6]])
  adapters = {'q': Adapter(jnp.array([[1.], [2]]), jnp.array([[10., 0, -10]]))}
  merged = lora.merge(base, adapters, LoraSpec(rank=1, alpha=0.5, targets=('q',)))
  # Half of a b = [[10, 0, -10], [20, 0, -20]].
  np.testing.assert_array_equal(merged.q.kernel[...], [[6, 2, -2], [14, 5, -4]])
  np.testing.assert_array_equal(base.q.kernel[...], [[1, 2, 3], [4, 5, 6]])
  attached = lora.attach(base, adapters, LoraSpec(rank=1, alpha=0.5, targets=('q',)))
  np.testing.assert_array_equal(attached.q(jnp.array([[1., 1]])), [[20, 7, -6]])
  np.testing.assert_array_equal(base.q(jnp.array([[1., 1]])), [[5, 7, 9]])


@pytest.mark.parametrize(('alpha', 'scale'), [(None, 1.0), (2.0, 0.5), (8.0, 2.0)])
def test_the_scale(alpha, scale):
  assert LoraSpec(rank=4, alpha=alpha).scale == scale


def test_fresh_adapters_change_nothing(transformer):
  spec = LoraSpec(rank=2, alpha=4.0)
  adapters = lora.init(transformer, spec, 0)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapters))
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), transformer)
  for base in (transformer, half):
    merged = lora.merge(base, adapters, spec)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    for new, old in zip(jax.tree.leaves(merged), jax.tree.leaves(base), strict=True):
      assert new.dtype == old.dtype
      np.testing.assert_array_equal(new, old)


def test_what_is_adapted_and_where_it_starts(transformer):
  adapters = lora.init(transformer, LoraSpec(rank=3), 0)
  attentions = {f'layers/{kind}_attn/{name}' for kind in ('self', 'cross') for name in 'qkvo'}
  assert set(adapters) == attentions | {'layers/ffn_in', 'layers/ffn_out'}
  assert [x.shape for x in adapters['layers/ffn_in']] == [(2, 24, 3), (2, 3, 32)]
  # 2 layers x rank x (in + out): eight of 24 + 24, two of 24 + 32.
  assert lora.count(adapters) == 2 * 3 * (8 * 48 + 2 * 56)
  a = np.asarray(adapters['layers/ffn_out'].a)
  assert 0.9 / 32**0.5 < np.abs(a).max() <= 1 / 32**0.5
  assert np.abs(a.mean()) < 0.03
  assert not np.array_equal(adapters['layers/self_attn/q'].a, adapters['layers/self_attn/k'].a)
  assert not np.array_equal(a, lora.init(transformer, LoraSpec(rank=3), 1)['layers/ffn_out'].a)
  only = lora.init(transformer, LoraSpec(rank=3, targets=('self_attn/q', 'text_in')), 0)
  assert set(only) == {'layers/self_attn/q', 'text_in'}
  assert only['text_in'].a.shape == (12, 3)
  np.testing.assert_array_equal(only['layers/self_attn/q'].a, adapters['layers/self_attn/q'].a)


def test_merged_is_base_plus_product_in_every_layer(transformer):
  spec = LoraSpec(rank=2, alpha=6.0, targets=('cross_attn/v', 'text_out'))
  adapters = shaken(lora.init(transformer, spec, 0))
  merged = lora.merge(transformer, adapters, spec)
  a, b = map(np.asarray, adapters['layers/cross_attn/v'])
  base = np.asarray(transformer.layers.cross_attn.v.kernel[...])
  for layer in range(2):
    np.testing.assert_allclose(merged.layers.cross_attn.v.kernel[...][layer],
                               base[layer] + 3 * a[layer] @ b[layer], rtol=1e-5, atol=1e-6)
  a, b = map(np.asarray, adapters['text_out'])
  np.testing.assert_allclose(merged.text_out.kernel[...],
                             np.asarray(transformer.text_out.kernel[...]) + 3 * a @ b,
                             rtol=1e-5, atol=1e-6)
  same = jax.tree.map(lambda x, y: bool((x == y).all()), merged, transformer)
  changed = []
  state.map_with_names(lambda names, leaf: leaf or changed.append('/'.join(names)), same)
  assert sorted(changed) == ['layers/cross_attn/v/kernel', 'text_out/kernel']


def flow_of(transformer):
  rng = np.random.default_rng(3)
  latents = jnp.asarray(rng.standard_normal((1, 2, 16, 16, 4)), jnp.float32)
  rows = jnp.asarray(rng.standard_normal((1, 5, 12)), jnp.float32)
  return transformer(latents, jnp.full((1, 2), 500.0), transformer.text_keys_values(rows)).flow


def test_attached_equals_merged(transformer):
  spec = LoraSpec(rank=2, alpha=6.0)
  fresh = lora.init(transformer, spec, 0)
  adapters = shaken(fresh)
  attached = jax.jit(lambda a: flow_of(lora.attach(transformer, a, spec)))
  base, flow = attached(fresh), attached(adapters)
  assert np.abs(flow - base).max() > 0.05
  merged = micro.once(lambda a: flow_of(lora.merge(transformer, a, spec)), adapters)
  np.testing.assert_allclose(flow, merged, rtol=1e-3, atol=1e-4)


def test_gradients_reach_every_factor_alike(transformer):
  spec = LoraSpec(rank=2, alpha=6.0, targets=('text_in', 'text_out', 'cross_attn/k', 'v'))
  adapters = shaken(lora.init(transformer, LoraSpec(rank=2, targets=spec.targets[:3]), 0))
  rows = jnp.asarray(np.random.default_rng(3).standard_normal((1, 5, 12)), jnp.float32)

  def gradient(put):
    return micro.once(jax.grad(lambda a: sum(
        jnp.sum(x ** 3) for x in put(transformer, a, spec).text_keys_values(rows))), adapters)

  by_merge, by_attach = gradient(lora.merge), gradient(lora.attach)
  assert len(by_merge) == 3
  for path, factors in by_merge.items():
    for one, other in zip(factors, by_attach[path], strict=True):
      assert np.abs(one).max() > 1e-4, path
      np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4 * np.abs(one).max())


def test_no_gradient_of_the_matrices_size_with_attached(transformer):
  spec = LoraSpec(rank=1, targets=('ffn_in',))
  shape = tuple(transformer.layers.ffn_in.kernel.shape[1:])

  def products(put):
    jaxpr = jax.make_jaxpr(jax.grad(lambda a: jnp.sum(flow_of(put(transformer, a, spec)))))(
        lora.init(transformer, spec, 0))
    return sum(str(jaxpr).count(f'f32[{one},{other}] = dot_general')
               for one, other in (shape, shape[::-1]))

  # In one layer: the merged matrix's own gradient, which the other way never forms.
  assert products(lora.attach) == 0
  assert products(lora.merge) > 0


class LoraToy(toy.Toy):
  """The regression with adapters on a frozen random network."""

  def __init__(self, spec=LoraSpec(rank=1, targets=('first', 'last'))):
    self.base, self.spec = super().init(0), spec

  def init(self, seed):
    return lora.init(self.base, self.spec, seed)

  def loss(self, params, batch, key):
    return super().loss(lora.attach(self.base, params, self.spec), batch, key)


def test_a_run_trains_and_resumes_adapters(tmp_path):
  objective = LoraToy()
  before = jax.tree.map(np.asarray, objective.base)
  optimizer = toy.config.OptimizerConfig(name='muon', learning_rate=3e-2, schedule='constant',
                                         warmup_steps=0)
  half, whole = (loop.fit(objective, toy.batches, toy.settings(
      steps, optimizer=optimizer, save_every=30, ema_decay=0.0), tmp_path, say=lambda _: None)
                 for steps in (30, 60))
  losses = [float(objective.loss(params, toy.batch_of(0), jax.random.key(0))[0])
            for params in (objective.init(0), half.state.params, whole.state.params)]
  assert losses[2] < losses[1] < 0.95 * losses[0]
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, objective.base), before)


def test_training_a_transformer_by_its_adapters(transformer):
  spec = LoraSpec(rank=4)
  adapters = lora.init(transformer, spec, 0)
  wanted = micro.once(flow_of, transformer) + 0.5
  optimizer = optax.adam(1e-2)

  @jax.jit
  def advance(adapters, moments):
    loss, gradient = jax.value_and_grad(lambda a: jnp.mean(
        (flow_of(lora.attach(transformer, a, spec)) - wanted) ** 2))(adapters)
    updates, moments = optimizer.update(gradient, moments)
    return optax.apply_updates(adapters, updates), moments, loss

  moments, losses = optimizer.init(adapters), []
  for _ in range(12):
    adapters, moments, loss = advance(adapters, moments)
    losses.append(float(loss))
  assert losses[0] == pytest.approx(0.25, rel=1e-5)
  assert losses[-1] < 0.8 * losses[0]


def test_muon_and_decay_see_matrices(transformer):
  adapters = lora.init(transformer, LoraSpec(rank=2, targets=('q', 'text_in')), 0)
  axes = state.default_muon_axes(adapters)
  assert axes['layers/self_attn/q'].a == optax.contrib.MuonDimensionNumbers(1, 2)
  assert axes['text_in'].b == optax.contrib.MuonDimensionNumbers(0, 1)


def test_rank_zero_is_the_module_itself(transformer):
  assert lora.init(transformer, LoraSpec(), 0) == {}
  assert lora.merge(transformer, {}, LoraSpec()) is transformer
  assert lora.attach(transformer, {}, LoraSpec()) is transformer


def test_what_does_not_fit(transformer):
  with pytest.raises(ValueError, match=r"\['qkv'\] name no linear layer; there are.*'head'"):
    lora.init(transformer, LoraSpec(rank=2, targets=('q', 'qkv')), 0)
  with pytest.raises(ValueError, match=r'rank=16 exceeds text_in of \[12, 24\]; use at most 12'):
    lora.init(transformer, LoraSpec(rank=16, targets=('text_in',)), 0)
  spec = LoraSpec(rank=2, targets=('ffn_in',))
  adapters = lora.init(transformer, spec, 0)
  for put in (lora.merge, lora.attach):
    with pytest.raises(ValueError, match='fit no linear layer'):
      put(transformer, {'layers/ffn': adapters['layers/ffn_in']}, spec)
    with pytest.raises(ValueError, match='made for another model'):
      put(transformer, {'layers/ffn_out': adapters['layers/ffn_in']}, spec)
    with pytest.raises(ValueError, match='made for another model'):
      put(transformer, {'layers/ffn_in': Adapter(adapters['layers/ffn_in'].a,
                                                 jnp.zeros((2, 3, 32)))}, spec)


@pytest.mark.parametrize(('change', 'message'), [
    (dict(rank=-1), 'rank=-1 must be 0'), (dict(alpha=0.0), r'alpha=0\.0 must be positive'),
    (dict(targets=()), 'must be a tuple'), (dict(targets='q'), "targets='q' must be a tuple"),
    (dict(targets=('',)), 'must be a tuple')])
def test_specs_that_cannot_be(change, message):
  with pytest.raises(ValueError, match=message):
    LoraSpec(**change)
