"""The loop: interruption and resume are bit-exact, bad runs stop cleanly."""

import os
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from pf_jax import outputs
from pf_jax.train import checkpoint, loop, metrics
from tests.train import toy


def fit(workdir, steps=20, batches=toy.batches, objective=None, **overrides):
  return loop.fit(objective or toy.Toy(), batches, toy.settings(steps, **overrides), workdir,
                  say=lambda message: None)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """An uninterrupted run of 20 steps."""
  workdir = tmp_path_factory.mktemp('straight')
  return fit(workdir), workdir


def records(workdir):
  return metrics.read_metrics(workdir / metrics.METRICS_FILE)


def test_loss_falls_and_is_logged(straight):
  result, workdir = straight
  assert (result.step, result.interrupted) == (20, False)
  assert [r['step'] for r in records(workdir)] == [5, 10, 15, 20]
  losses = [r['loss'] for r in records(workdir)]
  assert losses[-1] < losses[0]
  assert {'rmse', 'grad_norm', 'skipped', 'steps_per_second'} <= set(records(workdir)[0])


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_resumed_run_is_bit_equal(straight, tmp_path, number):
  def interrupted(step):
    for index, batch in enumerate(toy.batches(step), start=step):
      if index == 7:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # an impatient second one changes nothing
      yield batch

  handler = signal.getsignal(number)
  first = fit(tmp_path, batches=interrupted)
  assert first.interrupted
  assert 7 <= first.step < 20
  assert signal.getsignal(number) is handler
  resumed = fit(tmp_path)
  assert not resumed.interrupted
  assert toy.digest(resumed.state) == toy.digest(straight[0].state)
  assert [r['step'] for r in records(tmp_path)] == [5, first.step, 10, 15, 20]


def test_sigkill_loses_at_most_one_save_interval(straight, tmp_path):
  command = [sys.executable, '-m', 'tests.train.toy', str(tmp_path), '20', '3']
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    for count, _ in enumerate(process.stdout, start=1):
      if count == 11:
        process.send_signal(signal.SIGKILL)
        break
    process.stdout.read()
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps()[-1] >= 3
  resumed = fit(tmp_path, save_every=3)
  assert toy.digest(resumed.state) == toy.digest(straight[0].state)
  assert not list((tmp_path / 'checkpoints').glob('*tmp*'))


def test_finished_run_is_left_alone(straight):
  result, workdir = straight
  again = fit(workdir)
  assert (again.step, again.compile_seconds) == (20, 0)
  assert toy.digest(again.state) == toy.digest(result.state)


def test_longer_run_continues(tmp_path):
  fit(tmp_path, steps=10)
  assert fit(tmp_path, steps=12).step == 12
  assert [r['step'] for r in records(tmp_path)] == [5, 10, 12]


def poisoned(first, last):
  def batches(step):
    for index, batch in enumerate(toy.batches(step), start=step):
      if first <= index < last:
        batch['x'][0, 0] = np.nan
      yield batch

  return batches


def test_bad_steps_are_skipped_and_counted(tmp_path):
  result = fit(tmp_path, batches=poisoned(6, 8))
  assert int(result.state.skipped) == 2
  assert [r['skipped'] for r in records(tmp_path)] == [0, 2, 2, 2]
  assert all(np.isfinite(r['loss']) for r in records(tmp_path))


def test_too_many_bad_steps_abort_with_finite_parameters(tmp_path):
  with pytest.raises(loop.NonFiniteTraining, match='4 steps in a row up to step 10'):
    fit(tmp_path, batches=poisoned(6, 99), max_skipped_in_a_row=4)
  assert records(tmp_path)[-1]['skipped_in_a_row'] == 4
  net = checkpoint.load_params(tmp_path, toy.Toy().init(0))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(net))


def test_bad_steps_between_two_logs_are_noticed(tmp_path):
  with pytest.raises(loop.NonFiniteTraining, match='3 steps in a row'):
    fit(tmp_path, batches=poisoned(5, 8), max_skipped_in_a_row=3)


def test_second_run_in_the_directory_is_refused(tmp_path):
  with outputs.claim_directory(tmp_path), pytest.raises(outputs.DirectoryInUse):
    fit(tmp_path)


def test_source_that_ends(tmp_path):
  with pytest.raises(ValueError, match='step=3 of 20'):
    fit(tmp_path, batches=lambda step: iter([toy.batch_of(i) for i in range(3)]))
  assert fit(tmp_path).step == 20  # what was done is kept


def test_error_of_the_source_is_not_hidden(tmp_path):
  def failing(step):
    yield toy.batch_of(step)
    raise OSError('disk on fire')

  with pytest.raises(OSError, match='disk on fire'):
    fit(tmp_path, batches=failing)


def test_evaluation_sees_the_average(tmp_path):
  seen = []

  def evaluate(params, step):
    seen.append((step, jax.device_get(params.first.kernel[...])))
    return {'score': step}

  result = loop.fit(toy.Toy(), toy.batches, toy.settings(7, eval_every=5), tmp_path,
                    evaluate=evaluate, say=print)
  assert [step for step, _ in seen] == [5, 7]
  np.testing.assert_array_equal(seen[-1][1], result.state.ema.first.kernel[...])
  assert [r['score'] for r in records(tmp_path) if r['kind'] == 'eval'] == [5, 7]


def test_works_outside_the_main_thread(tmp_path):
  results = []
  thread = threading.Thread(target=lambda: results.append(fit(tmp_path, steps=2)))
  thread.start()
  thread.join()
  assert results[0].step == 2


def test_groups_can_be_frozen(tmp_path):
  frozen = toy.config.OptimizerConfig(learning_rate=1e-2, group_scale={'trunk': 0.0})
  start = toy.Toy().init(0)
  result = fit(tmp_path, steps=3, objective=toy.GroupedToy(), optimizer=frozen, ema_decay=0.0)
  np.testing.assert_array_equal(result.state.params.first.kernel[...], start.first.kernel[...])
  assert not np.array_equal(result.state.params.last.kernel[...], start.last.kernel[...])
  assert {'grad_norm/trunk', 'grad_norm/head'} <= set(result.metrics)


# --- utilisation, and what a run depends on -------------------------------------------------------


class Rolling(toy.Toy):
  """Makes its batches beforehand, at a cost of a million operations."""

  def generation_flops(self, params, batch, step):
    return 10**6


def test_flops_of_steps_and_of_what_precedes_them(monkeypatch, tmp_path):
  monkeypatch.setattr(loop.flops, 'peak_flops', lambda device: (1e9, 'a test'))
  # A row of a batch takes 4 x 8 and 8 x 1 multiply-adds, the gradient of weights the same, that of
  # the hidden layer 8 x 1: 16 rows of 2 x (2 x 40 + 8) operations.
  for name, objective, wanted in (('a', toy.Toy(), 2816), ('b', Rolling(), 1_002_816)):
    result = fit(tmp_path / name, objective=objective)
    got = result.metrics
    assert got['tflops_per_second'] * 1e12 / got['steps_per_second'] == pytest.approx(wanted)
    assert got['mfu'] == pytest.approx(got['tflops_per_second'] * 1e3)
  assert 'mfu' not in fit(tmp_path / 'c', mfu=False).metrics


def test_parts_of_a_batch_are_steps_as_well(tmp_path):
  whole, parts = fit(tmp_path / 'a'), fit(tmp_path / 'b', accumulate=4)
  assert parts.metrics['loss'] == pytest.approx(whole.metrics['loss'], rel=0.2)  # other noise
  flops = [run.metrics['tflops_per_second'] / run.metrics['steps_per_second']
           for run in (whole, parts)]
  assert flops[0] == pytest.approx(flops[1])


def test_a_run_is_not_resumed_beside_other_files(tmp_path):
  about = {'teacher': {'model': 'abc'}, 'clips': 1}
  fit_with = lambda **about: loop.fit(toy.Toy(), toy.batches, toy.settings(10), tmp_path,
                                      about=about, say=lambda message: None)
  fit_with(**about)
  fit_with(**about)  # nothing left to do
  with pytest.raises(checkpoint.CheckpointMismatch,
                     match=r"teacher: \{'model': 'abc'\} then, \{'model': 'xyz'\} now"):
    fit_with(teacher={'model': 'xyz'}, clips=1)


def test_more_cards_than_there_are(tmp_path):
  with pytest.raises(ValueError, match='devices=7 are wanted, 1 are here'):
    fit(tmp_path, devices=7)


def test_a_step_that_compiles_is_no_measure_of_speed(tmp_path):
  fit(tmp_path, steps=2, log_every=1)
  first, second = records(tmp_path)
  assert first['steps_per_second'] is first['mfu'] is None
  assert second['steps_per_second'] > 0
