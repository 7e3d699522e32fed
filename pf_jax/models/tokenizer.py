"""Prompts to token ids: cleaning as upstream does it, and a thin wrapper around `tokenizers`.

A prompt is cleaned first: broken encodings, curly quotes and control characters are repaired or
removed, HTML entities are read (twice, for the doubly escaped), and every run of whitespace,
newlines included, becomes one space. Then a Unigram model (UMT5's kind) splits it, `</s>` closes
it, and it is padded to a fixed number of text rows.

What happens to unusual prompts: characters the vocabulary lacks (emoji) become <unk>; a prompt
that is too long loses its end but keeps its </s>, and says so; a literal '</s>' in a prompt is
read as that token, as upstream does; a prompt with nothing left in it is an error.
"""

import html
import math
import os
import pathlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
  import tokenizers

PAD, EOS, BOS, UNK = '<pad>', '</s>', '<s>', '<unk>'
SPECIAL_TOKENS = (PAD, EOS, BOS, UNK)  # ids 0, 1, 2, 3
_SPACE = '\N{LOWER ONE EIGHTH BLOCK}'  # how Unigram vocabularies write the space before a word
# Frequent English words and endings: text outside the training prompts stays a little shorter.
_COMMON = tuple(_SPACE + word for word in (
    'the', 'of', 'and', 'to', 'in', 'is', 'with', 'number', 'digit', 'black')) + (
        'ing', 'tion', 'er', 'ed', 'th', 'an', 're', 'es', 'ly', 'al', 'en', 'ar', 'st', 'or',
        'le', 'ou', 'ch', 'sh', 'in', 'at')
_LETTERS = 'abcdefghijklmnopqrstuvwxyz'
_REST = '0123456789' + '.,!?\'"-:;()/&%#+*=@_$[]<>{}|~^`\\'


def clean_prompt(prompt: str) -> str:
  r"""Repairs and normalises a prompt the way Wan's text pipeline does; case is kept.

  NUL and other control characters disappear, tabs and newlines count as spaces.

  Args:
    prompt: any text.

  Returns:
    The cleaned text, possibly empty.

  Raises:
    TypeError: `prompt` is not a string.
  """
  import ftfy  # 60 ms that only sampling and training need

  if not isinstance(prompt, str):
    raise TypeError(f'a prompt is a string, got {type(prompt).__name__}: {prompt!r:.60}.')
  text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
  return re.sub(r'\s+', ' ', text.strip()).strip()


class TextBatch(NamedTuple):
  """Tokenised prompts, on the host.

  Attributes:
    ids: int32 [B, max_tokens], padded on the right.
    mask: bool [B, max_tokens], true at tokens (</s> included).
    truncated: per prompt, whether its end was cut off.
  """

  ids: np.ndarray
  mask: np.ndarray
  truncated: tuple[bool, ...]


class Tokenizer:
  """A `tokenizers` model with cleaning, closing, padding and reported truncation.

  Attributes:
    max_tokens: text rows, </s> included.
    vocab_size: ids run from 0 to below this.
  """

  def __init__(self, backend: 'tokenizers.Tokenizer', *, max_tokens: int):
    """Wraps a loaded tokenizer.

    Args:
      backend: any `tokenizers.Tokenizer` that knows <pad>, </s> and <unk>.
      max_tokens: text rows to pad and truncate to.

    Raises:
      ValueError: no room for a token besides </s>, or special tokens are missing.
    """
    if max_tokens < 2:
      raise ValueError(f'{max_tokens=} leaves no room for a prompt; use at least 2.')
    self._pad, self._eos, _ = (_required(backend, token) for token in (PAD, EOS, UNK))
    backend.no_truncation()
    backend.no_padding()
    self._backend = backend
    self.max_tokens = max_tokens

  @classmethod
  def from_file(cls, path: str | os.PathLike, *, max_tokens: int) -> 'Tokenizer':
    """Reads a tokenizer.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: the file is not a tokenizer.
    """
    import tokenizers

    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(f'no tokenizer at {path}; give the path of a tokenizer.json.')
    try:
      backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exceptions
      raise ValueError(f'{path} is not a tokenizer.json: {ascii(str(error))[1:200]}.') from error
    return cls(backend, max_tokens=max_tokens)

  @property
  def vocab_size(self) -> int:
    return self._backend.get_vocab_size()

  def pieces(self, prompt: str) -> list[str]:
    """The vocabulary entries a prompt is split into, before truncation and without </s>.

    Unlike `tokenizers`' own list, characters outside the vocabulary show as <unk>.
    """
    ids = self._backend.encode(clean_prompt(prompt), add_special_tokens=False).ids
    return [str(self._backend.id_to_token(i)) for i in ids]

  def __call__(self, prompts: str | Sequence[str], *, allow_empty: bool = False) -> TextBatch:
    """Tokenises prompts; warns about those that do not fit.

    Args:
      prompts: one prompt (a batch of 1) or several.
      allow_empty: accept empty prompts, for unconditional guidance.

    Returns:
      A `TextBatch`.

    Raises:
      ValueError: a prompt has nothing left after cleaning.
      TypeError: a prompt is not a string.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = np.full((len(prompts), self.max_tokens), self._pad, np.int32)
    mask = np.zeros(ids.shape, bool)
    truncated = []
    for row, prompt in enumerate(prompts):
      tokens, cut = self._encode(prompt, allow_empty)
      ids[row, :len(tokens)] = tokens
      mask[row, :len(tokens)] = True
      truncated.append(cut)
    return TextBatch(ids, mask, tuple(truncated))

  def _encode(self, prompt: str, allow_empty: bool) -> tuple[list[int], bool]:
    """One prompt -> its ids with </s>, and whether some were cut off."""
    text = clean_prompt(prompt)
    if not text and not allow_empty:
      raise ValueError(f'the prompt is empty (got {prompt!r:.60}); say what the video shows, for '
                       f'example "a white seven drifts right on a teal background".')
    tokens = self._backend.encode(text, add_special_tokens=False).ids
    room = self.max_tokens - 1
    if cut := len(tokens) > room:
      warnings.warn(f'the prompt "{text[:40]}..." has {len(tokens)} tokens, {room} fit; the rest '
                    f'is ignored. Shorten it.', stacklevel=3)
    return [*tokens[:room], self._eos], cut


def _required(backend: 'tokenizers.Tokenizer', token: str) -> int:
  index = backend.token_to_id(token)
  if index is None:
    raise ValueError(f'the tokenizer has no {token!r}; use a tokenizer.json of UMT5\'s kind.')
  return index


def build_tokenizer(prompts: Iterable[str], *, vocab_size: int = 128) -> 'tokenizers.Tokenizer':
  """Makes a small Unigram tokenizer in which every word of `prompts` is one token.

  A Unigram model prefers the segmentation with the largest sum of log probabilities. Words get
  their log frequency; letters, digits, punctuation and a few frequent English pieces get less
  than any word, so that they spell whatever else is typed. Nothing is fitted, so the same prompts
  always give the same file. Input is NFKC-normalised and lower-cased by the tokenizer itself.

  The shipped file is `build_tokenizer(pf_jax.data.digits.DigitsWorld().prompts)`, saved by its
  `save` method.

  Args:
    prompts: all prompts, or a fair sample of them.
    vocab_size: size of the vocabulary; room that is left over goes to frequent English pieces.

  Returns:
    A `tokenizers.Tokenizer`: pad 0, </s> 1, <s> 2, <unk> 3, then pieces by falling frequency.

  Raises:
    ValueError: the words and single characters alone need more than `vocab_size`.
  """
  counts = Counter(word for prompt in prompts for word in clean_prompt(prompt).lower().split())
  words = [_SPACE + word for word in sorted(counts, key=lambda word: (-counts[word], word))]
  characters = [_SPACE, *_LETTERS, *_REST]
  spare = vocab_size - len(SPECIAL_TOKENS) - len({*words, *characters})
  if spare < 0:
    raise ValueError(f'{vocab_size=} is {-spare} too small for {len(words)} words and '
                     f'{len(characters)} characters; use {vocab_size - spare}.')
  common = [piece for piece in _COMMON if piece not in {*words, *characters}][:spare]
  total = sum(counts.values())
  floor = math.log(1 / total)
  scores = dict.fromkeys(SPECIAL_TOKENS, 0.0)
  scores |= {word: round(math.log(counts[word[1:]] / total), 6) for word in words}
  scores |= {piece: round(floor - 2, 6) for piece in common}
  scores |= {piece: round(floor - 4, 6) for piece in characters if piece not in scores}
  return _unigram(list(scores.items()))


def _unigram(vocabulary: list[tuple[str, float]]) -> 'tokenizers.Tokenizer':
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

  backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL_TOKENS.index(UNK)))
  backend.add_special_tokens(list(SPECIAL_TOKENS))
  backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
  backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme='always')
  backend.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme='always')
  backend.post_processor = processors.TemplateProcessing(
      single=f'$A {EOS}', special_tokens=[(EOS, SPECIAL_TOKENS.index(EOS))])
  return backend
