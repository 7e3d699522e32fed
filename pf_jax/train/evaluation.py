"""What every stage that samples does at an evaluation: one prompt a class, a picture, metrics."""

import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from pf_jax.data import digits
from pf_jax.models.bundle import VideoModels
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.rollout.block import RolloutSpec
from pf_jax.rollout.stream import Programs, stream
from pf_jax.types import VideoSpec

SEED = 1
PICTURE = 'samples.png'
_METRICS = ('class_accuracy', 'colour_accuracy', 'background_drift', 'dynamic_degree')


def prompts(world: digits.DigitsWorld) -> list[str]:
  """One prompt for each class."""
  return [world.describe(i, SEED, digit=i).prompt for i in range(len(digits.DIGIT_NAMES))]


def judge(videos: np.ndarray, prompts: Sequence[str], world: digits.DigitsWorld, video: VideoSpec,
          blocks: Sequence[int], step: int, workdir: str | os.PathLike) -> dict[str, float]:
  """Writes `samples.png` and measures.

  Args:
    videos: uint8 [B, T, H, W, 3].
    prompts: of each.
    world: they should be from.
    video: geometry.
    blocks: numbers of the blocks to measure.
    step: of the training, for the title.
    workdir: receives the picture.

  Returns:
    Means over the videos, '{metric}/block_{number}'.
  """
  from pf_jax.evals import classifier, evaluator
  from pf_jax.viz import sheet

  sheet.write_png(pathlib.Path(workdir) / PICTURE, sheet.contact_sheet(
      list(videos), fps=video.fps, labels=prompts, title=f'step {step}', tile_height=64))
  report = evaluator.evaluate(videos, prompts, video=video, world=world,
                              classifier=classifier.load().model,
                              spec=evaluator.EvalSpec(blocks=tuple(blocks)))
  return {f'{name}/block_{block}': float(np.nanmean(report.values[name][:, i]))
          for name in _METRICS for i, block in enumerate(report.spec.blocks)}


class Sampler:
  """Samples one prompt of each class with the very programs that sampling uses, and judges.

  Args:
    world: of prompts and truth.
    rollout: cache and passes.
  """

  def __init__(self, world: digits.DigitsWorld, rollout: RolloutSpec):
    self._world, self._rollout = world, rollout
    self._prompts = prompts(world)
    self._programs: Programs | None = None

  def judge(self, models: VideoModels, encode: PromptEncoder, lengths: Sequence[int], step: int,
            workdir: str | os.PathLike) -> dict[str, float]:
    """Means over the videos at the first block and at the end of every length.

    Args:
      models: networks to judge.
      encode: of the prompts.
      lengths: blocks; the longest video is sampled, and drawn.
      step: of the training, for the title.
      workdir: receives `samples.png`.
    """
    if self._programs is None:
      self._programs = Programs(models, len(self._prompts), self._rollout)
    programs = self._programs
    programs.models = models
    text = programs.text_keys_values(encode(self._prompts))
    keys = jax.random.split(jax.random.key(SEED), len(self._prompts))
    frames = [np.asarray(block.frames)
              for block in stream(programs, [text], [0] * max(lengths), keys)]
    return judge(np.concatenate(frames, axis=1), self._prompts, self._world, models.spec.video,
                 sorted({1, *lengths}), step, workdir)
