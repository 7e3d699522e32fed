"""The command line of preparation."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.digits import model as digits_model
from launch.build import build
from pf_jax.data.latents import LatentStore
from pf_jax.data.text_rows import TextStore
from pf_jax.models.bundle import ModelSpec
from pf_jax.models.vae import WanVae
from pf_jax.pipeline import PACKAGED
from pf_jax.viz.video import VideoWriter
from pf_jax.weights import package

ROOT = pathlib.Path(__file__).resolve().parents[2]
CAUSAL, DMD = '--config=configs/digits/causal.py:tiny', '--config=configs/digits/dmd.py'


def launch(*arguments, **variables):
  return subprocess.run([sys.executable, '-m', 'launch.prepare', *map(str, arguments)], cwd=ROOT,
                        env=os.environ | variables, capture_output=True, text=True, check=False)


def test_prompts_become_a_store(tmp_path):
  lines = tmp_path / 'prompts.txt'
  lines.write_bytes('\ufeffa white seven\r\n\r\n  a white two \r\n'.encode())
  given = [DMD, f'--config.start={PACKAGED}', f'--prompts={lines}',
           f'--config.prompts={tmp_path}/store']
  done = launch(*given)
  assert done.returncode == 0, done.stderr
  assert '2 prompts' in done.stdout
  text = package.read_spec(PACKAGED)['spec'].text
  store = TextStore(tmp_path / 'store', text.max_tokens, text.width)
  assert [store.prompt(i) for i in range(2)] == ['a white seven', 'a white two']
  lines.write_text('a white nine')
  refused = launch(*given)
  assert refused.returncode == 1
  assert 'holds other data' in refused.stderr
  assert 'Traceback' not in refused.stderr


def test_videos_become_a_store(tmp_path):
  spec = build(ModelSpec, digits_model.get_config('tiny')).vae
  shapes = jax.eval_shape(lambda: WanVae(spec, rngs=nnx.Rngs(0)))
  vae = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype), shapes)
  package.save_vae(tmp_path / 'vae', vae, spec)
  videos = tmp_path / 'videos'
  videos.mkdir()
  for name, caption in (('b', 'a white seven'), ('a', 'a white two'), ('mute', None)):
    with VideoWriter(videos / f'{name}.mp4', 64, 80, 16) as writer:
      writer.write(np.zeros((45, 64, 80, 3), np.uint8))
    if caption:
      (videos / f'{name}.txt').write_text(caption)
  done = launch(CAUSAL, f'--config.vae={tmp_path}/vae', f'--config.dataset={tmp_path}/store',
                f'--videos={videos}', '--config.clip_blocks=3')
  assert done.returncode == 0, done.stderr
  assert 'skipped: mute.mp4: there is no caption' in done.stdout
  assert f'{tmp_path}/store: 2 clips of 45 frames' in done.stdout
  store = LatentStore(tmp_path / 'store', {'latents': (12, 8, 8, 8), 'lr_latents': (3, 2, 2, 2, 8)})
  assert [store.prompt(i) for i in range(2)] == ['a white two', 'a white seven']
  assert list(json.loads((tmp_path / 'store' / 'skipped.json').read_text())['skipped']) == [
      'mute.mp4']


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--config=configs/digits/ode.py', '--videos=x'],
     "config.stage='ode' reads nothing that is prepared; wanted a config of the stage causal or"),
    (['--config=configs/digits/sample.py', '--videos=x'], 'config.stage=None reads nothing'),
    ([CAUSAL, '--prompts=x', '--config.dataset=y'],
     "--prompts is not for config.stage='causal', which is prepared from --videos=..."),
    ([CAUSAL, '--videos=x', '--batch_size=4'], "--batch_size is not for config.stage='causal'"),
    ([CAUSAL, '--videos=x'], 'give one with --config.dataset=DIR'),
    ([CAUSAL, '--config.dataset=y'], '--videos=... is missing'),
    ([DMD, '--videos=x', '--config.prompts=y'], "--videos is not for config.stage='dmd'"),
    ([DMD, '--prompts=x'], 'config.prompts names no directory'),
    ([DMD, '--config.prompts=x'], '--prompts=... is missing'),
])
def test_usage_errors_are_one_line_and_import_no_jax(arguments, message, without_jax):
  done = launch(*arguments, **without_jax)
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith('error: ')
  assert done.stderr.count('\n') == 1
  assert message in done.stderr


def test_prompts_that_cannot_be_read():
  done = launch('--config=configs/wan/dmd_1_3b.py', '--prompts=/nowhere')
  assert (done.returncode, 'Traceback' in done.stderr) == (1, False), done.stderr
  assert 'cannot read prompts from' in done.stderr
