"""A model that compiles in a few seconds, with everything an evaluation touches."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.data import digits
from pf_jax.models import bundle, compressor, text, transformer, vae
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.pipeline import PACKAGED, Pipeline
from pf_jax.types import VideoSpec
from pf_jax.weights.rules import dotted

VIDEO = VideoSpec(height=32, width=32, latent_channels=4, temporal_stride=2, spatial_stride=2,
                  patch=(1, 4, 4))
WORLD = digits.DigitsWorld(height=32, width=32, glyph_size=16)
CHOICES = {'cache': {'sink_blocks': 1, 'recent_blocks': 1, 'top_k': 1, 'mid_capacity': 3},
           'sampler': {'steps': (1000.0,)}}


def spec() -> bundle.ModelSpec:
  return bundle.ModelSpec(
      video=VIDEO,
      vae=vae.VaeSpec(base_width=4, latent_channels=4, width_multipliers=(1, 1), num_res_blocks=1,
                      temporal_downsample=(True,)),
      text=text.TextSpec(vocab_size=128, width=12, num_layers=1, num_heads=2, head_dim=4,
                         ffn_width=16, max_tokens=16),
      transformer=transformer.TransformerSpec(
          width=24, ffn_width=32, num_heads=2, num_layers=2, in_channels=4, out_channels=4,
          patch=VIDEO.patch, time_width=16, text_width=12),
      compressor=compressor.CompressorSpec(in_channels=4, channels=(4, 4, 6, 8), width=24))


def models() -> bundle.Models:
  """Random parameters, drawn without compiling anything; no branch is silent."""
  rng = np.random.default_rng(1)

  def fill(path, leaf):
    name = dotted(path).rsplit('.', 1)[-1]
    noise = rng.standard_normal(leaf.shape)
    if name in ('gamma', 'scale'):
      return jnp.asarray(1 + 0.1 * noise, leaf.dtype)
    fan_in = math.prod(leaf.shape[:-1][-4:]) if name == 'kernel' else 100
    return jnp.asarray(noise / math.sqrt(fan_in), leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, bundle.shapes(spec()))


def pipeline() -> Pipeline:
  tokenizer = Tokenizer.from_file(PACKAGED / 'tokenizer.json', max_tokens=16)
  made = models()
  prompts = PromptEncoder(tokenizer, made.spec.text, lambda: made.text)
  return Pipeline(made.without_text(), prompts, choices=CHOICES)


def once(function, *arguments):
  """Calls a function compiled without optimisation: quicker than op by op, or optimised."""
  return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})(*arguments)
