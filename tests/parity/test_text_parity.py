"""UMT5Encoder against transformers, at a length where the distance buckets saturate.

The gate is shown to bite: each plausible mistake is made on purpose and must fail it clearly.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pf_jax.models import text
from pf_jax.types import DTypes
from pf_jax.weights.networks import from_released, to_released
from tests.parity import oracles

GATE = 2e-5  # max|d| / max|ref|, float32
BF16_GATE = 2e-3  # 1 - cos
SPEC = text.TextSpec(vocab_size=97, width=32, num_layers=3, num_heads=3, head_dim=8, ffn_width=56,
                     max_tokens=200)


@functools.cache
def _case():
  model = oracles.tiny_umt5(seed=0)
  ids = np.random.default_rng(0).integers(4, 97, (2, 200)).astype(np.int32)
  mask = np.arange(200) < np.array([[200], [61]])
  ids = np.where(mask, ids, 0)
  encoder = from_released(oracles.wan_tensors(model), SPEC)
  return model, encoder, ids, mask, oracles.umt5_oracle(model, ids, mask)


def _encode(encoder, ids, mask):
  # A new function each time: mutations patch what tracing calls.
  return np.asarray(jax.jit(lambda *args: encoder(*args))(ids, mask))


def test_encoder_matches_transformers():
  _, encoder, ids, mask, wanted = _case()
  assert oracles.relative_error(_encode(encoder, ids, mask), wanted) <= GATE


def test_bfloat16_stays_close():
  model, _, ids, mask, wanted = _case()
  encoder = from_released(oracles.wan_tensors(model), dataclasses.replace(
      SPEC, dtypes=DTypes(params='bfloat16', compute='bfloat16')))
  assert oracles.angular_error(_encode(encoder, ids, mask), wanted) <= BF16_GATE


def test_prompt_alone_gives_the_same_rows_as_padded():
  _, encoder, ids, mask, wanted = _case()
  alone = _encode(encoder, ids[1:, :61], mask[1:, :61])
  assert oracles.relative_error(alone, wanted[1:, :61]) <= GATE


def test_weights_round_trip_through_the_original_names():
  model, encoder, *_ = _case()
  tensors = oracles.wan_tensors(model)
  ours = to_released(encoder)
  assert set(ours) == set(tensors)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def test_buckets_equal_transformers_at_every_distance():
  attention = oracles.tiny_umt5(seed=0).encoder.block[0].layer[0].SelfAttention
  offsets = np.arange(300)[None] - np.arange(300)[:, None]
  np.testing.assert_array_equal(
      text.relative_buckets(300, num_buckets=32, max_distance=128),
      attention._relative_position_bucket(torch.tensor(offsets)).numpy())


def _scaled_scores(encoder, monkeypatch):
  kernel = encoder.layers.attn.q.kernel
  kernel[...] = kernel[...] * SPEC.head_dim ** -0.5


def _shared_table(encoder, monkeypatch):
  table = encoder.layers.attn.position_bias
  table[...] = jnp.broadcast_to(table[...][:1], table[...].shape)


def _buckets_off_by_one(encoder, monkeypatch):
  right = text.relative_buckets
  monkeypatch.setattr(text, 'relative_buckets',
                      lambda length, **kwargs: right(length + 1, **kwargs)[1:, :-1])


def _exact_gelu(encoder, monkeypatch):
  tanh_form = jax.nn.gelu
  monkeypatch.setattr(jax.nn, 'gelu', lambda x, approximate: tanh_form(x, approximate=False))


def _swapped_gate(encoder, monkeypatch):
  ffn = encoder.layers.ffn
  gate, value = ffn.gate.kernel[...], ffn.fc1.kernel[...]
  ffn.gate.kernel[...], ffn.fc1.kernel[...] = value, gate


@pytest.mark.parametrize('mutate', [_scaled_scores, _shared_table, _buckets_off_by_one,
                                    _exact_gelu, _swapped_gate])
def test_gate_fails_mutated_encoder(mutate, monkeypatch):
  model, _, ids, mask, wanted = _case()
  encoder = from_released(oracles.wan_tensors(model), SPEC)
  mutate(encoder, monkeypatch)
  assert oracles.relative_error(_encode(encoder, ids, mask), wanted) > 10 * GATE


def test_gate_fails_unmasked_padding():
  _, encoder, ids, mask, wanted = _case()
  unmasked = _encode(encoder, ids, np.ones_like(mask)) * mask[..., None]
  assert oracles.relative_error(unmasked, wanted) > 10 * GATE
