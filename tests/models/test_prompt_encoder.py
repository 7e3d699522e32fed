"""Prompts to text rows: bucketed lengths change nothing, the network is let go."""

import gc
import weakref

import numpy as np
import pytest
from flax import nnx

from pf_jax.models.prompt_encoder import PromptEncoder, bucket_lengths
from pf_jax.models.text import TextSpec, UMT5Encoder
from pf_jax.models.tokenizer import Tokenizer, build_tokenizer

ROWS = 70
SPEC = TextSpec(vocab_size=128, width=8, num_layers=2, num_heads=2, head_dim=4, ffn_width=12,
                max_tokens=ROWS)
SHORT, LONG = 'red cat', ' '.join(['cat'] * 40)


def make(load=None):
  encoder = UMT5Encoder(SPEC, rngs=nnx.Rngs(0))
  tokenizer = Tokenizer(build_tokenizer(['red cat', 'blue dog']), max_tokens=ROWS)
  return encoder, PromptEncoder(tokenizer, SPEC, load or (lambda: encoder))


def test_bucket_lengths():
  assert bucket_lengths(512) == (32, 64, 128, 256, 512)
  assert bucket_lengths(200) == (32, 64, 128, 200)
  assert bucket_lengths(32) == (32,)
  assert bucket_lengths(16) == (16,)


def test_rows_are_those_of_the_padded_batch_and_zero_after_the_end():
  """SHORT runs at 32 rows, LONG (40 words and </s>) at 64; all 70 rows in one batch agree."""
  encoder, prompts = make()
  rows = prompts([SHORT, LONG])
  batch = prompts.tokenizer([SHORT, LONG])
  np.testing.assert_allclose(rows, encoder(batch.ids, batch.mask), atol=2e-6)
  assert [int((np.abs(row).sum(-1) > 0).sum()) for row in rows] == [3, 41]
  assert rows.shape == (2, ROWS, 8)


def test_a_prompt_is_encoded_once_whatever_its_neighbours():
  loaded = []
  encoder, _ = make()
  _, prompts = make(lambda: loaded.append(1) or encoder)
  first = prompts([SHORT, SHORT])
  np.testing.assert_array_equal(first[0], first[1])
  np.testing.assert_array_equal(prompts([LONG, SHORT])[1], first[0])
  prompts([SHORT, LONG])
  assert len(loaded) == 2  # for SHORT, then for LONG


def test_the_network_is_not_kept():
  made = []

  def load():
    encoder = UMT5Encoder(SPEC, rngs=nnx.Rngs(0))
    made.append(weakref.ref(encoder.layers.ffn.gate.kernel[...]))
    return encoder

  _, prompts = make(load)
  prompts([SHORT])
  gc.collect()
  assert made[0]() is None


def test_a_tokenizer_that_knows_more_words_is_refused():
  large = Tokenizer(build_tokenizer([f'word{i}' for i in range(90)], vocab_size=200),
                    max_tokens=ROWS)
  with pytest.raises(ValueError, match='has 193 tokens, the text encoder embeds 128'):
    PromptEncoder(large, SPEC, lambda: None)


def test_empty_prompts_need_leave():
  _, prompts = make()
  with pytest.raises(ValueError, match='empty'):
    prompts([' '])
  assert np.abs(prompts([''], allow_empty=True)).sum(-1).nonzero()[1].tolist() == [0]  # </s>
