"""Stage "vae": data, evaluation and result of the autoencoder's training."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.data import crops, digits, source
from pf_jax.models import compressor
from pf_jax.models.bundle import ModelSpec
from pf_jax.models.vae import VaeSpec, WanVae
from pf_jax.train import checks, loop, vae_objective
from pf_jax.train.config import TrainConfig
from pf_jax.types import Array, PyTree
from pf_jax.weights import package

# Clips of an evaluation never depend on the training seed.
_EVAL_SEED = 1


@dataclasses.dataclass(frozen=True)
class CropBatch:
  """One kind of batch: boxes of one size.

  Attributes:
    batch_size: boxes per step.
    crop: which boxes.

  Raises:
    ValueError: an empty batch.
  """

  batch_size: int
  crop: crops.CropSpec = crops.CropSpec()

  def __post_init__(self):
    if self.batch_size < 1:
      raise ValueError(f'batch_size={self.batch_size} must be at least 1.')


@dataclasses.dataclass(frozen=True)
class CropPhase:
  """A stretch of the VAE's training whose steps take kinds of batches in turn.

  Attributes:
    until: the first step after the phase.
    batches: step i takes number i modulo their count; each kind compiles once.
  """

  until: int
  batches: tuple[CropBatch, ...]


@dataclasses.dataclass(frozen=True)
class VaeStage:
  """Settings of the stage "vae": the autoencoder alone, on clips of the miniature's world.

  Attributes:
    model: the whole model; only its VAE is trained here.
    phases: boxes to train on, one phase after the other; the last one lasts to the end.
    loss: weights of the loss.
    world: what clips look like.
    eval_clips: held-out clips per evaluation.
    eval_frames: pixel frames of each, 1 + a multiple of the temporal stride.

  Raises:
    ValueError: sizes that do not fit each other.
  """

  model: ModelSpec
  phases: tuple[CropPhase, ...]
  loss: vae_objective.VaeLossSpec = vae_objective.VaeLossSpec()
  world: digits.DigitsWorld = digits.DigitsWorld()
  eval_clips: int = 8
  eval_frames: int = 77

  def __post_init__(self):
    if not self.phases or not all(phase.batches for phase in self.phases):
      raise ValueError(f'phases={self.phases} must name at least one phase, and each at least one '
                       'kind of batch.')
    checks.check_phases([phase.until for phase in self.phases])
    if self.eval_clips < 1:
      raise ValueError(f'eval_clips={self.eval_clips} must be at least 1.')
    kinds = [kind for phase in self.phases for kind in phase.batches]
    for frames in (self.eval_frames, *(kind.crop.size[0] for kind in kinds)):
      checks.check_frames(frames, self.model.vae.temporal_stride)
    checks.check_world(self.world, self.model)


def to_float(pixels: Array) -> Array:
  """uint8 pixels to float32 in [-1, 1], on the device."""
  return pixels.astype(jnp.float32) / 127.5 - 1


def vae_evaluation(stage: VaeStage, workdir: str | os.PathLike
                   ) -> Callable[[WanVae, int], dict[str, float]]:
  """PSNR on held-out clips at full and at the LR branch's resolution, and a picture to look at.

  Args:
    stage: settings.
    workdir: receives `reconstruction.png`.

  Returns:
    (vae, step) -> metrics.
  """
  from pf_jax.viz import sheet

  clips = source.ClipSource(stage.world, stage.eval_frames, seed=_EVAL_SEED, split='test')
  records = [clips[i] for i in range(stage.eval_clips)]
  pixels = np.stack([record['pixels'] for record in records])
  model = stage.model

  @jax.jit
  def reconstruct(vae: WanVae, clip: Array) -> tuple[Array, Array, Array]:
    full = to_float(clip[None])
    blocks = full[:, 1:1 + model.video.temporal_stride * model.video.frames_per_block]
    low = compressor.pool_pixels(blocks, model.video, model.compressor)
    decoded = vae.decode(vae.encode(full))
    return (decoded[0], vae_objective.psnr(full, decoded)[0],
            vae_objective.psnr(low, vae.decode(vae.encode(low)))[0])

  def evaluate(vae: WanVae, step: int) -> dict[str, float]:
    del step
    results = [reconstruct(vae, clip) for clip in pixels]  # one at a time: memory of one clip
    rows, labels = [], []
    for clip, result in list(zip(pixels, results, strict=True))[:3]:
      rows += [to_float(clip), np.asarray(result[0])]
      labels += ['held-out clip', 'reconstruction']
    sheet.write_png(pathlib.Path(workdir) / 'reconstruction.png', sheet.contact_sheet(
        [np.asarray(row) for row in rows], fps=model.video.fps, labels=labels))
    return {'psnr': float(np.mean([r[1] for r in results])),
            'psnr_low_resolution': float(np.mean([r[2] for r in results]))}

  return evaluate


def measure_latents(vae: WanVae, stage: VaeStage) -> VaeSpec:
  """Mean and deviation of the latents of training clips, in the VAE's spec.

  Args:
    vae: trained; its own statistics are ignored.
    stage: gives the clips, as many and as long as those of an evaluation.
  """
  clips = source.ClipSource(stage.world, stage.eval_frames, seed=_EVAL_SEED)
  encode = jax.jit(lambda vae, pixels: vae.encode_moments(to_float(pixels))[0])
  means = [encode(vae, clips[i]['pixels'][None]) for i in range(4 * stage.eval_clips)]
  return vae_objective.latent_statistics(np.concatenate(means), stage.model.vae)


def crop_batches(stage: VaeStage, seed: int) -> Callable[[int], Iterator[PyTree]]:
  """Batches of boxes, a function of the step alone: `fit`'s batches for the stage.

  Args:
    stage: settings; its phases choose size and number of boxes.
    seed: of clips and boxes.
  """
  video, compression = stage.model.video, stage.model.compressor

  def pool(frames: np.ndarray) -> np.ndarray:
    pooled = compressor.pool_pixels(jnp.asarray(frames[None], jnp.float32), video, compression)
    return np.asarray(pooled[0]).round().astype(np.uint8)

  def kind(batch: CropBatch, start: int) -> Iterator[PyTree]:
    records = crops.CropSource(stage.world, batch.crop, seed=seed, pool=pool,
                               pool_frames=video.block_frames)
    return source.batches(records, batch.batch_size, start_step=start)

  def batches(step: int) -> Iterator[PyTree]:
    for phase in stage.phases:
      if step >= phase.until and phase is not stage.phases[-1]:
        continue
      count = len(phase.batches)
      # Step i of the run is record i // count of its kind, so that a resumed run sees the same.
      streams = [kind(batch, -(-(step - i) // count)) for i, batch in enumerate(phase.batches)]
      while step < phase.until or phase is stage.phases[-1]:
        yield next(streams[step % count])
        step += 1

  return batches


def train_vae(stage: VaeStage, config: TrainConfig, workdir: str | os.PathLike) -> loop.FitResult:
  """Trains the VAE; a finished run leaves it with its latents' statistics in `vae/`. See `fit`."""
  objective = vae_objective.VaeObjective(stage.model.vae, stage.loss)
  result = loop.fit(objective, crop_batches(stage, config.seed), config, workdir,
                    evaluate=vae_evaluation(stage, workdir))
  if not result.interrupted:
    params = result.state.params if result.state.ema is None else result.state.ema
    package.save_vae(pathlib.Path(workdir) / 'vae', params, measure_latents(params, stage))
  return result
