import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pf_jax.kernels.attention import Blocks, Segment, attend, combine, cudnn, reference

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


HALVES = {
    'two segments': lambda: ([segment(1, 2, 5)], [segment(3, 2, 3)]),
    'holes': lambda: ([segment(1, 2, 5, HOLES), segment(3, 2, 3)], [segment(5, 2, 2)]),
    'shared': lambda: ([segment(1, 1, 5, HOLES[:1])], [segment(3, 2, 3)]),
}


@pytest.mark.parametrize(('backend', 'parts_of_queries'), [
    (reference, False), (reference, True), (cudnn, False)])
@pytest.mark.parametrize('case', HALVES)
def test_halves_are_combined_to_the_whole(case, backend, parts_of_queries, without_the_card,
                                          monkeypatch):
  """Values and gradients, also of the log-sum-exp itself."""
  q, halves = draw(0, 2, 7), HALVES[case]()

  def loss(function):
    def of(q, halves):
      out, lse = function(q, halves)
      return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)), (out, lse)
    return of

  def whole(q, halves):
    return reference.attend(q, [*halves[0], *halves[1]], return_lse=True)

  def combined(q, halves):
    return combine([backend.attend(q, half, return_lse=True) for half in halves])

  wanted = jax.grad(loss(whole), (0, 1), has_aux=True, allow_int=True)(q, halves)
  if parts_of_queries:
    monkeypatch.setattr(reference, 'LOGITS_BYTES', 300)
  got = jax.grad(loss(combined), (0, 1), has_aux=True, allow_int=True)(q, halves)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    if a.dtype == jnp.float32:
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_log_sum_exp_by_hand():
  """Two keys with logits 3 and 5 of one query; a scale of a half."""
  q, k = jnp.array([[[[2.0, 0, 0, 0]]]]), jnp.array([[[[3.0, 0, 0, 0]], [[5.0, 0, 0, 0]]]])
  _, lse = attend(q, [Segment(k, k)], return_lse=True)
  assert lse.shape == (1, 1, 1)
  np.testing.assert_allclose(lse, np.log(np.exp(3) + np.exp(5)), rtol=1e-6)


def test_a_part_without_tokens_adds_nothing():
  q, own = draw(0, 2, 4), segment(3, 2, 3)
  nothing = segment(1, 2, 5, np.zeros((2, 5)))
  parts = [attend(q, [part], return_lse=True) for part in (nothing, own)]
  assert float(jnp.abs(parts[0][0]).max()) == 0.0
  for got, wanted in zip(combine(parts), parts[1], strict=True):
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize('case', CASES)
def test_queries_in_parts_give_the_same(case, monkeypatch):
  """Seven queries, three at a time; values and gradients."""
  q, segments = draw(0, 2, 7), CASES[case]()
  segments = [segment for segment in segments if segment.k.shape[1]]
  keys = sum(segment.k.shape[1] for segment in segments)

  def loss(q, segments):
    return jnp.sum(jnp.sin(reference.attend(q, segments)))

  wanted = reference.attend(q, segments), *jax.grad(loss, (0, 1), allow_int=True)(q, segments)
  monkeypatch.setattr(reference, 'LOGITS_BYTES', 4 * 2 * HEADS * keys * 3)
  got = reference.attend(q, segments), *jax.grad(loss, (0, 1), allow_int=True)(q, segments)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    if a.dtype == jnp.float32:
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_parts_do_not_add_up_gradients_in_half_precision(monkeypatch):
  """1024 queries in 128 parts: gradients of keys and values are as good as in one."""
  q, k, v = (draw(seed, 1, tokens, jnp.bfloat16) for seed, tokens in ((0, 1024), (1, 16), (2, 16)))

  def gradients(dtype):
    def loss(k, v):
      out = reference.attend(q.astype(dtype), [Segment(k, v)])
      return jnp.sum(jnp.square(out.astype(jnp.float32)))

    return [np.asarray(x, np.float32) for x in jax.grad(loss, (0, 1))(*(x.astype(dtype)
                                                                       for x in (k, v)))]

  exact = gradients(jnp.float32)
  at_once = gradients(jnp.bfloat16)
  monkeypatch.setattr(reference, 'LOGITS_BYTES', 4 * HEADS * 16 * 8)
  for parts, once, wanted in zip(gradients(jnp.bfloat16), at_once, exact, strict=True):
    assert np.linalg.norm(parts - wanted) < 1.3 * np.linalg.norm(once - wanted)


def test_parts_keep_the_logits_out_of_memory(monkeypatch):
  """512 queries of two heads over 1024 keys: 4.2 MB of logits at once, in parts an eighth."""
  q, k = jnp.zeros((1, 512, HEADS, SIZE)), jnp.zeros((1, 1024, HEADS, SIZE))
  logits = 4 * HEADS * 512 * 1024

  def scratch():
    compiled = jax.jit(lambda q, k: reference.attend(q, [Segment(k, k)])).lower(q, k).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert scratch() >= logits
  monkeypatch.setattr(reference, 'LOGITS_BYTES', logits // 8)
  assert scratch() < logits / 2


def test_chosen_for_cards_in_half_precision_only(monkeypatch):
  calls = []
  for name in ('reference', 'cudnn'):
    monkeypatch.setattr(attend.__globals__['BACKENDS'][name], 'attend',
                        lambda q, segments, name=name, **options: calls.append(name))
  card = AbstractMesh((1,), ('x',), (AxisType.Auto,), abstract_device=AbstractDevice(
      device_kind='some card', num_cores=1, platform='cuda'))
  half = draw(0, 1, 4, jnp.bfloat16)
  attend(half, [Segment(half, half)])
  with use_abstract_mesh(card):
    attend(half, [Segment(half, half)])
    attend(half.astype(jnp.float32), [Segment(half, half)])
    attend(half[..., :6], [Segment(half[..., :6], half[..., :6])])
    blocks = Blocks(half[:, None], half[:, None], jnp.zeros((1, 1)), jnp.ones((1, 1), bool))
    attend(half, [blocks, blocks, Segment(half, half)])
    valid = jnp.ones((1, 4), bool)
    attend(half, [Segment(half, half, valid), Segment(half, half, valid)])
    attend(half, [Segment(half, half)], return_lse=True)  # cuDNN's is rounded
  assert calls == ['reference', 'cudnn', 'reference', 'reference', 'cudnn', 'reference',
                   'reference']


def test_refuses_blocks_that_contradict_themselves():
  q = draw(0, 2, 4)
  blocks = Blocks(q[:, None], q[:, None], jnp.zeros((1, 1)), jnp.ones((1, 1), bool))
  for change, message in (
      (dict(shift=jnp.zeros((1, 2))), r'has shift of shape \[1, 2\], wanted \[1 or 2, 1\]'),
      (dict(chosen=jnp.zeros((3, 1), int)), r'has chosen of shape \[3, 1\], wanted \[1 or 2, 1\]'),
      (dict(k=jnp.zeros((2, 3, 4, 2, 8)), v=jnp.zeros((2, 3, 4, 2, 8))),
       'attends 1 blocks of 3 without saying which')):
    with pytest.raises(ValueError, match=message):
      attend(q, [blocks._replace(**change)])
  for nothing in ([], [Segment(q[:, :0], q[:, :0])]):
    with pytest.raises(ValueError, match='there is nothing to attend'):
      attend(q, nothing)


def test_refuses_what_cudnn_cannot_do():
  q = draw(0, 1, 4)
  with pytest.raises(ValueError, match=r'cudnn takes bfloat16 .* got queries float32\[1, 4, 2'):
    attend(q, [Segment(q, q)], implementation='cudnn')
  with pytest.raises(ValueError, match="implementation='flash' is unknown"):
    attend(q, [Segment(q, q)], implementation='flash')
