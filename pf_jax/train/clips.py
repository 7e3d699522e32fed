"""What the stages that train on encoded clips share: their settings, the store, the batches.

The VAE is frozen, so clips are encoded into a store first (resumable, checksummed) and training
reads latents only. Clips are the miniature's, or those of a directory of videos with captions.
"""

import dataclasses
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax import outputs, pipeline
from pf_jax.data import digits, latents, source
from pf_jax.data import videos as videos_lib
from pf_jax.models import bundle
from pf_jax.models.bundle import Models, ModelSpec, VideoModels
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.train import checks, evaluation, plan
from pf_jax.train.config import TrainConfig
from pf_jax.train.flow_matching import ClipBatch, FirstBlocks, FlowBatch, PartsObjective
from pf_jax.types import Array, PyTree
from pf_jax.weights import package

SKIPPED_FILE = 'skipped.json'  # in a store of videos: which files are not in it, and why
_EVAL_PROMPTS = 4


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
    store: directory of the encoded clips of `world`, made if it is not there.
    dataset: directory of encoded videos that `launch.prepare` made; '' for clips of `world`.
    clips: number of clips of `world`.
    clip_blocks: blocks per clip.
    encode_batch: clips encoded at once.
    phases: what a step sees, one phase after the other; the last one lasts to the end.
    start: model directory or workdir whose weights the run starts from; '' for random ones.
    world: what clips look like, and the truth of evaluations; without `dataset` only.
    tokenizer: a tokenizer.json; '' for the packaged one.

  Raises:
    ValueError: sizes that do not fit each other.
  """

  model: ModelSpec
  vae: str
  store: str
  dataset: str = ''
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
    if not self.dataset:
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


def clip_encoder(models: VideoModels, tokenizer: Tokenizer
                 ) -> Callable[[np.ndarray, Sequence[str]], dict[str, np.ndarray]]:
  """What `latents.ClipEncoder` calls: clips and prompts to the fields of a `ClipBatch`.

  The LR branch's latents come from the clips' own pixels, not from decoded ones, which differ by
  the VAE's error and would cost three times as much.
  """

  @jax.jit
  def encode(models: VideoModels, pixels: Array) -> tuple[Array, Array]:
    return models.vae.encode(pixels), encode_low(models, pixels)

  def call(pixels: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    clip, low = encode(models, pixels)
    text = tokenizer(list(prompts))
    return {'latents': np.asarray(clip), 'lr_latents': np.asarray(low), 'ids': text.ids,
            'mask': text.mask}

  return call


def open_store(stage: ClipStage, models: Models, tokenizer: Tokenizer) -> latents.LatentStore:
  """Encodes the clips, or opens the store of an earlier run, or that of `stage.dataset`.

  Raises:
    StoreError: a store of other content is in the way, or no usable one at `stage.dataset`.
  """
  if stage.dataset:
    return latents.LatentStore(stage.dataset, clip_shapes(stage), _encoding(stage))
  return latents.encode_clips(
      clip_encoder(models, tokenizer), stage.world, range(stage.clips), stage.store,
      frames=stage.frames, batch_size=stage.encode_batch,
      about={'vae_crc32': _vae_crc32(stage), 'blocks': stage.clip_blocks})


def _vae_crc32(stage: ClipStage) -> int:
  return zlib.crc32(pathlib.Path(stage.vae, 'vae.safetensors').read_bytes())


def _encoding(stage: ClipStage) -> dict[str, Any]:
  """What the clips of a video depend on beside the video."""
  video = stage.model.video
  return {'vae_crc32': _vae_crc32(stage), 'blocks': stage.clip_blocks, 'height': video.height,
          'width': video.width, 'fps': video.fps,
          'tokenizer': outputs.file_digest(tokenizer_file(stage.tokenizer))}


def clip_shapes(stage: ClipStage) -> dict[str, tuple[int, ...]]:
  """Shapes of an encoded clip's fields."""
  video, blocks = stage.model.video, stage.clip_blocks
  frames, *rest = video.block_latent_shape
  low_frames, rows, columns = stage.model.mid_grid
  low = (low_frames, rows * video.patch[1], columns * video.patch[2], video.latent_channels)
  tokens = (stage.model.text.max_tokens,)
  return {'latents': (blocks * frames, *rest), 'lr_latents': (blocks, *low), 'ids': tokens,
          'mask': tokens}


def encode_videos(stage: ClipStage, directory: str | os.PathLike, *, clips_per_video: int = 1,
                  overwrite: bool = False, clips_per_shard: int = 64,
                  say: Callable[[str], None] = print) -> latents.LatentStore:
  """Encodes videos with captions into `stage.dataset`, continuing an earlier attempt.

  Only the VAE is read, whatever `stage.start` names. Size and rate are those of the model.

  Args:
    stage: settings.
    directory: see `pf_jax.data.videos`.
    clips_per_video: most clips of one video.
    overwrite: replaces a store of other content.
    clips_per_shard: clips per file, and what a killed run redoes.
    say: receives a line for every file that is not used, before anything is encoded.

  Returns:
    The store; `skipped.json` in it names those files once more.

  Raises:
    PackageError: there is no usable VAE at `stage.vae`.
    StoreError: a store of other content is in the way.
    VideosError: there is no usable video.
  """
  vae = package.load_vae(stage.vae)
  stage = dataclasses.replace(stage, model=dataclasses.replace(stage.model, vae=vae.spec))
  absent: Any = None  # the other networks take no part
  encode = clip_encoder(VideoModels(stage.model, vae, absent, absent), load_tokenizer(stage))
  video = stage.model.video
  shape = videos_lib.ClipShape(stage.frames, video.height, video.width, video.fps)
  found = videos_lib.scan(directory, shape, clips_per_video=clips_per_video)
  for line in found.report():
    say(line)
  if not found.clips:
    raise videos_lib.VideosError(
        f'{directory} holds no video that can be used; wanted files such as street.mp4 of at least '
        f'{stage.frames} frames at {video.fps} fps, with their captions in street.txt.')
  store = latents.write_store(
      latents.ClipEncoder(encode, found.read, stage.encode_batch), range(len(found.clips)),
      stage.dataset, clips_per_shard=clips_per_shard, overwrite=overwrite,
      facts={**_encoding(stage), 'videos': found.files, 'videos_sha256': found.sha256})
  outputs.write_json(store.path / SKIPPED_FILE, {'skipped': found.skipped, 'cut_short': found.cut})
  return store


def evaluation_prompts(stage: ClipStage) -> tuple[digits.DigitsWorld | None, list[str]]:
  """What evaluations sample: one prompt of each class of the world, or some captions of `dataset`.

  Returns:
    The world that knows the truth of the prompts, None without one; the prompts.

  Raises:
    StoreError: there is no store at `stage.dataset`.
  """
  if not stage.dataset:
    return stage.world, evaluation.prompts(stage.world)
  store = latents.LatentStore(stage.dataset)
  # Clips of one video lie side by side and share a caption.
  every = max(len(store) // _EVAL_PROMPTS, 1)
  return None, [store.prompt(i) for i in range(0, len(store), every)][:_EVAL_PROMPTS]


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
  nets = bundle.shapes(stage.model)
  objective, video, text = make(nets), stage.model.video, stage.model.text
  phase = max(stage.phases, key=lambda p: p.clips * stage.clip_blocks + p.first_blocks)
  of_clip = clip_shapes(stage)

  def shape(*sizes: int, dtype=jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)

  def tokens(count: int) -> tuple[Any, Any]:
    return shape(count, text.max_tokens, dtype=jnp.int32), shape(count, text.max_tokens, dtype=bool)

  def batch(mesh):
    clips, first = (count // config.accumulate for count in (phase.clips, phase.first_blocks))
    whole, low = of_clip['latents'], of_clip['lr_latents']
    way = shape(clips, passes, *whole) if passes else None
    given = FlowBatch(
        ClipBatch(shape(clips, *whole), shape(clips, *low), *tokens(clips), way) if clips else None,
        FirstBlocks(shape(first, *video.block_latent_shape), *tokens(first)) if first else None)
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
