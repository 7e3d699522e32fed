"""The text encoder: buckets, masking, the golden case of the transformers oracle."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pf_jax.models.text import TextSpec, UMT5Encoder, relative_buckets
from pf_jax.types import DTypes
from pf_jax.weights.networks import from_released, to_released

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / 'goldens' / 'text.npz'
GOLDEN_SPEC = TextSpec(vocab_size=97, width=32, num_layers=3, num_heads=3, head_dim=8, ffn_width=56,
                       max_tokens=200)
TINY = TextSpec(vocab_size=20, width=8, num_layers=2, num_heads=2, head_dim=4, ffn_width=12)


def _encode(encoder, ids, mask):
  return np.asarray(jax.jit(lambda model, *args: model(*args))(encoder, ids, mask))


def _prefix_mask(*lengths, rows):
  return np.arange(rows) < np.array(lengths)[:, None]


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as stored:
    arrays = {key: stored[key] for key in stored.files}
  prefix = 'weights/'
  tensors = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
  return tensors, arrays['ids'], arrays['mask'], arrays['output']


def test_golden_case(golden):
  tensors, ids, mask, wanted = golden
  ours = _encode(from_released(tensors, GOLDEN_SPEC), ids, mask)
  assert np.abs(ours - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_bfloat16_stays_close_to_the_golden_case(golden):
  tensors, ids, mask, wanted = golden
  encoder = from_released(tensors, dataclasses.replace(
      GOLDEN_SPEC, dtypes=DTypes('bfloat16', 'bfloat16')))
  assert encoder.layers.attn.q.kernel.dtype == jnp.bfloat16
  ours = _encode(encoder, ids, mask)
  assert ours.dtype == np.float32
  cosine = np.sum(ours * wanted) / np.linalg.norm(ours) / np.linalg.norm(wanted)
  assert 1 - cosine < 2e-3


def test_bucket_starts():
  """Distances at which a new bucket starts; from 91 on everything shares the last one."""
  starts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
  expected = np.searchsorted(starts, np.arange(200), side='right') - 1
  buckets = relative_buckets(200, num_buckets=32, max_distance=128)
  np.testing.assert_array_equal(buckets[:, 0], expected)  # keys behind the query
  np.testing.assert_array_equal(buckets[0, 1:], 16 + expected[1:])  # keys ahead of it


def test_buckets_of_a_small_table():
  np.testing.assert_array_equal(relative_buckets(4, num_buckets=8, max_distance=4), [
      [0, 5, 6, 7],
      [1, 0, 5, 6],
      [2, 1, 0, 5],
      [3, 2, 1, 0],
  ])


def test_padding_never_reaches_the_output():
  encoder = UMT5Encoder(TINY, rngs=nnx.Rngs(0))
  ids = np.random.default_rng(0).integers(0, 20, (2, 9))
  mask = _prefix_mask(9, 4, rows=9)
  output = _encode(encoder, ids, mask)
  assert output.shape == (2, 9, 8)
  np.testing.assert_array_equal(output[1, 4:], 0)
  other = np.where(mask, ids, (ids + 1) % 20)
  np.testing.assert_array_equal(_encode(encoder, other, mask), output)
  np.testing.assert_allclose(_encode(encoder, ids[1:, :4], mask[1:, :4])[0], output[1, :4],
                             atol=1e-5)


def test_masked_row_without_any_token_is_zero():
  encoder = UMT5Encoder(TINY, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(_encode(encoder, np.zeros((1, 3), int), np.zeros((1, 3), bool)), 0)


def test_fresh_encoder_tells_prompts_and_positions_apart():
  encoder = UMT5Encoder(TextSpec(), rngs=nnx.Rngs(0))
  one, other = np.arange(4, 12), np.arange(4, 12)
  other[2] = 30
  output = _encode(encoder, np.stack([one, other]), np.ones((2, 8), bool))
  assert 0.5 < output.std() < 2
  # The changed word changes its own row most, and every other row a little.
  distance = np.abs(output[0] - output[1]).mean(axis=-1)
  assert distance.argmax() == 2
  assert (distance > 1e-3).all()
  repeated = _encode(encoder, np.full((1, 8), 5), np.ones((1, 8), bool))[0]
  assert np.abs(repeated[0] - repeated[4]).mean() < 0.5  # same word, nearly the same row


def test_gradient_reaches_every_parameter():
  encoder = UMT5Encoder(TINY, rngs=nnx.Rngs(0))
  ids = np.arange(20).reshape(1, 20)
  target = jax.random.normal(jax.random.key(1), (1, 20, 8))

  def loss(model):
    return jnp.sum(model(ids, np.ones((1, 20), bool)) * target)

  gradients = to_released(jax.jit(jax.grad(loss))(encoder))
  assert all(np.abs(gradient).max() > 0 for gradient in gradients.values())


def test_layers_are_stacked_and_independently_initialised():
  encoder = UMT5Encoder(TINY, rngs=nnx.Rngs(0))
  kernel = encoder.layers.attn.q.kernel[...]
  assert kernel.shape == (2, 8, 8)
  assert not np.allclose(kernel[0], kernel[1])


def test_weights_round_trip():
  encoder = UMT5Encoder(TINY, rngs=nnx.Rngs(0))
  tensors = to_released(encoder)
  assert tensors['blocks.1.ffn.gate.0.weight'].shape == (12, 8)  # [out, in], as released
  again = from_released(tensors, TINY)
  jax.tree.map(np.testing.assert_array_equal, again, encoder)


def test_released_size_has_the_released_number_of_parameters():
  """UMT5-XXL's encoder: 5,680,910,336 parameters in 242 tensors. Nothing is allocated."""
  spec = TextSpec(vocab_size=256384, width=4096, num_layers=24, num_heads=64, head_dim=64,
                  ffn_width=10240, max_tokens=512)
  shapes = jax.eval_shape(lambda: UMT5Encoder(spec, rngs=nnx.Rngs(0)))
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  assert sum(leaf.size for _, leaf in leaves) == 5_680_910_336
  stacked = sum(path[0].name == 'layers' for path, _ in leaves)
  assert len(leaves) - stacked + 24 * stacked == 242


@pytest.mark.parametrize(('sizes', 'message'), [
    ({'width': 0}, 'width=0 must be at least 1'),
    ({'num_layers': -1}, 'num_layers=-1 must be at least 1'),
    ({'num_buckets': 30}, 'num_buckets=30 is not a multiple of 4'),
    ({'max_distance': 8}, 'max_distance=8 leaves no room'),
])
def test_bad_sizes(sizes, message):
  with pytest.raises(ValueError, match=message):
    TextSpec(**sizes)


def test_bad_shapes():
  encoder = UMT5Encoder(TINY, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r'ids has shape \(3,\)'):
    encoder(np.zeros(3, int), np.ones(3, bool))
  with pytest.raises(ValueError, match=r'mask has shape \(1, 4\), wanted \[b=1 t=3\]'):
    encoder(np.zeros((1, 3), int), np.ones((1, 4), bool))
