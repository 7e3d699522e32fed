"""How runs end that do not end by themselves: nothing but finite numbers, and a status to go by."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from pf_jax.train import checkpoint, loop, metrics
from tests.reliability import duel
from tests.train import toy

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_storm_of_bad_steps_leaves_what_was_before_it(tmp_path):
  def batches(step):
    for index, batch in enumerate(toy.batches(step), start=step):
      if index >= 4:
        batch['x'][3, 2] = np.inf
      yield batch

  settings = dict(log_every=1, save_every=2, max_skipped_in_a_row=5, mfu=False)
  before = loop.fit(duel.Duel(), batches, toy.settings(4, **settings), tmp_path / 'before')
  with pytest.raises(loop.NonFiniteTraining, match='5 steps in a row up to step 9'):
    loop.fit(duel.Duel(), batches, toy.settings(20, **settings), tmp_path / 'storm')
  records = metrics.read_metrics(tmp_path / 'storm' / metrics.METRICS_FILE)
  assert [record['skipped_in_a_row'] for record in records] == [0, 0, 0, 0, 1, 2, 3, 4, 5]
  with checkpoint.Checkpoints(tmp_path / 'storm', read_only=True) as checkpoints:
    saved, _ = checkpoints.restore(before.state)
  assert (int(saved.step), int(saved.skipped), int(saved.skipped_in_a_row)) == (9, 5, 5)
  kept = [(run.params, run.opt_state, run.ema) for run in (saved, before.state)]
  for leaf, wanted in zip(*map(jax.tree.leaves, kept), strict=True):
    np.testing.assert_array_equal(leaf, wanted)
    assert np.isfinite(leaf).all()


CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=None):
  return ConfigDict(dict(stage='vae', train=dict(steps=40, log_every=5, save_every=15, mfu=False)))
"""
LAUNCH = """
import dataclasses, runpy, time
from pf_jax.train import loop, stages
from tests.reliability.kills import fingerprint
from tests.train import toy

@dataclasses.dataclass(frozen=True)
class Stage:
  pass

def run(stage, config, workdir):
  def slowly(step):
    for batch in toy.batches(step):
      print('step', flush=True)
      time.sleep(0.05)
      yield batch

  result = loop.fit(toy.Toy(), slowly, config, workdir)
  print('state', fingerprint(result.state))
  return result

stages.STAGES['vae'] = stages.Stage(Stage, run)
runpy.run_module('launch.train', run_name='__main__', alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sigterm_saves_and_exits_with_status_0(tmp_path):
  config = tmp_path / 'small.py'
  config.write_text(CONFIG)

  def train(name, steps=None):
    """Trains to the end, or to a SIGTERM after so many steps; what it says last."""
    command = [sys.executable, '-c', LAUNCH, f'--config={config}', f'--workdir={tmp_path / name}']
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE,
                          text=True) as process:
      lines = []
      for line in process.stdout:
        lines.append(line.strip())
        if lines.count('step') == steps:
          process.send_signal(signal.SIGTERM)
          steps = None
    assert process.returncode == 0
    return lines[-2:]

  whole = train('straight')
  assert whole[1] == 'finished at step 40.'
  said = train('stopped', 8)[1]
  assert said.startswith('stopped at step ')
  with checkpoint.Checkpoints(tmp_path / 'stopped', read_only=True) as checkpoints:
    assert checkpoints.steps()[-1] == int(said.split()[-1][:-1])
  assert train('stopped') == whole
