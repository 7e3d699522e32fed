"""Released tensors against our modules: every name, every shape, both ways, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pf_jax.models.text import TextSpec, UMT5Encoder
from pf_jax.models.transformer import TransformerSpec
from pf_jax.models.vae import VaeSpec
from pf_jax.types import DTypes
from pf_jax.weights import networks
from pf_jax.weights.networks import from_released, to_released
from pf_jax.weights.tensors import WeightsError
from tests.weights import released

TEXT = TextSpec(vocab_size=20, width=8, num_layers=2, num_heads=2, head_dim=4, ffn_width=12,
                num_buckets=8, max_distance=16)
# spec, what was released, its tensors and parameters
RELEASED = {
    '1.3B': (TransformerSpec.wan_1_3b(), lambda: released.transformer(1536, 8960, 30), 825,
             1_418_996_800),
    '14B': (TransformerSpec.wan_14b(), lambda: released.transformer(5120, 13824, 40), 1095,
            14_288_491_584),
    'UMT5-XXL': (TextSpec.umt5_xxl(), released.text, 242, 5_680_910_336),
    'VAE': (VaeSpec.wan21(), released.vae, 194, 126_892_531),
}


@pytest.mark.parametrize('name', RELEASED)
def test_every_released_tensor_has_its_parameter(name):
  spec, tensors, count, parameters = RELEASED[name]
  target, wanted = networks.network(spec), list(tensors())
  assert len(wanted) == count
  assert {t.wan: t.shape for t in wanted} == {p.name: p.shape for p in target.pieces()}
  assert {t.wan: t.diffusers for t in wanted} == {
      p.name: target.diffusers(p.name) for p in target.pieces()}
  assert target.parameters == parameters == sum(int(np.prod(t.shape)) for t in wanted)


def _encoder() -> UMT5Encoder:
  return UMT5Encoder(TEXT, rngs=nnx.Rngs(0))


def test_stacked_layers_come_from_one_tensor_each_and_kernels_are_transposed():
  encoder = _encoder()
  tensors = to_released(encoder)
  kernel = np.asarray(encoder.layers.ffn.gate.kernel)  # [L, in, out]
  assert kernel.shape == (2, 8, 12)
  np.testing.assert_array_equal(tensors['blocks.1.ffn.gate.0.weight'], kernel[1].T)
  jax.tree.map(np.testing.assert_array_equal, from_released(tensors, TEXT), encoder)


def test_all_mismatches_are_named_at_once():
  tensors = to_released(_encoder())
  del tensors['blocks.1.norm2.weight'], tensors['norm.weight']
  tensors |= {'surplus': np.zeros(1), 'blocks.0.norm1.weight': np.zeros(9),
              'blocks.0.attn.q.weight': np.zeros((8, 8), np.int32)}
  with pytest.raises(WeightsError) as error:
    from_released(tensors, TEXT)
  text = str(error.value)
  assert '2 missing, 1 unexpected, 1 wrongly shaped, 1 wrongly typed' in text
  for line in ('missing: blocks.1.norm2.weight', 'missing: norm.weight', 'unexpected: surplus',
               'shape: blocks.0.norm1.weight is (9,), wanted (8,)',
               'dtype: blocks.0.attn.q.weight is int32, wanted floating point'):
    assert line in text


def test_precision_is_the_spec_s_and_norms_stay_float32():
  tensors = to_released(_encoder())
  module = from_released(tensors, dataclasses.replace(TEXT, dtypes=DTypes(params='bfloat16')))
  assert module.layers.attn.q.kernel.dtype == module.token_embedding.dtype == jnp.bfloat16
  assert module.layers.norm1.scale.dtype == module.norm.scale.dtype == jnp.float32


def test_transformer_keeps_time_head_and_norms_in_float32():
  spec = dataclasses.replace(TransformerSpec(), dtypes=DTypes('bfloat16', 'bfloat16', 'bfloat16'))
  kept = {path.rpartition('.')[0] for path, leaf in networks.network(spec).leaves.items()
          if leaf.dtype == jnp.float32 and 'layers' not in path}
  assert kept == {'time_in', 'time_out', 'time_projection', 'head', ''}  # '': head_modulation
  kept = {path.removeprefix('layers.') for path, leaf in networks.network(spec).leaves.items()
          if leaf.dtype == jnp.float32 and 'layers' in path}
  assert kept == {'modulation', 'norm3.scale', 'norm3.bias', 'self_attn.norm_q.scale',
                  'self_attn.norm_k.scale', 'cross_attn.norm_q.scale', 'cross_attn.norm_k.scale'}
