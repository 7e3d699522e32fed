"""Released weights from the command line: sample, dry run, convert, export, and what is refused."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs.wan import model as wan_model
from launch.build import build
from pf_jax.models.bundle import ModelSpec
from pf_jax.testing import random_models
from pf_jax.weights import convert, networks, package
from pf_jax.weights.load import load_network
from tests.sampled import environment
from tests.weights import checkpoints, hostile, released

pytestmark = pytest.mark.timeout(400)
ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = '--config=configs/wan/t2v_1_3b.py'
SPEC = build(ModelSpec, wan_model.get_config('tiny,frames=3'))


def launch(module, *arguments):
  return subprocess.run([sys.executable, '-m', f'launch.{module}', *map(str, arguments)], cwd=ROOT,
                        capture_output=True, text=True, timeout=300, env=environment())


@pytest.fixture(scope='module')
def models():
  return random_models(SPEC, 1)


@pytest.fixture(scope='module')
def wan(models, tmp_path_factory):
  return checkpoints.write_wan(tmp_path_factory.mktemp('weights') / 'Wan2.1', models)


def test_sampling_released_weights_in_blocks_of_three(models, wan, tmp_path):
  wan = shutil.copytree(wan, tmp_path / 'Wan2.1')
  dmd = checkpoints.write_self_forcing(tmp_path / 'dmd.pt', models, models)
  done = launch('sample', f'{CONFIG}:tiny,frames=3', f'--weights={wan}', f'--transformer={dmd}',
                '--prompt=a white seven', '--seconds=3', f'--output={tmp_path}/run',
                '--save_latents')
  assert done.returncode == 0, done.stderr
  assert "entry 'generator_ema' is used; 'generator', 'critic' left." in done.stdout
  assert 'the LR branch works alone (zero-shot)' in done.stdout
  metrics = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
  # 3 s x 16 fps in blocks of 3 latent frames, 12 pixel frames; the first has 9.
  assert (metrics['blocks'], metrics['frames'], metrics['compilations_after_block_1']) == (4, 45, 0)
  assert metrics['predicted_cache_bytes'] == metrics['cache_bytes']
  run = json.loads((tmp_path / 'run' / 'run.json').read_text())
  assert run['source']['weights']['transformer'] == str(dmd)
  wan.rename(tmp_path / 'elsewhere')
  lost = launch('decode', f'--latents={tmp_path}/run', f'--output={tmp_path}/again')
  assert (lost.returncode, lost.stderr) == (
      1, f"error: there is no file or directory '{tmp_path}/Wan2.1'.\n")
  again = launch('decode', f'--latents={tmp_path}/run', f'--output={tmp_path}/again',
                 f'--weights={tmp_path}/elsewhere')
  assert again.returncode == 0, again.stderr
  first, second = (next(p.glob('*.mp4')).read_bytes()
                   for p in (tmp_path / 'run', tmp_path / 'again'))
  assert first == second


MISTAKES = [
    (['--weights=nowhere'], "there is no file or directory 'nowhere'"),
    ([], 'say where they are with --weights=DIR'),
    (['--checkpoint=runs/x'], '--checkpoint brings its own sizes'),
    (['--config.model.transformer.num_layer=3'], 'mean config.model.transformer.num_layers'),
    (['--config.model.video.width=850', '--weights=x'], 'width=850 is not a multiple of 16'),
    (['--config.model.video.frames_per_block=5', '--weights=x'], 'is not a multiple of the compr'),
]


@pytest.fixture(scope='module')
def mistaken(tmp_path_factory):
  """What comes of each mistake, in one process; and where it would have written."""
  out = tmp_path_factory.mktemp('mistaken')
  commands = [[CONFIG, '--prompt=a', f'--output={out}/run', *given] for given, _ in MISTAKES]
  return hostile.launch('sample', commands), out


@pytest.mark.parametrize('number', range(len(MISTAKES)), ids=[m for _, m in MISTAKES])
def test_mistakes(mistaken, number):
  done, message = mistaken[0][number], MISTAKES[number][1]
  assert done.code in (1, 2)
  assert message in done.err
  assert all(line.startswith('error: ') for line in done.err.splitlines())
  assert not list(mistaken[1].rglob('*.mp4'))


def test_weights_need_sizes():
  done = launch('sample', '--config=configs/digits/sample.py', '--prompt=a', '--weights=x',
                '--output=x')
  assert done.returncode == 2
  assert '--weights needs a config that says the sizes' in done.stderr


def test_converting_from_the_command_line(tmp_path):
  """The released VAE's layout at full size would take half a gigabyte: what is refused is quick,
  what works is `convert`'s own test; here flags reach it."""
  flags = {'--model=wan': 'did you mean wan_14b?',
           '--model=vae --format=npz': 'use one of safetensors, orbax, both',
           '--model=vae --dtype=int8': 'use one of bfloat16, float32'}
  missing, *unknown = hostile.launch('convert', [
      [f'--source={tmp_path}', f'--output={tmp_path}/out', *flag.split()]
      for flag in ('--model=wan_1_3b', *flags)])
  assert missing.code == 1
  assert f'error: {tmp_path} holds no transformer' in missing.err
  assert not (tmp_path / 'out').exists()
  for done, message in zip(unknown, flags.values(), strict=True):
    assert done.code == 2
    assert message in done.err


@pytest.mark.slow
def test_converting_the_released_vae_s_layout(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {t.wan: rng.standard_normal(t.shape, np.float32) for t in released.vae()}
  checkpoints.write_torch(tmp_path / 'Wan2.1_VAE.pth', tensors)
  done = launch('convert', f'--source={tmp_path}', '--model=vae', f'--output={tmp_path}/out',
                '--dtype=float32')
  assert done.returncode == 0, done.stderr
  assert sorted(os.listdir(tmp_path / 'out')) == ['.lock', 'vae.orbax', 'vae.safetensors']
  spec = networks.VaeSpec.wan21()
  for path in (convert.converted_path(tmp_path / 'out', 'vae'),
               convert.orbax_path(tmp_path / 'out', 'vae')):
    again = networks.to_released(load_network(path, spec))
    for name, tensor in tensors.items():
      np.testing.assert_array_equal(again[name], tensor)


def test_exporting_from_the_command_line(models, tmp_path):
  package.save_model(tmp_path / 'model', models)
  done = launch('export', f'--checkpoint={tmp_path}/model', f'--output={tmp_path}/out')
  assert done.returncode == 0, done.stderr
  loaded = package.load_model(tmp_path / 'model').models
  for part in ('transformer', 'vae', 'text'):
    jax.tree.map(np.testing.assert_array_equal,
                 load_network(tmp_path / 'out', getattr(SPEC, part)), getattr(loaded, part))
  shapes = jax.eval_shape(lambda: loaded.compressor)
  jax.tree.map(np.testing.assert_array_equal,
               package.load_module(tmp_path / 'out/compressor/compressor.safetensors', shapes),
               loaded.compressor)
  again = launch('export', f'--checkpoint={tmp_path}/model', f'--output={tmp_path}/out')
  assert again.returncode == 1
  assert 'exists already' in again.stderr
  wrong = launch('export', '--format=onnx', f'--output={tmp_path}/x')
  assert (wrong.returncode, 'use diffusers' in wrong.stderr) == (2, True)
