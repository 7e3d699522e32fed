"""The command line of training: refusals without JAX, then a whole tiny run."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = '--config=configs/digits/vae.py:tiny'


def launch(*arguments, **environment):
  return subprocess.run([sys.executable, '-m', 'launch.train', *map(str, arguments)], cwd=ROOT,
                        env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--config.train.step=3'],
     '--config.train.step is unknown (did you mean config.train.steps?)'),
    (['--config.steps=3'], '(did you mean config.train.steps?)'),
    (['--config.train.optimizer.learning_rat=1.0', '--config.trian.steps=1'],
     'config.train.optimizer.learning_rate?'),
    (['--config.train.steps=abc'], 'config.train.steps'),
    (['--config.train.steps=1.5'], 'config.train.steps'),
    (['--config.train.optimizer.learning_rate=fast'], 'learning_rate'),
    (['--config.train.optimizer.learning_rate=nan'], 'learning_rate=nan must be finite'),
    (['--config.train.optimizer.name=sgd'], 'use adamw or muon'),
    (['--config.train.steps=0'], 'steps=0 must be at least 1'),
    (['--config.train.steps=-5'], 'steps=-5'),
    (['--config.stage=vea'], 'did you mean vae?'),
    (['--wrkdir=x'], 'did you mean --workdir?'),
    (['extra'], "unexpected argument 'extra'"),
    (['--config=configs/digits/va.py'], 'did you mean configs/digits/vae.py?'),
    (['--config=configs/digits/vae.py:tny'], 'did you mean tiny?'),
    (['--config=configs/arguments.py'], 'get_config'),
])
def test_mistakes_are_named_before_jax_is_imported(arguments, message, without_jax, tmp_path):
  given = [] if any(a.startswith('--config=') for a in arguments) else [CONFIG]
  start = time.monotonic()
  done = launch(*given, *arguments, f'--workdir={tmp_path}/run', **without_jax)
  assert message in done.stderr
  assert done.returncode == 2
  assert 'JAX WAS IMPORTED' not in done.stderr
  assert 'Traceback' not in done.stderr
  assert all(line.startswith('error: ') for line in done.stderr.splitlines())
  assert not (tmp_path / 'run').exists()
  assert time.monotonic() - start < 10


def test_missing_flags(without_jax):
  done = launch(CONFIG, **without_jax)
  assert (done.returncode, done.stderr) == (2, 'error: --workdir=... is missing; see --help.\n')
  done = launch('--workdir=x', **without_jax)
  assert (done.returncode, done.stderr) == (2, 'error: --config=... is missing; see --help.\n')


def test_help_is_quick_and_complete(without_jax):
  start = time.monotonic()
  done = launch('--help', **without_jax)
  assert time.monotonic() - start < 3
  assert 'python -m launch.train --config=configs/digits/vae.py' in done.stdout
  assert {'--config', '--workdir'} <= set(done.stdout.replace(':', ' ').split())


def test_model_mistakes_are_named_without_a_traceback(tmp_path):
  done = launch(CONFIG, '--config.model.video.height=65', '--config.eval_clips=0',
                f'--workdir={tmp_path}')
  assert done.returncode == 2
  assert 'height=65 is not a multiple of 16' in done.stderr
  assert 'Traceback' not in done.stderr


SMALL_STAGE = """
from ml_collections import ConfigDict

def get_config(arg=None):
  return ConfigDict(dict(stage='vae', train=dict(steps=4, save_every=2)))
"""
FULL_DISK = """
import dataclasses, pathlib, runpy, shutil
from pf_jax.train import loop, stages
from tests.train import toy

@dataclasses.dataclass(frozen=True)
class Stage:
  pass

def run(stage, config, workdir):
  usage = shutil.disk_usage
  full = lambda path: pathlib.Path(workdir, 'checkpoints/00000002').exists()
  shutil.disk_usage = lambda path: usage(path)._replace(free=1000 if full(path) else 10**9)
  return loop.fit(toy.Toy(), toy.batches, config, workdir)

stages.STAGES['vae'] = stages.Stage(Stage, run)
runpy.run_module('launch.train', run_name='__main__', alter_sys=True)
"""


def test_full_disk_is_one_line(tmp_path):
  config, run = tmp_path / 'small.py', tmp_path / 'run'
  config.write_text(SMALL_STAGE)
  done = subprocess.run([sys.executable, '-c', FULL_DISK, f'--config={config}', f'--workdir={run}'],
                        cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 1
  lines = [line for line in done.stderr.splitlines() if not line.startswith('step ')]
  message = (f'error: cannot save into {run}/checkpoints: No space left: 1.0 MB are needed, 0.0 MB '
             'free. Step 2 is intact; free some space and give the same command again.')
  assert lines == [message]


def test_file_in_place_of_the_directory_is_refused(tmp_path):
  (tmp_path / 'run').write_text('mine')
  done = launch(CONFIG, f'--workdir={tmp_path}/run')
  assert (done.returncode, done.stderr.count('\n')) == (1, 1)
  assert 'is not a directory' in done.stderr


@pytest.mark.timeout(400)
def test_vae_stage_runs_and_resumes(tmp_path):
  # Compiling dominates: XLA_FLAGS are those of all tests (conftest.py).
  options = ['--config.train.optimizer.schedule=constant',
             '--config.train.log_every=1', f'--workdir={tmp_path}']
  done = launch(CONFIG, *options, '--config.train.steps=2')
  assert done.returncode == 0, done.stderr
  assert 'finished at step 2' in done.stdout
  records = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [(r['step'], r['kind']) for r in records] == [(1, 'train'), (2, 'train'), (2, 'eval')]
  assert {'psnr', 'psnr_low_resolution'} <= set(records[-1])
  assert (tmp_path / 'reconstruction.png').stat().st_size > 1000
  statistics = json.loads((tmp_path / 'vae' / 'vae.json').read_text())
  assert len(statistics['latent_mean']) == len(statistics['latent_std']) == 8
  assert min(statistics['latent_std']) > 0
  assert (tmp_path / 'vae' / 'vae.safetensors').stat().st_size > 1000
  other = launch(CONFIG, *options, '--config.model.vae.base_width=4')
  assert other.returncode == 1
  assert 'does not fit this configuration' in other.stderr
  assert 'Traceback' not in other.stderr


# --- dry runs -------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_memory_of_one_card_and_of_several(tmp_path):
  done = launch('--config=configs/digits/causal.py:tiny', '--dry_run', '--cards=1,2')
  assert done.returncode == 0, done.stderr
  titles = [line for line in done.stdout.splitlines() if line.startswith('memory of each of')]
  assert [title.split(' (')[0] for title in titles] == [
      'memory of each of 1 x NVIDIA H200', 'memory of each of 2 x NVIDIA H200']
  assert done.stdout.count('trained parameters') == 2
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--card=h2000'], 'did you mean h200?'),
    (['--cards=1,x'], '--cards=x must be numbers'),
    (['--cards=8,0'], '--cards=0 must be numbers')])
def test_unknown_cards_are_refused_before_jax_is_imported(arguments, message, without_jax):
  done = launch('--config=configs/digits/causal.py:tiny', *arguments, '--dry_run', **without_jax)
  assert (done.returncode, done.stderr.count('\n')) == (2, 1), done.stderr
  assert message in done.stderr


@pytest.mark.parametrize(('arguments', 'code', 'message'), [
    (['--config=configs/digits/dmd.py', '--config.start=/nowhere'], 1, "'/nowhere' does not exist"),
    (['--config=configs/digits/vae.py:tiny'], 2, 'VaeStage has no memory plan'),
])
def test_dry_runs_that_cannot_be(arguments, code, message):
  done = launch(*arguments, '--dry_run')
  assert (done.returncode, 'Traceback' in done.stderr) == (code, False), done.stderr
  assert message in done.stderr
