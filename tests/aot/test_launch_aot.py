"""Ahead-of-time reports with the real compiler (`make test-aot`), on small programs."""

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
from pf_jax.aot.compile import Program, device_mesh
from pf_jax.aot.targets import MACHINES
from pf_jax.models import bundle
from pf_jax.rollout import block as block_lib
from pf_jax.sampling.source import ModelSource
from pf_jax.types import tree_bytes

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = '--config=configs/digits/sample.py'

pytestmark = pytest.mark.timeout(300)


def run(*arguments):
  return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT,
                        env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True,
                        check=False)


def shape(*sizes, dtype=jnp.bfloat16, **options):
  return jax.ShapeDtypeStruct(sizes, dtype, **options)


def test_a_product_by_hand():
  program = Program('product', 'a product', lambda x, w: x @ w, (shape(256, 512), shape(512, 128)))
  made = aot._report(program, MACHINES['h200'], ptxas.Kernels())
  assert made.flops == 2 * 256 * 512 * 128
  assert made.moved_bytes == 2 * (256 * 512 + 512 * 128 + 256 * 128)
  assert made.argument_bytes == 2 * (256 * 512 + 512 * 128)
  assert made.roofline(MACHINES['h200']).product_seconds == pytest.approx(
      2 * 256 * 512 * 128 / 989.4e12)
  assert made.roofline(MACHINES['h200']).bound == 'memory'
  assert (made.kernels, made.collectives.kinds) == ((), {})


def test_elementwise_work_reads_and_writes_everything_once():
  program = Program('sum', 'a sum', lambda x, y: x + y, (shape(64, 64), shape(64, 64)))
  made = aot._report(program, MACHINES['h200'], ptxas.Kernels())
  assert (made.flops, made.moved_bytes) == (0, 3 * 2 * 64 * 64)


def test_what_eight_cards_gather_for_a_product():
  split = NamedSharding(device_mesh(MACHINES['h200x8'].target, 8), PartitionSpec('data'))
  arguments = shape(256, 512, sharding=split), shape(512, 128, sharding=split)

  def layers(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w) @ w.T, None), x, length=3)[0]

  product = 2 * 256 * 512 * 128
  for function, flops, number, sizes in (
      (jnp.matmul, product, 1, {512 * 128}),  # every card needs all of the second factor
      (layers, 6 * product, 3, {512 * 128, 256 * 512})):  # or all of the first, in each turn
    made = aot._report(Program('p', 'p', function, arguments), MACHINES['h200x8'], ptxas.Kernels())
    assert made.flops == flops  # on all cards together
    assert made.argument_bytes == 2 * (32 * 512 + 64 * 128)
    assert made.collectives.complete
    gathered = made.collectives.kinds['all-gather']
    assert gathered.number == number
    assert gathered.bytes in {2 * number * size for size in sizes}


def test_the_launcher_on_the_miniature(tmp_path):
  done = run('-m', 'launch.aot', CONFIG, '--target=h200x8', '--config.batch_size=8',
             '--program=switch', f'--output={tmp_path}')
  assert done.returncode == 0, done.stderr
  assert 'compiling change of prompt for 8 x NVIDIA H200 ...' in done.stderr
  data = json.loads((tmp_path / 'aot.json').read_text())
  assert (data['machine']['cards'], data['unfinished']) == (8, [])
  assert data['choices']['batch_size'] == 8
  assert list(data['programs']) == ['switch']
  made = data['programs']['switch']
  assert made['total_bytes'] == (made['argument_bytes'] + made['output_bytes']
                                 - made['alias_bytes'] + made['scratch_bytes'])
  # One video on each card, updated in place; all weights that a clean pass needs.
  model, spec = ModelSource().specs({}, {})
  models = bundle.shapes(model).without_text()
  shapes = block_lib.input_shapes(models, 1, spec)
  state = tree_bytes(shapes.state)
  assert made['alias_bytes'] == state
  needed = tree_bytes(models.transformer) + tree_bytes(models.compressor)
  assert state < made['argument_bytes'] <= state + needed + tree_bytes(shapes.text)
  assert made['collectives'] == {}, 'videos do not meet'
  assert made['flops'] % 8 == 0 < made['flops']
  assert made['roofline']['seconds'] == max(
      made['flops'] / 8 / 989.4e12, made['moved_bytes'] / 8 / 4.8e12)
  assert (tmp_path / 'aot.md').read_text() in done.stdout

  again = run('-m', 'launch.aot', CONFIG, '--program=switch', f'--output={tmp_path}')
  assert again.returncode == 1
  assert 'aot.json' in again.stderr
  assert 'pass --overwrite' in again.stderr


def test_a_number_of_videos_that_eight_cards_do_not_divide(tmp_path):
  done = run('-m', 'launch.aot', CONFIG, '--target=h200x8', f'--output={tmp_path}/out')
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == (
      'error: 4 videos at a time do not divide over 8 cards; make batch_size a multiple of 8 or '
      'choose one card.')
  assert not (tmp_path / 'out').exists()


KERNELS = """
import os
os.environ['MOSAIC_GPU_DUMP_PTXAS'] = '1'
import jax, jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from launch import aot
from pf_jax.aot import ptxas
from pf_jax.aot.compile import Program
from pf_jax.aot.targets import MACHINES

X = jax.ShapeDtypeStruct((128, 128), jnp.float32)

def body(x_ref, out_ref):
  out_ref[...] = x_ref[...] * 2

def double(x):
  return plgpu.kernel(body, out_type=X, grid=(1,), grid_names=('g',),
                      compiler_params=plgpu.CompilerParams(
                          lowering_semantics=plgpu.LoweringSemantics.Warpgroup))(x)

kernels = ptxas.Kernels()
for function in (double, lambda x: double(double(x) + x), jnp.tanh):
  made = aot._report(Program('p', 'p', function, (X,)), MACHINES['h200'], kernels)
  print(len(made.kernels), *[(k.registers > 8, k.spill_store_bytes, k.name)
                             for k in made.kernels], made.uncounted is not None)
"""


def test_registers_of_a_kernel_in_every_program_that_has_it():
  done = run('-c', KERNELS)
  assert done.returncode == 0, done.stderr
  held = "1 (True, 0, 'body_mosaic_gpu_kernel') True"
  assert done.stdout.splitlines() == [held, held, '0 False']
