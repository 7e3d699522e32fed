"""Operations and bytes of a piece of work, by formula from its shapes, and as its program has them.

An operation is an addition or a multiplication of a product; elementwise work is left out, as in
`pf_jax.train.flops`, which counts the traced program. Bytes are the least that has to move: every
operand, weight and result once.

With queries T, keys S, width D, hidden width E, text rows R, a layer of the transformer is

  T (8 D^2 + 4 S D)    self-attention: q, k, v, o and the two products over the keys
  T (4 D^2 + 4 R D)    cross-attention: q, o; the text's keys/values are computed once a prompt
  T 4 D E              feed-forward
"""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pf_jax.cache import CacheSpec
from pf_jax.kernels import conv3d
from pf_jax.models.bundle import ModelSpec, VideoModels
from pf_jax.models.transformer import TransformerSpec
from pf_jax.train import flops
from pf_jax.types import PyTree, tree_bytes

# What kernels of another backend do is not to be seen in their trace; those of a CPU hide nothing.
_CPU = AbstractMesh((1,), ('device',), (AxisType.Auto,), abstract_device=AbstractDevice(
    device_kind='cpu', num_cores=None, platform='cpu'))


def traced(function: Callable, *inputs: PyTree) -> int:
  """Operations of a function as it is traced for a CPU; nothing is computed.

  Args:
    function: anything that JAX can trace.
    *inputs: arrays or shapes.
  """
  with use_abstract_mesh(_CPU):
    return flops.count(function, *jax.tree.map(_shape, inputs))


def _shape(leaf) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype)


def moved(function: Callable, *inputs: PyTree) -> int:
  """Bytes of all arguments and results."""
  shapes = jax.tree.map(_shape, inputs)
  return tree_bytes(shapes) + tree_bytes(jax.eval_shape(function, *shapes))


def dense(rows: int, fan_in: int, fan_out: int) -> int:
  """Of a linear layer."""
  return 2 * rows * fan_in * fan_out


def attention(queries: int, keys: int, width: int) -> int:
  """Of the two products; `width` is that of all heads together."""
  return 4 * queries * keys * width


def layer(dit: TransformerSpec, tokens: int, keys: int, text_rows: int) -> int:
  """Of one layer for `tokens` that attend `keys`, themselves included."""
  products = 12 * tokens * dit.width**2 + 2 * dense(tokens, dit.width, dit.ffn_width)
  return products + attention(tokens, keys + text_rows, dit.width)


def _time(dit: TransformerSpec, frames: int) -> int:
  return (dense(frames, dit.time_width, dit.width) + dense(frames, dit.width, dit.width)
          + dense(frames, dit.width, 6 * dit.width))


def transformer_pass(model: ModelSpec, cache: CacheSpec, *, clean: bool = False) -> int:
  """Of one pass over a block in the steady state.

  Args:
    model: sizes.
    cache: sizes.
    clean: the pass that remembers the block: with its compressed version beside it, and without
      the head, whose flow nobody needs.
  """
  dit, rows = model.transformer, model.text.max_tokens
  tokens, compressed, context = cache.block_tokens, cache.mid_tokens, cache.context_tokens
  total = dense(tokens, dit.patch_volume * dit.in_channels, dit.width)
  total += _time(dit, model.video.frames_per_block)
  total += dit.num_layers * layer(dit, tokens, context + tokens, rows)
  if not clean:
    return total + dense(tokens, dit.width, dit.patch_volume * dit.out_channels)
  total += dit.num_layers * layer(dit, compressed, context + compressed, rows)
  return total + _time(dit, 1)


def selection(cache: CacheSpec) -> int:
  """Of scoring the archive in all layers."""
  if cache.selection != 'top_k' or not cache.top_k:
    return 0
  heads = cache.score_heads or cache.num_heads
  return cache.num_layers * 2 * cache.mid_capacity * heads * cache.head_dim


def denoise(model: ModelSpec, cache: CacheSpec, passes: int) -> int:
  """Of denoising a block."""
  return passes * transformer_pass(model, cache) + selection(cache)


class Convolution(NamedTuple):
  """Shapes of a convolution over time and space: [B, T, H, W, C] and [kt, kh, kw, C, O]."""

  x: tuple[int, ...]
  kernel: tuple[int, ...]
  strides: tuple[int, int, int] = (1, 1, 1)


def hr_convolutions(models: VideoModels) -> list[Convolution]:
  """The compressor's, in order; each pads 1 all around."""
  video, found = models.spec.video, []
  size = [video.frames_per_block, video.latent_height, video.latent_width]
  for conv in models.compressor.hr.convs:
    kernel, strides = conv.kernel.shape, cast(tuple[int, int, int], conv.strides)
    found.append(Convolution((1, *size, kernel[3]), kernel, strides))
    size = list(conv3d.output_size(size, kernel[:3], strides, [(1, 1)] * 3))
  return found


def compress(models: VideoModels) -> int:
  """Of both branches of the compressor, without the VAE's encoder."""
  dit, tokens = models.spec.transformer, math.prod(models.spec.mid_grid)
  convolutions = hr_convolutions(models)
  hr = sum(conv3d.operations(*each, [(1, 1)] * 3) for each in convolutions)
  return (hr + dense(tokens, convolutions[-1].kernel[4], dit.width)
          + dense(tokens, dit.patch_volume * dit.in_channels, dit.width))
