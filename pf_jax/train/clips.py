"""What the stages that train on encoded clips share: their settings, the store, the batches.

The VAE is frozen, so clips are encoded into a store first (resumable, checksummed) and training
reads latents only.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pf_jax import pipeline
from pf_jax.data import digits, latents, source
from pf_jax.models import bundle
from pf_jax.models.bundle import Models, ModelSpec, VideoModels
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.train import checks, plan
from pf_jax.train.config import TrainConfig
from pf_jax.train.flow_matching import ClipBatch, FirstBlocks, FlowBatch, PartsObjective
from pf_jax.types import Array, PyTree
from pf_jax.weights import package


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
class ClipStage:
  """Settings of every stage that trains on encoded clips.

  Attributes:
    model: all networks; the VAE's sizes and statistics are those of `vae`.
    vae: directory that the stage "vae" left (`WORKDIR/vae`).
    store: directory of the encoded clips, made if it is not there.
    clips: number of encoded clips.
    clip_blocks: blocks per clip.
    encode_batch: clips encoded at once.
    phases: what a step sees, one phase after the other; the last one lasts to the end.
    start: model directory or workdir whose weights the run starts from; '' for random ones.
    world: what clips look like.
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
  world: digits.DigitsWorld = digits.DigitsWorld()
  tokenizer: str = ''

  def __post_init__(self):
    for name in ('clips', 'clip_blocks', 'encode_batch'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    checks.check_phases([phase.until for phase in self.phases])
    checks.check_world(self.world, self.model)

  @property
  def frames(self) -> int:
    """Pixel frames of a clip."""
    return self.model.video.pixel_frames(self.clip_blocks)


S = TypeVar('S', bound=ClipStage)


def tokenizer_file(tokenizer: str) -> pathlib.Path:
  """A stage's tokenizer.json: the one it names, or the packaged one."""
  return pathlib.Path(tokenizer or package.ROOT / 'digits' / package.TOKENIZER_FILE)


def load_tokenizer(stage: ClipStage) -> Tokenizer:
  """The stage's tokenizer."""
  return Tokenizer.from_file(tokenizer_file(stage.tokenizer),
                             max_tokens=stage.model.text.max_tokens)


def encode_low(models: VideoModels, pixels: Array) -> Array:
  """What the compressor's LR branch sees of whole clips [B, T, H, W, 3]: [B, n, f, h', w', C]."""
  video = models.spec.video
  # As `pool_pixels` does with the shorter first block: its first frame is repeated.
  missing = video.block_frames - video.first_block_frames
  whole = jnp.concatenate([jnp.repeat(pixels[:, :1], missing, axis=1), pixels], axis=1)
  low = models.encode_low_resolution(whole.reshape(-1, video.block_frames, *pixels.shape[2:]))
  return low.reshape(len(pixels), -1, *low.shape[1:])


def clip_encoder(models: Models, tokenizer: Tokenizer
                 ) -> Callable[[np.ndarray, Sequence[str]], dict[str, np.ndarray]]:
  """What `latents.encode_clips` calls: clips and prompts to the fields of a `ClipBatch`.

  The LR branch's latents come from the clips' own pixels, not from decoded ones, which differ by
  the VAE's error and would cost three times as much.
  """

  @jax.jit
  def encode(models: Models, pixels: Array) -> tuple[Array, Array]:
    return models.vae.encode(pixels), encode_low(models, pixels)

  def call(pixels: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    clip, low = encode(models, pixels)
    text = tokenizer(list(prompts))
    return {'latents': np.asarray(clip), 'lr_latents': np.asarray(low), 'ids': text.ids,
            'mask': text.mask}

  return call


def open_store(stage: ClipStage, models: Models, tokenizer: Tokenizer) -> latents.LatentStore:
  """Encodes the clips, or opens the store of an earlier run.

  Raises:
    StoreError: a store of other content is in the way.
  """
  weights = pathlib.Path(stage.vae, 'vae.safetensors').read_bytes()
  return latents.encode_clips(
      clip_encoder(models, tokenizer), stage.world, range(stage.clips), stage.store,
      frames=stage.frames, batch_size=stage.encode_batch,
      about={'vae_crc32': zlib.crc32(weights), 'blocks': stage.clip_blocks})


def about(store: latents.LatentStore) -> dict[str, int]:
  """What a checkpoint remembers of the clips it was trained on, and so of what encoded them."""
  return {'clips_crc32': store.crc32}


def clip_batches(stage: ClipStage, store: source.Source, seed: int
                 ) -> Callable[[int], Iterator[PyTree]]:
  """`fit`'s batches: `FlowBatch` in float32, a function of the step alone."""
  frames = stage.model.video.frames_per_block

  def batch(record: source.Record, whole: int) -> FlowBatch:
    latents, low = (jnp.asarray(record[n], jnp.float32) for n in ('latents', 'lr_latents'))
    ids, mask = jnp.asarray(record['ids']), jnp.asarray(record['mask'])
    way = record.get('trajectory')
    clips = ClipBatch(latents[:whole], low[:whole], ids[:whole], mask[:whole],
                      None if way is None else jnp.asarray(way[:whole], jnp.float32))
    first = FirstBlocks(latents[whole:, :frames], ids[whole:], mask[whole:])
    return FlowBatch(clips if whole else None, first if len(first.ids) else None)

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


def sketch(stage: ClipStage, config: TrainConfig, make: Callable[[Models], PartsObjective], *,
           passes: int = 0) -> plan.Sketch:
  """A stage as shapes, in its dearest phase; reads nothing.

  Args:
    stage: settings.
    config: of the run.
    make: networks (shapes) -> objective.
    passes: levels of a teacher's trajectory that clips come with.
  """
  nets = jax.eval_shape(lambda: Models(stage.model, rngs=nnx.Rngs(0)))
  objective, video, text = make(nets), stage.model.video, stage.model.text
  phase = max(stage.phases, key=lambda p: p.clips * stage.clip_blocks + p.first_blocks)
  frames, *rest = video.block_latent_shape
  low_frames, rows, columns = stage.model.mid_grid
  low = (low_frames, rows * video.patch[1], columns * video.patch[2], video.latent_channels)

  def shape(*sizes: int, dtype=jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)

  def tokens(count: int) -> tuple[Any, Any]:
    return shape(count, text.max_tokens, dtype=jnp.int32), shape(count, text.max_tokens, dtype=bool)

  def batch(mesh):
    clips, first = (count // config.accumulate for count in (phase.clips, phase.first_blocks))
    whole = (stage.clip_blocks * frames, *rest)
    way = shape(clips, passes, *whole) if passes else None
    given = FlowBatch(
        ClipBatch(shape(clips, *whole), shape(clips, stage.clip_blocks, *low), *tokens(clips), way)
        if clips else None,
        FirstBlocks(shape(first, frames, *rest), *tokens(first)) if first else None)
    return plan.by_videos(given, jax.tree.map(lambda _: 0, given), mesh)

  return plan.Sketch(objective, objective.init(config.seed), {'VAE': nets.vae}, batch)


def initial_models(stage: ClipStage, seed: int) -> Models:
  """Random networks, or those of `stage.start`.

  Raises:
    PackageError: `stage.start` holds no model, or one of other sizes.
  """
  if not stage.start:
    return bundle.init(stage.model, seed)
  models = package.load_model(pipeline.find_model(stage.start)).models
  for name in ('transformer', 'compressor', 'text'):
    got, wanted = getattr(models.spec, name), getattr(stage.model, name)
    if got != wanted:
      raise package.PackageError(f'{stage.start} has another {name}: {got}; wanted {wanted}. Give '
                                 "a model of these sizes, or start='' for random weights.")
  return models


def load_networks(stage: S, seed: int) -> tuple[S, Models, Tokenizer]:
  """The stage with the trained VAE's sizes, the networks to start from, the tokenizer.

  Raises:
    PackageError: there is no usable VAE at `stage.vae`, or no model at `stage.start`.
  """
  vae = package.load_vae(stage.vae)
  stage = dataclasses.replace(stage, model=dataclasses.replace(stage.model, vae=vae.spec))
  models = initial_models(stage, seed)
  models.vae = vae
  return stage, models, load_tokenizer(stage)
