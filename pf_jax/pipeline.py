"""Load a model, sample a video, write it: the three lines, and the one way to sample blocks.

    video = pf_jax.load().sample('a white seven drifts right on a teal background', seconds=120)
    video.write('seven.mp4')

`Pipeline.blocks` yields a batch of videos block by block through `rollout.stream`; `sample` and the
command line are built on it. The scan of `rollout.rollout` gives the same blocks, but XLA runs
convolutions inside a scan very slowly on a CPU.
"""

import dataclasses
import difflib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.cache import CacheSpec
from pf_jax.models.bundle import ModelSpec, VideoModels
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.progress import Progress
from pf_jax.request import PromptSchedule, check_seed, parse_prompt
from pf_jax.rollout.block import RolloutSpec, SamplerSpec, cache_spec
from pf_jax.rollout.stream import Block, Programs, stream
from pf_jax.types import Array, VideoSpec
from pf_jax.viz.video import VideoWriter
from pf_jax.weights import package

PACKAGED = package.ROOT / 'digits'
MODEL_FOLDER = 'model'  # where training leaves its model, inside the workdir

Choices = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Video:
  """One finished video.

  Attributes:
    frames: uint8 [T, H, W, 3].
    fps: frames per second.
    prompt: as it was typed, with its switches.
    seed: of its noise.
    latents: float32 [blocks * F, h, w, C].
  """

  frames: np.ndarray
  fps: int
  prompt: str
  seed: int
  latents: np.ndarray

  def write(self, path: str | os.PathLike, *, overwrite: bool = False,
            quality: int = 18) -> pathlib.Path:
    """Writes an MP4.

    Args:
      path: ends in .mp4; its directory exists.
      overwrite: replace an existing file.
      quality: see `VideoWriter`.

    Raises:
      ValueError: the file cannot be created.
      OutputExists: the file exists and `overwrite` is false.
    """
    height, width = self.frames.shape[1:3]
    with VideoWriter(path, height, width, self.fps, quality=quality, overwrite=overwrite) as writer:
      for start in range(0, len(self.frames), self.fps):  # a fragment a second
        writer.write(self.frames[start:start + self.fps])
    return writer.path


class Pipeline:
  """A model ready to sample.

  Attributes:
    models: the networks that every block needs.
    prompts: turns prompts into text rows.
    spec: static choices of the rollout.
    choices: the same as the fields of `CacheSpec` and `SamplerSpec` they were made from, JSON-able:
      {'cache': {...}, 'sampler': {...}}.
    directory: where the model came from, None if it was made in memory.
  """

  def __init__(self, models: VideoModels, prompts: PromptEncoder, *,
               choices: Choices | None = None, directory: pathlib.Path | None = None):
    """Puts the parts together; nothing is compiled yet.

    Args:
      models: the networks that every block needs.
      prompts: of the same model.
      choices: {'cache': fields of `CacheSpec`, 'sampler': fields of `SamplerSpec`}.
      directory: where the model came from.

    Raises:
      ValueError: unknown or contradicting choices.
    """
    self.models, self.prompts, self.directory = models, prompts, directory
    self.spec = rollout_spec(models.spec, choices)
    self.choices = choices_of(self.spec)
    self._programs: dict[int, Programs] = {}

  @property
  def video(self) -> VideoSpec:
    """Geometry of the videos."""
    return self.models.spec.video

  @property
  def tokenizer(self) -> Tokenizer:
    """Of the prompts."""
    return self.prompts.tokenizer

  def programs(self, batch: int = 1) -> Programs:
    """The compiled programs for `batch` videos; compiled at the first call."""
    if batch not in self._programs:
      self._programs[batch] = Programs(self.models, batch, self.spec)
    return self._programs[batch]

  def blocks(self, prompts: Sequence[str | PromptSchedule], count: int, seeds: Sequence[int], *,
             replay: Sequence[tuple[Array, Array]] = ()) -> Iterator[Block]:
    """Samples a batch of videos block by block; memory does not grow with their length.

    Args:
      prompts: one per video; all videos of a batch switch at the same blocks.
      count: blocks per video.
      seeds: one per video; a video's noise depends on its own seed only.
      replay: (latents, selection) of the first blocks, see `rollout.stream`.

    Yields:
      `Block`, one by one.

    Raises:
      ValueError: a prompt or seed that cannot be used; videos that switch at different blocks.
    """
    schedules = [p if isinstance(p, PromptSchedule) else parse_prompt(p) for p in prompts]
    if not schedules or len(schedules) != len(seeds):
      raise ValueError(f'got {len(schedules)} prompts and {len(seeds)} seeds; wanted one seed per '
                       'video and at least one video.')
    if len({schedule.starts for schedule in schedules}) > 1:
      raise ValueError(f'the videos of a batch switch at {[s.starts for s in schedules]}; sample '
                       'them in batches of equal switches.')
    if count < 1:
      raise ValueError(f'{count=} blocks must be at least 1.')
    for schedule, seed in zip(schedules, seeds, strict=True):
      schedule.check_length(count)
      check_seed(seed)
    rows = [self.prompts(texts)
            for texts in zip(*(schedule.texts for schedule in schedules), strict=True)]
    programs = self.programs(len(schedules))
    text = [programs.text_keys_values(prompt_rows) for prompt_rows in rows]
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    prompt_index = [schedules[0].of_block(block) for block in range(count)]
    return stream(programs, text, prompt_index, keys, replay=replay)

  def picture_block(self, texts: Sequence[str], seeds: Sequence[int], picture: np.ndarray
                    ) -> tuple[np.ndarray, np.ndarray]:
    """The first block of videos that begin with a picture; hand it to `blocks` as `replay`.

    Args:
      texts: one per video.
      seeds: one per video.
      picture: latent [h, w, C] that is the first frame of all of them.

    Returns:
      Latents [B, F, h, w, C] and selection [L, B, K].
    """
    programs = self.programs(len(texts))
    rows = programs.text_keys_values(self.prompts(texts))
    given = jnp.broadcast_to(jnp.asarray(picture), (len(texts), 1, *picture.shape))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    latents, selected = programs.denoise_after_picture(programs.start(), rows, keys, given)
    return np.asarray(latents), np.asarray(selected)

  def sample(self, prompt: str, *, seconds: float = 10.0, seed: int = 0,
             progress: bool = True) -> Video:
    """Samples one video.

    Args:
      prompt: what the video shows; 'text | BLOCK: text' changes it on the way.
      seconds: length; rounded up to whole blocks.
      seed: of the noise.
      progress: show it on standard error.

    Raises:
      ValueError: an unusable prompt, length or seed.
    """
    count = self.video.blocks_for_seconds(seconds)
    blocks = self.blocks([prompt], count, [seed])
    bar = Progress(count, unit='block') if progress else None
    frames, latents = [], []
    for block in blocks:
      frames.append(np.asarray(block.frames)[0])
      latents.append(np.asarray(block.latents)[0])
      if bar:
        bar.update()
    if bar:
      bar.close()
    return Video(np.concatenate(frames), self.video.fps, prompt, seed, np.concatenate(latents))


def rollout_spec(model: ModelSpec, choices: Choices | None = None) -> RolloutSpec:
  """The static choices of a rollout.

  Args:
    model: gives the sizes.
    choices: {'cache': fields of `CacheSpec`, 'sampler': fields of `SamplerSpec`}.

  Raises:
    ValueError: unknown or contradicting choices.
  """
  given = {name: dict((choices or {}).get(name, {})) for name in ('cache', 'sampler')}
  _check_names('cache', given['cache'], cache_choices())
  _check_names('sampler', given['sampler'], [f.name for f in dataclasses.fields(SamplerSpec)])
  if 'steps' in given['sampler']:
    given['sampler']['steps'] = tuple(given['sampler']['steps'])
  return RolloutSpec(cache_spec(model, **given['cache']), SamplerSpec(**given['sampler']))


def choices_of(spec: RolloutSpec) -> dict[str, dict[str, Any]]:
  """The inverse of `rollout_spec`: {'cache': {...}, 'sampler': {...}}, all fields, JSON-able."""
  return {'cache': {name: getattr(spec.cache, name) for name in cache_choices()},
          'sampler': dataclasses.asdict(spec.sampler)}


def load(checkpoint: str | os.PathLike | None = None, *, cache: Mapping[str, Any] | None = None,
         sampler: Mapping[str, Any] | None = None) -> Pipeline:
  """Loads a model for sampling.

  Args:
    checkpoint: a model directory, the workdir of a training, or the name of a packaged model; None
      is the packaged default.
    cache: fields of `CacheSpec` that differ from the model's own choice.
    sampler: fields of `SamplerSpec`, likewise.

  Raises:
    PackageError: no usable model there.
    ValueError: choices that do not exist or contradict each other.
  """
  directory = find_model(checkpoint)
  models, choices, _, _ = package.load_model(directory)
  tokenizer = Tokenizer.from_file(find_tokenizer(directory), max_tokens=models.spec.text.max_tokens)
  prompts = PromptEncoder(tokenizer, models.spec.text, lambda: models.text)
  return Pipeline(models.without_text(), prompts, directory=directory, choices={
      'cache': {**choices.get('cache', {}), **(cache or {})},
      'sampler': {**choices.get('sampler', {}), **(sampler or {})}})


def find_model(checkpoint: str | os.PathLike | None) -> pathlib.Path:
  """The model directory that `load` would read.

  Args:
    checkpoint: a directory with a model, or with one in its folder `model`. What does not exist is
      looked for among the packaged ones: 'digits/causal'.

  Raises:
    PackageError: there is none.
  """
  if checkpoint is None:
    return PACKAGED
  root = pathlib.Path(checkpoint)
  places = [root, root / MODEL_FOLDER]
  if not root.exists():
    places.append(package.ROOT / root)
  for directory in places:
    if (directory / package.SPEC_FILE).is_file():
      return directory
  reason = 'does not exist' if not root.exists() else 'holds no model'
  raise package.PackageError(
      f'checkpoint {str(root)!r} {reason}; wanted a directory with {package.SPEC_FILE} and '
      f'{package.WEIGHTS_FILE}, a training workdir with such a directory "{MODEL_FOLDER}", or one '
      f'of {", ".join(packaged_models())}.')


def packaged_models() -> list[str]:
  """Names of the models that are part of the package."""
  return sorted(path.parent.relative_to(package.ROOT).as_posix()
                for path in package.ROOT.rglob(package.SPEC_FILE))


def find_tokenizer(directory: pathlib.Path) -> pathlib.Path:
  """A model's own tokenizer.json, or the packaged one."""
  own = directory / package.TOKENIZER_FILE
  return own if own.exists() else PACKAGED / package.TOKENIZER_FILE


def cache_choices() -> tuple[str, ...]:
  """The fields of `CacheSpec` that are choices, not sizes of the model."""
  fixed = ('dtype', 'mid_offsets')  # the model's spec says these
  return tuple(field.name for field in dataclasses.fields(CacheSpec)
               if field.default is not dataclasses.MISSING and field.name not in fixed)


def _check_names(section: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
  for name in given:
    if name not in known:
      close = difflib.get_close_matches(name, known, n=1)
      hint = f' (did you mean {close[0]}?)' if close else ''
      raise ValueError(f'{section} has no choice {name!r}{hint}; it has {", ".join(known)}.')
