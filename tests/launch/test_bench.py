"""Benchmarks: sums and intervals by hand, every suite on a tiny model, what is written. No timing
is asserted."""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax import outputs
from pf_jax.bench import (
    block,
    counts,
    kernels,
    long,
    report,
    run,
    subject,
    timing,
    torch_peer,
    tune,
)
from pf_jax.bench.case import Bench
from pf_jax.bench.ceilings import Ceilings
from pf_jax.bench.config import SUITES, Effort, parse_suites
from pf_jax.bench.subject import Subject, draw
from pf_jax.bench.timing import Call, Timing
from pf_jax.kernels import conv3d, tuning
from pf_jax.kernels.attention import cudnn, pallas, pallas_float8, pallas_gpu, reference
from pf_jax.kernels.context import ready_made
from pf_jax.kernels.conv3d import operations
from pf_jax.kernels.conv3d import pallas as conv3d_pallas
from pf_jax.kernels.conv3d import pallas_gpu as conv3d_gpu
from pf_jax.kernels.quantization import DTYPES, Quantized, dequantize, largest
from pf_jax.models import bundle
from pf_jax.pipeline import rollout_spec
from pf_jax.sampling.meter import CompileCounter
from pf_jax.testing import tiny_model_spec
from pf_jax.types import DTypes
from tests import sampled
from tests.kernels.test_pallas import half_precision

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = Effort(seconds=1e-3, least=2, most=2, early_block=2, late_block=4, window=2,
              ceiling_seconds=1e-4, ceiling_bytes=1 << 16, ceiling_rows=64)

# --- medians, intervals, turns --------------------------------------------------------------------


@pytest.mark.parametrize(('count', 'rank'), [(1, 0), (5, 0), (6, 1), (8, 1), (9, 2), (10, 2),
                                             (20, 6), (100, 40)])
def test_ranks_of_the_median_s_interval(count, rank):
  assert timing.interval_rank(count) == rank  # as in tables of the sign test


def test_medians_and_intervals():
  assert timing.summarise([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0, 3)
  assert timing.summarise([10.0, 9, 8, 7, 6, 5, 4, 3, 2, 1]) == (5.5, 2.0, 9.0, 10)
  with pytest.raises(ValueError, match='no values'):
    timing.summarise([])


def test_ratios_are_taken_round_by_round():
  # The machine was ten times slower in the second round: of the medians the ratio is 2.5.
  assert timing.ratio(Timing((2.0, 30.0, 5.0)), Timing((1.0, 15.0, 2.0))) == (2.0, 2.0, 2.5, 3)


class Clock:
  """Advances when something runs."""

  def __init__(self):
    self.now, self.ran = 0.0, []

  def __call__(self):
    return self.now

  def work(self, name, seconds):
    def go():
      self.now += seconds
      self.ran.append(name)
      return name
    return Call(go, lambda result: self.ran.append(f'waited for {result}'))


def test_calls_run_in_turn_and_in_reverse():
  clock = Clock()
  # 5 ms are six calls of a 1024th of a second.
  timings = timing.alternate({'a': clock.work('a', 1 / 64), 'b': clock.work('b', 1 / 1024)},
                             seconds=1e-9, least=2, most=9, clock=clock)
  a, b = ['a', 'waited for a'], ['b', 'waited for b']
  assert clock.ran == 3 * a + 3 * b + a + 2 * (['b'] * 6 + ['waited for b']) + a
  assert timings == {'a': Timing((1 / 64,) * 2), 'b': Timing((1 / 1024,) * 2, repeat=6)}


def test_time_and_rounds_are_bounded():
  clock = Clock()
  timings = timing.alternate({'a': clock.work('a', 1.0)}, seconds=4.0, least=2, most=9, clock=clock)
  assert len(timings['a'].samples) == 4
  timings = timing.alternate({'a': clock.work('a', 1.0)}, seconds=40.0, least=2, most=9,
                             clock=clock)
  assert len(timings['a'].samples) == 9
  clock.ran.clear()
  timing.in_turn({'a': clock.work('a', 1.0)}, 3, clock=clock)
  assert clock.ran == ['a', 'waited for a'] * 3


# --- sums by hand ---------------------------------------------------------------------------------

# 32x48 pixels are 4x6 latents and 2x3 tokens; 4 frames make 24 tokens, compressed 2. Text has 6
# rows. Sink, recent and one compressed block are 24 + 24 + 2 keys.
T, M, HISTORY, R, D, E = 24, 2, 50, 6, 24, 32
LAYER = 4 * 2 * T * D * D + 4 * T * (HISTORY + T) * D + 2 * 2 * T * D * D + 4 * T * R * D \
    + 2 * 2 * T * D * E
COMPRESSED = 4 * 2 * M * D * D + 4 * M * (HISTORY + M) * D + 2 * 2 * M * D * D + 4 * M * R * D \
    + 2 * 2 * M * D * E
TIME = 2 * 16 * D + 2 * D * D + 2 * D * 6 * D  # a frame
EMBED = 2 * T * 16 * D
DENOISE = 2 * (EMBED + 4 * TIME + 2 * LAYER + 2 * T * D * 16) + 2 * (2 * 2 * 24)  # 2 archive slots
CLEAN = EMBED + 5 * TIME + 2 * LAYER + 2 * COMPRESSED
# Taps that meet data: an axis of n with kernel 3 has 3n - 2, with kernel 4 at stride 2 4n/2 - 2.
HR = [2 * 4 * 4 * (3 + 3) * 10 * 16, 2 * 4 * 6 * 4 * 6 * 10, 2 * 6 * 8 * 4 * 2 * 3]
COMPRESS = sum(HR) + 2 * M * 8 * D + 2 * M * 16 * D


def conv(frames, height, width, fan_in, fan_out, taps=3):
  """3x3 in space."""
  return 2 * frames * taps * (3 * height - 2) * (3 * width - 2) * fan_in * fan_out


def stage(frames, height, width):
  """Two residual blocks that begin with half the channels."""
  here = frames, height, width
  shortcut = 2 * frames * height * width * 2 * 4
  return conv(*here, 2, 4) + 3 * conv(*here, 4, 4) + shortcut


ATTENTION = 2 * 96 * 4 * 12 + 4 * (4 * 24 * 24 * 4) + 2 * 96 * 4 * 4
DECODE = (
    2 * 96 * 4 * 4 + conv(4, 4, 6, 4, 4) + 4 * conv(4, 4, 6, 4, 4) + ATTENTION
    + 4 * conv(4, 4, 6, 4, 4) + 2 * 4 * 3 * 24 * 4 * 8 + conv(8, 8, 12, 4, 2, taps=1)
    + stage(8, 8, 12) + 2 * 8 * 3 * 96 * 4 * 8 + conv(16, 16, 24, 4, 2, taps=1)
    + stage(16, 16, 24) + conv(16, 32, 48, 4, 2, taps=1)
    + stage(16, 32, 48) + conv(16, 32, 48, 4, 3))


@pytest.fixture(scope='module')
def tiny():
  models = sampled.random_models().without_text()
  rows = draw(jax.ShapeDtypeStruct((1, 6, 12), jnp.float32))
  return Subject(models, rollout_spec(models.spec, sampled.CHOICES), rows, 'random')


@pytest.fixture(scope='module')
def found(tiny, tmp_path_factory):
  """All suites of a tiny model: the record and where it is."""
  root, lines = tmp_path_factory.mktemp('bench'), []
  record = run.run(tiny, SUITES, TINY, root / 'out', config='tiny', profile=root / 'profile',
                   say=lines.append)
  return record, root, lines


def test_convolutions_by_hand():
  padding = (0, 0), (1, 1), (1, 1)
  assert operations((1, 4, 5, 6, 2), (3, 3, 3, 2, 7), (1, 1, 1), padding) == (
      2 * 2 * 7 * (2 * 3) * 13 * 16)
  assert operations((2, 3, 8, 8, 1), (1, 4, 4, 1, 1), (1, 2, 2), padding) == (
      2 * 2 * 3 * 14 * 14)


def test_every_case_counts_what_was_worked_out_by_hand(found):
  flops = {suite: {case['name']: (case['flops'], case['traced_flops']) for case in cases}
           for suite, cases in found[0]['suites'].items()}
  both = {suite: {name: pair[0] for name, pair in cases.items()} for suite, cases in flops.items()}
  assert {pair[0] - pair[1] for cases in flops.values() for pair in cases.values()} == {0}
  assert both['attention'] == {
      'block over history': 4 * T * (HISTORY + T) * D,
      'compressed block over history': 4 * M * (HISTORY + M) * D, 'block over text': 4 * T * R * D}
  assert both['context'] == {'one layer': 0, 'queries normed and rotated': 0}
  frames = {name: count for name, count in both['conv3d'].items() if 'decoder' in name}
  assert frames == {'decoder stage 0': conv(4, 4, 6, 4, 4), 'decoder stage 1': conv(8, 8, 12, 4, 4),
                    'decoder stage 2': conv(16, 16, 24, 4, 4),
                    'decoder stage 3': conv(16, 32, 48, 4, 4)}
  # Here the frames before and after are numbers, not padding.
  assert both['conv3d']['compressor 0'] == HR[0] // 6 * 8
  assert both['vae']['decode a block'] == DECODE
  finish = CLEAN + COMPRESS + DECODE + both['vae']['encode its low resolution']
  assert both['block'] == {'one layer': LAYER, 'denoise': DENOISE, 'finish': finish,
                           'whole': DENOISE + finish}
  assert both['rollout'] == {'a block': DENOISE + finish}


def test_bytes_by_hand(found):
  moved = {case['name']: case['bytes'] for cases in found[0]['suites'].values() for case in cases}
  assert moved['block over history'] == 4 * D * (T + 2 * (HISTORY + T) + T)
  assert moved['one layer'] > 0
  context, _ = found[0]['suites']['context']
  assert context['bytes'] == 2 * 2 * HISTORY * D * 4  # keys and values, read and written
  head = D // 2
  assert moved['queries normed and rotated'] == 4 * (T * D + D + D + 2 * T * head // 2 + T * D)
  assert moved['decoder stage 1'] == 4 * (10 * 96 * 4 + 8 * 96 * 4 + 27 * 16 + 4)


def test_a_change_of_the_program_shows():
  assert counts.traced(lambda x: x @ x @ x, jnp.ones((3, 3))) == 2 * counts.dense(3, 3, 3)
  record = {'name': 'x', 'flops': 54, 'traced_flops': 108, 'bytes': 7}
  assert report._counts(record) == (
      '- x: 54 FLOP, but 108 in the traced program; 7 bytes')


# --- the record -----------------------------------------------------------------------------------


def test_record(found):
  record, root, lines = found
  written = json.loads((root / 'out' / 'bench.json').read_text())
  assert written == json.loads(json.dumps(record))
  assert list(written['suites']) == list(SUITES)
  assert written['machine']['platform'] == jax.devices()[0].platform
  assert written['machine']['versions']['jax'] == jax.__version__
  assert written['machine']['cores'] >= 1
  assert written['model']['attention_tokens'] == HISTORY + T
  assert written['model']['cache']['mid_capacity'] == 2
  assert written['ceilings']['copy']['size'] == 1 << 16
  assert written['ceilings']['product float32']['flops'] == 2 * 64**3
  assert [line for line in lines if 'suite ' in line] == [
      f'{suite}: suite {number} of 6 ...' for number, suite in enumerate(SUITES, 1)]
  document = (root / 'out' / 'bench.md').read_text()
  assert document == report.markdown(record)
  assert [line for line in document.splitlines() if line.startswith('## ')] == [
      f'## {suite}' for suite in SUITES]


def test_a_machine_that_others_use_is_said(tiny, monkeypatch, tmp_path):
  monkeypatch.setattr(run, 'suite', lambda *rest: [])
  for load in (0.4, 0.6):
    lines = []
    monkeypatch.setattr(os, 'getloadavg', lambda load=load: (load, 0, 0))
    run.run(tiny, (), TINY, tmp_path, config='tiny', say=lines.append)
    notes = ['note: others use this machine (load 0.6)']
    assert [line[:40] for line in lines] == (notes if load > 0.5 else [])


def test_every_call_is_timed_and_compared(found):
  for cases in found[0]['suites'].values():
    for case in cases:
      peers = list(case['calls'])[1:]
      assert list(case['ratios']) == peers
      for call in case['calls'].values():
        median = call['seconds']['median']
        assert len(call['samples']) == call['seconds']['rounds'] == 2
        assert 0 < call['seconds']['low'] <= median <= call['seconds']['high'] < 100
        assert call['flops_per_second'] == case['flops'] / median
        assert 0 < call['of_limit'] < 1000
        assert call['of_limit'] == pytest.approx(max(call['of_product'], call['of_copy']))
  names = {suite: [list(case['calls']) for case in cases]
           for suite, cases in found[0]['suites'].items()}
  assert {tuple(calls) for calls in names['conv3d']} == {('reference', 'taps')}
  assert names['rollout'] == [['blocks 4 to 5', 'blocks 2 to 3']]
  assert names['context'] == [['ours', 'copy']] * 2
  assert all(calls[:2] == ['ours', 'jax.nn (xla)'] for calls in names['attention'])


def test_each_suite_leaves_a_trace(found):
  for suite in SUITES:
    assert list((found[1] / 'profile' / suite).rglob('*.xplane.pb'))


def test_traces_need_a_directory_of_their_own(tiny, monkeypatch, tmp_path):
  monkeypatch.setattr(run, 'suite', lambda *unused: pytest.fail('work was begun'))
  with pytest.raises(outputs.OutputExists, match='holds something already; traces need a new'):
    (tmp_path / 'profile').mkdir()
    (tmp_path / 'profile' / 'file').write_text('')
    run.run(tiny, SUITES, TINY, tmp_path / 'out', config='tiny', profile=tmp_path / 'profile')


def test_the_fused_convolution_is_compared_on_hopper_cards_only(monkeypatch):
  shapes = counts.Convolution((1, 3, 4, 8, 32), (3, 3, 3, 32, 32))
  monkeypatch.setattr(kernels, 'jitted', lambda function, *inputs: function)

  def compared(dtype):
    return list(kernels._convolution('here', shapes, dtype).calls)

  assert compared('bfloat16') == ['reference', 'taps']
  monkeypatch.setattr(kernels, 'target_platform', lambda: 'cuda')  # one of another generation
  assert compared('bfloat16') == ['reference', 'taps']
  monkeypatch.setattr(kernels, 'hopper', lambda: True)
  assert compared('bfloat16') == ['reference', 'taps', 'pallas']
  assert compared('float32') == ['reference', 'taps']


def test_the_fused_rotation_is_compared_on_hopper_cards_only(half, monkeypatch):
  monkeypatch.setattr(kernels, 'jitted', lambda function, *inputs: function)
  monkeypatch.setattr(kernels, 'target_platform', lambda: 'cuda')  # one of another generation
  case = kernels._rotated(bench_of(half, []))
  assert list(case.calls) == ['ours', 'copy']
  assert case.absent['pallas'].startswith('needs a Hopper card')
  monkeypatch.setattr(kernels, 'hopper', lambda: True)
  assert list(kernels._rotated(bench_of(half, [])).calls) == ['ours', 'pallas', 'copy']


def test_peers_that_are_absent_say_so(monkeypatch):
  def absent(name):
    raise ImportError(f'No module named {name!r}')

  monkeypatch.setattr(importlib, 'import_module', absent)
  why = "cannot be imported (No module named 'torch')"
  assert torch_peer.find() == torch_peer.attention((1, 2, 1, 4), (1, 3, 1, 4), 'float32') == why
  assert torch_peer.layer(None, None, None) == why


SECONDS = {'median': 0.0125, 'low': 0.01, 'high': 0.02, 'rounds': 6}


def test_rows_of_the_table():
  call = {'seconds': SECONDS, 'flops_per_second': 1.5e12, 'bytes_per_second': 2e9,
          'of_product': 0.5, 'of_copy': 0.25, 'of_limit': 0.5}
  case = {'name': 'x', 'flops': 3, 'calls': {'ours': call, 'jax': call | {'of_limit': 0.125}},
          'ratios': {'jax': {'median': 1.0, 'low': 0.9, 'high': 1.25}},
          'absent': {'torch': 'is away'}}
  shown = '12.5 ms [10 ms, 20 ms]'
  assert report.rows(case) == [
      ['x', 'ours', shown, '1.5 T', '50.0%', '2 G', '25.0%', '50.0%', ''],
      ['', 'jax', shown, '1.5 T', '50.0%', '2 G', '25.0%', '12.5%', '1.000 [0.900, 1.250]'],
      ['', 'torch', 'is away', '', '', '', '', '', '']]


# --- our own kernels ------------------------------------------------------------------------------


@pytest.fixture
def half():
  """A model that our kernel takes; its weights are only shapes."""
  return Subject(*half_precision('pallas'), None, 'random')


@pytest.fixture
def card(monkeypatch, tmp_path):
  """A Hopper card whose kernels are XLA's; some tiles are no use on it."""

  def attend(q, segments, tiles=None):
    if tiles is not None and tiles.keys == 192:
      raise ValueError('19 attended blocks take too much shared memory')
    out = reference.attend(q, ready_made(segments))
    return 2 * out if tiles is not None and tiles.keys == 128 else out

  for module in (kernels, tune):
    monkeypatch.setattr(module, 'hopper', lambda: True)
  for backend in (cudnn, pallas):
    monkeypatch.setattr(backend, 'attend', attend)
  monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / 'tuning.json'))


def bench_of(measured, lines):
  return Bench(measured, TINY, Ceilings(TINY), CompileCounter(), lines.append)


def test_our_kernel_meets_cudnn_in_both_forms(half, card):
  blocks = kernels.block_attentions(half)
  cases = kernels.attention(bench_of(half, []))
  assert [case.name for case in cases[:2]] == [
      'block over its cache', 'compressed block over its cache']
  for case, work, queries in zip(cases, blocks.values(), (24, 2), strict=False):
    assert list(case.calls) == ['pallas, in place', 'jax.nn (xla), rows ready',
                                'cudnn, rows assembled']
    keys = 24 + 2 * 2 + 24 + queries  # sink, two compressed blocks, recent, itself
    assert case.flops == case.traced_flops == 4 * queries * keys * 128
    assert case.bytes == 2 * 2 * (queries + keys) * 128
    ours, ready, assembled = (np.asarray(call.run(), np.float32) for call in case.calls.values())
    np.testing.assert_array_equal(ours, assembled)
    assert ready.shape == ours.shape == (1, queries, 2, 64)
    # As a slow reader of the cache has it: every block counts and none is zero.
    segment, own = ready_made(work.segments)
    assert bool(segment.valid.all())
    k, v = (np.concatenate([a, b], axis=1) for a, b in zip(segment[:2], own[:2], strict=True))
    np.testing.assert_allclose(ours, jax.nn.dot_product_attention(
        *(jnp.asarray(x, jnp.float32) for x in (work.q, k, v))), atol=8e-3, rtol=8e-3)
  assert not any('pallas, in place' in case.absent for case in cases)


def test_without_a_card_our_kernel_is_absent(found):
  (case, *others) = found[0]['suites']['attention']
  assert case['absent']['pallas, in place'].endswith('on a Hopper card')
  assert not any('pallas, in place' in case['absent'] for case in others)


def test_tuning_keeps_the_fastest_and_says_what_is_no_use(half, card, monkeypatch):
  sizes = [pallas_gpu.TileSpec(*size)
           for size in ((3, 64, 3), (3, 128, 2), (2, 192, 2), (2, 64, 4))]
  monkeypatch.setattr(pallas_gpu, 'candidates', lambda *kind: sizes)
  monkeypatch.setattr(tune, 'race', lambda ready, effort: {
      tiles: float(tiles.warpgroups) for tiles in ready})
  lines = []
  tune.tune(bench_of(half, lines), ('context', 'attention'))
  for work in kernels.block_attentions(half).values():
    assert pallas.tuned(work.q, work.segments) == sizes[3]
  skipped = [line.split(': ', 1)[1] for line in lines if 'skipped' in line]
  assert skipped == 2 * ['skipped: what it computes is off by 100.0%',
                         'skipped: 19 attended blocks take too much shared memory']
  assert len([line for line in lines if line.startswith('tuning attention, ')]) == 2


def test_float8_is_tuned_and_compared_for_caches_stored_in_it(half, card, monkeypatch):
  cache = dataclasses.replace(half.spec.cache, storage='float8_e4m3fn')
  stored = dataclasses.replace(half, spec=dataclasses.replace(half.spec, cache=cache))
  monkeypatch.setattr(pallas_float8, 'attend', pallas.attend)
  asked = []
  monkeypatch.setattr(tuning, 'tune', lambda problem, *rest, **say: asked.append(problem.kernel))
  tune.tune(bench_of(stored, []), ('attention',))
  assert asked == ['attention', 'attention in float8'] * 2
  block, *_ = kernels.attention(bench_of(stored, []))
  assert list(block.calls)[:2] == ['pallas, in place', 'pallas_float8, in place']
  # A block's queries, results, keys and values in half precision; its history in 8 bits.
  assert block.bytes == 4 * 24 * 128 * 2 + cache.attended_bytes()


@pytest.fixture
def wide(half):
  """The same with convolutions that our kernel takes but for the first of the compressor."""
  models, spec = half.models, half.spec
  sizes = dataclasses.replace(
      models.spec, vae=dataclasses.replace(
          models.spec.vae, base_width=32, dtypes=DTypes('bfloat16', 'bfloat16')),
      compressor=dataclasses.replace(models.spec.compressor, channels=(8, 32, 32)))
  return Subject(bundle.shapes(sizes).without_text(), spec, None, 'random')


def test_convolutions_are_tuned_with_what_follows_them(wide, card, monkeypatch):
  sizes = [conv3d_gpu.TileSpec(groups, columns=columns, channels=32)
           for groups, columns in ((3, 16), (2, 32), (2, 16))]
  asked = []

  def convolve(x, kernel, bias, *, epilogue, tiles, **options):
    asked.append((x.shape, epilogue.gain is not None, epilogue.silu, epilogue.residual is not None))
    out = conv3d.IMPLEMENTATIONS['reference'](x, kernel, bias, epilogue=epilogue, **options)
    return 2 * out if tiles.columns == 32 else out

  monkeypatch.setattr(conv3d_pallas, 'conv3d', convolve)
  monkeypatch.setattr(conv3d_gpu, 'candidates', lambda kernel: sizes)
  monkeypatch.setattr(tune, 'race', lambda ready, effort: {
      tiles: float(tiles.warpgroups) for tiles in ready})
  lines = []
  tune.tune(bench_of(wide, lines), ('conv3d',))
  assert lines[0] == f'nothing to tune for compressor 0: the kernel takes {conv3d_pallas.LIMITS}.'
  stages = kernels.decoder_stages(wide.models)
  strided = kernels.compressor_stages(wide.models)[1:]
  assert asked[::3] == [*((stage.x, False, True, False) for stage in strided),
                        *((stage.x, True, True, True) for stage in stages)]
  assert len([line for line in lines if 'off by 100.0%' in line]) == len(asked[::3]) > 2
  # A block's frames with the two before them lie apart in a rollout.
  x, kernel = (jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in stages[-1][:2])
  past, x = (jax.ShapeDtypeStruct((1, frames, *x.shape[2:]), x.dtype)
             for frames in (2, x.shape[1] - 2))
  assert conv3d_pallas.tuned(x, kernel, past, (1, 1, 1)) == sizes[2]


def test_the_race_is_timed(monkeypatch):
  clock = Clock()
  calls = {name: clock.work(name, seconds).run for name, seconds in (('a', 1.0), ('b', 0.5))}
  monkeypatch.setattr(timing, 'alternate', functools.partial(timing.alternate, clock=clock))
  assert tune.race(calls, TINY) == {'a': 1.0, 'b': 0.5}


def test_tiles_that_spill_are_no_use():
  said = ["ptxas info    : Compiling entry function 'attention' for 'sm_90a'",
          '0 bytes stack frame, {} bytes spill stores, {} bytes spill loads',
          'ptxas info    : Used 168 registers']
  tune.check_registers([line.format(0, 0) for line in said])
  with pytest.raises(tune.Unfit, match='156 bytes of registers'):
    tune.check_registers([line.format(156, 160) for line in said])


def test_where_there_is_nothing_to_tune(tiny, half, card, monkeypatch, tmp_path):
  lines = []
  tune.tune(bench_of(half, lines), ('context', 'vae'))
  tune.tune(bench_of(tiny, lines), ('attention',))
  assert lines == [
      'nothing to tune in context, vae; suites with tiles: attention, conv3d.',
      *(f'nothing to tune for {name}: the kernel takes {pallas.LIMITS}.'
        for name in ('block', 'compressed block'))]
  monkeypatch.undo()
  lines.clear()
  run.run(tiny, (), TINY, tmp_path / 'out', config='tiny', tune=True, say=lines.append)
  assert lines[-1] == 'nothing to tune: kernels of our own run on Hopper cards, this is cpu.'


# --- long videos ----------------------------------------------------------------------------------


def test_nothing_is_compiled_and_memory_stays(found):
  (case,) = found[0]['suites']['rollout']
  notes = case['notes']
  assert notes['compilations'] == 0
  assert notes['memory_constant'] is True
  early, late = notes['memory']['early'], notes['memory']['late']
  assert (early['block'], late['block']) == (1, 3)
  assert early['live'] == late['live'] > early['state'] > sum(early['partitions'].values()) > 0
  assert notes['goal'] == [0.95, 1.05]
  assert notes['late_latents_std'] > 0


def test_a_compilation_and_a_leak_are_noticed(tiny):
  with CompileCounter() as compilations:
    race = long.Race(Bench(tiny, TINY, Ceilings(TINY), compilations))
    assert race.compiled() == 0
    jax.jit(lambda x: x + 1)(np.float32(1))
    assert race.compiled() == 1
    compilations.works = False
    assert race.compiled() is None
    assert race.notes()['memory_constant'] is True
    race.late_memory['live'] += 4
    assert race.notes()['memory_constant'] is False
  before = long.live_bytes()
  kept = jnp.asarray(np.ones(5, np.float32))
  assert long.live_bytes() - before == kept.nbytes == 20


def test_late_blocks_that_are_dearer_are_outside():
  memory = {'state': 1000, 'live': 2000}
  notes = {'memory_constant': True, 'goal': [0.95, 1.05], 'compilations': 3,
           'memory': {'early': memory | {'block': 19}, 'late': memory | {'block': 1099}}}
  case = {'notes': notes, 'ratios': {'early': {'median': 1.06, 'low': 1.0, 'high': 1.1}}}
  first, state, compiled = report._notes(case)
  assert first == '- late over early: 1.060 [1.000, 1.100], outside 0.95 to 1.05'
  assert state == ('- state: 1,000 bytes after block 19, 1,000 after block 1099; all arrays: '
                   '2,000 and 2,000')
  assert compiled == '- compilations after the second block: 3'
  case['ratios']['early']['median'] = 1.05
  assert 'within' in report._notes(case)[0]


# --- what is shown to the programs ----------------------------------------------------------------


def test_no_zeros(tiny):
  state = tiny.state()
  for leaf in jax.tree.leaves(state):
    if leaf.ndim:
      assert float(jnp.std(leaf)) == pytest.approx(1, abs=0.2)
      assert not bool((leaf == 0).any())
  assert int(state.cache.blocks) == 3 + 2  # every partition and the archive are full
  assert tiny.selected(state.cache.blocks).tolist() == [[2]]  # the archive holds 2 and 3
  weights = subject.random_weights(tiny_model_spec())
  assert all(bool((leaf != 0).all()) for leaf in jax.tree.leaves(weights))
  assert not hasattr(weights, 'text')


@pytest.mark.parametrize('storage', DTYPES)
def test_blocks_in_8_bits_are_rounded_from_numbers(half, storage):
  """Scales are the largest of normal numbers over the dtype's: positive, which kernels rely on."""
  cache = dataclasses.replace(half.spec.cache, storage=storage)
  stored = Subject(half.models, dataclasses.replace(half.spec, cache=cache), None, 'random')
  pairs = [(blocks.k, blocks.v) for blocks in stored.history()]
  for x in jax.tree.leaves((pairs, stored.state().cache.layers.sink),
                           is_leaf=lambda x: isinstance(x, Quantized)):
    assert x.dtype == storage
    assert float(x.scale.min()) > 1 / largest(storage)
    whole = dequantize(x, jnp.float32)
    assert float(jnp.std(whole)) == pytest.approx(1, abs=0.2)
    assert float((whole == 0).mean()) < 0.02


def test_large_arrays_repeat_without_equal_rows(monkeypatch):
  monkeypatch.setattr(subject, '_FRESH', 7)
  rows = np.asarray(draw(jax.ShapeDtypeStruct((4, 6), jnp.float32)))
  assert len(np.unique(rows)) == 7
  assert len(np.unique(rows, axis=0)) == 4
  assert rows.flatten()[7] == rows[0, 0]


# --- the command line -----------------------------------------------------------------------------


def launch(*arguments, **environment):
  return subprocess.run([sys.executable, '-m', 'launch.bench', *map(str, arguments)], cwd=ROOT,
                        env=os.environ | environment, capture_output=True, text=True, check=False)


def test_suites_and_settings_that_do_not_exist():
  assert parse_suites('all') == parse_suites('') == SUITES
  assert parse_suites('vae, block') == ('vae', 'block')
  with pytest.raises(ValueError, match=r"'atention' is unknown \(did you mean attention\?\); use"):
    parse_suites('vae,atention')
  with pytest.raises(ValueError, match='name one twice'):
    parse_suites('vae,vae')
  for change, message in (({'seconds': 0}, 'seconds=0 must be'), ({'window': 0}, 'at least 1'),
                          ({'early_block': 1}, 'at least 2'), ({'most': 1}, 'fewer than least=6'),
                          ({'late_block': 119}, 'within the early window 20..119'),
                          ({'ceiling_rows': 1}, 'ceiling_rows=1 must be at least 16')):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(Effort(), **change)


def test_mistakes_are_named_before_jax_is_imported(without_jax, tmp_path):
  for argument, message in (
      ('--suite=atention', "error: suite 'atention' is unknown (did you mean attention?)"),
      ('--late_block=50', 'error: late_block=50 lies within the early window 20..119'),
      ('--config.cache.topk=3', '--config.cache.topk is unknown (did you mean config.cache.top_k')):
    done = launch(argument, f'--output={tmp_path}/out', **without_jax)
    assert message in done.stderr
    assert (done.returncode, 'JAX WAS IMPORTED' in done.stderr) == (2, False)
  assert not (tmp_path / 'out').exists()


def test_one_suite_of_random_weights(tmp_path):
  config = 'configs/wan/t2v_1_3b.py:tiny'
  done = launch(f'--config={config}', '--suite=context', '--seconds=0.001', '--tune',
                f'--output={tmp_path}/out')
  assert done.returncode == 0, done.stderr
  assert 'nothing to tune: kernels of our own run on Hopper cards' in done.stdout
  record = json.loads((tmp_path / 'out' / 'bench.json').read_text())
  assert (record['config'], record['model']['weights']) == (config, 'random')
  assert (record['model']['dtype'], list(record['suites'])) == ('bfloat16', ['context'])
  assert done.stdout.endswith((tmp_path / 'out' / 'bench.md').read_text() + '\n')


def test_block_suite_s_state_moves_on(tiny):
  chain = block.Chain(tiny)
  before = int(chain.state.cache.blocks)
  chain.whole()
  assert int(chain.state.cache.blocks) == before + 1
