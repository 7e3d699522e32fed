"""The smallest model that still takes every path: several layers, heads, partitions, patches."""

import dataclasses

from pf_jax.models.bundle import ModelSpec
from pf_jax.models.compressor import CompressorSpec
from pf_jax.models.text import TextSpec
from pf_jax.models.transformer import TransformerSpec
from pf_jax.models.vae import VaeSpec
from pf_jax.types import VideoSpec


def tiny_model_spec(**video) -> ModelSpec:
  """A model of a few thousand parameters on 32x48 pixels; `video` overrides `VideoSpec` fields."""
  size = dataclasses.replace(VideoSpec(height=32, width=48, latent_channels=4), **video)
  return ModelSpec(
      video=size,
      vae=VaeSpec(base_width=4, latent_channels=4, width_multipliers=(1, 1, 1, 1),
                  num_res_blocks=1),
      text=TextSpec(vocab_size=128, width=12, num_layers=1, num_heads=2, head_dim=4, ffn_width=16,
                    max_tokens=6),
      transformer=TransformerSpec(width=24, ffn_width=32, num_heads=2, num_layers=2, in_channels=4,
                                  out_channels=4, time_width=16, text_width=12),
      compressor=CompressorSpec(in_channels=4, channels=(4, 6, 8), width=24))
