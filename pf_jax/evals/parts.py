"""What VAE and compressor do with true, held-out clips.

Measured per clip:
  psnr                 reconstruction, against the clip.
  psnr_low_resolution  the same for what the LR branch re-encodes: a block's pixels, pooled.
  hr_to_lr             length of the HR branch's tokens over that of the LR branch's, mean over a
                       clip. 0: the HR branch adds nothing; 1: both say equally much.
  cosine               between the two branches' tokens: -1, 0 or 1 as they undo, ignore or repeat
                       each other.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.data import digits
from pf_jax.evals import evaluator
from pf_jax.models import compressor as compressor_lib
from pf_jax.models.bundle import VideoModels
from pf_jax.types import Array

PARTS = ('psnr', 'psnr_low_resolution', 'hr_to_lr', 'cosine')


class PartsReport(NamedTuple):
  """Measured values.

  Attributes:
    values: one per clip for each of `PARTS`.
    reconstructions: the reconstructed clips judged like sampled videos: what the VAE costs.
  """

  values: dict[str, np.ndarray]
  reconstructions: evaluator.Report


def psnr(reference: Array, other: Array) -> Array:
  """Peak signal-to-noise ratio in dB, a scalar; pixels in [-1, 1]."""
  return -10 * jnp.log10(jnp.maximum(jnp.mean(jnp.square((reference - other) / 2)), 1e-10))


def branch_tokens(models: VideoModels, latents: Array, pixels: Array) -> tuple[Array, Array]:
  """Tokens of both compressor branches, whichever of them the model adds up.

  Args:
    models: networks.
    latents: blocks [N, F, h, w, C].
    pixels: the same blocks, decoded [N, T, H, W, 3].

  Returns:
    HR and LR tokens, [N, M, D] each.
  """
  hr = models.compressor.hr(latents)
  lr = models.transformer.patch_embedding(models.encode_low_resolution(pixels))
  return hr.reshape(lr.shape), lr


@jax.jit
def _measure(models: VideoModels, frames: Array, latents: Array) -> tuple[Array, dict[str, Array]]:
  """Reconstruction [T, H, W, 3] of one clip, and its `PARTS`; latents [blocks, F, h, w, C]."""
  video = models.spec.video
  true = frames.astype(jnp.float32)[None] / 127.5 - 1
  decoded = models.vae.decode(latents.reshape(1, -1, *latents.shape[2:]))

  def blocks(pixels: Array) -> Array:
    """The blocks after the first, [blocks - 1, T, H, W, 3]."""
    return pixels[0, video.first_block_frames:].reshape(-1, video.block_frames, *pixels.shape[2:])

  pooled = compressor_lib.pool_pixels(blocks(true), video, models.spec.compressor)
  low = models.vae.decode(models.vae.encode(pooled))
  hr, lr = branch_tokens(models, latents[1:], blocks(decoded))
  hr_norm, lr_norm = (jnp.linalg.norm(tokens, axis=-1) for tokens in (hr, lr))
  alike = jnp.sum(hr * lr, -1) / jnp.maximum(hr_norm * lr_norm, 1e-9)
  return decoded[0], {'psnr': psnr(true, decoded), 'psnr_low_resolution': psnr(pooled, low),
                      'hr_to_lr': jnp.mean(hr_norm / jnp.maximum(lr_norm, 1e-9)),
                      'cosine': jnp.mean(alike)}


def measure(models: VideoModels, world: digits.DigitsWorld, draws: Sequence[digits.ClipAttributes],
            latents: np.ndarray, judge: evaluator.Judge,
            watch: Callable[[np.ndarray], None] | None = None) -> PartsReport:
  """Measures VAE and compressor on true clips, one clip at a time.

  Args:
    models: networks.
    world: renders the clips.
    draws: which clips.
    latents: theirs [B, blocks, F, h, w, C], at least 2 blocks; see `rollouts.encode_clips`.
    judge: expects these clips.
    watch: is handed each reconstruction, uint8 [T, H, W, 3].
  """
  frames = models.spec.video.pixel_frames(latents.shape[1])
  rows = []
  for number, draw in enumerate(draws):
    decoded, values = _measure(models, world.render(draw, frames).pixels, latents[number])
    pixels = digits.to_uint8(decoded)
    judge.add_video(number, pixels)
    if watch is not None:
      watch(pixels)
    rows.append({name: float(values[name]) for name in PARTS})
  return PartsReport({name: np.array([row[name] for row in rows]) for name in PARTS},
                     judge.report())
