"""What an evaluation measures, in plain numbers; nothing here needs JAX."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from pf_jax.data import digits

STARTS = ('prompt', 'clip')
BRANCHES = ('both', 'hr', 'lr', 'none')


def _check_starts(name: str, starts: tuple[str, ...]) -> None:
  unknown = [start for start in starts if start not in STARTS]
  if unknown or len(set(starts)) < len(starts):
    raise ValueError(f'{name}={starts} must name some of {", ".join(STARTS)}, each once.')


def _check_blocks(judged: tuple[int, ...], blocks: int, given: int) -> None:
  rising = bool(judged) and list(judged) == sorted(set(judged))
  if not rising or judged[0] <= given or judged[-1] > blocks:
    raise ValueError(f'judged={judged} must rise within {given + 1}..{blocks}: later than the '
                     f'{given} given blocks and no later than the end of the video.')


@dataclasses.dataclass(frozen=True)
class AblationConfig:
  """Cache policies, and perhaps models, compared on the same prompts and the same noise.

  Attributes:
    policies: name -> fields of `CacheSpec` that differ from the model's own choices.
    samplers: policy -> fields of `SamplerSpec`, likewise.
    checkpoints: policy -> another model to sample with, see `pipeline.find_model`.
    baseline: the policy that all others are compared with.
    starts: how videos begin: 'prompt' (text alone) or 'clip' (the first blocks are a true one).
    start_blocks: length of that true beginning.
    blocks: length of the videos.
    judged: blocks of the tables, counted from 1.
    curve_every: the curves also show every n-th block; 0 shows the judged ones only.

  Raises:
    ValueError: a field is out of range.
  """

  policies: Mapping[str, Mapping[str, Any]]
  samplers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  checkpoints: Mapping[str, str] = dataclasses.field(default_factory=dict)
  baseline: str = 'pack'
  starts: tuple[str, ...] = STARTS
  start_blocks: int = 2
  blocks: int = 120
  judged: tuple[int, ...] = (5, 30, 60, 120)
  curve_every: int = 10

  def __post_init__(self):
    if self.baseline not in self.policies:
      raise ValueError(f'baseline={self.baseline!r} is not one of the policies '
                       f'{", ".join(self.policies)}; add it or name another.')
    for section in ('samplers', 'checkpoints'):
      if unknown := [name for name in getattr(self, section) if name not in self.policies]:
        raise ValueError(f'{section} names {", ".join(unknown)}; wanted some of the policies '
                         f'{", ".join(self.policies)}.')
    for name in self.policies:
      if not re.fullmatch(r'[a-z0-9][a-z0-9_]*', name):
        raise ValueError(f'the policy name {name!r} becomes a file name; use small letters, digits '
                         'and underscores.')
    _check_starts('starts', self.starts)
    if self.curve_every < 0:
      raise ValueError(f'curve_every={self.curve_every} must be 0 (none) or more.')
    _check_blocks(self.judged, self.blocks, self.start_blocks if 'clip' in self.starts else 0)
    if self.start_blocks < 1:
      raise ValueError(f'start_blocks={self.start_blocks} must be at least 1; for videos without a '
                       'true beginning leave "clip" out of starts.')

  @property
  def names(self) -> tuple[str, ...]:
    """The policies, baseline first."""
    return (self.baseline, *(name for name in self.policies if name != self.baseline))

  @property
  def all_judged(self) -> tuple[int, ...]:
    """Blocks of tables and curves, rising."""
    curve = range(self.curve_every, self.blocks + 1, self.curve_every) if self.curve_every else ()
    return tuple(sorted({*self.judged, *curve}))


@dataclasses.dataclass(frozen=True)
class PartsConfig:
  """What each part of the model does.

  Attributes:
    clip_blocks: length of the true clips that VAE and compressor are measured on.
    branches: compressor branches left in, one rollout each; the first one is the baseline and is
      also run with the prompts swapped between videos.
    start: how these rollouts begin, see `AblationConfig.starts`.
    blocks: their length; 0 measures VAE and compressor alone.
    judged: their judged blocks.

  Raises:
    ValueError: a field is out of range.
  """

  clip_blocks: int = 5
  branches: tuple[str, ...] = BRANCHES
  start: str = 'prompt'
  blocks: int = 30
  judged: tuple[int, ...] = (5, 30)

  def __post_init__(self):
    if self.clip_blocks < 2:
      raise ValueError(f'clip_blocks={self.clip_blocks} must be at least 2: drift needs a block '
                       'after the first.')
    _check_starts('start', (self.start,))
    if self.blocks:
      _check_blocks(self.judged, self.blocks, 0)
    unknown = [branch for branch in self.branches if branch not in BRANCHES]
    if unknown or not self.branches or len(set(self.branches)) < len(self.branches):
      raise ValueError(f'branches={self.branches} must name some of {", ".join(BRANCHES)}, '
                       'each once.')


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """A whole evaluation.

  Attributes:
    ablation: cache policies.
    parts: VAE, text, compressor.
    world: what the videos should show.
    videos: videos of every run: held-out draws 0, 1, ..., each with its own noise.
    batch: videos that advance in lockstep.
    seed: of draws, noise and bootstrap.
    instances: candidates of instance retrieval.
    resamples: bootstrap samples.
    confidence: of the intervals.
    headline: metrics that get tables of differences and a curve.
    sheet_videos: rows of the contact sheets.
    sheet_columns: their moments, from the first frame to the last.

  Raises:
    ValueError: a field is out of range.
  """

  ablation: AblationConfig
  parts: PartsConfig = PartsConfig()
  world: digits.DigitsWorld = digits.DigitsWorld()
  videos: int = 16
  batch: int = 16
  seed: int = 0
  instances: int = 10
  resamples: int = 2000
  confidence: float = 0.95
  headline: tuple[str, ...] = ('class_accuracy', 'background_drift')
  sheet_videos: int = 6
  sheet_columns: int = 10

  def __post_init__(self):
    for name in ('videos', 'batch', 'resamples', 'sheet_videos', 'sheet_columns'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.videos % self.batch:
      raise ValueError(f'videos={self.videos} is not a multiple of batch={self.batch}; use '
                       f'{-(-self.videos // self.batch) * self.batch} videos or another batch.')
    if not 0 <= self.seed <= 2**32 - self.videos:
      raise ValueError(f'seed={self.seed} must lie within 0..{2**32 - self.videos}; the videos '
                       'count up from it.')
    if self.instances < 2 or not 0 < self.confidence < 1:
      raise ValueError(f'instances={self.instances} must be at least 2 and '
                       f'confidence={self.confidence} inside (0, 1).')
    ablation, parts = self.ablation, self.parts
    if parts.start == 'clip' and parts.blocks and min(parts.judged) <= ablation.start_blocks:
      raise ValueError(f'parts.judged={parts.judged} includes blocks of the true beginning '
                       f'(start_blocks={ablation.start_blocks}); judge later ones.')
