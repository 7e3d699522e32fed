"""Wan2.1's transformer checkpoint (`diffusion_pytorch_model*.safetensors`) <-> `CausalTransformer`.

Self-Forcing's checkpoints hold the same tensors under a prefix.
"""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from pf_jax.models.transformer import CausalTransformer, TransformerSpec
from pf_jax.weights.rules import Rule, linear, read_module, without_batch, write_module


def rules(spec: TransformerSpec) -> dict[str, Rule]:
  """The table of a transformer; the patch embedding's layout depends on the sizes."""
  layer = {'layers.modulation': without_batch('blocks.{}.modulation'),
           'layers.norm3.scale': Rule('blocks.{}.norm3.weight'),
           'layers.norm3.bias': Rule('blocks.{}.norm3.bias')}
  for attention in ('self_attn', 'cross_attn'):
    for part in 'qkvo':
      layer |= linear(f'layers.{attention}.{part}', f'blocks.{{}}.{attention}.{part}')
    for norm in ('norm_q', 'norm_k'):
      layer[f'layers.{attention}.{norm}.scale'] = Rule(f'blocks.{{}}.{attention}.{norm}.weight')
  return {
      'patch_embedding.proj.kernel': _patch_kernel(spec),
      'patch_embedding.proj.bias': Rule('patch_embedding.bias'),
      **linear('text_in', 'text_embedding.0'),
      **linear('text_out', 'text_embedding.2'),
      **linear('time_in', 'time_embedding.0'),
      **linear('time_out', 'time_embedding.2'),
      **linear('time_projection', 'time_projection.1'),
      **layer,
      **linear('layers.ffn_in', 'blocks.{}.ffn.0'),
      **linear('layers.ffn_out', 'blocks.{}.ffn.2'),
      'head_modulation': without_batch('head.modulation'),
      **linear('head', 'head.head'),
  }


def _patch_kernel(spec: TransformerSpec) -> Rule:
  """Released [D, C, p, q, r]; ours is [p*q*r*C, D]: the channel moves from slowest to fastest."""
  sizes = (*spec.patch, spec.in_channels, spec.width)
  return Rule('patch_embedding.weight',
              lambda kernel: kernel.transpose(2, 3, 4, 1, 0).reshape(-1, spec.width),
              lambda kernel: kernel.reshape(sizes).transpose(4, 3, 0, 1, 2))


def dit_from_wan(tensors: Mapping[str, np.ndarray], spec: TransformerSpec) -> CausalTransformer:
  """Builds a transformer from a checkpoint's tensors.

  Args:
    tensors: the flat dict, under Wan2.1's original names.
    spec: sizes; they must be the checkpoint's.

  Returns:
    The transformer.

  Raises:
    ValueError: tensors are missing, left over or of another shape.
  """
  shapes = jax.eval_shape(lambda: CausalTransformer(spec, rngs=nnx.Rngs(0)))
  return read_module(tensors, shapes, rules(spec), spec.num_layers)


def dit_to_wan(transformer: CausalTransformer) -> dict[str, np.ndarray]:
  """The inverse of `dit_from_wan`: every parameter under its original name."""
  spec = transformer.spec
  return write_module(transformer, rules(spec), spec.num_layers)
