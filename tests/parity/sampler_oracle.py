"""A few-step student's rollout in diffusers' networks, torch and NumPy.

Nothing of pf_jax's rollout, cache, VAE or compressor takes part. Handed in are the noise and, where
there is an archive, which of its blocks every layer attends. A block's past is what this chain
itself made of the blocks before.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from pf_jax.models.bundle import VideoModels
from pf_jax.models.compressor import Compressor
from tests.parity import oracles, vae_oracle
from tests.rollout import few_step

# 1000, 750, 500 and 250 of 1000 under shift 5: 5u / (1 + 4u).
SIGMAS = (1.0, 15 / 16, 5 / 6, 5 / 8)
SINK = 1

FlowFn = Callable[[np.ndarray, float], np.ndarray]


def _denoise(flow: FlowFn, noise: np.ndarray) -> np.ndarray:
  """One block from its noise [passes, B, F, h, w, C] to x0; `flow` maps x and timestep to v."""
  x = noise[0]
  for sigma, lower, fresh in zip(SIGMAS, SIGMAS[1:], noise[1:], strict=False):
    x = (1 - lower) * (x - sigma * flow(x, 1000 * sigma)) + lower * fresh
  return x - SIGMAS[-1] * flow(x, 1000 * SIGMAS[-1])


def windowed_latents(model: WanTransformer3DModel, text: np.ndarray, noise: np.ndarray
                     ) -> np.ndarray:
  """Latents [n, B, F, h, w, C] under one sink and two recent blocks.

  Args:
    model: as many channels out as in.
    text: [B, rows, text_dim].
    noise: [n, passes, B, F, h, w, C].
  """
  past: list[np.ndarray] = []
  frames = noise.shape[3]
  for block in noise:
    visible, positions = oracles.window(len(past) + 1, sink=SINK, recent=2, frames=frames)

    def flow(x, timestep, visible=visible, positions=positions):
      timesteps = np.zeros((len(text), frames * (len(past) + 1)))
      timesteps[:, -frames:] = timestep
      return oracles.masked_causal_oracle(model, [*past, x], timesteps, text, visible=visible,
                                          positions=positions)

    past.append(_denoise(flow, block))
  return np.stack(past)


def packed_latents(model: WanTransformer3DModel, vae: AutoencoderKLWan, text: np.ndarray,
                   noise: np.ndarray, selected: np.ndarray) -> np.ndarray:
  """Latents [n, B, F, h, w, C] under one sink block, one recent block and compressed ones.

  Args:
    model: as many channels out as in.
    vae: decodes every block, and encodes it again at low resolution.
    text: [B, rows, text_dim].
    noise: [n, passes, B, F, h, w, C].
    selected: [n, L, B, K] archived blocks that each block attends, -1 for none.
  """
  past: list[np.ndarray] = []
  compressed: list[np.ndarray] = []
  # A compressed token stands amid two latent frames and 2x2 patches: (time, row, column).
  offsets = np.array([[0.5, 0.5, 0.5], [0.5, 0.5, 2.5], [2.5, 0.5, 0.5], [2.5, 0.5, 2.5]])
  for block in noise:

    def flow(x, timestep):
      return oracles.pack_oracle(
          model, [*past, x], compressed, offsets, timestep, text, sink_blocks=SINK,
          recent_blocks=1, selected=selected[:len(past) + 1])

    past.append(_denoise(flow, block))
    compressed.append(_compress(model, vae, past))
  return np.stack(past)


def _compress(model: WanTransformer3DModel, vae: AutoencoderKLWan, past: Sequence[np.ndarray]
              ) -> np.ndarray:
  """The last block's tokens [B, M, D]: LR branch + HR branch."""
  return _lr_tokens(model, vae, past) + _hr_tokens(few_step.compressor(), past[-1])


def _lr_tokens(model: WanTransformer3DModel, vae: AutoencoderKLWan, past: Sequence[np.ndarray]
               ) -> np.ndarray:
  """The block's 16 pictures as 5 smaller ones, through the VAE and the patch embedding."""
  mean, std = np.float32(vae.config.latents_mean), np.float32(vae.config.latents_std)
  pixels = vae_oracle.decode(vae, np.concatenate(past, axis=1) * std + mean)
  if len(past) == 1:  # 13 pictures: the first stands for its latent frame alone
    pixels = np.concatenate([*3 * [pixels[:, :1]], pixels], axis=1)
  pixels = pixels[:, -16:]
  pixels = (pixels[:, :, ::2, ::2] + pixels[:, :, 1::2, ::2]
            + pixels[:, :, ::2, 1::2] + pixels[:, :, 1::2, 1::2]) / 4
  first, pairs = pixels[:, :8].mean(axis=1, keepdims=True), (pixels[:, 8::2] + pixels[:, 9::2]) / 2
  latents = (vae_oracle.encode(vae, np.concatenate([first, pairs], axis=1))[0] - mean) / std
  # 2x5 latents: the last column fills no patch.
  rows = model.patch_embedding(torch.tensor(np.moveaxis(latents[:, :, :, :4], -1, 1)))
  return rows.flatten(2).movedim(1, 2).numpy()


def _hr_tokens(compressor: Compressor, latents: np.ndarray) -> np.ndarray:
  """Convolutions that halve time once, then space twice, each with SiLU; then a linear layer."""
  x = torch.tensor(np.moveaxis(latents, -1, 1))
  for conv, stride in zip(compressor.hr.convs, ((2, 1, 1), (1, 2, 2), (1, 2, 2)), strict=True):
    kernel = torch.tensor(np.moveaxis(np.asarray(conv.kernel), (-1, -2), (0, 1)))
    x = torch.nn.functional.conv3d(x, kernel, torch.tensor(np.asarray(conv.bias)), stride, 1)
    x = torch.nn.functional.silu(x)
  out = compressor.hr.out
  rows = x.flatten(2).movedim(1, 2).numpy()
  return rows @ np.asarray(out.kernel) + np.asarray(out.bias)


class Case(NamedTuple):
  """Networks, prompts and noise of two videos, and what the chains make of them."""

  model: WanTransformer3DModel
  vae: AutoencoderKLWan
  text: np.ndarray
  noise: np.ndarray

  def our_models(self, *, vae: bool) -> VideoModels:
    """The same networks in pf_jax, with or without the VAE."""
    return few_step.video_models(oracles.wan_tensors(self.model),
                                 vae_oracle.vae_tensors(self.vae) if vae else None)


@functools.cache
def case() -> Case:
  """`few_step.MODEL` with Wan2.1's float64 sinusoid; the first of the two prompts ends early."""
  spec = few_step.MODEL.vae
  vae = vae_oracle.tiny_wan_vae(
      33, base=spec.base_width, channels=spec.latent_channels, multipliers=spec.width_multipliers,
      res_blocks=spec.num_res_blocks, mean=spec.latent_mean, std=spec.latent_std)
  text = np.random.default_rng(34).standard_normal((2, 6, 20)).astype(np.float32)
  text[0, 4:] = 0
  model = oracles.tiny_wan_transformer(32, out_channels=4, float64_sinusoid=True)
  return Case(model, vae, text, few_step.noise())


@functools.cache
def packed_rollouts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Ours, the selection our cache made, and the oracle's under the same selection."""
  ours, selected = few_step.sample(case().our_models(vae=True), case().text, few_step.PACKED)
  return ours, selected, packed_latents(*case(), selected)


def sampler_case() -> dict[str, np.ndarray]:
  """The golden case: seven blocks through all three partitions, more than the archive holds."""
  _, selected, latents = packed_rollouts()
  weights = {f'transformer/{k}': v for k, v in oracles.wan_tensors(case().model).items()}
  weights |= {f'vae/{k}': v for k, v in vae_oracle.vae_tensors(case().vae).items()}
  return weights | {'text': case().text, 'selected': selected, 'latents_output': latents}
