"""Stage "causal": encodes clips once, trains on them by teacher forcing, leaves a model to sample.

The VAE is frozen, so clips are encoded into a store first (resumable, checksummed) and training
reads latents only. Every evaluation samples a few blocks for one prompt of each class with the very
programs that sampling uses, and writes `samples.png`.
"""

import dataclasses
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.data import digits, latents, source
from pf_jax.models import bundle
from pf_jax.models.bundle import Models, ModelSpec
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec, SamplerSpec
from pf_jax.rollout.stream import Programs, stream
from pf_jax.train import checks, loop
from pf_jax.train.config import TrainConfig
from pf_jax.train.teacher_forcing import (
    CausalBatch,
    CausalObjective,
    ClipBatch,
    FirstBlocks,
    TeacherForcingSpec,
)
from pf_jax.types import Array, PyTree
from pf_jax.weights import package

_EVAL_SEED = 1


@dataclasses.dataclass(frozen=True)
class ClipPhase:
  """A stretch of the training whose steps see the same number of clips.

  Attributes:
    until: the first step after the phase.
    clips: whole clips per step.
    first_blocks: further clips per step of which only the first block is trained.

  Raises:
    ValueError: an empty step.
  """

  until: int
  clips: int = 8
  first_blocks: int = 0

  def __post_init__(self):
    if min(self.clips, self.first_blocks) < 0 or self.clips + self.first_blocks < 1:
      raise ValueError(f'clips={self.clips} and first_blocks={self.first_blocks} must not be '
                       'negative, and not both 0.')


@dataclasses.dataclass(frozen=True)
class CausalStage:
  """Settings of the stage "causal".

  Attributes:
    model: all networks; the VAE's sizes and statistics are those of `vae`.
    vae: directory that the stage "vae" left (`WORKDIR/vae`).
    store: directory of the encoded clips, made if it is not there.
    clips: number of encoded clips.
    clip_blocks: blocks per clip.
    encode_batch: clips encoded at once.
    phases: what a step sees, one phase after the other; the last one lasts to the end.
    start: model directory whose weights the run starts from; '' for random ones.
    teacher_forcing: choices of the objective.
    cache: fields of `CacheSpec` that are not the model's sizes; training and sampling share them.
    sampler: how evaluations sample, and the model's default.
    world: what clips look like.
    eval_blocks: blocks sampled in an evaluation.
    tokenizer: a tokenizer.json; '' for the packaged one.

  Raises:
    ValueError: sizes that do not fit each other.
  """

  model: ModelSpec
  vae: str
  store: str
  clips: int = 4000
  clip_blocks: int = 5
  encode_batch: int = 4
  phases: tuple[ClipPhase, ...] = (ClipPhase(0),)
  start: str = ''
  teacher_forcing: TeacherForcingSpec = TeacherForcingSpec()
  cache: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  sampler: SamplerSpec = SamplerSpec()
  world: digits.DigitsWorld = digits.DigitsWorld()
  eval_blocks: int = 6
  tokenizer: str = ''

  def __post_init__(self):
    for name in ('clips', 'encode_batch', 'eval_blocks'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    checks.check_phases([phase.until for phase in self.phases])
    cache = self.cache_spec
    if self.clip_blocks <= cache.sink_blocks + cache.recent_blocks:
      raise ValueError(
          f'clip_blocks={self.clip_blocks} leave the mid partition empty with sink_blocks='
          f'{cache.sink_blocks} and recent_blocks={cache.recent_blocks}; use at least '
          f'{cache.sink_blocks + cache.recent_blocks + 1}.')
    checks.check_world(self.world, self.model)

  @property
  def cache_spec(self):
    """The cache's sizes while sampling."""
    return block_lib.cache_spec(self.model, **self.cache)

  @property
  def frames(self) -> int:
    """Pixel frames of a clip."""
    return self.model.video.pixel_frames(self.clip_blocks)


def load_tokenizer(stage: CausalStage) -> Tokenizer:
  """The stage's tokenizer."""
  path = stage.tokenizer or package.ROOT / 'digits' / package.TOKENIZER_FILE
  return Tokenizer.from_file(path, max_tokens=stage.model.text.max_tokens)


def clip_encoder(models: Models, tokenizer: Tokenizer
                 ) -> Callable[[np.ndarray, Sequence[str]], dict[str, np.ndarray]]:
  """What `latents.encode_clips` calls: clips and prompts to the fields of a `ClipBatch`.

  The LR branch's latents come from the clips' own pixels, not from decoded ones, which differ by
  the VAE's error and would cost three times as much.
  """
  video = models.spec.video

  @jax.jit
  def encode(models: Models, pixels: Array) -> tuple[Array, Array]:
    clip = models.vae.encode(pixels)
    # As `pool_pixels` does with the shorter first block: its first frame is repeated.
    missing = video.block_frames - video.first_block_frames
    whole = jnp.concatenate([jnp.repeat(pixels[:, :1], missing, axis=1), pixels], axis=1)
    blocks = whole.reshape(-1, video.block_frames, *pixels.shape[2:])
    low = models.encode_low_resolution(blocks)
    return clip, low.reshape(len(pixels), -1, *low.shape[1:])

  def call(pixels: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    clip, low = encode(models, pixels)
    text = tokenizer(list(prompts))
    return {'latents': np.asarray(clip), 'lr_latents': np.asarray(low), 'ids': text.ids,
            'mask': text.mask}

  return call


def open_store(stage: CausalStage, models: Models, tokenizer: Tokenizer) -> latents.LatentStore:
  """Encodes the clips, or opens the store of an earlier run.

  Raises:
    StoreError: a store of other content is in the way.
  """
  weights = pathlib.Path(stage.vae, 'vae.safetensors').read_bytes()
  return latents.encode_clips(
      clip_encoder(models, tokenizer), stage.world, range(stage.clips), stage.store,
      frames=stage.frames, batch_size=stage.encode_batch,
      about={'vae_crc32': zlib.crc32(weights), 'blocks': stage.clip_blocks})


def clip_batches(stage: CausalStage, store: source.Source, seed: int
                 ) -> Callable[[int], Iterator[PyTree]]:
  """`fit`'s batches: `CausalBatch` in float32, a function of the step alone."""
  frames = stage.model.video.frames_per_block

  def batch(record: source.Record, whole: int) -> CausalBatch:
    latents, low = (jnp.asarray(record[n], jnp.float32) for n in ('latents', 'lr_latents'))
    ids, mask = jnp.asarray(record['ids']), jnp.asarray(record['mask'])
    clips = ClipBatch(latents[:whole], low[:whole], ids[:whole], mask[:whole])
    first = FirstBlocks(latents[whole:, :frames], ids[whole:], mask[whole:])
    return CausalBatch(clips if whole else None, first if len(first.ids) else None)

  def batches(step: int) -> Iterator[PyTree]:
    for phase in stage.phases:
      last = phase is stage.phases[-1]
      if step >= phase.until and not last:
        continue
      for record in source.batches(store, phase.clips + phase.first_blocks, start_step=step,
                                   shuffle_seed=seed):
        yield batch(record, phase.clips)
        step += 1
        if step >= phase.until and not last:
          break

  return batches


def sample_evaluation(stage: CausalStage, objective: CausalObjective, tokenizer: Tokenizer,
                      workdir: str | os.PathLike) -> Callable[[PyTree, int], dict[str, float]]:
  """Samples one prompt per class and judges the last block; saves the model it judged.

  Args:
    stage: settings.
    objective: puts trained parts and the rest together.
    tokenizer: of the prompts.
    workdir: receives `model/` and `samples.png`.

  Returns:
    (trained parts, step) -> metrics.
  """
  from pf_jax.evals import classifier, evaluator
  from pf_jax.viz import sheet

  judge = classifier.load().model
  prompts = [stage.world.describe(i, _EVAL_SEED, digit=i).prompt
             for i in range(len(digits.DIGIT_NAMES))]
  spec = RolloutSpec(stage.cache_spec, stage.sampler)
  programs: list[Programs] = []

  def evaluate(params: PyTree, step: int) -> dict[str, float]:
    models = objective.assemble(params)
    save(stage, models, step, workdir)
    if not programs:
      programs.append(Programs(models.without_text(), len(prompts), spec))
    programs[0].models = models.without_text()
    encode = PromptEncoder(tokenizer, models.spec.text, lambda: models.text)
    text = programs[0].text_keys_values(encode(prompts))
    keys = jax.random.split(jax.random.key(_EVAL_SEED), len(prompts))
    frames = [np.asarray(block.frames) for block in
              stream(programs[0], [text], [0] * stage.eval_blocks, keys)]
    videos = np.concatenate(frames, axis=1)
    sheet.write_png(pathlib.Path(workdir) / 'samples.png', sheet.contact_sheet(
        list(videos), fps=stage.model.video.fps, labels=prompts, title=f'step {step}',
        tile_height=64))
    report = evaluator.evaluate(videos, prompts, video=stage.model.video, world=stage.world,
                                classifier=judge,
                                spec=evaluator.EvalSpec(blocks=(1, stage.eval_blocks)))
    names = ('class_accuracy', 'colour_accuracy', 'background_drift', 'dynamic_degree')
    return {f'{name}/block_{block}': float(np.nanmean(report.values[name][:, i]))
            for name in names for i, block in enumerate(report.spec.blocks)}

  return evaluate


def save(stage: CausalStage, models: Models, step: int, workdir: str | os.PathLike) -> None:
  """Writes `WORKDIR/model`, which `launch.sample --checkpoint=WORKDIR` finds."""
  package.save_model(pathlib.Path(workdir) / 'model', models, choices={
      'cache': dict(stage.cache), 'sampler': dataclasses.asdict(stage.sampler),
  }, about={'stage': 'causal', 'step': step})


def initial_models(stage: CausalStage, seed: int) -> Models:
  """Random networks, or those of `stage.start`.

  Raises:
    PackageError: `stage.start` is no model directory, or one of other sizes.
  """
  if not stage.start:
    return bundle.init(stage.model, seed)
  models = package.load_model(stage.start).models
  for name in ('transformer', 'compressor', 'text'):
    got, wanted = getattr(models.spec, name), getattr(stage.model, name)
    if got != wanted:
      raise package.PackageError(f'{stage.start} has another {name}: {got}; wanted {wanted}. Give '
                                 "a model of these sizes, or start='' for random weights.")
  return models


def train_causal(stage: CausalStage, config: TrainConfig,
                 workdir: str | os.PathLike) -> loop.FitResult:
  """Trains transformer, compressor and text encoder; see `fit` and the module's docstring.

  Raises:
    PackageError: there is no usable VAE at `stage.vae`.
    StoreError: a store of other content is in the way.
  """
  vae = package.load_vae(stage.vae)
  stage = dataclasses.replace(stage, model=dataclasses.replace(stage.model, vae=vae.spec))
  tokenizer = load_tokenizer(stage)
  models = initial_models(stage, config.seed)
  models.vae = vae
  store = open_store(stage, models, tokenizer)
  objective = CausalObjective(models, stage.cache_spec, stage.teacher_forcing)
  evaluate = sample_evaluation(stage, objective, tokenizer, workdir)
  return loop.fit(objective, clip_batches(stage, store, config.seed), config, workdir,
                  evaluate=evaluate)
