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


MEAN = 'mean'


def _mean_over_blocks(values: np.ndarray) -> np.ndarray:
  """[B, blocks] -> [B]; blocks without a value do not count, nor videos without any."""
  counts = (~np.isnan(values)).sum(1)
  return np.where(counts, np.nansum(values, axis=1) / np.maximum(counts, 1), np.nan)


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

  def at(self, blocks: Sequence[int]) -> 'Report':
    """The same report reduced to some of its blocks.

    Raises:
      ValueError: one of them was not judged.
    """
    missing = sorted(set(blocks) - set(self.spec.blocks))
    if missing:
      raise ValueError(f'block {missing[0]} was not judged; there are {self.spec.blocks}.')
    columns = [self.spec.blocks.index(block) for block in blocks]
    return dataclasses.replace(
        self, values={name: values[:, columns] for name, values in self.values.items()},
        spec=dataclasses.replace(self.spec, blocks=tuple(blocks)))

  def rows(self) -> list[dict[str, Any]]:
    """One row per metric and block: metric, block, mean, low, high, videos, chance.

    Block `MEAN` is each video's mean over all judged blocks: what comes and goes between two blocks
    of a table shows there. Metrics measured once a video have block None.
    """
    columns: list[tuple[str, int | str | None, np.ndarray]] = [
        (name, block, values[:, i]) for name, values in self.values.items()
        for i, block in enumerate(self.spec.blocks)]
    columns += [(name, MEAN, _mean_over_blocks(values)) for name, values in self.values.items()]
    columns += [(name, None, values) for name, values in self.once.items()]
    rows = []
    for name, block, values in columns:
      mean, low, high = metrics.bootstrap(values, resamples=self.spec.resamples,
                                          confidence=self.spec.confidence, seed=self.spec.seed)
      rows.append({'metric': name, 'block': block, 'mean': mean, 'low': low, 'high': high,
                   'videos': int((~np.isnan(values)).sum()), 'chance': self.chance.get(name)})
    return rows

  def to_dict(self) -> dict[str, Any]:
    """Rows and per-video values, ready for `outputs.write_json` (NaN becomes null there)."""
    return {
        'spec': dataclasses.asdict(self.spec),
        'videos': self.videos,
        'rows': self.rows(),
        'values': {name: values.tolist() for name, values in self.values.items()},
        'once': {name: values.tolist() for name, values in self.once.items()},
        'chance': dict(self.chance),
    }

  @classmethod
  def from_dict(cls, data: Mapping[str, Any]) -> 'Report':
    """Rebuilds a report from `to_dict`, also after JSON.

    Raises:
      KeyError, TypeError, ValueError: not such a dict.
    """
    def arrays(columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
      return {name: np.array(values, np.float64) for name, values in columns.items()}
    spec = EvalSpec(**{**data['spec'], 'blocks': tuple(data['spec']['blocks'])})
    return cls(arrays(data['values']), arrays(data['once']), dict(data['chance']), spec)

  def to_json(self) -> str:
    """`to_dict` as strict JSON (NaN becomes null)."""
    def clean(value):
      if isinstance(value, float):
        return value if np.isfinite(value) else None
      if isinstance(value, Mapping):
        return {k: clean(v) for k, v in value.items()}
      return [clean(v) for v in value] if isinstance(value, list | tuple) else value
    return json.dumps(clean(self.to_dict()), indent=1, allow_nan=False)


class Judge:
  """Judges videos while they are made, block by block: memory does not grow with their length."""

  def __init__(self, prompts: Sequence[str], *, video: types.VideoSpec,
               world: digits.DigitsWorld, classifier: classifier_lib.GlyphClassifier,
               spec: EvalSpec | None = None, image_ids: Sequence[int] | None = None):
    """Reads what the videos should show.

    Args:
      prompts: one prompt of the world per video.
      video: geometry: which frames belong to which block.
      world: the world the videos should show.
      classifier: reads digits (`classifier.load().model`).
      spec: what to measure.
      image_ids: the true instance of each video, when one was given to the sampler as its first
        blocks. Without it the anchor is the candidate nearest to the video's own first block.

    Raises:
      ValueError: no prompt, one that is not of this world, or more instances than there are.
    """
    self._spec = spec or EvalSpec()
    if not len(prompts):
      raise ValueError('no prompts to judge by; wanted at least one video.')
    self._world = world
    parts = [digits.parse_prompt(prompt, world.colours) for prompt in prompts]
    rng = np.random.default_rng(self._spec.seed)
    self._videos = []
    for i, wanted in enumerate(parts):
      true_id = None if image_ids is None else int(image_ids[i])
      candidates = _candidates(world, wanted.digit, true_id, self._spec, rng)
      glyphs = metrics.centred(digits.glyphs(world.glyph_size)[candidates])
      self._videos.append(_VideoJudge(f'video {i}', world, video, classifier, wanted, glyphs,
                                      true_id is not None, self._spec.blocks))

  def add(self, frames: np.ndarray, *, first_video: int = 0) -> None:
    """Takes the next block of some videos.

    Args:
      frames: [B, T, H, W, 3], uint8 or float in [-1, 1].
      first_video: number of the first of them, where videos are made in several batches.

    Raises:
      ValueError: not one block of pixels, or more videos than prompts.
    """
    if first_video + len(frames) > len(self._videos):
      raise ValueError(f'videos {first_video}..{first_video + len(frames) - 1} were handed in for '
                       f'{len(self._videos)} prompts; wanted one prompt per video.')
    for judge, own in zip(self._videos[first_video:], frames, strict=False):
      judge.add(np.asarray(own))

  def add_video(self, number: int, frames: np.ndarray) -> None:
    """Takes a whole video [T, H, W, 3] at once.

    Raises:
      ValueError: it ends before the last judged block.
    """
    self._videos[number].add_all(frames)

  def report(self) -> Report:
    """What was measured.

    Raises:
      ValueError: a video ended before a judged block.
    """
    per_video = [judge.results() for judge in self._videos]
    values = {name: np.array([[block[name] for block in blocks] for blocks, _ in per_video])
              for name in METRICS}
    once = {'direction_accuracy': np.array([once for _, once in per_video])}
    chance = {'class_accuracy': 1 / len(digits.DIGIT_NAMES),
              'instance_rank1': 1 / self._spec.instances,
              'colour_accuracy': 1 / len(self._world.colours), 'direction_accuracy': 1 / 2}
    return Report(values, once, chance, self._spec)


def evaluate(videos: Sequence[np.ndarray] | np.ndarray, prompts: Sequence[str], *,
             video: types.VideoSpec, world: digits.DigitsWorld,
             classifier: classifier_lib.GlyphClassifier, spec: EvalSpec | None = None,
             image_ids: Sequence[int] | None = None) -> Report:
  """Measures finished videos against their prompts; `Judge` measures unfinished ones.

  Args:
    videos: [B, T, H, W, 3], or any sequence of [T, H, W, 3]; uint8, or float in [-1, 1]. One is
      converted at a time.
    prompts: one prompt of the world per video.
    video, world, classifier, spec, image_ids: as in `Judge`.

  Returns:
    The report.

  Raises:
    ValueError: numbers of videos and prompts differ, a prompt is not of this world, or a video
      ends before a judged block.
  """
  if len(videos) != len(prompts) or not len(videos):
    raise ValueError(f'{len(videos)=} and {len(prompts)=}; wanted one prompt per video and at '
                     'least one video.')
  judge = Judge(prompts, video=video, world=world, classifier=classifier, spec=spec,
                image_ids=image_ids)
  for number, frames in enumerate(videos):
    judge.add_video(number, np.asarray(frames))
  return judge.report()


def ground_truth_report(world: digits.DigitsWorld, video: types.VideoSpec,
                        classifier: classifier_lib.GlyphClassifier, *, clips: int = 16,
                        spec: EvalSpec | None = None,
                        draws: Sequence[digits.ClipAttributes] | None = None) -> Report:
  """The same measurement on true, held-out clips: the ceiling of every metric.

  `draws` says which clips; without it the first `clips` of split 'test' are taken.
  """
  spec = spec or EvalSpec()
  frames = video.pixel_frames(max(spec.blocks))
  if draws is None:
    draws = [world.describe(i, spec.seed, 'test') for i in range(clips)]
  judge = Judge([draw.prompt for draw in draws], video=video, world=world, classifier=classifier,
                spec=spec, image_ids=[draw.image_id for draw in draws])
  for number, draw in enumerate(draws):  # one at a time: memory of one video
    judge.add_video(number, world.render(draw, frames).pixels)
  return judge.report()


def paired(report: Report, baseline: Report) -> Report:
  """Differences `report - baseline` video by video, for videos that share prompts and noise.

  What all seeds have in common cancels, so the intervals of the result are those of the difference
  and say more than two intervals side by side.

  Returns:
    A report of differences; it has no chance.

  Raises:
    ValueError: the reports hold different numbers of videos or judged other blocks.
  """
  if report.spec != baseline.spec or report.videos != baseline.videos:
    raise ValueError(f'{report.videos} videos judged by {report.spec} cannot be paired with '
                     f'{baseline.videos} judged by {baseline.spec}; evaluate both alike.')
  return Report({name: values - baseline.values[name] for name, values in report.values.items()},
                {name: values - baseline.once[name] for name, values in report.once.items()},
                {}, report.spec)


class _VideoJudge:
  """Measures one video as its blocks arrive; remembers its first block and one frame."""

  def __init__(self, name: str, world: digits.DigitsWorld, video: types.VideoSpec,
               classifier: classifier_lib.GlyphClassifier, wanted: digits.PromptParts,
               candidates: np.ndarray, first_is_true: bool, blocks: Sequence[int]):
    """Takes what to compare with.

    Args:
      name: for messages.
      world, video, classifier: as in `Judge`.
      wanted: what the prompt asked for.
      candidates: centred coverage [N, S, S] of same-class instances; the true one first, if known.
      first_is_true: whether the first candidate is the video's true instance.
      blocks: judged blocks, from 1.
    """
    self._name, self._world, self._video, self._classifier = name, world, video, classifier
    self._wanted, self._candidates, self._first_is_true = wanted, candidates, first_is_true
    self._blocks = tuple(blocks)
    self._seen = 0
    self._last = np.zeros((0, world.height, world.width, 3), np.float32)
    self._reference: dict[str, Any] = {}
    self._direction = float('nan')
    self._measured: dict[int, dict[str, float]] = {}

  def add(self, frames: np.ndarray) -> None:
    """Takes the next block, [T, H, W, 3]."""
    video, world = self._video, self._world
    count = video.block_frames if self._seen else video.first_block_frames
    wanted = (count, world.height, world.width, 3)
    if frames.shape != wanted:
      raise ValueError(f'{self._name}: block {self._seen + 1} has shape {frames.shape}; '
                       f'wanted {wanted}.')
    self._seen += 1
    if self._seen == 1:
      self._remember_first(metrics.to_unit(frames))
    if self._seen in self._blocks:
      self._measured[self._seen] = self._measure(metrics.to_unit(frames))
    self._last = metrics.to_unit(frames[-1:])

  def add_all(self, frames: np.ndarray) -> None:
    """Takes a whole video, at least up to the last judged block."""
    last = max(self._blocks)
    wanted = (self._video.pixel_frames(last), self._world.height, self._world.width, 3)
    if frames.ndim != 4 or frames.shape[1:] != wanted[1:] or len(frames) < wanted[0]:
      raise ValueError(f'{self._name} has shape {frames.shape}; wanted at least {wanted} for block '
                       f'{last}: judge earlier blocks or sample a longer video.')
    for block in range(1, last + 1):
      stop = self._video.pixel_frames(block)
      start = stop - self._video.block_frames if block > 1 else 0
      self.add(frames[start:stop])

  def results(self) -> tuple[list[dict[str, float]], float]:
    """Values of the judged blocks, and whether the first block moves as the prompt says."""
    missing = [block for block in self._blocks if block not in self._measured]
    if missing:
      raise ValueError(f'{self._name} ended after {self._seen} blocks; wanted {missing[0]} for '
                       f'block {missing[0]}: judge earlier blocks or sample a longer video.')
    return [self._measured[block] for block in self._blocks], self._direction

  def _remember_first(self, unit: np.ndarray) -> None:
    first = metrics.analyse(unit, self._world.glyph_size)
    self._reference = {
        'background': np.median(first['background'], 0),
        'glyph': first['glyphs'].mean(0),
        # The instance most first-block frames resemble most; found before later blocks are seen.
        'anchor': 0 if self._first_is_true else int(
            metrics.similarity(first['glyphs'], self._candidates).mean(0).argmax()),
    }
    self._direction = float(metrics.direction(first['centres']) == self._wanted.direction)

  def _measure(self, own: np.ndarray) -> dict[str, float]:
    """All metrics of one block [T, H, W, 3] in [0, 1]."""
    world, wanted, reference = self._world, self._wanted, self._reference
    found = metrics.analyse(own, world.glyph_size)
    probabilities = classifier_lib.predict(self._classifier, found['glyphs'])
    nearest = metrics.similarity(found['glyphs'], self._candidates).argmax(-1)
    colour = [c.name for c in world.colours].index(wanted.colour)
    drift = metrics.colour_distance(found['background'], reference['background'])
    alike = metrics.similarity(found['glyphs'], reference['glyph'][None])
    return {
        'class_accuracy': float((probabilities.argmax(-1) == wanted.digit).mean()),
        'class_probability': float(probabilities[:, wanted.digit].mean()),
        'instance_rank1': float((nearest == reference['anchor']).mean()),
        'instance_similarity': float(alike.mean()),
        'colour_accuracy': float(
            (metrics.nearest_colour(found['background'], world) == colour).mean()),
        'background_drift': float(drift.mean()),
        'dynamic_degree': (metrics.dynamic_degree(found['centres'], world.speed)
                           if world.speed else float('nan')),
        'sharpness': float(metrics.sharpness(found['glyphs']).mean()),
        'seam': (metrics.seam(np.concatenate([self._last, own])) if len(self._last)
                 else float('nan')),
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
