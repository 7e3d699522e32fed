"""What every stage that samples does at an evaluation: prompts, pictures, metrics.

Files in the run's directory:
  samples.png   moments of the latest videos.
  drift.png     metrics over the blocks of the latest evaluations, the newest the strongest, and
                where the clips of training end.
  drift.jsonl   their numbers, one line for each evaluation: step, blocks, values.

Videos of the digits world are compared with what their prompts ask for. Of all others there is no
truth; what can be said without it are signs of drift:

  colour_drift       RMS distance of a frame's mean colour from that of the first block
  contrast           standard deviation of its brightness: over-exposure, or fading to grey
  sharpness          self-weighted gradient of its brightness: blurring, or noise that builds up
  frame_difference   mean change from frame to frame: standing still, or flicker

Pixels count from 0 to 1 in all of these.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pf_jax import outputs
from pf_jax.data import digits
from pf_jax.models.bundle import VideoModels
from pf_jax.rollout.block import RolloutSpec
from pf_jax.rollout.stream import Programs, stream
from pf_jax.train.metrics import read_metrics
from pf_jax.types import VideoSpec

SEED = 1
PICTURE, DRIFT_PICTURE, DRIFT_FILE = 'samples.png', 'drift.png', 'drift.jsonl'
_METRICS = ('class_accuracy', 'colour_accuracy', 'background_drift', 'dynamic_degree')
_PLAIN_METRICS = ('colour_drift', 'contrast', 'sharpness', 'frame_difference')
_SHARES = ('class_accuracy', 'colour_accuracy')  # drawn from 0 to 1
# One block of ten videos of the miniature takes a core 0.2 s: 5 s an evaluation, however long.
_MOST_BLOCKS = 24
_CURVES = 4
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def prompts(world: digits.DigitsWorld) -> list[str]:
  """One prompt for each class."""
  return [world.describe(i, SEED, digit=i).prompt for i in range(len(digits.DIGIT_NAMES))]


def drift_blocks(total: int, most: int = _MOST_BLOCKS) -> tuple[int, ...]:
  """Blocks of a drift curve: every n-th, n being as small as `most` allows, and the ends.

  Args:
    total: blocks of the video.
    most: largest number of them, the ends not counted.
  """
  every = math.ceil(total / most)
  return tuple(sorted({1, *range(every, total + 1, every), total}))


def _mean(values: np.ndarray) -> float:
  """Mean over the videos that have a value; NaN if none has."""
  known = values[~np.isnan(values)]
  return float(known.mean()) if known.size else float('nan')


class _PlainJudge:
  """Measures videos that have no truth, block by block; see the module's docstring."""

  def __init__(self, videos: int, blocks: Sequence[int]):
    self._blocks = tuple(blocks)
    self._seen = 0
    self._first: list[np.ndarray] = []
    self._last: list[np.ndarray | None] = [None] * videos
    self._rows: dict[int, list[dict[str, float]]] = {}

  def add(self, frames: np.ndarray) -> None:
    """Takes the next block of all videos, [B, T, H, W, 3]."""
    from pf_jax.evals import metrics

    self._seen += 1
    if self._seen == 1:
      self._first = [metrics.to_unit(own).mean((0, 1, 2)) for own in frames]
    if self._seen in self._blocks:
      self._rows[self._seen] = [self._measure(number, metrics.to_unit(own))
                                for number, own in enumerate(frames)]
    self._last = [metrics.to_unit(own[-1:]) for own in frames]

  def _measure(self, number: int, unit: np.ndarray) -> dict[str, float]:
    """One block [T, H, W, 3] of one video, in [0, 1]."""
    from pf_jax.evals import metrics

    before = self._last[number]
    run = unit if before is None else np.concatenate([before, unit])
    light = unit @ _LUMA
    distance = metrics.colour_distance(unit.mean((1, 2)), self._first[number])
    return {'colour_drift': float(distance.mean()),
            'contrast': float(light.std((1, 2)).mean()),
            'sharpness': float(metrics.sharpness(light).mean()),
            'frame_difference': (float(np.abs(np.diff(run, axis=0)).mean()) if len(run) > 1
                                 else float('nan'))}

  def values(self) -> dict[str, np.ndarray]:
    """Metric -> [B, blocks]."""
    return {name: np.array([[row[name] for row in self._rows[block]] for block in self._blocks]).T
            for name in _PLAIN_METRICS}


class _Evaluation:
  """Watches videos while they are made: memory does not grow with their length.

  Args:
    prompts: of each video.
    world: they should be from; None without truth.
    video: geometry.
    asked: numbers of the blocks to report.
    total: blocks of every video.
    step: of the training.
  """

  def __init__(self, prompts: Sequence[str], world: digits.DigitsWorld | None, video: VideoSpec,
               asked: Sequence[int], total: int, step: int):
    from pf_jax.viz import sheet

    if not 1 <= min(asked) <= max(asked) <= total:
      raise ValueError(f'blocks={tuple(asked)} must lie within 1..{total}, the length of the '
                       f'videos: judge earlier blocks or sample longer videos.')
    self._asked, self._video, self._step = sorted(set(asked)), video, step
    self._blocks = tuple(sorted({*drift_blocks(total), *asked}))
    self._names = _PLAIN_METRICS if world is None else _METRICS
    self._sheet = sheet.ContactSheet(
        sheet.spread(video.pixel_frames(total), 8), fps=video.fps, labels=prompts,
        title=f'step {step}', tile_height=128 if world is None else 64)
    self._judge = self._make_judge(prompts, world)

  def _make_judge(self, prompts: Sequence[str], world: digits.DigitsWorld | None) -> Any:
    if world is None:
      return _PlainJudge(len(prompts), self._blocks)
    from pf_jax.evals import classifier, evaluator

    return evaluator.Judge(prompts, video=self._video, world=world,
                           classifier=classifier.load().model,
                           spec=evaluator.EvalSpec(blocks=self._blocks))

  def add(self, frames: np.ndarray) -> None:
    """Takes the next block of all videos, [B, T, H, W, 3]."""
    self._sheet.add(frames)
    self._judge.add(frames)

  def finish(self, workdir: str | os.PathLike, clip_blocks: int | None) -> dict[str, float]:
    """Writes pictures and numbers; returns the means at the blocks that were asked for."""
    from pf_jax.viz import sheet

    workdir = pathlib.Path(workdir)
    values = (self._judge.values() if isinstance(self._judge, _PlainJudge)
              else self._judge.report().values)
    means = {name: [_mean(column) for column in values[name].T] for name in self._names}
    sheet.write_png(workdir / PICTURE, self._sheet.render())
    records = _record(workdir / DRIFT_FILE, self._step, self._blocks, means)
    sheet.write_png(workdir / DRIFT_PICTURE, drift_curves(records[-_CURVES:], clip_blocks))
    return {f'{name}/block_{block}': means[name][self._blocks.index(block)]
            for name in self._names for block in self._asked}


def _record(path: pathlib.Path, step: int, blocks: Sequence[int],
            means: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
  """Adds a line; those of steps that a resumed run does again are dropped. Returns all."""
  clean = {name: [value if math.isfinite(value) else None for value in row]
           for name, row in means.items()}
  records = [record for record in read_metrics(path) if record['step'] < step]
  records.append({'step': step, 'blocks': list(blocks), 'values': clean})
  outputs.write_text(path, ''.join(json.dumps(record) + '\n' for record in records))
  return records


def drift_curves(records: Sequence[Mapping[str, Any]], clip_blocks: int | None = None
                 ) -> np.ndarray:
  """Metrics over blocks, one panel each; a curve for each evaluation, older ones fainter.

  Args:
    records: lines of `drift.jsonl`, oldest first; the panels are the newest one's.
    clip_blocks: where the clips of training end: a vertical line.

  Returns:
    uint8 [height, width, 3].
  """
  from matplotlib.ticker import MaxNLocator

  from pf_jax.viz import plots

  names = list(records[-1]['values'])
  figure, axes = plots._figure(1 + 3.6 * len(names), 3.2, 1, len(names))
  for axis, name in zip(axes[0], names, strict=True):
    shown = [record for record in records if name in record['values']]
    for age, record in zip(range(len(shown) - 1, -1, -1), shown, strict=True):
      look = dict(color='#d55e00', linewidth=1.2) if age else dict(color='#1b4f8f', linewidth=2.0)
      axis.plot(record['blocks'], np.array(record['values'][name], np.float64), **look,
                alpha=0.6**age, marker='o', markersize=2.5, label=f'step {record["step"]}')
    if clip_blocks is not None:
      axis.axvline(clip_blocks, color='#777777', linewidth=1, linestyle='--', label='clips end')
    # No metric is negative, and a curve that hardly moves should look like it.
    if name in _SHARES:
      axis.set_ylim(-0.03, 1.03)
    else:
      axis.axhline(0, linewidth=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel('block')
    axis.set_title(name.replace('_', ' '), loc='left')
    axis.grid(alpha=0.3)
  axes[0, -1].legend(loc='upper left', bbox_to_anchor=(1.01, 1), frameon=False, reverse=True)
  return plots._pixels(figure)


def judge(videos: np.ndarray, prompts: Sequence[str], world: digits.DigitsWorld | None,
          video: VideoSpec, blocks: Sequence[int], step: int, workdir: str | os.PathLike, *,
          clip_blocks: int | None = None) -> dict[str, float]:
  """Measures finished videos and writes the files of an evaluation.

  Args:
    videos: uint8 [B, T, H, W, 3].
    prompts: of each.
    world: they should be from; None for other videos, which are measured without truth.
    video: geometry.
    blocks: numbers of the blocks to report.
    step: of the training.
    workdir: receives the files.
    clip_blocks: length of the clips of training, for the picture.

  Returns:
    Means over the videos, '{metric}/block_{number}'.

  Raises:
    ValueError: a video ends before one of the blocks, or shows another size than the world.
  """
  length = videos.shape[1] - video.first_block_frames
  total = 1 + length // video.block_frames if length >= 0 else 0
  evaluation = _Evaluation(prompts, world, video, blocks, total, step)
  for block in range(1, total + 1):
    stop = video.pixel_frames(block)
    evaluation.add(videos[:, stop - video.block_frames if block > 1 else 0:stop])
  return evaluation.finish(workdir, clip_blocks)


class Sampler:
  """Samples a prompt each with the very programs that sampling uses, and judges.

  Args:
    world: of prompts and truth; None for models of other videos.
    rollout: cache and passes.
    texts: prompts; default: one of each class of the world.
    clip_blocks: length of the clips of training, for the picture.

  Raises:
    ValueError: neither a world nor prompts.
  """

  def __init__(self, world: digits.DigitsWorld | None, rollout: RolloutSpec, *,
               texts: Sequence[str] = (), clip_blocks: int | None = None):
    if world is None and not texts:
      raise ValueError('there is no prompt to sample; give texts, or a world to take them from.')
    self._world, self._rollout, self._clip_blocks = world, rollout, clip_blocks
    self._prompts = list(texts) if world is None or texts else prompts(world)
    self._programs: Programs | None = None

  def judge(self, models: VideoModels, encode: Callable[[Sequence[str]], np.ndarray],
            lengths: Sequence[int], step: int, workdir: str | os.PathLike) -> dict[str, float]:
    """Means over the videos at the first block and at the end of every length.

    Args:
      models: networks to judge.
      encode: gives the text rows [B, rows, D] of the prompts.
      lengths: blocks; the longest video is sampled, drawn, and measured along its whole length.
      step: of the training.
      workdir: receives the files of an evaluation.
    """
    evaluation = _Evaluation(self._prompts, self._world, models.spec.video, (1, *lengths),
                             max(lengths), step)
    if self._programs is None:
      self._programs = Programs(models, len(self._prompts), self._rollout)
    programs = self._programs
    programs.models = models
    text = programs.text_keys_values(encode(self._prompts))
    keys = jax.random.split(jax.random.key(SEED), len(self._prompts))
    for block in stream(programs, [text], [0] * max(lengths), keys):
      evaluation.add(np.asarray(block.frames))
    return evaluation.finish(workdir, self._clip_blocks)
