"""The stages of training: which data, objective and evaluation each one puts into `fit`.

`STAGES` maps the name in a config to a dataclass of settings and the function that runs it.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax import outputs
from pf_jax.data import digits, source
from pf_jax.models.bundle import ModelSpec
from pf_jax.models.vae import VaeSpec, WanVae
from pf_jax.train import loop, vae_objective
from pf_jax.train.config import TrainConfig

Array = jax.Array
PyTree = Any

# Clips of an evaluation never depend on the training seed.
_EVAL_SEED = 1


@dataclasses.dataclass(frozen=True)
class VaeStage:
  """Settings of the stage "vae": the autoencoder alone, on clips of the miniature's world.

  Attributes:
    model: the whole model; only its VAE is trained here.
    loss: weights of the loss.
    world: what clips look like.
    frames: pixel frames per training clip, 1 + a multiple of the temporal stride.
    batch_size: clips per step.
    eval_clips: held-out clips per evaluation.
    eval_frames: pixel frames of each.

  Raises:
    ValueError: sizes that do not fit each other.
  """

  model: ModelSpec
  loss: vae_objective.VaeLossSpec = vae_objective.VaeLossSpec()
  world: digits.DigitsWorld = digits.DigitsWorld()
  frames: int = 17
  batch_size: int = 4
  eval_clips: int = 8
  eval_frames: int = 77

  def __post_init__(self):
    stride = self.model.vae.temporal_stride
    for name in ('frames', 'eval_frames'):
      frames = getattr(self, name)
      if frames < 1 or (frames - 1) % stride:
        below = max(frames - 1, 0) // stride * stride + 1
        raise ValueError(f'{name}={frames} is not 1 + a multiple of {stride}; '
                         f'use {below} or {below + stride}.')
    if min(self.batch_size, self.eval_clips) < 1:
      raise ValueError(f'batch_size={self.batch_size} and eval_clips={self.eval_clips} must be at '
                       'least 1.')
    world, video = self.world, self.model.video
    if (world.height, world.width, world.fps) != (video.height, video.width, video.fps):
      raise ValueError(f'world is {world.height}x{world.width} at {world.fps} fps, model.video '
                       f'{video.height}x{video.width} at {video.fps}; set them to one value.')


def to_float(pixels: Array) -> Array:
  """uint8 pixels to float32 in [-1, 1], on the device."""
  return pixels.astype(jnp.float32) / 127.5 - 1


def psnr(reference: Array, other: Array) -> Array:
  """Peak signal-to-noise ratio in dB of pictures in [-1, 1], one per clip: [B, ...] -> [B]."""
  axes = tuple(range(1, reference.ndim))
  error = jnp.mean(jnp.square((reference - other) / 2), axes)
  return -10 * jnp.log10(jnp.maximum(error, 1e-10))


def vae_evaluation(stage: VaeStage, workdir: str | os.PathLike
                   ) -> Callable[[WanVae, int], dict[str, float]]:
  """PSNR on held-out clips at full and at the LR branch's resolution, and a picture to look at.

  Args:
    stage: settings.
    workdir: receives `reconstruction.png`.

  Returns:
    (vae, step) -> metrics.
  """
  from pf_jax.models import compressor
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
    return decoded[0], psnr(full, decoded), psnr(low, vae.decode(vae.encode(low)))

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


def train_vae(stage: VaeStage, config: TrainConfig, workdir: str | os.PathLike) -> loop.FitResult:
  """Trains the VAE and writes the statistics of its latents to `vae.json`; see `fit`."""
  clips = source.ClipSource(stage.world, stage.frames, seed=config.seed)

  def batches(step: int) -> Iterator[PyTree]:
    for batch in source.batches(clips, stage.batch_size, start_step=step):
      yield {'pixels': batch['pixels']}

  objective = vae_objective.VaeObjective(stage.model.vae, stage.loss)
  result = loop.fit(objective, batches, config, workdir, evaluate=vae_evaluation(stage, workdir))
  if not result.interrupted:
    params = result.state.params if result.state.ema is None else result.state.ema
    outputs.write_json(pathlib.Path(workdir) / 'vae.json',
                       dataclasses.asdict(measure_latents(params, stage)))
  return result


STAGES: dict[str, tuple[type, Callable[..., loop.FitResult]]] = {
    'vae': (VaeStage, train_vae),
}
