"""A request laid out for one model and directory, and the JSON that describes it."""

import dataclasses
import functools
import json
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pf_jax import outputs
from pf_jax import pipeline as pipeline_lib
from pf_jax.models.bundle import ModelSpec
from pf_jax.models.tokenizer import UNK, Tokenizer
from pf_jax.pipeline import Pipeline
from pf_jax.request import Request, RequestError, plan_batches
from pf_jax.rollout.block import RolloutSpec
from pf_jax.rollout.stream import Block
from pf_jax.sampling import budget as budget_lib
from pf_jax.sampling import files, meter
from pf_jax.sampling import record as record_lib
from pf_jax.sampling.budget import Budget
from pf_jax.sampling.config import SampleSpec
from pf_jax.sampling.files import BatchFiles
from pf_jax.sampling.record import Record
from pf_jax.sampling.source import ModelSource
from pf_jax.types import VideoSpec
from pf_jax.viz.video import check_video_size

ROLLOUT = 'stream'
FINISHED, UNFINISHED = 'finished', 'unfinished'
FORMAT_VERSION = 2
Say = Callable[[str], None]


class SampleError(ValueError):
  """A run that cannot start or go on; the message is meant for the person who asked for it."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """What each block of each file will be.

  Attributes:
    request: what was asked for.
    spec: settings.
    source: where the model is from.
    model: its sizes.
    rollout: static choices.
    root: directory of the files.
    batches: indices of the videos that advance together.
    beginning: what the videos begin with, see `Beginning.describe`; None if with noise.

  Nothing has to be loaded for it.

  Raises:
    SampleError: the videos end before one of their switches, or cannot be stored.
  """

  request: Request
  spec: SampleSpec
  source: ModelSource
  model: ModelSpec
  rollout: RolloutSpec
  root: pathlib.Path
  batches: tuple[tuple[int, ...], ...]
  beginning: Mapping[str, Any] | None = None

  def __post_init__(self):
    video = self.video
    try:
      check_video_size(video.height, video.width, video.fps)
      for schedule in self.request.schedules:
        schedule.check_length(self.blocks)
    except (ValueError, RequestError) as error:
      raise SampleError(str(error)) from error

  @property
  def video(self) -> VideoSpec:
    """Geometry of the videos."""
    return self.model.video

  @property
  def choices(self) -> dict[str, dict[str, Any]]:
    """See `Pipeline.choices`."""
    return pipeline_lib.choices_of(self.rollout)

  @property
  def blocks(self) -> int:
    """Of every video."""
    return self.video.blocks_for_seconds(self.request.seconds)

  @property
  def batch(self) -> int:
    """Rows of the compiled programs; a smaller batch repeats its last video."""
    return max(map(len, self.batches))

  @property
  def names(self) -> list[str]:
    """Of the videos, without an ending."""
    return files.video_names(self.request)

  def rows(self, index: int) -> list[int]:
    """The video in each row of a batch."""
    videos = list(self.batches[index])
    return videos + videos[-1:] * (self.batch - len(videos))

  def record(self, index: int, source: pathlib.Path | None = None) -> Record:
    """Opens the record of a batch, to write in the plan's directory or to read in another."""
    video, cache = self.video, self.rollout.cache
    shapes = {record_lib.LATENTS: ((self.batch, *video.block_latent_shape), 'float32'),
              record_lib.SELECTED: ((cache.num_layers, self.batch, cache.top_k), 'int32')}
    return Record(files.record_path(source or self.root, index), self.blocks, shapes,
                  create=source is None)

  def sample(self, pipeline: Pipeline, index: int, replay: Record) -> Iterator[Block]:
    """The blocks of a batch, from `Pipeline.blocks`."""
    rows, schedules, seeds = self.rows(index), self.request.schedules, self.request.seeds
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', UserWarning)  # said before, see `warn_about_prompts`
      return pipeline.blocks([schedules[row] for row in rows], self.blocks,
                             [seeds[row] for row in rows], replay=replay)

  def open_files(self, index: int, *, replayed: int = 0) -> BatchFiles:
    """The videos and the contact sheet of a batch, ready to be written."""
    videos = self.batches[index]
    return BatchFiles(
        self.root, [self.names[video] for video in videos],
        [self.request.prompts[video] for video in videos], self.video,
        blocks=self.blocks, replayed=replayed, quality=self.spec.quality,
        columns=self.spec.sheet_columns, sheet=files.sheet_name(index, len(self.batches)))

  @functools.cached_property
  def digests(self) -> dict[str, str]:
    """Of the model's files.

    Raises:
      SampleError: they are not there.
    """
    try:
      return self.source.digests()
    except (ValueError, OSError) as error:
      raise SampleError(str(error)) from error

  def identity(self) -> dict[str, Any]:
    """What decides every bit of the result, as it reads back from JSON."""
    return json.loads(json.dumps({
        'prompts': self.request.prompts, 'seconds': self.request.seconds,
        'seed': self.request.seed, 'blocks': self.blocks, 'batches': self.batches,
        'model': self.digests, 'sizes': self.source.sizes(), 'beginning': self.beginning,
        **self.choices}))

  def write_sidecars(self, index: int, done: int, status: str, **more: Any) -> None:
    """Writes the JSON beside each video of a batch, `done` blocks of which are finished."""
    versions = meter.versions()
    for video in self.batches[index]:
      outputs.write_json(self.root / f'{self.names[video]}.json', {
          'status': status, **self._describe(video, done), 'model': self.digests,
          'versions': versions, **more})

  def _describe(self, video: int, done: int) -> dict[str, Any]:
    schedule, geometry = self.request.schedules[video], self.video
    return {
        'file': f'{self.names[video]}.mp4', 'prompt': schedule.source, 'texts': schedule.texts,
        'text_of_block': [schedule.of_block(block) for block in range(self.blocks)],
        'seed': self.request.seeds[video], 'seconds': self.request.seconds,
        'beginning': self.beginning, 'blocks': done,
        'planned_blocks': self.blocks, 'frames': geometry.pixel_frames(done) if done else 0,
        'fps': geometry.fps, 'height': geometry.height, 'width': geometry.width,
        'frames_per_block': geometry.frames_per_block, 'rollout': ROLLOUT,
        'config': {**dataclasses.asdict(self.spec), **self.choices}}

  def budget(self, scratch: int | None = None) -> Budget:
    """What the run takes.

    Args:
      scratch: temporary memory of its largest program, bytes; None if it was not compiled.
    """
    return budget_lib.budget(
        self.model, self.rollout, batch=self.batch, blocks=self.blocks,
        videos=len(self.request.prompts), quality=self.spec.quality, scratch=scratch,
        texts=max(len(schedule.texts) for schedule in self.request.schedules))

  def is_finished(self, index: int) -> bool:
    """Whether nothing is left to do for a batch, by its sidecars."""
    names = [self.names[video] for video in self.batches[index]]
    return all(read_json(self.root / f'{name}.json').get('status') == FINISHED
               and (self.root / f'{name}.mp4').exists() for name in names)


def make_plan(request: Request, spec: SampleSpec, source: ModelSource, root: pathlib.Path,
              beginning: Mapping[str, Any] | None = None) -> Plan:
  """Lays a request out; nothing is loaded.

  Raises:
    SampleError: no such model, choices that do not fit it, or what `Plan` refuses.
  """
  try:
    model, rollout = source.specs(spec.chosen('cache'), spec.chosen('sampler'))
  except (ValueError, TypeError) as error:  # TypeError: a choice of the wrong type
    raise SampleError(str(error)) from error
  return Plan(request, spec, source, model, rollout, root,
              tuple(plan_batches(request.schedules, spec.batch_size)), beginning)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object, or {} where there is none to read."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


def write_run(plan: Plan) -> None:
  """Writes run.json; from here on there is something to resume or decode."""
  outputs.write_json(plan.root / files.RUN_FILE, {
      'version': FORMAT_VERSION, 'identity': plan.identity(), 'versions': meter.versions(),
      'source': plan.source.to_json(),
      'settings': dataclasses.asdict(plan.spec)})


def read_run(root: pathlib.Path) -> dict[str, Any]:
  """What run.json says.

  Raises:
    SampleError: missing, damaged or of another version.
  """
  run = read_json(root / files.RUN_FILE)
  if run.get('version') != FORMAT_VERSION or not isinstance(run.get('identity'), dict):
    raise SampleError(f'{root / files.RUN_FILE} is missing, damaged or not of version '
                      f'{FORMAT_VERSION}; there is nothing to continue or decode.')
  return run


def check_same(run: Mapping[str, Any], plan: Plan, remedy: str, say: Say) -> None:
  """Compares a plan with the run on disk.

  Args:
    run: from `read_run`.
    plan: what is asked for now.
    remedy: ends the message.
    say: is told when only versions differ, which may change the last bits.

  Raises:
    SampleError: they are not the same; names what differs.
  """
  before, now = run['identity'], plan.identity()
  changed = [f'{name} was {before.get(name)!r:.80}, is now {now.get(name)!r:.80}'
             for name in {**before, **now} if before.get(name) != now.get(name)]
  if changed:
    raise SampleError(f'another run: {"; ".join(changed)}. {remedy}')
  versions = meter.versions()
  differing = [f'{name} was {run["versions"].get(name)}, is now {version}'
               for name, version in versions.items() if run['versions'].get(name) != version]
  if differing:
    say(f'note: {", ".join(differing)}; the last bits may differ from an uninterrupted run.')


def warn_about_prompts(tokenizer: Tokenizer, texts: Sequence[str], say: Say) -> None:
  """Says what the tokenizer cannot represent, once for every text."""
  for text in dict.fromkeys(texts):
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      tokenizer(text)
    for warning in caught:
      say(f'warning: {warning.message}')
    if unknown := tokenizer.pieces(text).count(UNK):
      say(f'warning: the prompt {text.strip()[:40]!r} has {unknown} pieces outside the '
          'vocabulary; the model sees <unk> there.')
