"""Judges sampled videos of the digits world, block by block, with intervals.

Every metric gives one number per video and judged block. A table row is the mean over videos with
a 95% bootstrap interval over videos: the spread between seeds, not between frames. Metrics that
can be hit by luck carry their chance; ground-truth clips (`ground_truth_report`) give the ceiling.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pf_jax import types
from pf_jax.data import digits
from pf_jax.evals import classifier as classifier_lib
from pf_jax.evals import metrics

METRICS = {
    'class_accuracy': 'share of the frames whose glyph is read as the digit of the prompt',
    'class_probability': 'mean probability of the digit of the prompt',
    'instance_rank1': 'share of the frames whose glyph is nearest to the anchor instance among '
                      'same-class instances',
    'instance_similarity': 'mean correlation with the glyph of the first block',
    'colour_accuracy': 'share of the frames whose background is nearest to the colour '
                       'of the prompt',
    'background_drift': 'RMS distance of the background from its colour in the first block',
    'dynamic_degree': 'speed of the glyph relative to the true speed',
    'sharpness': 'self-weighted gradient of the glyph\'s coverage',
    'seam': 'frame difference at the block\'s start relative to inside it',
}


@dataclasses.dataclass(frozen=True)
class EvalSpec:
  """How videos are judged.

  Attributes:
    blocks: judged blocks, counted from 1: block 120 is the last of a 120-block video.
    instances: candidates N of instance retrieval (chance 1 / N).
    split: where the candidate instances come from.
    resamples: bootstrap samples.
    confidence: of the intervals.
    seed: of candidates and bootstrap.

  Raises:
    ValueError: a field is out of range.
  """

  blocks: tuple[int, ...] = (5, 30, 60, 120)
  instances: int = 10
  split: str = 'train'
  resamples: int = 2000
  confidence: float = 0.95
  seed: int = 0

  def __post_init__(self):
    if not self.blocks or min(self.blocks) < 1:
      raise ValueError(f'blocks={self.blocks} must name at least one block, counted from 1.')
    if self.instances < 2:
      raise ValueError(f'instances={self.instances} must be at least 2: one to find, one to miss.')


@dataclasses.dataclass(frozen=True)
class Report:
  """Measured values.

  Attributes:
    values: metric -> float [B, blocks]; NaN where a metric does not apply.
    once: metric -> float [B], measured once a video.
    chance: metric -> what guessing would score, where that means something.
    spec: how it was measured.
  """

  values: Mapping[str, np.ndarray]
  once: Mapping[str, np.ndarray]
  chance: Mapping[str, float]
  spec: EvalSpec

  @property
  def videos(self) -> int:
    return len(next(iter(self.values.values())))

  def rows(self) -> list[dict[str, Any]]:
    """One row per metric and block: metric, block, mean, low, high, videos, chance.

    Metrics measured once a video have block None.
    """
    columns: list[tuple[str, int | None, np.ndarray]] = [
        (name, block, values[:, i]) for name, values in self.values.items()
        for i, block in enumerate(self.spec.blocks)]
    columns += [(name, None, values) for name, values in self.once.items()]
    rows = []
    for name, block, values in columns:
      mean, low, high = metrics.bootstrap(values, resamples=self.spec.resamples,
                                          confidence=self.spec.confidence, seed=self.spec.seed)
      rows.append({'metric': name, 'block': block, 'mean': mean, 'low': low, 'high': high,
                   'videos': int((~np.isnan(values)).sum()), 'chance': self.chance.get(name)})
    return rows

  def to_json(self) -> str:
    """Rows and per-video values as strict JSON (NaN becomes null)."""
    def clean(value):
      if isinstance(value, float):
        return value if np.isfinite(value) else None
      if isinstance(value, Mapping):
        return {k: clean(v) for k, v in value.items()}
      return [clean(v) for v in value] if isinstance(value, list | tuple) else value
    return json.dumps(clean({
        'spec': dataclasses.asdict(self.spec),
        'videos': self.videos,
        'rows': self.rows(),
        'values': {name: values.tolist() for name, values in self.values.items()},
        'once': {name: values.tolist() for name, values in self.once.items()},
    }), indent=1, allow_nan=False)

  def to_markdown(self) -> str:
    """A table, metrics down and blocks across: mean [low, high]."""
    blocks = self.spec.blocks
    lines = ['| metric | ' + ' | '.join(f'block {b}' for b in blocks) + ' | chance |',
             '|---|' + '---|' * (len(blocks) + 1)]
    rows = self.rows()
    for name in self.values:
      cells = [_cell(row) for row in rows if row['metric'] == name]
      lines.append(f'| {name} | ' + ' | '.join(cells) + f' | {self.chance.get(name, "")} |')
    return '\n'.join(lines)


def evaluate(videos: Sequence[np.ndarray], prompts: Sequence[str], *,
             video: types.VideoSpec, world: digits.DigitsWorld,
             classifier: classifier_lib.GlyphClassifier, spec: EvalSpec | None = None,
             image_ids: Sequence[int] | None = None) -> Report:
  """Measures videos against their prompts.

  Args:
    videos: [B, T, H, W, 3], or any sequence of [T, H, W, 3]; uint8, or float in [-1, 1]. One is
      converted at a time.
    prompts: one prompt of the world per video.
    video: geometry: which frames belong to which block.
    world: the world the videos should show.
    classifier: reads digits (`classifier.load().model`).
    spec: what to measure.
    image_ids: the true instance of each video, when one was given to the sampler as its first
      blocks. Without it the anchor is the candidate nearest to the video's own first block.

  Returns:
    The report.

  Raises:
    ValueError: numbers of videos and prompts differ, a prompt is not of this world, or a video
      ends before a judged block.
  """
  spec = spec or EvalSpec()
  if len(videos) != len(prompts) or not len(videos):
    raise ValueError(f'{len(videos)=} and {len(prompts)=}; wanted one prompt per video and at '
                     'least one video.')
  parts = [digits.parse_prompt(prompt, world.colours) for prompt in prompts]
  rng = np.random.default_rng(spec.seed)
  per_video = []
  for i, (frames, wanted) in enumerate(zip(videos, parts, strict=True)):
    true_id = None if image_ids is None else int(image_ids[i])
    candidates = _candidates(world, wanted.digit, true_id, spec, rng)
    judge = _Judge(world, video, classifier, wanted,
                   metrics.centred(digits.glyphs(world.glyph_size)[candidates]),
                   true_id is not None)
    per_video.append(judge(np.asarray(frames), spec.blocks, name=f'video {i}'))
  values = {name: np.array([[block[name] for block in blocks] for blocks, _ in per_video])
            for name in METRICS}
  once = {'direction_accuracy': np.array([once for _, once in per_video])}
  chance = {'class_accuracy': 1 / len(digits.DIGIT_NAMES), 'instance_rank1': 1 / spec.instances,
            'colour_accuracy': 1 / len(world.colours), 'direction_accuracy': 1 / 2}
  return Report(values, once, chance, spec)


def ground_truth_report(world: digits.DigitsWorld, video: types.VideoSpec,
                        classifier: classifier_lib.GlyphClassifier, *, clips: int = 16,
                        spec: EvalSpec | None = None) -> Report:
  """The same measurement on true, held-out clips: the ceiling of every metric."""
  spec = spec or EvalSpec()
  frames = video.pixel_frames(max(spec.blocks))
  drawn = [world.clip(i, spec.seed, frames, 'test') for i in range(clips)]
  return evaluate([clip.pixels for clip in drawn], [clip.prompt for clip in drawn], video=video,
                  world=world, classifier=classifier, spec=spec,
                  image_ids=[clip.attributes.image_id for clip in drawn])


def comparison(reports: Mapping[str, Report], metric: str) -> str:
  """A markdown table of one metric: a row per report (e.g. cache policy), a column per block.

  Raises:
    ValueError: no reports, an unknown metric or reports that judged different blocks.
  """
  if not reports or metric not in METRICS:
    raise ValueError(f'{metric=} of {len(reports)} reports; wanted one of {", ".join(METRICS)} and '
                     'at least one report.')
  blocks = {report.spec.blocks for report in reports.values()}
  if len(blocks) > 1:
    raise ValueError(f'The reports judged different blocks: {sorted(blocks)}; evaluate again with '
                     'one EvalSpec.')
  header = next(iter(blocks))
  lines = [f'| {metric} | ' + ' | '.join(f'block {b}' for b in header) + ' |',
           '|---|' + '---|' * len(header)]
  for name, report in reports.items():
    cells = [_cell(row) for row in report.rows() if row['metric'] == metric]
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class _Judge:
  """Measures one video.

  Attributes:
    world, video, classifier: as in `evaluate`.
    wanted: what the prompt asked for.
    candidates: centred coverage [N, S, S] of same-class instances; the true one first, if known.
    first_is_true: whether the first candidate is the video's true instance.
  """

  world: digits.DigitsWorld
  video: types.VideoSpec
  classifier: classifier_lib.GlyphClassifier
  wanted: digits.PromptParts
  candidates: np.ndarray
  first_is_true: bool

  def __call__(self, frames: np.ndarray, blocks: Sequence[int],
               name: str) -> tuple[list[dict[str, float]], float]:
    self._check(frames, max(blocks), name)
    size = self.world.glyph_size
    first = metrics.analyse(metrics.to_unit(frames[:self.video.first_block_frames]), size)
    reference = {
        'background': np.median(first['background'], 0),
        'glyph': first['glyphs'].mean(0),
        # The instance most first-block frames resemble most; found before later blocks are seen.
        'anchor': 0 if self.first_is_true else int(
            metrics.similarity(first['glyphs'], self.candidates).mean(0).argmax()),
    }
    direction = metrics.direction(first['centres']) == self.wanted.direction
    return [self._block(frames, block, reference) for block in blocks], float(direction)

  def _check(self, frames: np.ndarray, last_block: int, name: str) -> None:
    wanted = (self.video.pixel_frames(last_block), self.world.height, self.world.width, 3)
    if frames.ndim != 4 or frames.shape[1:] != wanted[1:] or len(frames) < wanted[0]:
      raise ValueError(f'{name} has shape {frames.shape}; wanted at least {wanted} for block '
                       f'{last_block}: judge earlier blocks or sample a longer video.')

  def _block(self, frames: np.ndarray, block: int, reference: Mapping) -> dict[str, float]:
    stop = self.video.pixel_frames(block)
    start = stop - self.video.block_frames if block > 1 else 0
    unit = metrics.to_unit(frames[max(start - 1, 0):stop])
    own = unit if block == 1 else unit[1:]
    found = metrics.analyse(own, self.world.glyph_size)
    probabilities = classifier_lib.predict(self.classifier, found['glyphs'])
    nearest = metrics.similarity(found['glyphs'], self.candidates).argmax(-1)
    colour = [c.name for c in self.world.colours].index(self.wanted.colour)
    drift = metrics.colour_distance(found['background'], reference['background'])
    alike = metrics.similarity(found['glyphs'], reference['glyph'][None])
    return {
        'class_accuracy': float((probabilities.argmax(-1) == self.wanted.digit).mean()),
        'class_probability': float(probabilities[:, self.wanted.digit].mean()),
        'instance_rank1': float((nearest == reference['anchor']).mean()),
        'instance_similarity': float(alike.mean()),
        'colour_accuracy': float(
            (metrics.nearest_colour(found['background'], self.world) == colour).mean()),
        'background_drift': float(drift.mean()),
        'dynamic_degree': (metrics.dynamic_degree(found['centres'], self.world.speed)
                           if self.world.speed else float('nan')),
        'sharpness': float(metrics.sharpness(found['glyphs']).mean()),
        'seam': metrics.seam(unit) if block > 1 else float('nan'),
    }


def _candidates(world: digits.DigitsWorld, digit: int, true_id: int | None, spec: EvalSpec,
                rng: np.random.Generator) -> np.ndarray:
  """Image ids [N] of instances to choose from; the true one first, if there is one."""
  pool = world.images(spec.split, digit)
  pool = pool[pool != true_id]
  known = [] if true_id is None else [true_id]
  count = spec.instances - len(known)
  if count > len(pool):
    raise ValueError(f'instances={spec.instances} exceeds the {len(pool)} images of digit {digit} '
                     f'in split {spec.split!r}; use fewer.')
  return np.concatenate([known, rng.choice(pool, count, replace=False)]).astype(int)


def _cell(row: Mapping[str, Any]) -> str:
  if np.isnan(row['mean']):
    return '-'
  return f'{row["mean"]:.3f} [{row["low"]:.3f}, {row["high"]:.3f}]'
