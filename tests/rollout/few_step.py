"""A few-step student's rollout at a tiny size, as its golden and parity tests need it.

Sampled as Self-Forcing's students are: passes at 1000, 750, 500 and 250, which shift 5 warps, and
fresh noise between them. Two kinds of history: sink and recent blocks alone, and all three
partitions with an archive too small for the video.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pf_jax.models.bundle import ModelSpec, VideoModels
from pf_jax.models.vae import DecoderState
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec, SamplerSpec, block_noise, cache_spec
from pf_jax.testing import random_models, tiny_model_spec
from pf_jax.weights.networks import from_released
from tests.models import cached

BLOCKS, BATCH, SEED = 7, 2, 31
# max|d| / max|ref| of any block, float32. Errors do not pile up from block to block: what a history
# is off by reaches the next block through attention alone, and fresh noise drowns it in every pass.
GATE = 5e-6


def _model_spec() -> ModelSpec:
  """Blocks of four 4x10 latent frames, of which the archive keeps two of 1x2 tokens."""
  spec = tiny_model_spec(width=80)
  dit = dataclasses.replace(cached.SPEC, out_channels=4)
  return dataclasses.replace(
      spec, transformer=dit, text=dataclasses.replace(spec.text, width=dit.text_width),
      compressor=dataclasses.replace(spec.compressor, width=dit.width),
      vae=dataclasses.replace(spec.vae, latent_mean=(0.3, -0.2, 0.1, -0.4),
                              latent_std=(0.8, 1.3, 1.1, 0.7)))


MODEL = _model_spec()
SAMPLER = SamplerSpec(solver='renoise', steps=(1000.0, 750.0, 500.0, 250.0), shift=5.0)
WINDOWED = RolloutSpec(
    cache_spec(MODEL, sink_blocks=1, recent_blocks=2, top_k=0, mid_capacity=0), SAMPLER)
PACKED = RolloutSpec(
    cache_spec(MODEL, sink_blocks=1, recent_blocks=1, top_k=2, mid_capacity=3), SAMPLER)


@functools.cache
def compressor():
  """Random weights of the only network that was never released."""
  return random_models(MODEL, SEED).compressor


def video_models(transformer: dict[str, np.ndarray], vae: dict[str, np.ndarray] | None = None
                 ) -> VideoModels:
  """The networks from tensors under Wan2.1's names; without the VAE's, it is a `BlankVae`."""
  return VideoModels(MODEL, BlankVae() if vae is None else from_released(vae, MODEL.vae),
                     from_released(transformer, MODEL.transformer), compressor())


class BlankVae(nnx.Module):
  """Shows black pictures and compiles fast. Without an archive no picture reaches a latent."""

  def init_decoder_state(self, batch: int, height: int, width: int) -> DecoderState:
    del batch, height, width
    return DecoderState(())

  def decode_first(self, latents: jax.Array) -> tuple[jax.Array, DecoderState]:
    return self._black(latents, MODEL.video.first_block_frames)

  def decode_next(self, state: DecoderState, latents: jax.Array
                  ) -> tuple[jax.Array, DecoderState]:
    del state
    return self._black(latents, MODEL.video.block_frames)

  def encode(self, pixels: jax.Array) -> jax.Array:
    batch, frames, rows, columns, _ = pixels.shape
    stride = MODEL.video.spatial_stride
    return jnp.zeros((batch, 1 + (frames - 1) // MODEL.video.temporal_stride, rows // stride,
                      columns // stride, MODEL.video.latent_channels))

  def _black(self, latents: jax.Array, frames: int) -> tuple[jax.Array, DecoderState]:
    size = MODEL.video.height, MODEL.video.width
    return jnp.zeros((len(latents), frames, *size, 3)), DecoderState(())


def keys() -> jax.Array:
  """Of both videos."""
  return jax.random.split(jax.random.key(SEED), BATCH)


def noise() -> np.ndarray:
  """What the sampler draws, [blocks, passes, B, F, h, w, C]: each block's start comes first."""
  shape = MODEL.video.block_latent_shape
  return np.stack([[block_noise(keys(), block, number, shape)
                    for number in range(len(SAMPLER.steps))] for block in range(BLOCKS)])


def sample(models: VideoModels, text: np.ndarray, spec: RolloutSpec, blocks: int = BLOCKS
           ) -> tuple[np.ndarray, np.ndarray]:
  """Samples the videos.

  Args:
    models: from `video_models`.
    text: [B, rows, text width].
    spec: `WINDOWED`, `PACKED` or a variation.
    blocks: n, at least 1.

  Returns:
    Latents [n, B, F, h, w, C] and the archived blocks that each attended [n, L, B, K].
  """
  denoise = jax.jit(functools.partial(block_lib.denoise_block, spec=spec))
  finish = jax.jit(functools.partial(block_lib.finish_block, spec=spec), static_argnames='first')
  read = models.transformer.text_keys_values(text)
  state, latents, selected = block_lib.init(models, BATCH, spec), [], []
  for index in range(blocks):
    x0, chosen = denoise(models, state.cache, read, keys())
    latents.append(x0)
    selected.append(chosen)
    if index + 1 < blocks:
      state, _ = finish(models, state, x0, chosen, read, first=index == 0)
  return np.stack(latents), np.stack(selected)
