"""One step: what moves, what is averaged, what a bad batch leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pf_jax.train import state, step
from tests.train import toy


def start(objective=None, **overrides):
  objective = objective or toy.Toy()
  config = toy.settings(**overrides)
  params = objective.init(0)
  labels = (objective.param_groups(params) if hasattr(objective, 'param_groups')
            else jax.tree.map(lambda _: 'all', params))
  optimizer = state.make_optimizer(config.optimizer, config.steps, params, labels)
  train_step = step.TrainStep(objective, optimizer, labels, config.ema_decay)
  return train_step, state.init_state(params, optimizer, 0, ema=config.ema_decay > 0)


def host(tree):
  return [np.asarray(leaf).copy() for leaf in jax.tree.leaves(tree)]


def assert_same(a, b):
  for left, right in zip(a, b, strict=True):
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize('poison', [np.nan, np.inf])
def test_bad_batch_changes_nothing_but_the_counters(poison):
  train_step, train_state = start()
  train_state, _ = train_step(train_state, toy.batch_of(0))
  before = host((train_state.params, train_state.opt_state, train_state.ema))
  bad = toy.batch_of(1)
  bad['x'][3, 2] = poison
  train_state, metrics = train_step(train_state, bad)
  assert_same(before, host((train_state.params, train_state.opt_state, train_state.ema)))
  assert (int(train_state.step), int(train_state.skipped)) == (2, 1)
  train_state, metrics = train_step(train_state, bad)
  assert (metrics['skipped'], metrics['skipped_in_a_row']) == (2, 2)
  train_state, metrics = train_step(train_state, toy.batch_of(3))
  assert (metrics['skipped'], metrics['skipped_in_a_row']) == (2, 0)
  assert np.isfinite(metrics['loss'])


def test_average_starts_fast_and_settles():
  train_step, train_state = start(ema_decay=0.9)
  ema = host(train_state.ema)
  for i in range(3):
    train_state, _ = train_step(train_state, toy.batch_of(i))
    keep = min(0.9, (1 + i) / (10 + i))
    ema = [keep * a + (1 - keep) * p
           for a, p in zip(ema, host(train_state.params), strict=True)]
  for wanted, got in zip(ema, host(train_state.ema), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)


def test_no_average_when_not_asked_for():
  train_step, train_state = start(ema_decay=0.0)
  assert train_state.ema is None
  train_state, _ = train_step(train_state, toy.batch_of(0))
  assert train_state.ema is None


def test_gradient_norms_per_group():
  train_step, train_state = start(toy.GroupedToy())
  params = jax.tree.map(jnp.array, train_state.params)
  key = jax.random.fold_in(train_state.rng, 0)
  gradients = jax.grad(lambda p: toy.Toy().loss(p, toy.batch_of(0), key)[0])(params)
  norm = lambda tree: np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(tree)))
  _, metrics = train_step(train_state, toy.batch_of(0))
  assert metrics['grad_norm/trunk'] == pytest.approx(norm(gradients.first), rel=1e-5)
  assert metrics['grad_norm/head'] == pytest.approx(norm(gradients.last), rel=1e-5)
  assert metrics['grad_norm'] == pytest.approx(norm(gradients), rel=1e-5)


def test_step_compiles_once_and_draws_new_noise_every_step():
  train_step, train_state = start()
  losses = []
  for _ in range(3):
    train_state, metrics = train_step(train_state, toy.batch_of(0))
    losses.append(float(metrics['loss']))
  assert train_step.whole._cache_size() == 1
  assert len(set(losses)) == 3


# --- parts ----------------------------------------------------------------------------------------


class Quadratic(toy.Toy):
  """Without noise: a batch's gradient is the mean of its parts'."""

  def loss(self, net, batch, key):
    del key
    error = jnp.mean((net.last(jax.nn.relu(net.first(batch['x'])))[:, 0] - batch['y'])**2)
    return error, {'error': error}


def test_a_batch_in_parts_is_the_batch():
  batch = toy.batch_of(0)
  whole, state_a = start(Quadratic())
  state_a, one = whole(state_a, batch)
  for parts in (2, 4):
    train_step, state_b = start(Quadratic())
    state_b, several = train_step.in_parts(state_b, step.split(batch, parts))
    moved = [host((x.params, x.opt_state, x.ema)) for x in (state_a, state_b)]
    for wanted, got in zip(*moved, strict=True):
      np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-7)
    assert several.keys() == one.keys()
    for name, value in one.items():
      assert float(several[name]) == pytest.approx(float(value), rel=1e-4), name


def test_parts_differ_in_noise_and_one_bad_one_spoils_the_step():
  train_step, train_state = start()
  batch = toy.batch_of(0)
  same = {name: np.repeat(value[:8], 2, axis=0) for name, value in batch.items()}
  halves = [{name: value[i::2] for name, value in same.items()} for i in range(2)]
  losses = []
  for half in halves:  # the same rows
    sums = train_step._zeros(train_state, half, None)
    sums = train_step.add(sums, train_state, half, jnp.int32(len(losses)), moving=None)
    losses.append(float(sums.loss))
  assert losses[0] != losses[1]
  before = host(train_state.params)
  halves[1]['x'][0, 0] = np.nan
  train_state, metrics = train_step.in_parts(train_state, halves)
  assert_same(before, host(train_state.params))
  assert metrics['skipped'] == 1


def test_a_batch_that_does_not_divide():
  with pytest.raises(ValueError, match='a batch of 16 does not divide into accumulate=3 parts'):
    list(step.split(toy.batch_of(0), 3))


# --- players --------------------------------------------------------------------------------------


class Duel:
  """Two numbers: `one` moves in every third step, towards 1; `two` in each, towards `one`."""

  averaged = ('one',)

  def __init__(self):
    self.players = {'one': 3, 'two': 1}

  def init(self, seed):
    return {'one': {'x': jnp.float32(0)}, 'two': {'x': jnp.float32(5)}}

  def param_groups(self, params):
    return {name: {'x': name} for name in params}

  def loss(self, params, batch, key, moving=()):
    one, two = params['one']['x'], params['two']['x']
    loss = (two - jax.lax.stop_gradient(one))**2
    return loss + ((one - 1)**2 if 'one' in moving else 0), {}


def test_players_take_turns():
  duel = Duel()
  labels = duel.param_groups(duel.init(0))
  optimizer = state.take_turns({name: optax.adam(0.1) for name in duel.players})
  train_step = step.TrainStep(duel, optimizer, labels, 0.5)
  run = state.init_state(duel.init(0), optimizer, 0, ema=True, averaged=duel.averaged)
  ones, twos, averages = [], [], []
  for index in range(7):
    moving = state.moving_parts(duel.players, index)
    run, metrics = train_step(run, None, moving=moving)
    ones.append(float(run.params['one']['x']))
    twos.append(float(run.params['two']['x']))
    averages.append(float(run.ema['one']['x']))
    assert np.isnan(metrics['grad_norm/one']) == (index % 3 != 0)
    assert np.isfinite(metrics['grad_norm/two'])
  assert set(run.ema) == {'one'}
  assert len(set(ones)) == 3, ones  # steps 0, 3 and 6
  assert ones[0] == ones[1] == ones[2] != ones[3] == ones[5] != ones[6]
  assert averages[0] == averages[2] != averages[3]
  assert len(set(twos)) == 7
  # Adam's first three updates of 0.1 each; a moment that moved meanwhile would shrink them.
  np.testing.assert_allclose([ones[0], ones[3], ones[6]], [0.1, 0.2, 0.3], atol=2e-3)
  assert [int(run.opt_state[name][0].count) for name in ('one', 'two')] == [3, 7]
