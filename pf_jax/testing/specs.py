"""The smallest model that still takes every path: several layers, heads, partitions, patches."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.models import bundle
from pf_jax.models.bundle import Models, ModelSpec
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


def random_models(spec: ModelSpec, seed: int = 0) -> Models:
  """Networks with every parameter drawn, and nothing compiled for it.

  Zero heads, zero biases and unit norms, with which training starts, would hide mistakes.

  Args:
    spec: sizes.
    seed: of the draws.
  """
  rng = np.random.default_rng(seed)

  def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    names = jax.tree_util.keystr(path)
    noise = rng.standard_normal(leaf.shape)
    if 'scale' in names or 'gamma' in names:
      return jnp.asarray(1 + 0.1 * noise, leaf.dtype)
    if 'kernel' not in names:
      return jnp.asarray(0.1 * noise, leaf.dtype)
    fan_in = leaf.shape[1:-1] if 'layers' in names else leaf.shape[:-1]  # layers are stacked
    return jnp.asarray(noise / math.sqrt(math.prod(fan_in)), leaf.dtype)

  shapes = bundle.shapes(spec)
  return jax.tree_util.tree_map_with_path(draw, shapes)
