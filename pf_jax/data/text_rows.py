"""Prompts and their text rows in a store, so that no text encoder is in memory while training.

Rows are float16, cut behind the longest prompt of the store; the zeros up to the model's number of
rows are put back on reading (they do take part in cross-attention). The prompts themselves are kept
beside them, as UTF-8.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pf_jax.data import latents, source
from pf_jax.models.prompt_encoder import PromptEncoder


class TextStore:
  """Read-only access to a complete store; a `source.Source` for `source.batches`.

  Args:
    path: the store's directory.
    rows: of the model, as many as the store has at least.
    width: of a row.

  Raises:
    StoreError: no such store, unfinished, damaged, or of another text encoder's sizes.
  """

  def __init__(self, path: str | os.PathLike, rows: int, width: int):
    self._store = latents.LatentStore(path)
    arrays = self._store.spec.arrays
    got = arrays['rows'].shape if 'rows' in arrays else None
    if got is None or 'text' not in arrays or got[0] > rows or got[1] != width:
      raise latents.StoreError(f'{path} holds {sorted(arrays)}, rows of {got}; wanted text rows of '
                               f'at most [{rows}, {width}]: make it with launch.prepare.')
    self._rows = rows

  def __len__(self) -> int:
    return len(self._store)

  def __getitem__(self, index: int) -> source.Record:
    rows = self._store[index]['rows']
    return {'rows': np.pad(rows, ((0, self._rows - len(rows)), (0, 0)))}

  @property
  def crc32(self) -> int:
    """Of what the store was made from: prompts, text encoder, tokenizer."""
    return self._store.crc32

  def prompt(self, index: int) -> str:
    """The prompt of a record."""
    return self._store.prompt(index)


def write(encode: PromptEncoder, prompts: Sequence[str], path: str | os.PathLike, *,
          about: Mapping[str, Any], batch_size: int = 16, overwrite: bool = False) -> int:
  """Encodes prompts into a store, continuing an earlier attempt.

  Args:
    encode: of the model's text encoder and tokenizer.
    prompts: one a record.
    path: directory of the store.
    about: JSON-able; what tells the text encoder apart.
    batch_size: prompts encoded at once, and a file of the store.
    overwrite: replaces an existing store.

  Returns:
    Rows that were kept of each prompt.

  Raises:
    StoreError: a store of other prompts, or of another text encoder, is in the way.
    ValueError: a prompt that cannot be used.
  """
  longest = int(encode.tokenizer(prompts).mask.sum(axis=1).max())
  texts = [prompt.encode() for prompt in prompts]
  size = max(map(len, texts))
  facts = json.loads(json.dumps({
      'encoder': dict(about), 'rows': longest, 'bytes': size, 'prompts': len(texts),
      'prompts_crc32': zlib.crc32(b'\0'.join(texts))}))

  def make(indices: Sequence[int]) -> dict[str, np.ndarray]:
    rows = encode([prompts[i] for i in indices])[:, :longest]
    text = np.stack([latents.text_bytes(prompts[i], size) for i in indices])
    return {'rows': latents.storable('rows', rows), 'text': text}

  latents.write_store(make, range(len(prompts)), path, facts=facts, clips_per_shard=batch_size,
                      overwrite=overwrite)
  return longest
