"""Counting operations: by hand on small functions, loops and convolutions; a transformer."""

import functools
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from pf_jax.kernels.attention import Segment, attend
from pf_jax.models.transformer import CausalTransformer, TransformerSpec
from pf_jax.train import flops
from pf_jax.types import KeyValues
from tests.train import toy


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def test_products():
  assert flops.count(jnp.matmul, shape(2, 3), shape(3, 5)) == 2 * 2 * 3 * 5
  assert flops.count(lambda a, b: jnp.einsum('bij,bkj->bik', a, b),
                     shape(7, 2, 3), shape(7, 5, 3)) == 2 * 7 * 2 * 3 * 5
  assert flops.count(jnp.add, shape(2, 3), shape(2, 3)) == 0


# Two layers of 4 -> 8 -> 8 on 3 rows.
FIRST, SECOND = 2 * 3 * 4 * 8, 2 * 3 * 8 * 8


def layers(params, x):
  first, second = params
  return jnp.tanh(jnp.tanh(x @ first) @ second)


def loss_of(function):
  def loss(params, x):
    return jnp.sum(function(params, x)), {}
  return loss


MLP = (shape(4, 8), shape(8, 8)), shape(3, 4)


def test_two_layers_and_their_gradient():
  plain = loss_of(layers)
  assert flops.count(plain, *MLP) == FIRST + SECOND
  # Of the first layer the gradient in the weights only: nobody asks for that of x.
  model = 2 * FIRST + 3 * SECOND
  assert flops.count(jax.value_and_grad(plain, has_aux=True), *MLP) == model
  assert flops.of_step(plain, *MLP) == model


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['plain', 'jit'])
def test_what_a_checkpoint_repeats_is_no_model_flops(wrap):
  saved = loss_of(wrap(jax.checkpoint(layers)))
  model = 2 * FIRST + 3 * SECOND
  assert flops.count(jax.value_and_grad(saved, has_aux=True), *MLP) == model + FIRST + SECOND
  assert flops.of_step(saved, *MLP) == model


def test_without_remat_computes_the_same():
  params = jnp.arange(32.).reshape(4, 8) / 32, jnp.ones((8, 8)) / 9
  x = jnp.linspace(-1, 1, 12).reshape(3, 4)
  saved = loss_of(jax.checkpoint(layers))
  (value, _), gradient = jax.value_and_grad(saved, has_aux=True)(params, x)
  (other, _), same = jax.value_and_grad(flops.without_remat(saved), has_aux=True)(params, x)
  assert float(value) == float(other)
  jax.tree.map(np.testing.assert_array_equal, same, gradient)


def test_a_scan_counts_every_turn_checkpointed_or_not():
  def body(x, weight):
    return jnp.tanh(x @ weight), None

  def scanned(body):
    return loss_of(lambda weights, x: jax.lax.scan(body, x, weights)[0])

  once, args = 2 * 3 * 4 * 4, (shape(5, 4, 4), shape(3, 4))
  assert flops.count(scanned(body), *args) == 5 * once
  saved = scanned(jax.checkpoint(body, prevent_cse=False))
  assert flops.count(jax.value_and_grad(saved, has_aux=True), *args) == 5 * 4 * once
  assert flops.of_step(saved, *args) == flops.of_step(scanned(body), *args) == 5 * 3 * once


def test_loops_and_branches():
  def doubling(x):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ x, x)

  with pytest.raises(ValueError, match=r'a loop of 54 operations a turn .* trips='):
    flops.count(doubling, shape(3, 3))
  assert flops.count(doubling, shape(3, 3), trips=4) == 4 * 54
  # Without products it does not matter.
  assert flops.count(lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, x),
                     shape()) == 0
  assert flops.count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x),
                     shape(3, 3)) == 2 * 54


def test_what_nobody_reads_is_not_counted():
  def body(x, _):
    return x @ x, x @ x @ x

  assert flops.count(lambda x: jax.lax.scan(body, x, length=2)[0], shape(3, 3)) == 2 * 54


def convolve(x, kernel, **choices):
  choices = {'window_strides': (1,), 'padding': 'VALID', **choices}
  return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=('NWC', 'WIO', 'NWC'), **choices)


@pytest.mark.parametrize(('size', 'choices', 'pairs'), [
    # Kernels of 3. 5 wide: outputs at 1, 2, 3.
    (5, {}, 9),
    # Outputs at 0 and 4 have a tap in the padding.
    (5, dict(padding='SAME'), 13),
    # Outputs at 0, 2, 4, the same two of them.
    (5, dict(padding=[(1, 1)], window_strides=(2,)), 7),
    # x _ x _ x: outputs at 1, 2, 3 meet two elements, one and two.
    (3, dict(padding=[(0, 0)], lhs_dilation=(2,)), 5),
    # Taps at 0, 2, 4: one place.
    (5, dict(rhs_dilation=(2,)), 3)])
def test_convolution_taps(size, choices, pairs):
  # Batch 2, 4 -> 6 channels.
  count = flops.count(functools.partial(convolve, **choices), shape(2, size, 4), shape(3, 4, 6))
  assert count == 2 * 2 * 4 * 6 * pairs


def test_convolution_groups_and_axes():
  grouped = functools.partial(convolve, feature_group_count=2)
  assert flops.count(grouped, shape(2, 5, 4), shape(3, 2, 6)) == 2 * 2 * 2 * 6 * 9
  plane = functools.partial(jax.lax.conv_general_dilated, window_strides=(2, 1), padding='VALID',
                            dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  # 5x4 by 3x2: rows at 2 places with 3 taps, columns at 3 places with 2.
  assert flops.count(plane, shape(1, 5, 4, 3), shape(3, 2, 3, 7)) == 2 * 3 * 7 * (2 * 3) * (3 * 2)


@pytest.mark.parametrize('choices', [
    dict(padding='SAME', window_strides=(2,)), dict(padding=[(2, 0)]),
    dict(feature_group_count=2)])
def test_a_convolution_is_as_dear_in_each_gradient(choices):
  def loss(kernel, x):
    return jnp.sum(convolve(x, kernel, **choices) ** 2)

  args = shape(3, 4 // choices.get('feature_group_count', 1), 6), shape(2, 7, 4)
  forward = flops.count(loss, *args)
  assert flops.count(jax.value_and_grad(loss), *args) == 2 * forward
  assert flops.count(jax.value_and_grad(loss, argnums=(0, 1)), *args) == 3 * forward


def test_custom_rules_are_looked_into():
  @jax.custom_vjp
  def product(a, b):
    return a @ b
  product.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
  assert flops.count(product, shape(2, 3), shape(3, 5)) == 60
  assert flops.count(jax.value_and_grad(lambda a, b: jnp.sum(product(a, b)), (0, 1)),
                     shape(2, 3), shape(3, 5)) == 180
  jvp = jax.custom_jvp(lambda a: a @ a)
  jvp.defjvp(lambda a, t: (a[0] @ a[0], t[0] @ a[0] + a[0] @ t[0]))
  assert flops.count(jvp, shape(3, 3)) == 54
  assert flops.count(jax.grad(lambda a: jnp.sum(jvp(a))), shape(3, 3)) == 2 * 54


def test_shards_are_counted_on_all_devices():
  mesh = jax.sharding.AbstractMesh((4, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
  split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(PartitionSpec('data'), PartitionSpec()),
                        out_specs=PartitionSpec('data'), axis_names={'data'})
  assert flops.count(split, shape(8, 3), shape(3, 5)) == 2 * 8 * 3 * 5


def test_what_cannot_be_counted_is_refused():
  with pytest.raises(ValueError, match="the primitive 'cholesky' are not to be seen"):
    flops.count(jnp.linalg.cholesky, shape(3, 3))


@pytest.fixture
def as_if_cudnn_were_here(monkeypatch):
  """JAX asks for cuDNN's version before it traces a call of it; private, but there is no other."""
  module = importlib.import_module('jax._src.cudnn.fused_attention_stablehlo')
  monkeypatch.setattr(module, 'check_cudnn_version', lambda: 91000)


def test_fused_attention_counts_like_the_plain_one(as_if_cudnn_were_here):
  q, k = (shape(2, tokens, 3, 64, dtype=jnp.bfloat16) for tokens in (8, 24))
  valid = shape(2, 16, dtype=jnp.bool_)

  def loss(parts, valid, implementation):
    q, k, v = parts
    segments = [Segment(k[:, :8], v[:, :8]), Segment(k[:, 8:], v[:, 8:], valid=valid)]
    return jnp.sum(attend(q, segments, implementation=implementation)), {}

  forward = 4 * 2 * 3 * 8 * 24 * 64
  for name in ('reference', 'cudnn'):
    own = functools.partial(loss, implementation=name)
    assert flops.count(own, (q, k, k), valid) == forward, name
    assert flops.of_step(own, (q, k, k), valid) == 3 * forward, name
  assert flops.count(jax.value_and_grad(own, has_aux=True), (q, k, k), valid) == 3.5 * forward


@pytest.mark.parametrize('remat', [False, True])
def test_a_transformer_by_formula(remat):
  spec = TransformerSpec(width=24, ffn_width=32, num_heads=2, num_layers=3, in_channels=4,
                         out_channels=4, time_width=16, text_width=12, remat=remat)
  model = jax.eval_shape(lambda: CausalTransformer(spec, rngs=nnx.Rngs(0)))
  batch, frames, side, rows = 2, 3, 8, 5
  tokens = frames * (side // 2)**2
  text = KeyValues(*[shape(3, batch, rows, 2, 12)] * 2)

  def loss(model, latents, timesteps, text):
    return jnp.sum(model(latents, timesteps, text).flow), {}

  args = shape(batch, frames, side, side, 4), shape(batch, frames), text
  width, ffn = 24, 32
  # The q, k, v, o of the tokens themselves; q and o towards the text; the feed-forward; attention.
  layer = 2 * batch * tokens * (4 * width**2 + 2 * width**2 + 2 * width * ffn)
  layer += 4 * batch * tokens * (tokens + rows) * width
  embeddings = 2 * batch * tokens * 16 * width * 2  # patches in and out: 16 numbers each
  time = 2 * batch * frames * (16 * width + width**2 + width * 6 * width)
  forward = 3 * layer + embeddings + time
  assert flops.count(loss, model, *args) == forward
  # Three times that, but for gradients in latents, sinusoid, and the text's keys and values.
  given = embeddings // 2 + 2 * batch * frames * 16 * width
  wanted = 3 * forward - given - 3 * 4 * batch * tokens * rows * width
  assert flops.of_step(loss, model, *args) == wanted


def test_each_kind_of_step_is_counted_once(monkeypatch):
  counted = []
  real = flops.of_step
  monkeypatch.setattr(flops, 'of_step', lambda *a, **k: counted.append(k) or real(*a, **k))

  def loss(params, batch, key, moving):
    return sum(jnp.sum(batch['x'] @ params[name]) for name in sorted(moving)), {}

  params = {'a': jnp.ones((4, 2)), 'b': jnp.ones((4, 6))}
  key, both, one = jax.random.key(0), frozenset('ab'), frozenset('b')
  step = flops.StepFlops(loss)
  batch = {'x': np.ones((16, 4), np.float32)}
  assert [step(params, batch, key, moving) for moving in (both, one, one, both)] == [
      2 * 2 * 16 * 4 * (2 + 6), 2 * 2 * 16 * 4 * 6, 2 * 2 * 16 * 4 * 6, 2 * 2 * 16 * 4 * (2 + 6)]
  assert len(counted) == 2
  assert step(params, {'x': np.ones((8, 4), np.float32)}, key, one) == 2 * 2 * 8 * 4 * 6
  assert len(counted) == 3


def test_a_step_of_the_toy():
  objective = toy.Toy()
  params = objective.init(0)
  # 16 rows, 4 -> 8 -> 1; inputs need no gradient.
  wanted = 2 * 16 * (2 * 4 * 8 + 3 * 8)
  step = flops.StepFlops(objective.loss)
  assert step(params, toy.batch_of(0), jax.random.key(0)) == wanted
  jax.tree.map(lambda leaf: leaf.delete(), params)  # as after a step that donates them
  assert step(params, toy.batch_of(1), jax.random.key(0)) == wanted


@pytest.mark.parametrize(('kind', 'peak'), [
    ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H200', 989e12),
    ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA B200', 2250e12), ('NVIDIA L40S', 362e12),
    ('NVIDIA L4', 121e12), ('TPU v5 lite', 197e12), ('TPU v5', 459e12), ('TPU v6 lite', 918e12)])
def test_known_peaks(kind, peak):
  assert flops.peak_flops(types.SimpleNamespace(device_kind=kind)) == (peak, 'data sheet')


def test_other_devices_are_measured_once(monkeypatch):
  device = types.SimpleNamespace(device_kind='abacus', __hash__=None)
  calls = []

  def rate(size, device):
    calls.append(size)
    return 1e11

  monkeypatch.setattr(flops, '_rate', rate)
  flops._measured.cache_clear()
  device = jax.devices('cpu')[0]
  assert flops.peak_flops(device) == flops.peak_flops(device) == (1e11, 'measured')
  # 50 ms at that rate are 5 GFLOP: a product of 1357.
  assert calls == [512, 1408]
  flops._measured.cache_clear()


def test_a_real_measurement():
  rate, source = flops.peak_flops(jax.devices('cpu')[0])
  assert source == 'measured'
  assert 1e8 < rate < 1e14


def traffic(function, *args, **options):
  return flops.traffic_of_jaxpr(jax.make_jaxpr(function)(*args), **options)


def test_bytes_that_products_move(as_if_cudnn_were_here):
  half = jnp.bfloat16
  assert traffic(lambda a, b: jnp.tanh(a) @ b + 1, shape(2, 3), shape(3, 5)) == 4 * (6 + 15 + 10)
  assert traffic(jnp.matmul, shape(2, 3, dtype=half), shape(3, 5, dtype=half)) == 2 * 31
  assert traffic(convolve, shape(2, 5, 4), shape(3, 4, 6)) == 4 * (40 + 72 + 2 * 3 * 6)
  assert traffic(jnp.add, shape(2, 3), shape(2, 3)) == 0

  def body(x, weight):
    return x @ weight, x @ x.T  # of which the second is read by nobody

  assert traffic(lambda x, w: jax.lax.scan(body, x, w)[0], shape(3, 4), shape(5, 4, 4)) == (
      5 * 4 * (12 + 16 + 12))
  q, k = shape(2, 8, 3, 64, dtype=half), shape(2, 24, 3, 64, dtype=half)
  fused = traffic(lambda q, k, v: attend(q, [Segment(k, v)], implementation='cudnn'), q, k, k)
  own = 2 * 2 * 3 * 64 * (8 + 24 + 24 + 8)
  assert own <= fused < 1.1 * own  # no logits, but sums and such


def kernel(estimate):
  def copy(x_ref, out_ref):
    out_ref[...] = x_ref[...]
  return lambda x: pl.pallas_call(copy, out_shape=shape(4), cost_estimate=estimate)(x)


def test_a_kernel_counts_what_it_says():
  said = pl.CostEstimate(flops=70, transcendentals=0, bytes_accessed=32)
  assert flops.count(kernel(said), shape(4)) == 70
  assert traffic(kernel(said), shape(4)) == 32
  elementwise = pl.CostEstimate(flops=0, transcendentals=4, bytes_accessed=32)
  assert traffic(kernel(elementwise), shape(4)) == 0
  with pytest.raises(ValueError, match="the primitive 'pallas_call' are not to be seen"):
    flops.count(kernel(None), shape(4))
