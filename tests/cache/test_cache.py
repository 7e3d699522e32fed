"""The cache against a slow model of it, and on literal small arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pf_jax import cache as cache_lib
from pf_jax.cache import CacheSpec
from pf_jax.kernels.context import assemble
from pf_jax.kernels.quantization import dequantize, quantize
from pf_jax.types import KeyValues
from tests.cache.slow_model import Remembered, SlowCache

LAYERS, HEADS, SIZE = 2, 1, 6
GRID, MID_GRID = (2, 1, 2), (1, 1, 1)


def spec_of(**choices) -> CacheSpec:
  return CacheSpec(num_layers=LAYERS, num_heads=HEADS, head_dim=SIZE, grid=GRID,
                   mid_grid=MID_GRID, **choices)


def constant(value: float, tokens: int, key) -> KeyValues:
  """Values that name their block, and random keys."""
  shape = (LAYERS, 1, tokens, HEADS, SIZE)
  return KeyValues(jax.random.normal(key, shape), jnp.full(shape, value))


@functools.lru_cache(maxsize=64)
def compiled(spec: CacheSpec):
  """(cache, q, block, compressed) -> (next cache, selected [L, K], context values, valid)."""

  @jax.jit
  def step(cache, q, block, compressed):
    layout = cache_lib.layout(cache.blocks, spec)

    def one_layer(layer):
      chosen = cache_lib.select(layer, q, cache.blocks, spec=spec)
      parts = cache_lib.context(layer, chosen, cache.blocks, layout, spec=spec)
      return chosen, assemble(parts)

    selected, context = jax.lax.map(one_layer, cache.layers)
    after = cache_lib.commit(cache, block, compressed, spec=spec)
    return after, selected[:, 0], context, layout

  return step


def starts(layout, selected, spec) -> list[int]:
  """Start positions of the valid slots of one layer, in order, and of the current block."""
  mid = layout.mid if spec.positions == 'packed' else selected[None] * spec.frames_per_block
  valid_mid = np.asarray(layout.mid_valid)[0] & (selected >= 0)
  rows = (list(np.asarray(layout.sink)[0][np.asarray(layout.sink_valid)[0]])
          + list(np.asarray(mid)[0][valid_mid])
          + list(np.asarray(layout.recent)[0][np.asarray(layout.recent_valid)[0]]))
  return [*map(int, rows), int(layout.current[0])]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(sink=st.integers(0, 3), recent=st.integers(1, 3), capacity=st.integers(0, 5),
       k=st.integers(0, 5), blocks=st.integers(1, 16), stride=st.sampled_from([None, 1]),
       selection=st.sampled_from(['top_k', 'fifo']), seed=st.integers(0, 99),
       positions=st.sampled_from(['packed', 'absolute']),
       storage=st.sampled_from(['full', 'int8']))
def test_like_the_slow_model(sink, recent, capacity, k, blocks, stride, selection, seed, positions,
                             storage):
  spec = spec_of(sink_blocks=sink, recent_blocks=recent, mid_capacity=capacity,
                 top_k=min(k, capacity), selection=selection, mid_position_stride=stride,
                 positions=positions, storage=storage)
  cache, step = cache_lib.init(spec, 1), compiled(spec)
  slow = [SlowCache(spec) for _ in range(LAYERS)]
  for number in range(blocks):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), 3)
    q = jax.random.normal(keys[0], (1, spec.block_tokens, HEADS, SIZE))
    block = constant(number, spec.block_tokens, keys[1])
    compressed = constant(number + 0.5, spec.mid_tokens, keys[2])
    cache, selected, context, layout = step(cache, q, block, compressed)
    for layer in range(LAYERS):
      chosen = slow[layer].select(np.asarray(q[0].sum(0)))
      assert [int(b) for b in selected[layer] if b >= 0] == chosen
      rows = slow[layer].attended(chosen)
      assert starts(layout, np.asarray(selected[layer]), spec) == [at for _, at in rows]
      seen = np.asarray(context.v)[layer, 0][np.asarray(context.valid)[layer, 0], 0, 0]
      valid = np.flatnonzero(np.asarray(context.valid)[layer, 0])
      np.testing.assert_array_equal(context.order[layer, 0, :len(valid)], valid)
      archived = {b.number for b in slow[layer].archive}
      wanted = [np.repeat(n + (0.5 if n in archived else 0.0),
                          spec.mid_tokens if n in archived else spec.block_tokens)
                for n, _ in rows[:-1]]
      # One number many times is exact in 8 bits, but for the last digit of its scale.
      np.testing.assert_allclose(seen, np.concatenate([*wanted, []]), rtol=1e-6)
      stored = compressed.k if storage == 'full' else dequantize(quantize(compressed.k, storage),
                                                                 'float32')
      sums = np.asarray(stored)[layer, 0].sum(0)
      slow[layer].commit(Remembered(number, number, sums))
  assert int(cache.blocks) == blocks


def test_archive_slots_by_hand():
  spec = spec_of(sink_blocks=1, recent_blocks=1, mid_capacity=3, top_k=1)
  ids = [cache_lib.archive_ids(jnp.int32(n), spec).tolist() for n in range(8)]
  assert ids == [[-1, -1, -1], [-1, -1, -1], [-1, -1, -1], [1, -1, -1], [1, 2, -1], [1, 2, 3],
                 [4, 2, 3], [4, 5, 3]]


def test_packed_positions_at_full_scale():
  spec = CacheSpec(num_layers=30, num_heads=12, head_dim=128, grid=(4, 30, 52), mid_grid=(2, 7, 13))
  layout = cache_lib.layout(jnp.int32(119), spec)
  assert layout.sink.tolist() == [[0, 4]]
  assert layout.mid.tolist() == [list(range(8, 72, 4))]
  assert layout.recent.tolist() == [[72]]
  assert layout.current.tolist() == [76]
  assert spec.largest_position == 79
  assert spec.attention_tokens == 27_872
  assert spec.steady_block == 19


@pytest.mark.parametrize('storage', ['full', 'int8', 'float8_e4m3fn'])
def test_bytes_are_what_the_spec_predicts(storage):
  spec = spec_of(sink_blocks=2, recent_blocks=3, mid_capacity=5, top_k=2, storage=storage)
  layers = cache_lib.init(spec, 2).layers
  got = {name: sum(x.nbytes for x in jax.tree.leaves(getattr(layers, name)))
         for name in ('sink', 'archive', 'key_sums', 'pending', 'recent')}
  assert got == spec.partition_bytes(2)


def test_two_minutes_of_the_1_3b_in_8_bits_take_less_than_4_gb():
  spec = CacheSpec(num_layers=30, num_heads=12, head_dim=128, grid=(4, 30, 52), mid_grid=(2, 7, 13),
                   dtype='bfloat16')
  sizes = {name: sum(dataclasses.replace(spec, storage=name).partition_bytes().values())
           for name in ('full', 'int8', 'float8_e4m3fn')}
  assert sizes == {'full': 7_801_528_320, 'int8': 3_912_940_800, 'float8_e4m3fn': 3_912_940_800}


def test_winners_that_are_not_the_newest():
  """Keys of block b point along axis b: the query asks for blocks 1 and 3 of six archived ones."""
  spec = spec_of(sink_blocks=0, recent_blocks=1, mid_capacity=6, top_k=2,
                 score_keys='rope_no_slot_phase')
  sums = jnp.eye(6)[None, :, None]
  q = jnp.zeros((1, spec.block_tokens, 1, 6)).at[:, :, 0, 3].set(2.0).at[:, :, 0, 1].set(1.0)
  layer = dataclasses.replace(jax.tree.map(lambda x: x[0], cache_lib.init(spec, 1).layers),
                              key_sums=sums)
  assert cache_lib.select(layer, q, jnp.int32(7), spec=spec).tolist() == [[1, 3]]
  fifo = dataclasses.replace(spec, selection='fifo')
  assert cache_lib.select(layer, q, jnp.int32(7), spec=fifo).tolist() == [[4, 5]]


@pytest.mark.parametrize('score_keys', ['pre_rope', 'rope_no_slot_phase', 'absolute'])
def test_scores_equal_the_double_sum(score_keys):
  """Scoring through key-sums against summing q.k over every pair of tokens."""
  from pf_jax.kernels import rope
  spec = CacheSpec(num_layers=1, num_heads=2, head_dim=12, grid=(2, 2, 3), mid_grid=(1, 1, 2),
                   sink_blocks=0, mid_capacity=3, top_k=1, score_keys=score_keys)
  rng = np.random.default_rng(0)
  q0 = rng.standard_normal((1, 12, 2, 12)).astype(np.float32)
  k0 = rng.standard_normal((3, 2, 2, 12)).astype(np.float32)
  q_positions = rope.block_positions(spec.grid)
  k_positions = rope.compressed_positions(spec.grid, spec.mid_grid)
  q = rope.rotate(jnp.asarray(q0), rope.rope_table(q_positions, 12))
  k = rope.rotate(jnp.asarray(k0), rope.rope_table(k_positions, 12))
  sums = cache_lib.key_sum(k, spec)[None]
  got = cache_lib.scores(sums, q, jnp.int32(4), spec)[0]
  wanted = []
  for block in range(3):
    if score_keys == 'pre_rope':
      a, b = q0[0], k0[block]
    elif score_keys == 'absolute':
      shift = np.array([4 * 2 - block * 2, 0, 0])
      a = np.asarray(rope.rotate(jnp.asarray(q0), rope.rope_table(q_positions + shift, 12)))[0]
      b = np.asarray(k[block])
    else:
      a, b = np.asarray(q[0]), np.asarray(k[block])
    wanted.append(np.einsum('inh,jnh->', a, b) / (2 * 12 ** 0.5))
  np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=1e-4)


def test_commit_lives_in_a_scan_and_leaves_its_input_alone():
  spec = spec_of(sink_blocks=1, mid_capacity=2, top_k=1)
  before = cache_lib.init(spec, 1)
  blocks = jnp.arange(6.0)

  def body(cache, value):
    key = jax.random.key(0)
    return cache_lib.commit(cache, constant(value, spec.block_tokens, key),
                            constant(value, spec.mid_tokens, key), spec=spec), None

  after, _ = jax.jit(lambda cache: jax.lax.scan(body, cache, blocks))(before)
  assert int(before.blocks) == 0
  assert not np.any(before.layers.sink.v)
  assert np.unique(after.layers.recent.v).tolist() == [5]
  assert after.layers.archive.v[0, 0, :, 0, 0, 0].tolist() == [3, 4]  # 1 and 2 were evicted


@pytest.mark.parametrize(('choices', 'message'), [
    ({'top_k': 3, 'mid_capacity': 2}, 'top_k=3.*mid_capacity=2.*raise mid_capacity'),
    ({'recent_blocks': 0}, 'recent_blocks=0 must be at least 1'),
    ({'sink_blocks': -1}, 'sink_blocks=-1 must not be negative'),
    ({'selection': 'best'}, "selection='best' is unknown; use one of top_k, fifo"),
    ({'score_heads': 9}, 'score_heads=9'), ({'mid_position_stride': 0}, 'mid_position_stride=0'),
    ({'storage': 'int4'}, "storage='int4' is unknown; use one of full, int8, float8_e4m3fn"),
    ({'dtype': 'float16'}, "dtype='float16'")])
def test_wrong_sizes_say_what_to_do(choices, message):
  with pytest.raises(ValueError, match=message):
    spec_of(**choices)


def test_what_is_rounded_cannot_be_trained():
  assert spec_of().trainable() == spec_of()
  with pytest.raises(ValueError, match="storage='int8' has no gradient; train with 'full'"):
    spec_of(storage='int8').trainable()


def test_a_piece_of_a_block_is_refused():
  spec = spec_of(mid_capacity=2, top_k=1)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match=r'block keys has shape .*t=4'):
    cache_lib.commit(cache_lib.init(spec, 1), constant(0, 3, key), constant(0, 1, key), spec=spec)
