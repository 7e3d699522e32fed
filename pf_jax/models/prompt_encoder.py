"""Prompts to text rows: tokenizer and text encoder, each prompt at the length it needs.

The encoder is the largest network of the released model (11 GB of 14 in bfloat16) and is needed for
a moment only: it is asked for when a prompt is new and can be let go afterwards. Encoding a prompt
alone, over its real tokens, gives the rows that encoding it in a padded batch would (padding is
masked); so each prompt is run at the shortest of a few bucketed lengths, and its rows never depend
on its neighbours.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.models.text import TextSpec, UMT5Encoder
from pf_jax.models.tokenizer import Tokenizer

_SHORTEST_BUCKET = 32


def bucket_lengths(max_tokens: int) -> tuple[int, ...]:
  """Lengths that programs are compiled for: 512 -> 32, 64, 128, 256, 512."""
  lengths, length = [], _SHORTEST_BUCKET
  while length < max_tokens:
    lengths.append(length)
    length *= 2
  return (*lengths, max_tokens)


@jax.jit
def _encode(encoder: UMT5Encoder, ids: jax.Array, mask: jax.Array) -> jax.Array:
  return encoder(ids, mask)


class PromptEncoder:
  """Encodes prompts and remembers the rows, not the network.

  Attributes:
    tokenizer: of the prompts.
    spec: sizes of the text encoder.
  """

  def __init__(self, tokenizer: Tokenizer, spec: TextSpec, load: Callable[[], UMT5Encoder]):
    """Nothing is loaded yet.

    Args:
      tokenizer: must not know more tokens than the text encoder embeds.
      spec: sizes of the text encoder.
      load: gives the text encoder; called once per call with new prompts. What it returns is
        not kept here.

    Raises:
      ValueError: the tokenizer does not fit.
    """
    if tokenizer.vocab_size > spec.vocab_size:
      raise ValueError(f'the tokenizer has {tokenizer.vocab_size} tokens, the text encoder embeds '
                       f'{spec.vocab_size}; use the model\'s own tokenizer.json.')
    self.tokenizer, self.spec, self._load = tokenizer, spec, load
    self._rows: dict[str, np.ndarray] = {}

  def __call__(self, prompts: Sequence[str], *, allow_empty: bool = False) -> np.ndarray:
    """Text rows of prompts.

    Args:
      prompts: any number.
      allow_empty: accept empty prompts, for unconditional guidance.

    Returns:
      float32 [B, max_tokens, D]; rows after a prompt's end are zero and do take part in
      cross-attention.

    Raises:
      ValueError, TypeError: as `Tokenizer`.
    """
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
    if new:
      tokens = self.tokenizer(new, allow_empty=allow_empty)
      encoder = self._load()
      for prompt, ids, mask in zip(new, tokens.ids, tokens.mask, strict=True):
        self._rows[prompt] = self._encode_one(encoder, ids, mask)
    rows = np.zeros((len(prompts), self.tokenizer.max_tokens, self.spec.width), np.float32)
    for row, prompt in zip(rows, prompts, strict=True):
      known = self._rows[prompt]
      row[:len(known)] = known
    return rows

  def _encode_one(self, encoder: UMT5Encoder, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The rows of one prompt's real tokens."""
    count = int(mask.sum())
    length = next(n for n in bucket_lengths(self.tokenizer.max_tokens) if n >= count)
    rows = _encode(encoder, jnp.asarray(ids[None, :length]), jnp.asarray(mask[None, :length]))
    return np.asarray(rows)[0, :count]
