import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pf_jax.kernels.attention import Segment, attend, cudnn, reference

HEADS, SIZE = 2, 8


def draw(seed, batch, tokens, dtype=jnp.float32):
  shape = batch, tokens, HEADS, SIZE
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def segment(seed, batch, tokens, valid=None, order=None):
  k, v = draw(seed, batch, tokens), draw(seed + 1, batch, tokens)
  if valid is not None:
    valid = jnp.asarray(valid, bool)
    # Loud where nothing should be heard.
    k, v = (jnp.where(valid[..., None, None], x, 50.0) for x in (k, v))
  return Segment(k, v, valid, order)


@pytest.fixture
def without_the_card(monkeypatch):
  """cuDNN's call, answered by XLA: what is tested is the row it is handed."""
  monkeypatch.setattr(jax.nn, 'dot_product_attention', functools.partial(
      lambda original, *args, implementation, **kwargs: original(*args, **kwargs),
      jax.nn.dot_product_attention))


HOLES = [[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]
CASES = {
    'one segment': lambda: [segment(1, 2, 5)],
    'two segments': lambda: [segment(1, 2, 5), segment(3, 2, 3)],
    'holes': lambda: [segment(1, 2, 5, HOLES), segment(3, 2, 3)],
    'holes in a known order': lambda: [
        segment(1, 2, 5, HOLES, jnp.array([[0, 2, 3, 4, 4], [2, 2, 2, 2, 2]])), segment(3, 2, 3)],
    'nothing but the second': lambda: [segment(1, 2, 5, np.zeros((2, 5))), segment(3, 2, 3)],
    'an empty segment': lambda: [segment(1, 2, 0), segment(3, 2, 3)],
    'shared': lambda: [segment(1, 1, 5, HOLES[:1]), segment(3, 2, 3)],
}


@pytest.mark.parametrize('case', CASES)
def test_the_row_for_cudnn_means_the_same(case, without_the_card):
  q, segments = draw(0, 2, 4), CASES[case]()
  np.testing.assert_allclose(cudnn.attend(q, segments), reference.attend(q, segments), rtol=1e-5,
                             atol=1e-6)


def test_chosen_for_cards_in_half_precision_only(monkeypatch):
  calls = []
  for name in ('reference', 'cudnn'):
    monkeypatch.setitem(attend.__globals__['IMPLEMENTATIONS'], name,
                        lambda q, segments, name=name: calls.append(name))
  card = AbstractMesh((1,), ('x',), (AxisType.Auto,), abstract_device=AbstractDevice(
      device_kind='some card', num_cores=1, platform='cuda'))
  half = draw(0, 1, 4, jnp.bfloat16)
  attend(half, [Segment(half, half)])
  with use_abstract_mesh(card):
    attend(half, [Segment(half, half)])
    attend(half.astype(jnp.float32), [Segment(half, half)])
    attend(half[..., :6], [Segment(half[..., :6], half[..., :6])])
    valid = jnp.ones((1, 4), bool)
    attend(half, [Segment(half, half, valid), Segment(half, half, valid)])
  assert calls == ['reference', 'cudnn', 'reference', 'reference', 'reference']


def test_refuses_what_cudnn_cannot_do():
  q = draw(0, 1, 4)
  with pytest.raises(ValueError, match=r'cudnn takes bfloat16 .* got queries float32\[1, 4, 2'):
    attend(q, [Segment(q, q)], implementation='cudnn')
  with pytest.raises(ValueError, match="implementation='flash' is unknown"):
    attend(q, [Segment(q, q)], implementation='flash')
