"""A whole evaluation: runs one after the other, each kept on disk as soon as it is finished.

  DIR/runs/NAME.json   a finished run with all it depends on; reused while that is unchanged.
  DIR/sheet-NAME.png   a few of its videos.

`results` turns them into tables and curves.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import pf_jax
from pf_jax import outputs
from pf_jax import pipeline as pipeline_lib
from pf_jax.evals import classifier as classifier_lib
from pf_jax.evals import evaluator, parts, rollouts, tables
from pf_jax.evals.config import EvaluateConfig
from pf_jax.evals.evaluator import Report
from pf_jax.evals.rollouts import Run
from pf_jax.pipeline import Pipeline
from pf_jax.progress import Progress
from pf_jax.viz import sheet

RUNS = 'runs'
TRUTH = 'truth'
Json = dict[str, Any]


class StudyError(ValueError):
  """An evaluation that cannot be done as asked; the message says what to change."""


def plan(config: EvaluateConfig) -> list[Run]:
  """All rollouts of an evaluation; those of one policy stand together."""
  ablation, asked = config.ablation, config.parts
  runs = [Run(name=f'{start}-{policy}', start_blocks=ablation.start_blocks * (start == 'clip'),
              blocks=ablation.blocks, judged=ablation.all_judged,
              cache=ablation.policies[policy], sampler=ablation.samplers.get(policy, {}),
              checkpoint=ablation.checkpoints.get(policy))
          for policy in ablation.names for start in ablation.starts]
  if not asked.blocks:
    return runs
  given = ablation.start_blocks * (asked.start == 'clip')
  first, *others = [Run(name=f'parts-{branches}', start_blocks=given, blocks=asked.blocks,
                        judged=asked.judged, branches=branches) for branches in asked.branches]
  swapped = dataclasses.replace(first, name='parts-swapped', start_blocks=0, swapped=True)
  here = len(ablation.starts)
  return [*runs[:here], first, swapped, *others, *runs[here:]]


def digest(tree: Any) -> str:
  """A hash of all arrays in a pytree."""
  total = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    array = np.asarray(leaf)
    total.update(f'{array.dtype}{array.shape}'.encode() + array.tobytes())
  return total.hexdigest()[:16]


class Store:
  """Finished runs in a directory, each beside everything that its numbers depend on."""

  def __init__(self, directory: pathlib.Path):
    self._directory = directory

  def load(self, name: str, inputs: Json, *, overwrite: bool = False) -> Json | None:
    """The stored result, or None if there is none (or, with `overwrite`, another one).

    Raises:
      StudyError: it was made with other settings, or cannot be read.
    """
    path = self._path(name)
    if not path.exists():
      return None
    try:
      stored = json.loads(path.read_text(encoding='utf-8'))
      before = stored['inputs']
    except (OSError, ValueError, TypeError, KeyError) as error:
      if overwrite:
        return None
      raise StudyError(f'{path} cannot be read ({error}); remove it or pass --overwrite.'
                       ) from error
    inputs = json.loads(json.dumps(inputs))
    if before == inputs:
      return stored
    if overwrite:
      return None
    other = sorted(key for key in {*before, *inputs} if before.get(key) != inputs.get(key))
    raise StudyError(f'{path} was made with other settings ({", ".join(other)}); choose another '
                     'output directory, or pass --overwrite to do it again.')

  def save(self, name: str, inputs: Json, result: Json) -> Json:
    """Keeps a result; returns it as `load` would."""
    self._directory.mkdir(exist_ok=True)
    outputs.write_json(self._path(name), {'inputs': inputs, **result})
    return json.loads(self._path(name).read_text(encoding='utf-8'))

  def _path(self, name: str) -> pathlib.Path:
    return self._directory / f'{name}.json'


class Study:
  """One evaluation of one model in one output directory."""

  def __init__(self, config: EvaluateConfig, pipeline: Pipeline, output: str | os.PathLike, *,
               overwrite: bool = False):
    """Checks everything that can be checked before any work.

    Args:
      config: what to measure.
      pipeline: the model.
      output: directory of the results.
      overwrite: do runs again that were made with other settings.

    Raises:
      StudyError: the settings do not fit each other, the model or what the directory holds.
    """
    self.config, self.pipeline, self.root = config, pipeline, pathlib.Path(output)
    self.runs = plan(config)
    self._others: dict[str, Pipeline] = {}
    self._variants: dict[str, Pipeline] = {}
    self._classifier = classifier_lib.load().model
    self.draws = rollouts.held_out(config.world, config.videos, config.seed)
    try:
      self._check()
    except StudyError:
      raise
    except ValueError as error:
      raise StudyError(str(error)) from error
    self._store = Store(self.root / RUNS)
    self._common = {
        'model': digest(pipeline.models), 'version': pf_jax.__version__,
        'world': dataclasses.asdict(config.world), 'sampler': pipeline.choices['sampler'],
        **{name: getattr(config, name) for name in ('videos', 'seed', 'instances', 'resamples',
                                                    'confidence')}}
    self.done = {name: self._store.load(name, self._inputs(name), overwrite=overwrite)
                 for name in (TRUTH, *(run.name for run in self.runs))}

  def _check(self) -> None:
    config = self.config
    unknown = [name for name in config.headline if name not in evaluator.METRICS]
    if unknown or not config.headline:
      raise StudyError(f'headline={config.headline} must name some of '
                       f'{", ".join(evaluator.METRICS)}.')
    self._check_size(self.pipeline)
    for run in self.runs:
      self._check_size(rollouts.variant(self._model(run), run))
      if run.swapped:
        rollouts.swap_prompts([draw.prompt for draw in self.draws])
    self._judge((1,), [draw.prompt for draw in self.draws], [d.image_id for d in self.draws])

  def _check_size(self, pipeline: Pipeline) -> None:
    world, video = self.config.world, pipeline.video
    if (world.height, world.width, world.fps) != (video.height, video.width, video.fps):
      raise StudyError(f'world is {world.height}x{world.width} at {world.fps} fps, the model\'s '
                       f'videos are {video.height}x{video.width} at {video.fps}; set config.world '
                       'to the model\'s size.')

  def _model(self, run: Run) -> Pipeline:
    """The run's model as it is on disk, read once."""
    if run.checkpoint is None:
      return self.pipeline
    if run.checkpoint not in self._others:
      self._others[run.checkpoint] = pipeline_lib.load(run.checkpoint)
    return self._others[run.checkpoint]

  def _inputs(self, name: str) -> Json:
    """Everything that a run's numbers depend on."""
    if name == TRUTH:
      return {**self._common, 'judged': self.config.ablation.all_judged,
              'clip_blocks': self.config.parts.clip_blocks}
    run = next(run for run in self.runs if run.name == name)
    variant = rollouts.variant(self._model(run), run)
    chosen = ('cache', 'sampler', 'checkpoint')  # what they come to is below
    return {**self._common, **{f.name: getattr(run, f.name) for f in dataclasses.fields(run)
                               if f.name not in chosen},
            **variant.choices, 'branches': variant.models.spec.compressor.branches,
            'model': digest(variant.models) if run.checkpoint else self._common['model']}

  def _judge(self, blocks: Sequence[int], prompts: Sequence[str],
             image_ids: Sequence[int] | None) -> evaluator.Judge:
    spec = evaluator.EvalSpec(
        blocks=tuple(blocks), instances=self.config.instances, seed=self.config.seed,
        resamples=self.config.resamples, confidence=self.config.confidence)
    return evaluator.Judge(prompts, video=self.pipeline.video, world=self.config.world,
                           classifier=self._classifier, spec=spec, image_ids=image_ids)

  def execute(self, progress: Progress | None = None) -> None:
    """Makes what is missing.

    Args:
      progress: counts blocks of videos made in lockstep, see `blocks_left`.
    """
    say = progress.say if progress else print
    waiting = [run for run in self.runs if self.done[run.name] is None]
    for run in self.runs:
      if run not in waiting:
        say(f'{run.name}: kept from before.')
    beginnings = None
    if self.done[TRUTH] is None or any(run.start_blocks for run in waiting):
      say(f'encoding {len(self.draws)} held-out clips.')
      beginnings = rollouts.encode_clips(self.pipeline.models, self.config.world, self.draws,
                                         max(self.config.parts.clip_blocks,
                                             *(run.start_blocks for run in self.runs)))
    if self.done[TRUTH] is None:
      assert beginnings is not None
      self.done[TRUTH] = self._store.save(TRUTH, self._inputs(TRUTH), self._truth(beginnings))
      say(f'{TRUTH}: done.')
    for run in waiting:
      result = self._execute(run, beginnings, progress, say)
      self.done[run.name] = self._store.save(run.name, self._inputs(run.name), result)
    self._variants.clear()

  @property
  def blocks_left(self) -> int:
    """Blocks to make, counting videos in lockstep as one."""
    rounds = self.config.videos // self.config.batch
    return rounds * sum(run.blocks for run in self.runs if self.done[run.name] is None)

  def _truth(self, latents: np.ndarray) -> Json:
    """Ceilings and parts, from true clips."""
    config, blocks = self.config, self.config.parts.clip_blocks
    draws, prompts = self.draws, [draw.prompt for draw in self.draws]
    true_ids = [draw.image_id for draw in draws]
    judge = self._judge(config.ablation.all_judged, prompts, true_ids)
    last = self.pipeline.video.pixel_frames(max(config.ablation.all_judged))
    for number, draw in enumerate(draws):  # one at a time: memory of one video
      judge.add_video(number, config.world.render(draw, last).pixels)
    shown = tuple(b for b in config.ablation.all_judged if b <= blocks) or (blocks,)
    measured = parts.measure(self.pipeline.models, config.world, draws, latents[:, :blocks],
                             self._judge(shown, prompts, true_ids))
    return {'report': judge.report().to_dict(),
            'reconstructed': measured.reconstructions.to_dict(),
            'parts': {name: values.tolist() for name, values in measured.values.items()}}

  def _variant(self, run: Run) -> Pipeline:
    """The run's pipeline; only the latest one keeps its compiled programs and memory."""
    made = rollouts.variant(self._model(run), run)
    key = json.dumps([run.checkpoint, made.choices, made.models.spec.compressor.branches])
    if key not in self._variants:
      self._variants = {key: made}
    return self._variants[key]

  def _execute(self, run: Run, beginnings: np.ndarray | None, progress: Progress | None,
               say: Callable[[str], None]) -> Json:
    config, video = self.config, self.pipeline.video
    pipeline = self._variant(run)
    begun = time.monotonic()
    pipeline.programs(config.batch)
    compile_seconds = time.monotonic() - begun
    if compile_seconds > 1:
      say(f'{run.name}: compiled in {compile_seconds:.0f} s.')
    own = [draw.prompt for draw in self.draws]
    prompts = rollouts.swap_prompts(own) if run.swapped else own
    rows = min(config.sheet_videos, config.batch)
    pictures = sheet.ContactSheet(
        sheet.spread(video.pixel_frames(run.blocks), config.sheet_columns), fps=video.fps,
        labels=prompts[:rows], block_of=rollouts.block_of(video), title=run.name, tile_height=96)

    def watch(first: int, frames: np.ndarray) -> None:
      if first == 0:
        pictures.add(frames[:rows])
      if progress:
        progress.show({'run': self.runs.index(run) + 1, 'of': len(self.runs)})
        progress.update()

    outcome = rollouts.execute(
        run, pipeline, self.draws, seed=config.seed, batch=config.batch, beginnings=beginnings,
        make_judge=lambda run, prompts, ids: self._judge(run.judged, prompts, ids), watch=watch)
    pictures.save(self.root / f'sheet-{run.name}.png')
    scores = outcome.report.at(run.judged[-1:]).rows()
    score = next(row for row in scores if row['metric'] == config.headline[0])
    per_block = outcome.seconds * config.batch / (run.blocks * config.videos)
    say(f'{run.name}: {config.headline[0]} {tables.cell(score)} at block {run.judged[-1]}; '
        f'{per_block:.2f} s per block of {config.batch} videos.')
    return {'report': outcome.report.to_dict(), 'seconds_per_block': per_block,
            'compile_seconds': compile_seconds,
            'unswapped': outcome.unswapped.to_dict() if outcome.unswapped else None}

  def report(self, name: str, key: str = 'report') -> Report:
    """A finished run's report."""
    stored = self.done[name]
    if stored is None:
      raise StudyError(f'{name} has not been run yet.')
    return Report.from_dict(stored[key])
