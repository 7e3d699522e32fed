"""Needs the TPU compiler (`make test-aot`, or `make .venv-aot/.tpu`), no TPU."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch import aot
from pf_jax.aot import ptxas
from pf_jax.aot.compile import Program, compile_for, device_mesh
from pf_jax.aot.targets import MACHINES, V5E, Machine
from pf_jax.kernels.attention import Segment, attend
from pf_jax.kernels.platform import target_platform

ROOT = pathlib.Path(__file__).resolve().parents[2]
GB = 10**9

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                       reason='libtpu is not installed; make .venv-aot/.tpu adds it')]


def run(*arguments):
  return subprocess.run([sys.executable, '-m', 'launch.aot', *map(str, arguments)], cwd=ROOT,
                        env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True,
                        check=False)


def shape(*sizes, dtype=jnp.bfloat16, **options):
  return jax.ShapeDtypeStruct(sizes, dtype, **options)


def report(function, *arguments, machine=MACHINES['v5e'], **options):
  return aot._report(Program('p', 'p', function, arguments, **options), machine, ptxas.Kernels())


def test_a_product_by_hand():
  made = report(lambda x, w: x @ w, shape(256, 512), shape(512, 128))
  assert made.argument_bytes == 2 * (256 * 512 + 512 * 128)
  assert made.output_bytes == 2 * 256 * 128
  assert made.flops == 2 * 256 * 512 * 128
  assert made.moved_bytes == 2 * (256 * 512 + 512 * 128 + 256 * 128)
  assert made.roofline(MACHINES['v5e']).product_seconds == pytest.approx(
      2 * 256 * 512 * 128 / 197e12)
  assert (made.kernels, made.collectives.kinds, made.refused) == ((), {}, None)
  assert made.fits(MACHINES['v5e'])


def test_donated_memory_is_taken_over():
  made = report(lambda x: x + 1, shape(1024, 1024), donate=(0,))
  assert made.alias_bytes == made.output_bytes == made.argument_bytes == 2 * 1024**2


def test_what_does_not_fit_is_counted_and_not_compiled():
  arguments = shape(3072, 1024, 1024), shape(GB)
  made = report(lambda x, unused: x * 2, *arguments)
  assert made.argument_bytes == 6 * 1024**3
  assert made.total_bytes == pytest.approx(12 * 1024**3, abs=0.01 * GB)
  assert made.refused is None
  made = report(lambda x, unused: (x * 2, x * 3), *arguments)
  assert made.argument_bytes == 6 * 1024**3  # what nobody reads is left out
  assert made.total_bytes == pytest.approx(18 * 1024**3, abs=0.01 * GB)  # two decimals are printed
  assert made.refused.startswith('RESOURCE_EXHAUSTED: Ran out of memory on HBM')
  assert not made.fits(MACHINES['v5e'])


def test_attention_is_the_reference():
  platforms = []

  def attention(q, k, v):
    platforms.append(target_platform())
    return attend(q, [Segment(k, v)])

  made = compile_for(attention, [shape(1, 256, 2, 128)] * 3, V5E)
  assert platforms == ['tpu']
  assert 'fmha' not in made.executable.as_text()


def test_what_four_chips_gather_for_a_product():
  split = NamedSharding(device_mesh(V5E, 4), PartitionSpec('data'))
  made = report(jnp.matmul, shape(256, 512, sharding=split), shape(512, 128, sharding=split),
                machine=Machine('v5ex4', V5E, 4))
  assert made.argument_bytes == 2 * (64 * 512 + 128 * 128)
  assert made.collectives.kinds == {'all-gather': (1, 2 * 512 * 128)}


def test_the_launcher_on_the_miniature(tmp_path):
  done = run('--config=configs/digits/sample.py', '--target=v5e', '--program=denoise',
             f'--output={tmp_path}')
  assert done.returncode == 0, done.stderr
  # Nothing else is said: the compiler looks for no TPU and has no lock or log to complain about.
  lines = done.stderr.splitlines()
  assert lines[:2] == ['reading sizes ...',
                       'compiling denoise a block, 4 steps for 1 x TPU v5e ...']
  assert len(lines) == 3
  data = json.loads((tmp_path / 'aot.json').read_text())
  assert data['machine'] == {
      'name': 'v5e', 'card': 'TPU v5e', 'cards': 1, 'memory_bytes': 63 * 1024**3 // 4,
      'peak_flops': 197e12, 'memory_bandwidth': 819 * GB}
  made = data['programs']['denoise']
  assert (made['fits'], made['refused']) == (True, None)
  assert (made['kernels'], made['collectives']) == ([], {})
  assert 0 < made['total_bytes'] < 0.1 * GB
  assert made['flops'] > 10**9


def test_the_block_of_the_1_3b_does_not_fit(tmp_path):
  done = run('--config=configs/wan/t2v_1_3b.py', '--target=v5e', '--program=block',
             f'--output={tmp_path}')
  assert done.returncode == 0, done.stderr
  made = json.loads((tmp_path / 'aot.json').read_text())['programs']['block']
  assert not made['fits']
  assert made['argument_bytes'] == pytest.approx(12.84 * GB, abs=0.01 * GB)  # as on an H200
  assert 20 * GB < made['total_bytes'] < 32 * GB
  assert made['flops'] == pytest.approx(297.1e12, rel=1e-3)
  assert 'the whole steady block: does not fit' in done.stdout
