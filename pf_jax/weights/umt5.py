"""Wan2.1's text checkpoint (`models_t5_umt5-xxl-enc-bf16.pth`) <-> `UMT5Encoder`."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from pf_jax.models.text import TextSpec, UMT5Encoder
from pf_jax.types import DTypes
from pf_jax.weights.rules import Rule, read_module, transposed, write_module

RULES = {
    'token_embedding': Rule('token_embedding.weight'),
    'layers.norm1.scale': Rule('blocks.{}.norm1.weight'),
    'layers.attn.q.kernel': transposed('blocks.{}.attn.q.weight'),
    'layers.attn.k.kernel': transposed('blocks.{}.attn.k.weight'),
    'layers.attn.v.kernel': transposed('blocks.{}.attn.v.weight'),
    'layers.attn.o.kernel': transposed('blocks.{}.attn.o.weight'),
    'layers.attn.position_bias': Rule('blocks.{}.pos_embedding.embedding.weight'),
    'layers.norm2.scale': Rule('blocks.{}.norm2.weight'),
    'layers.ffn.gate.kernel': transposed('blocks.{}.ffn.gate.0.weight'),
    'layers.ffn.fc1.kernel': transposed('blocks.{}.ffn.fc1.weight'),
    'layers.ffn.fc2.kernel': transposed('blocks.{}.ffn.fc2.weight'),
    'norm.scale': Rule('norm.weight'),
}


def umt5_from_wan(tensors: Mapping[str, np.ndarray], spec: TextSpec, *,
                  dtypes: DTypes | None = None) -> UMT5Encoder:
  """Builds an encoder from a checkpoint's tensors.

  Args:
    tensors: the flat dict, under Wan2.1's original names.
    spec: sizes; they must be the checkpoint's.
    dtypes: how to store and compute.

  Returns:
    The encoder.

  Raises:
    ValueError: tensors are missing, left over or of another shape.
  """
  shapes = jax.eval_shape(lambda: UMT5Encoder(spec, rngs=nnx.Rngs(0), dtypes=dtypes))
  return read_module(tensors, shapes, RULES, spec.num_layers)


def umt5_to_wan(encoder: UMT5Encoder) -> dict[str, np.ndarray]:
  """The inverse of `umt5_from_wan`: every parameter under its original name."""
  return write_module(encoder, RULES, encoder.spec.num_layers)
