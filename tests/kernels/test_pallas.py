"""The fused attention kernel: its arguments, tiles and counts on any machine."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from pf_jax.kernels import mosaic, rope, tuning
from pf_jax.kernels.attention import Blocks, Segment, attend, combine, pallas, pallas_gpu
from pf_jax.kernels.context import assemble
from pf_jax.kernels.quantization import Quantized
from pf_jax.models import bundle
from pf_jax.pipeline import rollout_spec
from pf_jax.rollout import block as block_lib
from pf_jax.testing import tiny_model_spec
from pf_jax.train import flops
from pf_jax.types import DTypes
from tests.kernels import interpreted
from tests.kernels.slow_kernel import slow_kernel
from tests.kernels.test_platform import CARD

CASES = {name: (q, segments) for name, q, segments in interpreted.cases()}
FLOAT8_CASES = {name: (q, segments) for name, q, segments in interpreted.float8_cases()}
HALVES = {name: (q, parts) for name, q, parts in interpreted.halves()}


@pytest.fixture
def without_the_card(monkeypatch):
  monkeypatch.setattr(pallas_gpu, 'attend_pools', slow_kernel)


@pytest.mark.parametrize('case', HALVES)
def test_halves_are_combined_to_the_whole(case, without_the_card):
  q, parts = HALVES[case]
  found = combine([attend(q, part, implementation='pallas', return_lse=True) for part in parts])
  wanted = interpreted.expected(q, [segment for part in parts for segment in part])
  assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32]
  for ours, theirs in zip(found, wanted, strict=True):
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=8e-3)


@pytest.mark.parametrize('case', FLOAT8_CASES)
def test_products_in_float8_are_close(case, without_the_card):
  q, segments = FLOAT8_CASES[case]
  out = attend(q, segments, implementation='pallas_float8')
  error = np.abs(np.asarray(out, np.float32) - interpreted.expected(q, segments)[0])
  assert error.max() < 0.06
  assert (1e-3 if np.any(q) else 0) < np.sqrt(np.mean(error**2)) < 0.01


@pytest.mark.parametrize('left', [1e6, np.nan])
def test_what_does_not_count_takes_no_range_from_weights(left, without_the_card):
  """Weights in float8 are relative to the largest scale of values: of those that count."""
  q, (sink, *rest) = FLOAT8_CASES['products in float8, two heads']
  sink = sink._replace(valid=jnp.array([[False, True]]))
  loud = sink._replace(v=sink.v._replace(scale=sink.v.scale.at[:, 0].set(left)))
  out, wanted = (attend(q, [x, *rest], implementation='pallas_float8') for x in (loud, sink))
  np.testing.assert_array_equal(out, wanted)


def test_turned_queries_fit_into_float8():
  """A pair of length 500: its unit is 2, whatever the angle; the other head's is the smallest."""
  q = jnp.zeros((1, 3, 2, 64)).at[0, 1, 0, 6:8].set(jnp.array([300.0, -400]))
  q = q.at[0, 2, 1, 0].set(448.0)
  assert pallas._float8_unit(q).tolist() == [[2.0, 1.0]]
  assert pallas._float8_unit(q * 2).tolist() == [[4.0, 2.0]]


def test_turning_queries_is_moving_keys():
  """One key that is moved by 3 frames, one temporal pair of the head, by hand."""
  q = np.zeros((1, 1, 1, 64), np.float32)
  q[0, 0, 0, :2] = 1, 2
  angle = rope.time_angles(jnp.float32(3), 64)[0]
  cos, sin = pallas._rotations(jnp.array([[3.0]]), 64, 64)
  assert cos.shape == (1, 1, 64)
  turned = np.array([-2.0, 1.0])
  np.testing.assert_allclose(q[0, 0, 0, :2] * cos[0, 0, :2] + turned * sin[0, 0, :2],
                             [np.cos(angle) + 2 * np.sin(angle), 2 * np.cos(angle) - np.sin(angle)],
                             rtol=1e-6)
  pairs = rope.rope_pairs(64)[0]
  assert cos[0, 0, 2 * pairs:].tolist() == [1.0] * (64 - 2 * pairs)
  assert sin[0, 0, 2 * pairs:].tolist() == [0.0] * (64 - 2 * pairs)


@pytest.mark.parametrize('return_lse', [False, True])
def test_the_gradient_is_the_library_s(return_lse, without_the_card):
  q, segments = CASES['each video its own']
  # Where nothing counts there is NaN, which no library may be asked to differentiate.
  segments = jax.tree.map(lambda x: jnp.nan_to_num(x) if x.dtype == jnp.bfloat16 else x, segments)

  def loss(q, segments, implementation):
    options = {'implementation': implementation, 'return_lse': return_lse}
    out, *lse = jax.tree.leaves(attend(q, segments, **options))
    return 3 * sum(map(jnp.sum, lse)) + jnp.sum(out.astype(jnp.float32) * jnp.arange(out.shape[-1]))

  gradients = [jax.grad(functools.partial(loss, implementation=name), allow_int=True,
                        argnums=(0, 1))(q, segments) for name in ('pallas', 'reference')]
  for ours, theirs in zip(*map(jax.tree.leaves, gradients), strict=True):
    if ours.dtype == jnp.bfloat16:
      np.testing.assert_array_equal(ours, theirs)
      assert np.any(np.asarray(ours, np.float32) != 0)


def test_refuses_what_the_kernel_cannot_read():
  q, (sink, *_) = CASES['a hole in the middle']
  half = sink._replace(k=sink.k[:, :1, :63], v=sink.v[:, :1, :63])
  int8, float8 = (interpreted.in_8_bits(sink, dtype) for dtype in ('int8', 'float8_e4m3fn'))
  for segments in ([half], [assemble([sink])], [jax.tree.map(jnp.float32, sink)],
                   [int8, float8], [sink._replace(v=int8.v)]):
    with pytest.raises(ValueError, match=r'pallas takes bfloat16 .* queries bfloat16\[1, 64, 1'):
      attend(q, segments, implementation='pallas')
  with pytest.raises(ValueError, match=r'pallas_float8 takes .*; all blocks in float8_e4m3fn'):
    attend(q, [sink], implementation='pallas_float8')
  for wrong, message in ((dict(warpgroups=4), 'warpgroups=4 must be 2 or 3'),
                         (dict(keys=40), 'keys=40 must be a multiple of 32'),
                         (dict(stages=1), 'stages=1 must be at least 2'),
                         (dict(stored_stages=1), 'stored_stages=1 must be at least 2')):
    with pytest.raises(ValueError, match=message):
      pallas_gpu.TileSpec(**wrong)


def test_registers_are_there_for_all():
  """A warpgroup that asks for more than is left waits for ever."""
  for computing, (registers, fetching) in mosaic.REGISTERS.items():
    threads = 128 * (computing + 1)
    launched = 65_536 // threads // 8 * 8
    assert 128 * (computing * registers + fetching) <= launched * threads


def at_full_size(storage='full'):
  """Shapes of the 1.3B's attention at 832x480, 120 s."""
  def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)

  def blocks(number, rows, attended):
    pair = (shape(1, number, rows, 12, 128),) * 2
    if storage != 'full':
      pair = (Quantized(shape(*pair[0].shape, dtype=storage),
                        shape(1, number, 1, 12, 1, dtype=jnp.float32)),) * 2
    slots = (shape(1, attended, dtype=dtype) for dtype in (jnp.int32, jnp.bool_, jnp.int32))
    return Blocks(*pair, *slots)

  own = shape(1, 6240, 12, 128)
  return own, [blocks(2, 6240, 2), blocks(128, 182, 16), blocks(1, 6240, 1), Segment(own, own)]


def lower(tiles: pallas_gpu.TileSpec | None, storage='full', **options):
  q, segments = at_full_size(storage)
  attention = jax.jit(functools.partial(pallas.attend, tiles=tiles, **options))
  with use_abstract_mesh(CARD):
    return attention.trace(q, segments).lower(lowering_platforms=('cuda',))


@pytest.mark.parametrize('tiles', [pallas_gpu.TileSpec(), pallas_gpu.TileSpec(2, 128, 2)])
def test_lowers_for_a_card_that_is_not_there(tiles):
  """Checks layouts, shapes of products, divisibility of copies and shared memory."""
  lowered = lower(tiles)
  assert lowered.as_text().count('mosaic_gpu') >= 1
  assert lower(tiles, return_lse=True).out_info[1].shape == (1, 6240, 12)


@pytest.mark.parametrize('storage', ['int8', 'float8_e4m3fn'])
def test_lowers_with_blocks_in_8_bits(storage):
  lower(None, storage)
  if storage == pallas.FLOAT8:
    lower(None, storage, float8=True)
  with pytest.raises(ValueError, match='239616 bytes of shared memory, of 231424'):
    lower(pallas_gpu.TileSpec(), storage)


@pytest.fixture
def table(monkeypatch, tmp_path):
  """The user's table, empty."""
  monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / 'tuning.json'))
  return tmp_path / 'tuning.json'


def test_tiles_come_from_the_table(table, monkeypatch):
  used = []

  def attend_pools(q, *rest, tiles, return_lse, **options):
    used.append(tiles)
    return q, jnp.zeros((1, 12, 6240)) if return_lse else None

  q, segments = at_full_size()
  shape = 'bfloat16 1x6240x12x128 over 2x6240 16x182 1x6240 1x6240'
  assert pallas.shape_of(q, segments) == shape
  tuned = pallas_gpu.TileSpec(2, 64, 4)
  monkeypatch.setattr(pallas_gpu, 'attend_pools', attend_pools)
  tuning.record(tuning.Problem('attention', shape, 'some card', jax.__version__), tuned, 1e-3)
  default = pallas_gpu.TileSpec()
  for mesh, given, lse in ((CARD, None, False), (None, None, False), (CARD, default, False),
                           (CARD, None, True)):
    with contextlib.nullcontext() if mesh is None else use_abstract_mesh(mesh):
      jax.eval_shape(functools.partial(pallas.attend, tiles=given, return_lse=lse), q, segments)
      jax.eval_shape(functools.partial(pallas.attend, return_lse=lse), q, segments[1:])
  assert used == [tuned, default, default, default, default, default, tuned, default]


def test_tuned_tiles_that_do_not_fit_are_not_used(table):
  q, segments = at_full_size()
  problem = tuning.Problem.here('attention', pallas.shape_of(q, segments))
  tuning.record(problem, pallas_gpu.TileSpec(3, 64, 4), 1e-3)
  assert pallas.tuned(q, segments) == pallas_gpu.TileSpec()


def test_candidates_begin_with_the_default():
  for kind in ((False, False), (True, False), (True, True)):
    assert pallas_gpu.candidates(*kind)[0] == pallas_gpu.default(*kind)
  first, *rest = pallas_gpu.candidates()
  assert first == pallas_gpu.TileSpec()
  assert first not in rest
  assert len(set(rest)) == len(rest) > 10


def test_counts_what_it_does():
  """By hand: 64 queries of two videos over 2 x 64, 3 x 22 and 64 rows; padding is not counted."""
  q, segments = CASES['each video its own']
  attention = functools.partial(attend, implementation='pallas')
  rows = 2 * 64 + 3 * 22 + 64
  assert flops.count(attention, q, segments) == 4 * 2 * 64 * rows * 128
  jaxpr = jax.make_jaxpr(attention)(q, segments)
  # Queries, half of them a quarter turn further, results; keys and values.
  assert flops.traffic_of_jaxpr(jaxpr) == 2 * 2 * 128 * (64 + 32 + 64 + 2 * rows)
  q, segments = CASES['ragged own block']
  assert flops.count(attention, q, segments) == 4 * 92 * 92 * 128
  q, segments = CASES['two noisy versions share a history']
  assert flops.count(attention, q, segments) == 4 * 2 * 64 * (2 * 64 + 64) * 128


def test_a_model_counts_as_with_the_reference():
  """A block of a small model, clean pass and compressed block of two tokens included."""
  found = []
  for implementations in (('reference', None), ('pallas', None), ('pallas', 'pallas')):
    models, spec = half_precision(*implementations)
    shapes = block_lib.input_shapes(models, 1, spec)
    block = functools.partial(block_lib.sample_block, first=False, spec=spec)
    found.append(flops.count(block, models, shapes.state, shapes.text, shapes.keys))
  assert found[1:] == found[:1] * 2


def half_precision(attention, rotation=None):
  """Shapes of a small model that the kernel takes, and its rollout."""
  spec = tiny_model_spec()
  transformer = dataclasses.replace(
      spec.transformer, width=128, attention=attention, rotation=rotation,
      dtypes=DTypes(compute='bfloat16', cache='bfloat16'))
  spec = dataclasses.replace(spec, transformer=transformer,
                             compressor=dataclasses.replace(spec.compressor, width=128))
  cache = {'sink_blocks': 1, 'recent_blocks': 1, 'top_k': 2, 'mid_capacity': 4}
  choices = {'cache': cache, 'sampler': {'steps': [1000.0, 500.0]}}
  return bundle.shapes(spec).without_text(), rollout_spec(spec, choices)


def test_too_large_tiles_do_not_lower():
  with pytest.raises(ValueError, match=r'20 attended blocks with .*stages=6.* bytes of shared'):
    lower(dataclasses.replace(pallas_gpu.TileSpec(), stages=6))


def test_counts_shared_memory(monkeypatch):
  """What is just allowed lowers; the compiler itself refuses what is more."""
  one = pallas_gpu.TileSpec(3, 64, 4)
  assert one.shared_bytes(128, 20) == 192 * 256 * 2 + 2 * 4 * 64 * 128 * 2 + 2 * 20 * 64 * 4
  assert one.shared_bytes(128, 20, return_lse=True) - one.shared_bytes(128, 20) == 192 * 4
  monkeypatch.setattr(mosaic, 'SHARED_BYTES', 10**9)
  with pytest.raises(Exception, match=r'(?i)shared memory|smem'):
    lower(one)


def test_needs_a_card():
  q, segments = CASES['own block alone']
  shape = jax.eval_shape(functools.partial(attend, implementation='pallas'), q, segments)
  assert shape.shape == q.shape  # plans are made anywhere
  with pytest.raises(ValueError, match='Only interpret mode is supported on CPU'):
    attend(q, segments, implementation='pallas')
