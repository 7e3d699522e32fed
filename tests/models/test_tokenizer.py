"""Prompt cleaning, tokenising and what happens to unusual prompts."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

import pf_jax.models
from pf_jax.data.digits import DigitsWorld
from pf_jax.models.text import TextSpec
from pf_jax.models.tokenizer import Tokenizer, build_tokenizer, clean_prompt

SHIPPED = (pathlib.Path(pf_jax.models.__file__).resolve().parents[1] / 'weights' / 'digits' /
           'tokenizer.json')
PROMPT = 'a white seven drifts right on a teal background'
PAD, EOS, UNK = 0, 1, 3


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer.from_file(SHIPPED, max_tokens=16)


@pytest.mark.parametrize(('raw', 'clean'), [
    (PROMPT, PROMPT),
    ('  a \t b  ', 'a b'),
    ('one\ntwo\r\nthree\u2028four\x0cfive', 'one two three four five'),
    ('a\u00a0b\u3000c', 'a b c'),
    ('x\x00y\x07z\x1b', 'xyz'),
    ('\ufeffword', 'word'),
    ('\u2018q\u2019 \u201cd\u201d', '\'q\' "d"'),
    ('cafe\u0301', 'caf\u00e9'),
    ('caf\u00c3\u00a9', 'caf\u00e9'),  # UTF-8 read as Latin-1
    ('&lt;b&gt;', '<b>'),
    ('&amp;lt;b&amp;gt;', '<b>'),
    ('&nbsp;a&#10;b', 'a b'),
    ('Keep CASE', 'Keep CASE'),
    ('lone \ud800 surrogate', 'lone \ufffd surrogate'),
    ('\x00 \n\t', ''),
    ('', ''),
])
def test_clean_prompt(raw, clean):
  assert clean_prompt(raw) == clean
  assert clean_prompt(clean) == clean


def test_a_prompt_becomes_closed_padded_ids(tokenizer):
  batch = tokenizer(PROMPT)
  assert batch.ids.shape == batch.mask.shape == (1, 16)
  assert batch.ids.dtype == np.int32
  assert batch.mask.dtype == bool
  assert tokenizer.pieces(PROMPT) == ['▁' + word for word in PROMPT.split()]
  np.testing.assert_array_equal(batch.mask[0], np.arange(16) < 10)
  assert batch.ids[0, 9] == EOS
  np.testing.assert_array_equal(batch.ids[0, 10:], PAD)
  assert batch.truncated == (False,)


def test_every_word_of_the_world_is_one_token_and_every_prompt_fits(tokenizer):
  prompts = DigitsWorld().prompts
  batch = tokenizer(prompts)
  assert not any(batch.truncated)
  np.testing.assert_array_equal(batch.mask.sum(axis=1), [len(p.split()) + 1 for p in prompts])
  assert not (batch.ids == UNK).any()
  assert len(np.unique(batch.ids, axis=0)) == len(prompts)


def test_the_shipped_file_is_what_the_recipe_gives(tmp_path):
  """In a fresh process, so that no hash seed or thread order can hide in the file."""
  script = ('import sys; from pf_jax.data.digits import DigitsWorld; '
            'from pf_jax.models.tokenizer import build_tokenizer; '
            'build_tokenizer(DigitsWorld().prompts).save(sys.argv[1])')
  path = tmp_path / 'tokenizer.json'
  subprocess.run([sys.executable, '-c', script, path], check=True, timeout=120)
  assert path.read_bytes() == SHIPPED.read_bytes()


def test_the_vocabulary_fits_the_default_encoder(tokenizer):
  assert tokenizer.vocab_size == TextSpec().vocab_size == 128
  assert tokenizer.max_tokens == TextSpec().max_tokens


def test_other_english_is_spelled_and_case_does_not_matter(tokenizer):
  text = 'The quick brown fox (age 3.5) jumps over a lazy dog & "runs" at 90%!'
  assert '<unk>' not in tokenizer.pieces(text)
  assert tokenizer.pieces(PROMPT.upper()) == tokenizer.pieces(PROMPT)


@pytest.mark.parametrize('prompt', ['\N{PARTY POPPER}', '\N{FAMILY}\u200d\N{GIRL}', '日本'])
def test_characters_outside_the_vocabulary_become_unk(tokenizer, prompt):
  batch = tokenizer(prompt)
  assert UNK in batch.ids
  assert batch.ids[0, batch.mask[0]][-1] == EOS


def test_emoji_inside_a_prompt_leaves_its_words_alone(tokenizer):
  pieces = tokenizer.pieces('a white \N{PARTY POPPER} seven')
  assert pieces == ['▁a', '▁white', '▁', '<unk>', '▁seven']


@pytest.mark.parametrize('prompt', ['s' * 10_000, 'seven ' * 1_667, '\N{PARTY POPPER} ' * 5_000])
def test_ten_thousand_characters_are_cut_and_reported(tokenizer, prompt):
  with pytest.warns(UserWarning, match='15 fit; the rest is ignored. Shorten it'):
    batch = tokenizer([PROMPT, prompt])
  assert batch.truncated == (False, True)
  assert batch.mask[1].all()
  assert batch.ids[1, -1] == EOS
  assert (batch.ids[1, :-1] != EOS).all()


def test_a_prompt_that_just_fits_is_not_cut(tokenizer):
  batch = tokenizer('seven ' * 15)
  assert batch.truncated == (False,)
  assert batch.ids[0, -1] == EOS


def test_control_characters_and_newlines_do_not_change_the_tokens(tokenizer):
  noisy = PROMPT.replace(' ', ' \n\t').replace('seven', 's\x00even\x07')
  np.testing.assert_array_equal(tokenizer(noisy).ids, tokenizer(PROMPT).ids)


def test_a_literal_end_token_is_read_as_upstream_reads_it(tokenizer):
  """Text after it is kept; the prompt still ends with its own </s>."""
  ids = tokenizer('one </s> two').ids[0]
  assert list(ids).count(EOS) == 2
  assert tokenizer.pieces('one </s> two') == ['▁one', '▁', '</s>', '▁two']


@pytest.mark.parametrize('prompt', ['', '   ', '\x00', '\n\t', '&nbsp;'])
def test_empty_prompts_are_refused_unless_asked_for(tokenizer, prompt):
  with pytest.raises(ValueError, match=r'the prompt is empty .* say what the video shows'):
    tokenizer([PROMPT, prompt])
  batch = tokenizer(prompt, allow_empty=True)
  assert list(batch.ids[0, batch.mask[0]]) == [EOS]


@pytest.mark.parametrize('prompt', [None, 7, b'bytes', ['nested']])
def test_prompts_that_are_not_text(tokenizer, prompt):
  with pytest.raises(TypeError, match='a prompt is a string, got'):
    tokenizer([prompt])


def test_bad_files_and_sizes(tmp_path, tokenizer):
  with pytest.raises(FileNotFoundError, match=r'give the path of a tokenizer\.json'):
    Tokenizer.from_file(tmp_path / 'none.json', max_tokens=16)
  (tmp_path / 'bad.json').write_text('{"not": "a tokenizer"}')
  with pytest.raises(ValueError, match=r'is not a tokenizer\.json'):
    Tokenizer.from_file(tmp_path / 'bad.json', max_tokens=16)
  with pytest.raises(ValueError, match='max_tokens=1 leaves no room'):
    Tokenizer.from_file(SHIPPED, max_tokens=1)
  with pytest.raises(ValueError, match=r'vocab_size=50 is 25 too small .* use 75'):
    build_tokenizer(['one two'], vocab_size=50)


def test_a_tokenizer_without_the_special_tokens_is_refused():
  import tokenizers

  bare = tokenizers.Tokenizer(tokenizers.models.Unigram([('a', 0.0)], unk_id=0))
  with pytest.raises(ValueError, match=r'has no .<pad>.; use'):
    Tokenizer(bare, max_tokens=4)
