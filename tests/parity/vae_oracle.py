"""diffusers' AutoencoderKLWan at tiny sizes, every weight randomised, channels last in and out."""

import re
import warnings
from collections.abc import Sequence

import numpy as np

from tests.parity.oracles import randomise

with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  import torch
  from diffusers import AutoencoderKLWan

_RENAMES = (
    (r'^quant_conv\.', 'conv1.'), (r'^post_quant_conv\.', 'conv2.'),
    (r'\.conv_in\.', '.conv1.'), (r'\.norm_out\.', '.head.0.'), (r'\.conv_out\.', '.head.2.'),
    (r'\.down_blocks\.', '.downsamples.'),
    (r'\.mid_block\.resnets\.0\.', '.middle.0.'), (r'\.mid_block\.attentions\.0\.', '.middle.1.'),
    (r'\.mid_block\.resnets\.1\.', '.middle.2.'),
    (r'((?:samples|middle)\.\d+)\.norm1\.', r'\1.residual.0.'),
    (r'((?:samples|middle)\.\d+)\.conv1\.', r'\1.residual.2.'),
    (r'((?:samples|middle)\.\d+)\.norm2\.', r'\1.residual.3.'),
    (r'((?:samples|middle)\.\d+)\.conv2\.', r'\1.residual.6.'),
    (r'\.conv_shortcut\.', '.shortcut.'),
)


def tiny_wan_vae(seed: int, base: int = 8, channels: int = 4,
                 multipliers: Sequence[int] = (1, 2, 4, 4), res_blocks: int = 2,
                 mean: Sequence[float] = (), std: Sequence[float] = ()):
  """The Wan VAE at a small width; `mean` and `std` of latents are only told, not used, by it."""
  return randomise(AutoencoderKLWan(
      base_dim=base, z_dim=channels, dim_mult=list(multipliers), num_res_blocks=res_blocks,
      temperal_downsample=[False, True, True], latents_mean=list(mean) or [0.0] * channels,
      latents_std=list(std) or [1.0] * channels), seed)


def vae_tensors(model) -> dict[str, np.ndarray]:
  """The weights under Wan2.1's original names and layouts."""
  per_stage = model.config.num_res_blocks + 2  # residual blocks and the upsampling of one stage

  def flatten(match: re.Match) -> str:
    stage, kind, index = int(match[1]), match[2], int(match[3])
    return f'.upsamples.{stage * per_stage + (index if kind == "resnets" else per_stage - 1)}.'

  tensors = {}
  for name, parameter in model.named_parameters():
    name = re.sub(r'\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.', flatten, name)
    for pattern, replacement in _RENAMES:
      name = re.sub(pattern, replacement, name)
    tensors[name] = parameter.detach().float().numpy()
  return tensors


def encode(model, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """[B, T, H, W, 3] -> mean and log variance, [B, F, h, w, C] each."""
  with torch.no_grad():
    posterior = model.encode(torch.tensor(np.moveaxis(pixels, -1, 1))).latent_dist
  return (np.moveaxis(posterior.mean.numpy(), 1, -1),
          np.moveaxis(posterior.logvar.numpy(), 1, -1))


def decode(model, latents: np.ndarray) -> np.ndarray:
  """[B, F, h, w, C] -> pixels [B, T, H, W, 3], clamped."""
  with torch.no_grad():
    return np.moveaxis(model.decode(torch.tensor(np.moveaxis(latents, -1, 1))).sample.numpy(),
                       1, -1)


def vae_case() -> dict[str, np.ndarray]:
  """The golden case: three latent frames of an odd size, so first, second and steady show."""
  model = tiny_wan_vae(6, base=4, channels=2, multipliers=(1, 1, 2, 2), res_blocks=1)
  rng = np.random.default_rng(7)
  pixels = rng.uniform(-1, 1, (1, 9, 24, 40, 3)).astype(np.float32)
  latents = rng.standard_normal((1, 3, 3, 5, 2)).astype(np.float32)
  mean, logvar = encode(model, pixels)
  # Quiet enough that clamping hides nothing.
  weight = model.decoder.conv_out.weight
  weight.data *= 0.3
  return {f'weights/{k}': v for k, v in vae_tensors(model).items()} | {
      'pixels': pixels, 'latents': latents, 'mean_output': mean, 'logvar_output': logvar,
      'pixels_output': decode(model, latents)}
