"""Norm and rotation in one go: numbers, and the kernel's arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import use_abstract_mesh

from pf_jax.kernels import mosaic, rope
from pf_jax.kernels.rope import pallas, pallas_gpu
from pf_jax.models.transformer import Attention, RmsNorm, TransformerSpec
from pf_jax.train import flops, lora
from pf_jax.types import DTypes
from tests.kernels.interpreted_rope import CASES, EPS, expected
from tests.kernels.test_platform import CARD


def call(arguments, implementation=None):
  x, scale, table, bias, first = arguments
  return rope.norm_and_rotate(x, scale, table, bias=bias, first=first, eps=EPS,
                              implementation=implementation)


def slow_kernel(x, bias, scale, cos, sin, *, first, eps, spec, interpret):
  """What `pallas_gpu.norm_and_rotate` is to compute, by NumPy in float32."""
  del spec, interpret

  def numbers(words):
    return np.stack([half.astype(np.uint32).view(np.float32)
                     for half in (words << 16, words & 0xFFFF0000)])

  def compute(x, bias, scale, cos, sin):
    a, b = numbers(x)[:, :, :, first:first + bias.shape[0]] + numbers(bias)[:, None, None]
    mean = (a**2 + b**2).mean(axis=(2, 3), keepdims=True) / 2
    a, b = (half / np.sqrt(mean + eps) * s for half, s in zip((a, b), scale, strict=True))
    c, s = cos[:, None], sin[:, None]
    low, high = (half.astype(jnp.bfloat16).view(np.uint16).astype(np.uint32)
                 for half in (a * c - b * s, a * s + b * c))
    return low | high << 16

  out = jax.ShapeDtypeStruct((*x.shape[:2], *bias.shape), x.dtype)
  return jax.pure_callback(lambda *arrays: compute(*map(np.asarray, arrays)), out, x, bias, scale,
                           cos, sin)


@pytest.fixture
def without_the_card(monkeypatch):
  monkeypatch.setattr(pallas_gpu, 'norm_and_rotate', slow_kernel)


def test_one_pair_by_hand():
  """Two heads of 6; (3, 4) of the first has all the weight, and a quarter turn in width."""
  x = np.zeros((1, 1, 12), np.float32)
  x[0, 0, 4:6] = 3, 4
  quarter = np.zeros((1, 3)), np.ones((1, 3))
  quarter[0][0, :2], quarter[1][0, :2] = 1, 0
  table = rope.RopeTable(*map(jnp.float32, quarter))
  out = rope.norm_and_rotate(jnp.asarray(x), jnp.full(12, 10.0), table, eps=0.0)
  root = np.sqrt(25 / 12)
  np.testing.assert_allclose(out[0, 0], [[0, 0, 0, 0, -40 / root, 30 / root], [0] * 6], rtol=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_reference_is_the_norm_and_then_the_rotation_bit_for_bit(dtype):
  """As the transformer wrote it before: `RmsNorm`, heads, `rope.rotate`."""
  x, scale, table, bias, first = CASES['two videos, columns of a wider product']()
  x, bias = x.astype(dtype), bias.astype(dtype)
  norm = RmsNorm(scale.shape[0])
  norm.scale[...] = scale

  def apart(x):
    normed = norm(x[..., first:first + scale.shape[0]] + bias)
    return rope.rotate(normed.reshape(*x.shape[:2], -1, 128), table)

  out, wanted = (jax.jit(f)(x) for f in (lambda x: call((x, scale, table, bias, first)), apart))
  assert out.dtype == dtype
  assert out.shape == (2, 12, 2, 128)
  np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('implementation', ['reference', 'pallas'])
def test_both_equal_float64_to_their_precision(name, implementation, without_the_card):
  *arrays, first = CASES[name]()
  out = jax.jit(lambda arrays: call((*arrays, first), implementation))(arrays)
  wanted = expected(*arrays, first)
  assert out.dtype == jnp.bfloat16
  error = np.abs(np.asarray(out, np.float64) - wanted) / np.abs(wanted).max((2, 3), keepdims=True)
  # The reference rounds three times: with its bias, between norm and rotation, and in the end.
  times = 3 if implementation == 'reference' else 1
  assert error.max() <= times * 2**-8
  assert np.quantile(error, 0.99) <= times * 3e-3


def test_the_gradient_is_the_reference_s(without_the_card):
  x, *rest, first = CASES['two videos, columns of a wider product']()
  x = jnp.nan_to_num(x)

  def loss(x, scale, table, bias, implementation):
    out = call((x, scale, table, bias, first), implementation)
    return jnp.sum(out.astype(jnp.float32) * jnp.arange(out.shape[-1]))

  gradients = [jax.grad(functools.partial(loss, implementation=name), argnums=(0, 1, 2, 3))(
      x, *rest) for name in rope.IMPLEMENTATIONS]
  for ours, theirs in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_array_equal(ours, theirs)
    assert np.any(np.asarray(ours, np.float32) != 0)
  assert not np.any(np.asarray(gradients[0][0], np.float32)[..., :first])


def test_refuses_what_does_not_fit():
  x, scale, table, bias, first = CASES['two videos, columns of a wider product']()
  with pytest.raises(ValueError, match=r"implementation='palas' is unknown; use one of \['ref"):
    call((x, scale, table, bias, first), 'palas')
  with pytest.raises(ValueError, match=r'no columns 512 to 768 of whole heads of 128; check'):
    call((x, scale, table, bias, 2 * first))
  for wrong in ((x.astype(jnp.float32), bias), (x, bias.astype(jnp.float32))):
    with pytest.raises(ValueError, match=r'pallas takes bfloat16, and heads of 64 or 128 .*, got'):
      call((wrong[0], scale, table, wrong[1], first), 'pallas')
  with pytest.raises(ValueError, match=r'\[2, 12, 640\] from column 8 on, heads of 128'):
    call((x, scale, table, bias, 8), 'pallas')
  with pytest.raises(ValueError, match=r'rows=6 must be a multiple of 4 within 4..256'):
    pallas_gpu.RowSpec(6)
  with pytest.raises(ValueError, match=r"rotation='palas' is unknown; use one of"):
    TransformerSpec(rotation='palas')


# --- the transformer ------------------------------------------------------------------------------


def attention(rotation):
  """An attention of two heads of 64 in bfloat16, its tokens and their table."""
  spec = TransformerSpec(width=128, num_heads=2, rotation=rotation, dtypes=DTypes(
      compute='bfloat16'))
  module = Attention(spec, rngs=nnx.Rngs(0))
  keys = jax.random.split(jax.random.key(1), 6)
  for key, layer in zip(keys, (module.q, module.k, module.v), strict=False):
    layer.bias[...] = jax.random.normal(key, layer.bias.shape)
  for key, norm in zip(keys[3:], (module.norm_q, module.norm_k), strict=False):
    norm.scale[...] = jax.random.uniform(key, norm.scale.shape, minval=0.5)
  x = jax.random.normal(keys[5], (2, 6, 128))
  return module, x, rope.rope_table(rope.block_positions((1, 2, 3)), 64)


def test_queries_and_keys_come_out_of_one_product(without_the_card):
  """The same as out of three, and each with its own bias and scale."""
  (module, x, table), (plain, *_) = attention('pallas'), attention(None)
  products = str(jax.make_jaxpr(module.rotated)(x, table)).count('dot_general')
  assert products == 1
  for ours, theirs in zip(*(jax.tree.leaves(a.rotated(x, table)) for a in (module, plain)),
                          strict=True):
    ours, theirs = (np.asarray(a, np.float32) for a in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, atol=3 * 2**-8 * np.abs(theirs).max())


@pytest.mark.parametrize('target', ['q', 'k', 'v'])
def test_adapted_layers_are_left_to_xla(target, without_the_card):
  results = []
  for rotation in (None, 'pallas'):
    module, x, table = attention(rotation)
    spec = lora.LoraSpec(rank=2, targets=(target,))
    adapters = {name: pair._replace(b=jnp.ones_like(pair.b))
                for name, pair in lora.init(module, spec, 0).items()}
    results.append(lora.attach(module, adapters, spec).rotated(x, table))
  for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_array_equal(ours, theirs)


# --- the kernel -----------------------------------------------------------------------------------


def full_size(width=1536, tokens=6240, products=3):
  """Shapes of a layer's product and of what norms and rotates its keys."""
  def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)

  table = rope.RopeTable(*[shape(tokens, 64, dtype=jnp.float32)] * 2)
  return (shape(1, tokens, products * width), shape(width, dtype=jnp.float32), table, shape(width),
          width if products > 1 else 0)


def lower(arguments, spec=None):
  *arrays, first = arguments
  function = jax.jit(functools.partial(pallas.norm_and_rotate, first=first, eps=EPS, spec=spec))
  with use_abstract_mesh(CARD):
    return function.trace(*arrays).lower(lowering_platforms=('cuda',))


@pytest.mark.parametrize(('width', 'tokens'), [(1536, 6240), (1536, 182), (5120, 6240)])
def test_lowers_for_a_card_that_is_not_there(width, tokens):
  assert lower(full_size(width, tokens)).as_text().count('mosaic_gpu') >= 1


def test_counts_shared_memory(monkeypatch):
  """What is just allowed lowers; the compiler itself refuses what is more."""
  eight, four = pallas_gpu.RowSpec(8), pallas_gpu.RowSpec(4)
  assert eight.shared_bytes(12, 128) == 8 * 1536 * 2 + 2 * 8 * 64 * 4 + 1536 * (2 + 2 * 2)
  assert pallas_gpu.RowSpec.fitting(12, 128) == eight
  assert pallas_gpu.RowSpec.fitting(40, 128) == four
  assert 3 * four.shared_bytes(40, 128) <= mosaic.SHARED_BYTES
  with pytest.raises(ValueError, match=r'24 rows of 40 heads of 128 take 288768 bytes of shared'):
    lower(full_size(5120), pallas_gpu.RowSpec(24))
  lower(full_size(5120), pallas_gpu.RowSpec(16))
  monkeypatch.setattr(mosaic, 'SHARED_BYTES', 10**9)
  with pytest.raises(Exception, match=r'(?i)shared memory|smem'):
    lower(full_size(5120), pallas_gpu.RowSpec(24))


def test_counts_what_it_moves():
  """By hand: one head of a wider product, read and written once; no products."""
  x, *rest = full_size(128, 10)
  call = functools.partial(rope.norm_and_rotate, first=rest.pop(), implementation='pallas')
  x, scale, table, bias = x, *rest
  jaxpr = jax.make_jaxpr(lambda *arrays: call(*arrays[:3], bias=arrays[3]))(x, scale, table, bias)
  assert flops.count_jaxpr(jaxpr) == flops.traffic_of_jaxpr(jaxpr) == 0
  assert f'bytes_accessed={2 * 10 * 128 * 2 + 128 * (4 + 2) + 2 * 10 * 64 * 4}' in str(jaxpr)


def test_needs_a_card():
  arguments = CASES['one head']()
  with pytest.raises(ValueError, match='Only interpret mode is supported on CPU'):
    call(arguments, 'pallas')
