"""The settings of a sampling run that do not change with the prompt. No JAX here."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class SampleSpec:
  """How to sample and what to write.

  Attributes:
    batch_size: most videos that advance in lockstep.
    quality: x264's constant rate factor, 0..51.
    sheet_columns: moments on the contact sheet.
    cache: fields of `CacheSpec`; None leaves the model's own choice.
    sampler: fields of `SamplerSpec`, likewise.

  Raises:
    ValueError: a value out of range.
  """

  batch_size: int = 4
  quality: int = 18
  sheet_columns: int = 8
  cache: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for name in ('batch_size', 'sheet_columns'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if not 0 <= self.quality <= 51:
      raise ValueError(f'quality={self.quality} must be within 0..51; 18 is visually lossless.')

  def chosen(self, section: str) -> dict[str, Any]:
    """The choices of 'cache' or 'sampler' that were made here."""
    return {name: value for name, value in getattr(self, section).items() if value is not None}


WARM_UP = 2  # blocks: the first one runs programs of its own, the second one is theirs' first call


@dataclasses.dataclass(frozen=True)
class TraceSpec:
  """Which blocks of a run are traced.

  Attributes:
    directory: of the trace; new or empty.
    first: number of the first one; later if blocks are replayed before it.
    blocks: how many, at most.

  Raises:
    ValueError: a number out of range.
  """

  directory: str | os.PathLike
  first: int = WARM_UP
  blocks: int = 3

  def __post_init__(self):
    if self.first < WARM_UP:
      raise ValueError(f'first={self.first} must be at least {WARM_UP}: block 0 runs programs of '
                       'its own, and what runs for the first time takes longer.')
    if self.blocks < 1:
      raise ValueError(f'blocks={self.blocks} must be at least 1.')
