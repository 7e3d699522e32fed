"""Stores of text rows: what comes back, what is refused."""

import numpy as np
import pytest

from pf_jax.data import latents, source, text_rows
from pf_jax.data.text_rows import TextStore
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.pipeline import PACKAGED
from tests.evals import micro

PROMPTS = ('a white seven', 'a white three drifts left on a navy background', 'naïve ☃ 雪')


@pytest.fixture(scope='module')
def encode():
  spec = micro.spec().text
  tokenizer = Tokenizer.from_file(PACKAGED / 'tokenizer.json', max_tokens=spec.max_tokens)
  return PromptEncoder(tokenizer, spec, lambda: micro.models().text)


def test_rows_and_prompts_come_back(encode, tmp_path):
  rows = text_rows.write(encode, PROMPTS, tmp_path / 'store', about={'text': 'abc'}, batch_size=2)
  assert rows == max(int(n) for n in encode.tokenizer(PROMPTS).mask.sum(axis=1)) <= 16
  store = TextStore(tmp_path / 'store', 16, 12)
  assert [store.prompt(i) for i in range(len(store))] == list(PROMPTS)
  wanted = encode(PROMPTS)
  for index in range(3):
    got = store[index]['rows']
    np.testing.assert_allclose(got, wanted[index], rtol=2e-3, atol=1e-4)  # float16
    np.testing.assert_array_equal(got[rows:], 0)
  (batch,) = (b for b, _ in zip(source.batches(store, 2), range(1), strict=False))
  np.testing.assert_array_equal(batch['rows'][1], store[1]['rows'])


def test_an_interrupted_store_is_completed(encode, tmp_path):
  calls = []

  class Interrupted:
    tokenizer = encode.tokenizer

    def __call__(self, prompts):
      calls.append(list(prompts))
      if len(calls) == 3:  # the first call finds out the shapes
        raise KeyboardInterrupt
      return encode(prompts)

  with pytest.raises(KeyboardInterrupt):
    text_rows.write(Interrupted(), PROMPTS, tmp_path / 'a', about={}, batch_size=2)
  with pytest.raises(latents.StoreError, match='unfinished'):
    TextStore(tmp_path / 'a', 16, 12)
  text_rows.write(encode, PROMPTS, tmp_path / 'a', about={}, batch_size=2)
  text_rows.write(encode, PROMPTS, tmp_path / 'b', about={}, batch_size=2)
  a, b = (TextStore(tmp_path / name, 16, 12) for name in 'ab')
  for index in range(3):
    np.testing.assert_array_equal(a[index]['rows'], b[index]['rows'])
    assert a.prompt(index) == b.prompt(index)


@pytest.mark.parametrize(('prompts', 'about'), [
    (PROMPTS[:2], {'text': 'abc'}), (PROMPTS[::-1], {'text': 'abc'}), (PROMPTS, {'text': 'xyz'})])
def test_other_prompts_or_another_encoder_are_refused(encode, tmp_path, prompts, about):
  text_rows.write(encode, PROMPTS, tmp_path / 'store', about={'text': 'abc'})
  with pytest.raises(latents.StoreError, match='holds other data'):
    text_rows.write(encode, prompts, tmp_path / 'store', about=about)


def test_rows_of_another_model_are_refused(encode, tmp_path):
  text_rows.write(encode, PROMPTS, tmp_path / 'store', about={})
  with pytest.raises(latents.StoreError, match=r'wanted text rows of at most \[16, 4096\]'):
    TextStore(tmp_path / 'store', 16, 4096)
