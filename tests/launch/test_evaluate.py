"""The command line of the evaluation: refusals without JAX, then a whole tiny run."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from pf_jax import outputs
from pf_jax.weights import package
from tests.evals import micro

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = '--config=configs/digits/evaluate.py:tiny'
# The second policy is the first one under another name: nothing more to compile.
SMALL = ['--config.world.height=32', '--config.world.width=32', '--config.world.glyph_size=16',
         '--config.ablation.policies.no_mid.top_k=1', "--config.ablation.starts=('clip',)",
         '--config.ablation.blocks=2', '--config.ablation.judged=(2,)']


def launch(*arguments, **environment):
  return subprocess.run([sys.executable, '-m', 'launch.evaluate', *map(str, arguments)], cwd=ROOT,
                        env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A training's workdir."""
  workdir = tmp_path_factory.mktemp('workdir')
  package.save_model(workdir / 'model', micro.models(), choices=micro.CHOICES)
  return workdir


def test_mistakes_are_named_before_jax_is_imported(without_jax, tmp_path):
  for argument, message in (
      ('--config.vidoes=3', '--config.vidoes is unknown (did you mean config.videos?)'),
      ('--config.videos=0', 'config: videos=0 must be at least 1'),
      ('--config.ablation.judged=(2,9)', 'judged=(2, 9) must rise within'),
      ('--config.ablation.baseline=pakc', "baseline='pakc' is not one of the policies"),
      ('--checkpiont=x', 'did you mean --checkpoint?')):
    done = launch(CONFIG, argument, f'--output={tmp_path}/out', **without_jax)
    assert message in done.stderr
    assert (done.returncode, 'JAX WAS IMPORTED' in done.stderr) == (2, False)
    assert all(line.startswith('error: ') for line in done.stderr.splitlines())
  assert not (tmp_path / 'out').exists()


def test_a_model_that_is_not_there(tmp_path):
  done = launch(CONFIG, f'--checkpoint={tmp_path}/none', f'--output={tmp_path}/out')
  assert (done.returncode, done.stdout) == (1, '')
  assert f"error: checkpoint '{tmp_path}/none' does not exist" in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'out').exists()


@pytest.mark.timeout(400)
def test_a_whole_run_and_its_continuation(model, tmp_path):
  arguments = [CONFIG, *SMALL, f'--checkpoint={model}', f'--output={tmp_path}']
  with outputs.claim_directory(tmp_path):
    done = launch(*arguments)
  assert done.returncode == 1
  assert 'is in use by process' in done.stderr
  done = launch(*arguments)
  assert (done.returncode, done.stdout) == (0, f'{tmp_path}/table.md\n'), done.stderr
  assert 'clip-no_mid: class_accuracy' in done.stderr
  data = json.loads((tmp_path / 'results.json').read_text())
  assert list(data['runs']) == ['clip-pack', 'parts-both', 'parts-swapped', 'clip-no_mid']
  assert data['runs']['clip-no_mid']['inputs']['cache']['top_k'] == 1
  assert data['runs']['clip-pack']['report']['spec']['blocks'] == [2]
  rows = data['runs']['clip-no_mid']['difference']
  assert {row['mean'] for row in rows} <= {0.0, None}
  assert data['model']['choices']['cache']['mid_capacity'] == 3
  for name in ('table.md', 'curves-clip.png', 'sheet-clip-pack.png', 'sheet-parts-swapped.png'):
    assert (tmp_path / name).stat().st_size > 500

  (tmp_path / 'runs' / 'parts-both.json').unlink()
  done = launch(*arguments)
  assert done.returncode == 0
  assert [line for line in done.stderr.splitlines() if 'kept from before' in line] == [
      f'{name}: kept from before.' for name in ('clip-pack', 'parts-swapped', 'clip-no_mid')]
  done = launch(*arguments, '--config.seed=5')
  assert done.returncode == 1
  assert 'was made with other settings (seed)' in done.stderr
  assert 'Traceback' not in done.stderr
