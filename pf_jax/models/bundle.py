"""All networks of one model and the spec that describes them."""

import dataclasses
import functools
from typing import Any, Self

import jax
import numpy as np
from flax import nnx

from pf_jax.kernels import rope
from pf_jax.models import compressor as compressor_lib
from pf_jax.models.compressor import Compressor, CompressorSpec
from pf_jax.models.initialise import init_module
from pf_jax.models.text import TextSpec, UMT5Encoder
from pf_jax.models.transformer import CausalTransformer, TransformerSpec
from pf_jax.models.vae import VaeSpec, WanVae
from pf_jax.types import Array, KeyValues, VideoSpec


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """Everything needed to build the networks; sizes that must agree are checked.

  Raises:
    ValueError: two parts disagree about a size.
  """

  video: VideoSpec
  vae: VaeSpec
  text: TextSpec
  transformer: TransformerSpec
  compressor: CompressorSpec
  mid_offsets: rope.MidOffsets = 'center'

  def __post_init__(self):
    video, dit = self.video, self.transformer
    pairs: dict[str, dict[str, Any]] = {
        'latent channels': {'video': video.latent_channels, 'vae': self.vae.latent_channels,
                            'transformer in': dit.in_channels, 'transformer out': dit.out_channels,
                            'compressor': self.compressor.in_channels},
        'width': {'transformer': dit.width, 'compressor': self.compressor.width},
        'text width': {'text': self.text.width, 'transformer': dit.text_width},
        'patch': {'video': video.patch, 'transformer': dit.patch},
    }
    for name, sizes in pairs.items():
      if len(set(sizes.values())) > 1:
        raise ValueError(f'{name} must agree between parts, got {sizes}; set them to one value.')
    self.compressor.mid_grid(video)

  @property
  def grid(self) -> tuple[int, int, int]:
    """(frames, height, width) of a block in tokens."""
    return self.video.frames_per_block, *self.video.grid

  @property
  def mid_grid(self) -> tuple[int, int, int]:
    """(frames, height, width) of a compressed block in tokens."""
    return self.compressor.mid_grid(self.video)

  @property
  def compressed_positions(self) -> np.ndarray:
    """Positions [M, 3] of compressed tokens inside their block."""
    return rope.compressed_positions(self.grid, self.mid_grid, self.mid_offsets)


class VideoModels(nnx.Module):
  """The networks that every block needs: VAE, transformer, compressor."""

  def __init__(self, spec: ModelSpec, vae: WanVae, transformer: CausalTransformer,
               compressor: Compressor):
    """Puts networks together; parameters are shared, not copied."""
    self.spec = spec
    self.vae = vae
    self.transformer = transformer
    self.compressor = compressor

  def replaced(self, **networks: nnx.Module) -> Self:
    """The same networks with some of them replaced; nothing is copied."""
    models = jax.tree.map(lambda x: x, self)  # a new module around the same arrays
    for name, network in networks.items():
      setattr(models, name, network)
    return models

  def encode_low_resolution(self, pixels: Array) -> Array:
    """LR latents of one block of pixels [B, T, H, W, 3] -> [B, f, h', w', C]."""
    pooled = compressor_lib.pool_pixels(pixels, self.spec.video, self.spec.compressor)
    return compressor_lib.crop_to_patches(self.vae.encode(pooled), self.spec.mid_grid,
                                          self.spec.video.patch)

  def compress(self, latents: Array, lr_latents: Array) -> tuple[Array, Any]:
    """A clean block's compressed tokens [B, M, D] and their positions [M, 3] inside the block.

    Args:
      latents: [B, F, h, w, C].
      lr_latents: from `encode_low_resolution`.
    """
    tokens = self.compressor(latents, self.transformer.patch_embedding(lr_latents))
    return tokens, self.spec.compressed_positions


class Models(VideoModels):
  """All networks of one model: those of `VideoModels` and the text encoder."""

  def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
    """Draws fresh parameters."""
    vae = WanVae(spec.vae, rngs=rngs)
    self.text = UMT5Encoder(spec.text, rngs=rngs)
    transformer = CausalTransformer(spec.transformer, rngs=rngs)
    super().__init__(spec, vae, transformer, Compressor(spec.compressor, rngs=rngs))

  def text_keys_values(self, ids: Array, mask: Array) -> KeyValues:
    """Cross-attention keys/values [L, B, rows, N, H] of token ids [B, rows]; for training."""
    return self.transformer.text_keys_values(self.text(ids, mask))

  def without_text(self) -> VideoModels:
    """The networks that sampling needs once its prompts are encoded."""
    return VideoModels(self.spec, self.vae, self.transformer, self.compressor)


@functools.lru_cache(maxsize=16)
def _traced(spec: ModelSpec) -> Models:
  return jax.eval_shape(lambda: Models(spec, rngs=nnx.Rngs(0)))


def shapes(spec: ModelSpec) -> Models:
  """The networks as shapes. Tracing takes half a second or more, so each size is traced once."""
  return jax.tree.map(lambda x: x, _traced(spec))  # a module of the caller's own


def init(spec: ModelSpec, seed: int = 0) -> Models:
  """Freshly initialised networks, one compiled program for all of them."""
  return init_module(lambda rngs: Models(spec, rngs=rngs), seed)
