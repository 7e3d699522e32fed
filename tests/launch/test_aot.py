"""Ahead-of-time reports, without the compiler: the command line, what is read, what is written."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType

from configs.wan import sampling
from launch.build import build
from pf_jax.aot import hlo, ptxas, report, tpu
from pf_jax.aot.hlo import Collective, Collectives
from pf_jax.aot.ptxas import Kernel
from pf_jax.aot.report import ProgramReport
from pf_jax.aot.targets import MACHINES, V5E, GpuDeviceInfo, GpuTarget, Machine
from pf_jax.models.bundle import ModelSpec
from pf_jax.outputs import json_text
from pf_jax.pipeline import rollout_spec
from pf_jax.sampling import ahead
from pf_jax.train import plan

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = '--config=configs/digits/sample.py'


def launch(*arguments, **environment):
  return subprocess.run([sys.executable, '-m', 'launch.aot', *map(str, arguments)], cwd=ROOT,
                        env=os.environ | environment, capture_output=True, text=True, check=False)


# --- the command line -----------------------------------------------------------------------------


def test_mistakes_are_named_before_jax_is_imported(without_jax, tmp_path):
  for arguments, message in (
      ([CONFIG, '--target=h20'],
       '--target=h20 is unknown (did you mean h200?); use one of h200, h100, h200x8, v5e.'),
      ([CONFIG, '--target=v5p'], '--target=v5p is unknown (did you mean v5e?); use one of h200,'),
      ([CONFIG, '--program=denoize,blok'],
       ('--program=denoize is unknown (did you mean denoise?); this config has denoise, finish, '
        'block, switch, rollout.\nerror: --program=blok is unknown (did you mean block?)')),
      ([CONFIG, '--program=rollout'], '--program=rollout needs --blocks=N'),
      ([CONFIG, '--blocks=1'], '--blocks=1 must be at least 2'),
      ([CONFIG, '--config.batch_size=0'], 'config: batch_size=0 must be at least 1'),
      (['--config=configs/digits/causal.py', '--blocks=3'], '--blocks is the length of a rollout'),
      (['--config=configs/wan/baseline_1_3b.py'], 'this config has no cache and no batch_size')):
    done = launch(*arguments, f'--output={tmp_path}/out', **without_jax)
    assert message in done.stderr
    assert (done.returncode, 'JAX WAS IMPORTED' in done.stderr) == (2, False), done.stderr
  assert not (tmp_path / 'out').exists()


@pytest.mark.skipif(importlib.util.find_spec('jax_cuda13_plugin') is not None,
                    reason='the compiler is installed')
def test_without_the_compiler_one_command_is_named(tmp_path):
  done = launch(CONFIG, f'--output={tmp_path}/out')
  assert (done.returncode, done.stdout) == (1, '')
  assert done.stderr.startswith('error: compiling for NVIDIA H200 needs the CUDA compiler of jax')
  assert done.stderr.count('pip install --no-deps jax-cuda13-plugin==') == 1
  assert len(done.stderr.splitlines()) == 1
  assert not (tmp_path / 'out').exists()


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is not None,
                    reason='the compiler is installed')
def test_without_the_tpu_compiler_one_command_is_named(tmp_path):
  done = launch(CONFIG, '--target=v5e', f'--output={tmp_path}/out')
  assert (done.returncode, done.stdout) == (1, '')
  assert done.stderr.startswith('error: compiling for TPU v5e needs the TPU compiler that jax')
  assert done.stderr.count(f"add it with: pip install --no-deps '{tpu.requirement()}'") == 1
  assert len(done.stderr.splitlines()) == 1
  assert not (tmp_path / 'out').exists()


# --- what the TPU compiler is told and says -------------------------------------------------------


def test_the_tpu_compiler_is_the_one_that_jax_asks_for(monkeypatch):
  assert re.fullmatch(r'libtpu==[\d.]+\*', tpu.requirement())
  requires = ['jaxlib<=9,>=8', 'libtpu==1.2.*; extra == "tpu"', 'requests; extra == "tpu"']
  monkeypatch.setattr(importlib.metadata, 'requires', lambda name: requires)
  assert tpu.requirement() == 'libtpu==1.2.*'
  monkeypatch.setattr(importlib.metadata, 'requires', lambda name: None)
  assert tpu.requirement() == 'libtpu'


def test_the_environment_is_set_for_tpus_alone_and_replaces_nothing(monkeypatch):
  monkeypatch.setattr(os, 'environ', {'TPU_LOG_DIR': 'mine'})
  asked = []

  def describe(name, platform):
    asked.append((name, platform, dict(os.environ)))
    return SimpleNamespace(devices=jax.devices() * 4)
  monkeypatch.setattr(topologies, 'get_topology_desc', describe)
  assert tpu._mesh.__wrapped__(V5E, 1).shape == {'data': 1}
  ((name, platform, environment),) = asked
  assert (name, platform) == ('v5e:2x2', 'tpu')
  assert environment == {
      'TPU_LOG_DIR': 'mine', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
      'TPU_WORKER_HOSTNAMES': 'localhost', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}


REFUSED = ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
           'temporaries')


@pytest.mark.parametrize(('message', 'size'), [
    (f'{REFUSED} (18.50G) exceeds available HBM (15.75G).', 18.5 * 1024**3),
    (f'{REFUSED} (900M) exceeds available HBM (15.75G).', 900 * 1024**2),
    ('RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 130.00M of 128.00M', None),
    ('INTERNAL: Mosaic failed (18.50G)', None)])
def test_what_a_refused_program_would_take(message, size):
  assert tpu.needed_bytes(message) == size


# --- programs of sampling -------------------------------------------------------------------------

TINY = sampling.get_config('1_3b', frames=4, tiny=True)
MODEL = build(ModelSpec, TINY.model)
SPEC = rollout_spec(MODEL, {
    section: {name: value for name, value in TINY[section].items() if value is not None}
    for section in ('cache', 'sampler')})


def test_programs_of_sampling_and_their_shares():
  whole = ahead.programs(MODEL, SPEC, 8)
  assert [*whole] == ['denoise', 'finish', 'block', 'switch']
  assert [program.donate for program in whole.values()] == [(), (1,), (1,), (1,)]
  assert whole['denoise'].title == 'denoise a block, 2 steps'
  mesh = AbstractMesh((4,), ('data',), (AxisType.Auto,))
  split = ahead.programs(MODEL, SPEC, 8, mesh=mesh, blocks=3)
  # Each card has two of the videos and everything that does not belong to one.
  two = ahead.programs(MODEL, SPEC, 2)
  for name, program in two.items():
    assert plan.bytes_of(split[name].arguments) == plan.bytes_of(program.arguments) < plan.bytes_of(
        whole[name].arguments)
  _, text, index, _ = split['rollout'].arguments
  assert index.shape == (3,)
  assert text.k.shape == (1, *whole['block'].arguments[2].k.shape)
  assert plan.bytes_of(text) == plan.bytes_of(two['block'].arguments[2])


def test_videos_that_cards_do_not_divide_are_refused():
  mesh = AbstractMesh((8,), ('data',), (AxisType.Auto,))
  with pytest.raises(ValueError, match='1 videos at a time do not divide over 8 cards; make batch'):
    ahead.programs(MODEL, SPEC, 1, mesh=mesh)


# --- what is read ---------------------------------------------------------------------------------

HLO = """\
HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[64,16]) -> f32[8,16] {
  %p = f32[64,16]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = f32[8,16]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

%layer (carry: (s32[], bf16[64,16])) -> (s32[], bf16[64,16]) {
  %carry = (s32[], bf16[64,16]{1,0}) parameter(0)
  %all-gather-start.1 = (bf16[8,16]{1,0}, bf16[64,16]{1,0:S(1)}) all-gather-start(%x), channel_id=1
  %all-gather-done.1 = bf16[64,16]{1,0:S(1)} all-gather-done(%all-gather-start.1)
  ROOT %tuple = (s32[], bf16[64,16]{1,0}) tuple(%i, %all-gather-done.1)
}

%until (carry: (s32[], bf16[64,16])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main.1 (x: bf16[64,16], y: f32[64,16]) -> (f32[8,16], f32[3], f32[]) {
  %x = bf16[64,16]{1,0} parameter(0), sharding={devices=[8,1]<=[8]}
  %while.1 = (s32[], bf16[64,16]{1,0}) while(%init), condition=%until, body=%layer, \
backend_config={"known_trip_count":{"n":"30"},"known_init_step":{"init":"0","step":"1"}}
  %async = ((f32[64,16]{1,0}), f32[8,16]{1,0}) async-start(%y), calls=%wrapped
  %done = f32[8,16]{1,0} async-done(%async)
  %all-reduce-start = (f32[3]{0}, f32[]) all-reduce-start(%u, %v), to_apply=%add
  %all-reduce-done = (f32[3]{0}, f32[]) all-reduce-done(%all-reduce-start)
  %all-gather.2 = pred[24]{0} all-gather(%mask), dimensions={0}
  %permuted = (f8e4m3fn[40]{0}, f8e4m3fn[40]{0}, u32[], u32[]) collective-permute-start(%q)
  %both = (bf16[2,3]{1,0}, bf16[2,3]{1,0}) all-to-all(%r, %s), replica_groups={{0,1}}
  ROOT %result = (f32[8,16]{1,0}, f32[3]{0}, f32[]) tuple(%done, %w, %z)
}
"""


def test_collectives_by_hand():
  found = hlo.collectives(HLO)
  assert found.complete
  assert found.kinds == {
      'all-gather': Collective(30 + 1, 30 * 64 * 16 * 2 + 24), 'reduce-scatter': Collective(1, 512),
      'all-reduce': Collective(1, 4 * 3 + 4), 'collective-permute': Collective(1, 40),
      'all-to-all': Collective(1, 24)}


def test_loops_of_unknown_length_count_once_and_are_said():
  text = HLO.replace('"known_trip_count":{"n":"30"},', '')
  found = hlo.collectives(text)
  assert not found.complete
  assert found.kinds['all-gather'] == Collective(2, 64 * 16 * 2 + 24)
  # Where nothing is exchanged it does not matter.
  assert hlo.collectives(text.replace('all-gather', 'copy')).complete


def test_text_of_something_else_is_refused():
  with pytest.raises(ValueError, match='no ENTRY computation'):
    hlo.collectives('module @jit_f {}')


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_wide_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for _wide_mosaic_gpu_kernel
    16 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers
ptxas info    : Compile time = 550.070 ms
something else
ptxas info    : Compiling entry function '_slim_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for _slim_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
"""
WIDE = Kernel('_wide_mosaic_gpu_kernel', 168, 16, 24, 8)
SLIM = Kernel('_slim_mosaic_gpu_kernel', 40, 0, 0, 0)


def test_registers_and_spills():
  assert ptxas.parse(PTXAS) == (WIDE, SLIM)
  assert ptxas.parse('nothing') == ()


def call(name, number):
  return (f'  %c = f32[8]{{0}} custom-call(%x), custom_call_target="mosaic_gpu_v2", backend_config='
          f'{{kernel_hash = "\\0{number}", module = "ML\\00{name}_mosaic_gpu_kernel"}}')


def test_kernels_that_were_compiled_before_are_known_by_their_hash():
  kernels = ptxas.Kernels()
  both = '\n'.join([call('_slim', 1), call('_wide', 2), call('_slim', 1)])
  assert kernels.of(both, PTXAS) == (SLIM, WIDE)
  assert kernels.of(call('_wide', 2), '') == (WIDE,)
  assert kernels.of('  %d = f32[8]{0} add(%x, %y)', '') == ()


def test_what_c_code_prints_is_captured(capfd):
  with ptxas.captured() as lines:
    os.write(1, b'ptxas info    : Used 40 registers\na line of another\n')
  assert lines == ['ptxas info    : Used 40 registers', 'a line of another']
  assert capfd.readouterr().out == 'a line of another\n'


# --- what is written ------------------------------------------------------------------------------

CARD = GpuTarget('Small Card', (9, 0), GpuDeviceInfo(
    core_count=1, clock_rate_ghz=1.0, memory_bandwidth=100, device_memory_size=4000,
    l2_cache_size=1), peak_flops=1000.0)
PAIR = Machine('pair', CARD, 2)


def test_roofline_by_hand():
  bound = report.roofline(6000, 400, PAIR)
  assert bound == (3.0, 2.0)
  assert (bound.seconds, bound.bound) == (3.0, 'products')
  bound = report.roofline(2000, 400, PAIR)
  assert (*bound, bound.seconds, bound.bound) == (1.0, 2.0, 2.0, 'memory')
  unknown = GpuTarget('Unknown', (8, 0), CARD.info)
  assert report.roofline(1, 1, Machine('one', unknown, 1)) is None


def test_peaks_of_the_cards():
  # A block of the 1.3B, by hand: 297 TFLOP.
  for name, seconds in (('h200', 0.3002), ('h100', 0.3002), ('h200x8', 0.03752)):
    assert report.roofline(297 * 10**12, 0, MACHINES[name]).seconds == pytest.approx(seconds, 1e-3)
  assert report.roofline(0, 48 * 10**11, MACHINES['h200']).seconds == 1.0
  assert MACHINES['h200x8'].target is MACHINES['h200'].target
  assert report.roofline(197 * 10**12, 0, MACHINES['v5e']) == (1.0, 0.0)
  assert report.roofline(0, 819 * 10**9, MACHINES['v5e']) == (0.0, 1.0)
  assert MACHINES['v5e'].target.info.device_memory_size == 15.75 * 1024**3


REPORTS = (
    ProgramReport('step', 'the step', 1000, 500, 400, 900, 1.5, 12.25, 6000, 400,
                  kernels=(WIDE,), collectives=Collectives({'all-gather': Collective(31, 61464)},
                                                           False)),
    ProgramReport('odd', 'an odd one', 3000, 2000, 0, 0, 0.5, 1.0,
                  uncounted='it hides its work.'))


def test_json_of_a_report():
  got = json.loads(json_text(report.to_json(REPORTS, PAIR)))
  assert got['machine'] == {
      'name': 'pair', 'card': 'Small Card', 'cards': 2, 'memory_bytes': 4000, 'peak_flops': 1000.0,
      'memory_bandwidth': 100}
  step, odd = got['programs']['step'], got['programs']['odd']
  assert (step['total_bytes'], step['memory_share'], step['fits']) == (2000, 0.5, True)
  assert step['roofline'] == {'product_seconds': 3.0, 'memory_seconds': 2.0, 'seconds': 3.0,
                              'bound': 'products'}
  assert step['kernels'] == [{'name': '_wide_mosaic_gpu_kernel', 'registers': 168,
                              'stack_bytes': 16, 'spill_store_bytes': 24, 'spill_load_bytes': 8}]
  assert step['collectives'] == {'all-gather': {'number': 31, 'bytes': 61464}}
  assert (step['collectives_complete'], odd['collectives_complete']) == (False, True)
  assert (odd['total_bytes'], odd['fits'], odd['roofline']) == (5000, False, None)
  assert (odd['flops'], odd['moved_bytes'], odd['uncounted']) == (None, None, 'it hides its work.')


def test_a_refused_program_does_not_fit_and_says_what_it_would_take():
  refused = ProgramReport('big', 'a big one', 1000, 0, 0, 2000, 1.0, 2.0, 6000, 400,
                          refused='RESOURCE_EXHAUSTED: too much.')
  small = dataclasses.replace(refused, refused=None)
  assert (refused.fits(PAIR), small.fits(PAIR)) == (False, True)
  big = report.to_json([refused], PAIR)['programs']['big']
  assert (big['fits'], big['total_bytes'], big['refused']) == (
      False, 3000, 'RESOURCE_EXHAUSTED: too much.')
  assert big['roofline']['seconds'] == 3.0
  text = report.markdown([refused], PAIR)
  assert ('| a big one | 1 kB | - | - | 2 kB | 3 kB | 75% | 1.0 s | 2.0 s |\n\n'
          'a big one: does not fit; ') in text
  assert text.count('The compiler says: RESOURCE_EXHAUSTED: too much.') == 1
  assert 'does not fit' not in report.markdown([small], PAIR)


TABLES = """\
Memory of each card, 2 x Small Card of 4 kB:

| program | arguments | output | of it in place | scratch | total | of the card | traced in | \
compiled in |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| the step | 1 kB | 500 B | 400 B | 900 B | 2 kB | 50% | 1.5 s | 12.2 s |
| an odd one | 3 kB | 2 kB | 0 B | 0 B | 5 kB | 125% | 0.5 s | 1.0 s |

Work of all cards, and the time it takes at least, at 1 kFLOP/s and 100 B/s a card:

| program | products | bytes they move | products take | bytes take | at least | bound by |
| --- | --- | --- | --- | --- | --- | --- |
| the step | 6 kFLOP | 400 B | 3 s | 2 s | 3 s | products |
| an odd one | - | - | - | - | - | - |

an odd one: not counted: it hides its work.

Kernels of Pallas, by thread:

| program | kernel | registers | stack, bytes | spill stores, bytes | spill loads, bytes |
| --- | --- | --- | --- | --- | --- |
| the step | _wide_mosaic_gpu_kernel | 168 | 16 | 24 | 8 |

Exchanges between cards, results on each card for a call:

| program | exchange | how many | bytes |
| --- | --- | --- | --- |
| the step | all-gather | >= 31 | 61.46 kB |
"""


def test_tables_of_a_report():
  assert report.markdown(REPORTS, PAIR) == TABLES


@pytest.mark.parametrize(('value', 'text'), [
    (0, '0 B'), (999, '999 B'), (1000, '1 kB'), (999_999, '1 MB'), (12_840_000_000, '12.84 GB'),
    (297e12, '297 TB'), (None, '-')])
def test_amounts(value, text):
  assert report.amount(value, 'B') == text
