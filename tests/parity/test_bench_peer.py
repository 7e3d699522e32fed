"""The PyTorch layer that benchmarks compare with does the same work: it gives the same numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pf_jax.bench import block, torch_peer
from pf_jax.bench.subject import Subject, draw, random_weights
from pf_jax.pipeline import rollout_spec
from pf_jax.testing import tiny_model_spec
from pf_jax.types import DTypes


def make(dtype):
  model = tiny_model_spec()
  model = dataclasses.replace(model, transformer=dataclasses.replace(
      model.transformer, dtypes=DTypes(dtype, dtype, dtype)))
  rows = draw(jax.ShapeDtypeStruct((1, 6, 12), jnp.float32))
  spec = rollout_spec(model, {'cache': {'sink_blocks': 1, 'top_k': 1, 'mid_capacity': 2}})
  return Subject(random_weights(model), spec, rows, 'random')


@pytest.mark.parametrize(('dtype', 'gate'), [('float32', 2e-5), ('bfloat16', 3e-2)])
def test_layers_agree(dtype, gate):
  subject = make(dtype)
  layer, inputs = block.first_layer(subject.models), block.layer_inputs(subject)
  ours = np.asarray(jax.jit(block.layer_pass)(layer, inputs))
  peer = torch_peer.layer(layer, inputs, subject.models.spec.transformer)
  theirs = peer.run()
  peer.wait(theirs)
  assert np.abs(ours - theirs.numpy()).max() < gate * np.abs(ours).max()


def test_attention_has_the_shapes_asked_for():
  call = torch_peer.attention((1, 5, 2, 8), (1, 7, 2, 8), 'bfloat16')
  result = call.run()
  assert result.shape == (1, 2, 5, 8)
  assert result.dtype == torch.bfloat16
  assert result.is_inference()
