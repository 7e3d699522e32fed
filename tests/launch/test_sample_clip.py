"""The bidirectional baseline from the command line: refusals, a clip, dry run, signals."""

import contextlib
import json
import pathlib
import signal
import subprocess
import sys

import pytest

from configs.wan import model as wan_model
from launch.build import build
from pf_jax.models.bundle import ModelSpec
from pf_jax.testing import random_models
from pf_jax.viz.video import read_video
from tests.sampled import environment
from tests.weights import checkpoints

pytestmark = pytest.mark.timeout(400)
ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = '--config=configs/wan/baseline_1_3b.py:tiny'


def start(*arguments, **more):
  return subprocess.Popen([sys.executable, '-m', 'launch.sample_clip', *map(str, arguments)],
                          cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment(**more))


def finish(process):
  """(exit status, standard output, standard error)."""
  out, errors = process.communicate(timeout=200)
  return process.returncode, out, errors


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """Flags: Wan2.1's directory, and another transformer with two entries beside it."""
  root, models = tmp_path_factory.mktemp('weights'), random_models(
      build(ModelSpec, wan_model.get_config('tiny')), 1)
  wan = checkpoints.write_wan(root / 'Wan2.1', models)
  dmd = checkpoints.write_self_forcing(root / 'dmd.pt', models, models)
  return [f'--weights={wan}', f'--transformer={dmd}', '--entry=generator']


@pytest.fixture(scope='module')
def finished(weights, tmp_path_factory):
  """(directory, standard output, standard error) of a finished run."""
  root = tmp_path_factory.mktemp('finished') / 'run'
  status, out, errors = finish(start(TINY, '--prompt=a cat', *weights, f'--output={root}'))
  assert status == 0, errors
  return root, out, errors


def test_a_clip(finished):
  """A clip of 6 latent frames, 21 pixel frames, decoded as 2 and 4."""
  root, out, errors = finished
  (path,) = root.glob('*.mp4')
  assert {file.name for file in root.iterdir()} == {
      path.name, f'{path.stem}.json', f'{path.stem}.png', '.lock'}
  assert len(read_video(path).pixels) == 21
  sidecar = json.loads(path.with_suffix('.json').read_text())
  assert (sidecar['frames'], sidecar['config']['sampler']['solver']) == (21, 'unipc')
  assert list(sidecar['metrics']['compile_seconds_of']) == [
      'text', 'start', 'step', 'first', 'next']
  assert 'transformer/dmd.pt' in sidecar['model']
  assert not [name for name in sidecar['model'] if 'compressor' in name]
  assert "entry 'generator' is used" in out
  assert 'compressor' not in out + errors
  for line in ('compiled in ', 'estimate: memory ', f'wrote {path}'):
    assert line in out
  for line in ('estimate: time ', 'step 3/3 ', 'frame 21/21 '):
    assert line in errors


def test_a_clip_is_not_replaced_unasked(finished, weights):
  root, _, _ = finished
  before = {path: path.stat().st_mtime_ns for path in root.iterdir() if path.name != '.lock'}
  status, _, errors = finish(start(TINY, '--prompt=a cat', *weights, f'--output={root}'))
  assert status == 1
  assert errors.startswith('error: ')
  assert errors.endswith('exists already; pass --overwrite or choose another directory.\n')
  assert {path: path.stat().st_mtime_ns for path in before} == before


MISTAKES = [
    (['--prompt='], 'error: --prompt=... is missing'),
    (['--prompt=a | 3: b', '--weights=x'], 'error: a clip has one prompt'),
    (['--prompt=a', '--seed=-1', '--weights=x'], 'must be an integer within 0..'),
    (['--prompt=a', '--output=', '--weights=x'], 'error: --output=... is missing'),
    (['--prompt=a', '--weights=x', '--memory_gb=8'], 'error: --memory_gb belongs to --dry_run'),
    (['--prompt=a', '--dry_run', '--memory_gb=0'], 'must be a positive number of gigabytes'),
    (['--prompt=a'], 'error: this config has a section model'),
    (['--prompt=a', '--dry_run', '--entry=x'], 'error: --entry goes beside --weights=DIR'),
    (['--prompt=a', '--config.sampler.step=3'], 'did you mean config.sampler.steps?'),
    (['--prompt=a', '--compressor=x'], 'error: --compressor is unknown'),
]


def test_mistakes_are_named_before_jax_is_imported(without_jax, tmp_path):
  for first in range(0, len(MISTAKES), 2):  # two at a time: most of it is Python starting
    running = [(start(TINY, f'--output={tmp_path}/run', *arguments, **without_jax), message)
               for arguments, message in MISTAKES[first:first + 2]]
    for process, message in running:
      status, out, errors = finish(process)
      assert message in errors, errors
      assert (status, out) == (2, '')
      assert all(line.startswith('error: ') for line in errors.splitlines())
  assert not (tmp_path / 'run').exists()


def test_what_does_not_fit_is_one_line_and_leaves_nothing(tmp_path):
  wrong = start(TINY, '--prompt=a', '--weights=x', f'--output={tmp_path}/new/run',
                '--config.model.video.fps=2000')
  small = start(TINY, '--prompt=a', '--dry_run', '--memory_gb=0.0001')
  status, _, errors = finish(wrong)
  assert (status, errors.count('\n')) == (1, 1)
  assert errors.startswith('error: fps=2000 must be positive and at most 1000')
  assert not list(tmp_path.iterdir())
  status, out, errors = finish(small)
  assert status == 1
  assert errors.startswith('error: 0.0 GB are needed, the device has 0.0 GB; lower config.')
  assert out.startswith('21 frames of 48x32 at 16 fps; 3 steps of unipc, guidance 6\n'
                        '36 tokens that attend each other\n')
  assert 'peak while it is decoded, scratch not counted ' in out


def test_sigterm_ends_a_run_in_one_line_and_leaves_nothing(finished, weights, tmp_path):
  """Far more steps than could be finished; the programs are those of the finished run."""
  process = start(TINY, '--prompt=a cat', *weights, f'--output={tmp_path}/new/run',
                  '--config.sampler.steps=20000')
  with contextlib.ExitStack() as stack:
    stack.callback(process.kill)  # whatever fails here
    line = ''
    while 'estimate: time' not in line:
      line = process.stderr.readline()
      assert line, 'ended by itself'
    process.terminate()
    status, out, errors = finish(process)
  assert status == 128 + signal.SIGTERM
  assert [line for line in errors.splitlines() if not line.startswith('step ')] == [
      'interrupted; nothing was kept.']
  assert 'wrote' not in out
  assert not list(tmp_path.iterdir())


def test_exit_status_of_ctrl_c(without_jax):
  code = ('import os, signal, time\n'
          'from launch import config_flags, sample_clip\n'
          'signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # not deaf in the background
          'sample_clip._run = lambda args: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))\n'
          'config_flags.run(sample_clip._sample_clip)')
  done = subprocess.run([sys.executable, '-c', code, TINY, '--prompt=a', '--weights=x',
                         '--output=x'], cwd=ROOT, capture_output=True, text=True, timeout=50,
                        env=environment(**without_jax))
  assert (done.returncode, done.stderr) == (130, 'interrupted; nothing was kept.\n')
