import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pf_jax.kernels.attention import Blocks, Segment, attend
from pf_jax.kernels.quantization import DTYPES, Quantized, dequantize, largest, quantize


def test_int8_by_hand():
  """Two heads of one block: the largest number is 127 steps, whatever its sign."""
  x = jnp.array([[[1.27, 0.104], [20.0, 0.0]], [[-0.5, 0.996], [-254.0, 9.9]]])  # [T, N, H]
  got = quantize(x, 'int8')
  np.testing.assert_allclose(got.scale, [[[0.01], [2.0]]], rtol=1e-6)
  assert got.values.tolist() == [[[127, 10], [10, 0]], [[-50, 100], [-127, 5]]]
  np.testing.assert_allclose(dequantize(got, jnp.float32),
                             [[[1.27, 0.1], [20, 0]], [[-0.5, 1.0], [-254, 10]]], rtol=1e-6)


def test_float8_by_hand():
  """Three bits after the first: between 16 and 32 the steps are 2, below a 64th they are 1/512."""
  x = jnp.array([[[448.0, 17.1, -30.9, 0.3, 2.0**-9, 2.0**-11]]])
  got = quantize(x, 'float8_e4m3fn')
  assert got.scale.tolist() == [[[1.0]]]
  assert got.values.astype(jnp.float32).tolist() == [[[448, 18, -30, 0.3125, 2.0**-9, 0]]]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), power=st.integers(-12, 12), dtype=st.sampled_from(DTYPES))
def test_like_a_slow_model(seed, power, dtype):
  """Within half a step (int8), or a sixteenth of any number that is not almost zero (float8)."""
  x = np.random.default_rng(seed).standard_normal((2, 3, 5, 2, 4)).astype(np.float32) * 10.0**power
  got = np.asarray(dequantize(quantize(jnp.asarray(x), dtype), jnp.float32))
  for index in np.ndindex(2, 3, 2):
    block = x[index[0], index[1], :, index[2]]
    error = np.abs(got[index[0], index[1], :, index[2]] - block)
    step = np.abs(block).max() / largest(dtype)
    half = 0.5 * step if dtype == 'int8' else np.maximum(np.abs(block) / 16, step * 2.0**-10)
    assert (error <= half * 1.001).all()


@pytest.mark.parametrize('dtype', DTYPES)
def test_nothing_stays_nothing(dtype):
  got = quantize(jnp.zeros((4, 1, 2)), dtype)
  assert got.scale.tolist() == [[[1.0]]]
  np.testing.assert_array_equal(dequantize(got, jnp.float32), np.zeros((4, 1, 2)))


@pytest.mark.parametrize('dtype', DTYPES)
def test_what_is_almost_nothing_is_nothing(dtype):
  """The scale of such numbers would be a subnormal number, which machines take for 0."""
  got = quantize(jnp.array([[[1e-37, 0.0]], [[0.0, -1e-21]]]), dtype)
  assert got.scale.tolist() == [[[1.0]]]
  np.testing.assert_array_equal(dequantize(got, jnp.float32), np.zeros((2, 1, 2)))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('layer', [None, 1])
def test_attention_reads_what_was_stored(dtype, layer):
  """8-bit blocks against the same numbers written out; gathered, moved, some that do not count."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  shape = (5, 3, 2, 12) if layer is None else (3, 5, 3, 2, 12)
  k, v = (quantize(draw(*shape[:-4], 2, *shape[-4:]), dtype) for _ in range(2))
  chosen, valid = jnp.array([[4, 0, 1]]), jnp.array([[True, False, True]])
  stored = Blocks(k, v, jnp.array([[-7.0, -5, -3]]), valid, chosen,
                  None if layer is None else jnp.int32(layer))
  written = stored._replace(k=dequantize(k, jnp.float32), v=dequantize(v, jnp.float32))
  q, own = draw(2, 4, 2, 12), Segment(draw(2, 4, 2, 12), draw(2, 4, 2, 12))
  got, wanted = (jax.jit(attend)(q, [blocks, own]) for blocks in (stored, written))
  np.testing.assert_array_equal(got, wanted)
  loud = stored._replace(v=Quantized(v.values, v.scale * 2))
  assert np.abs(np.asarray(attend(q, [loud, own])) - wanted).max() > 0.01
