"""Schedules, parameter groups, and which parameters which optimizer sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pf_jax.train import state
from pf_jax.train.config import OptimizerConfig, TrainConfig
from tests.train import toy


def params():
  return {'embedding': jnp.ones((6, 4)), 'layers': {'proj': jnp.ones((3, 4, 4)),
                                                   'scale': jnp.ones((3, 4))},
          'out': {'kernel': jnp.ones((4, 2)), 'bias': jnp.ones((2,))}}


def test_schedules():
  cosine = state.learning_rate(OptimizerConfig(warmup_steps=4, final_fraction=0.1), 14, 2.0)
  np.testing.assert_allclose([cosine(i) for i in (0, 1, 3, 4, 9, 14, 99)],
                             [0.5, 1.0, 2.0, 2.0, 1.1, 0.2, 0.2], rtol=1e-6)
  constant = state.learning_rate(OptimizerConfig(schedule='constant', warmup_steps=2), 10, 1.0)
  np.testing.assert_allclose([constant(i) for i in (0, 1, 2, 50)], [0.5, 1, 1, 1])
  plain = state.learning_rate(OptimizerConfig(schedule='constant', warmup_steps=0), 10, 1.0)
  assert plain(0) == 1
  stable = state.learning_rate(OptimizerConfig(
      schedule='wsd', warmup_steps=2, decay_steps=4, final_fraction=0.5), 10, 2.0)
  np.testing.assert_allclose([stable(i) for i in (0, 1, 5, 6, 8, 10, 99)],
                             [1.0, 2.0, 2.0, 2.0, 1.5, 1.0, 1.0], rtol=1e-6)


def test_labels_by_longest_prefix():
  labels = state.label_by_prefix(params(), {'layers': 'a', 'layers/scale': 'b'}, default='rest')
  assert labels == {'embedding': 'rest', 'layers': {'proj': 'a', 'scale': 'b'},
                    'out': {'kernel': 'rest', 'bias': 'rest'}}


def test_module_paths_leave_out_variables():
  names = []
  state.map_with_names(lambda n, leaf: names.append('/'.join(n)), toy.Toy().init(0))
  assert sorted(names) == ['first/bias', 'first/kernel', 'last/bias', 'last/kernel']


def test_muon_takes_matrices_only():
  axes = state.default_muon_axes(params())
  assert axes['layers']['proj'] == optax.contrib.MuonDimensionNumbers(1, 2)
  assert axes['out']['kernel'] == optax.contrib.MuonDimensionNumbers(0, 1)
  assert axes['embedding'] is axes['layers']['scale'] is axes['out']['bias'] is None


def update_once(config, labels=None, grads=1.0):
  tree = params()
  labels = labels or jax.tree.map(lambda _: 'all', tree)
  optimizer = state.make_optimizer(config, 10, tree, labels)
  gradients = jax.tree.map(lambda p: jnp.full_like(p, grads), tree)
  updates, _ = optimizer.update(gradients, optimizer.init(tree), tree)
  return updates


CONSTANT = OptimizerConfig(learning_rate=0.1, schedule='constant', warmup_steps=0)


def test_weight_decay_spares_gains_and_biases():
  plain = update_once(CONSTANT)
  decayed = update_once(dataclasses.replace(CONSTANT, weight_decay=0.5))
  change = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), plain, decayed)
  assert change['layers']['scale'] == change['out']['bias'] == 0
  for decay in (change['embedding'], change['layers']['proj'], change['out']['kernel']):
    assert decay == pytest.approx(0.1 * 0.5, rel=1e-5)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_groups_scale_and_freeze(name):
  labels = {'embedding': 'e', 'layers': {'proj': 'l', 'scale': 'l'},
            'out': {'kernel': 'o', 'bias': 'o'}}
  config = dataclasses.replace(CONSTANT, name=name, clip_norm=0.0)
  plain = update_once(config, labels)
  scaled = update_once(dataclasses.replace(config, group_scale={'e': 0.0, 'l': 0.5}), labels)
  assert not np.any(scaled['embedding'])
  np.testing.assert_allclose(scaled['layers']['proj'], 0.5 * plain['layers']['proj'], rtol=1e-5)
  np.testing.assert_allclose(scaled['out']['kernel'], plain['out']['kernel'], rtol=1e-5)


def test_frozen_groups_have_no_state_and_no_part_in_clipping():
  tree = params()
  labels = {'embedding': 'e', 'layers': {'proj': 'l', 'scale': 'l'},
            'out': {'kernel': 'o', 'bias': 'o'}}
  config = dataclasses.replace(CONSTANT, group_scale={'l': 0.0})
  free = state.make_optimizer(CONSTANT, 10, tree, labels).init(tree)
  frozen = state.make_optimizer(config, 10, tree, labels).init(tree)
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(s)) for s in (free, frozen)]
  assert sizes[0] - sizes[1] == 2 * (48 + 12)


def test_wrong_groups_are_named():
  with pytest.raises(ValueError, match=r"\['heads'\].*\['all'\]"):
    update_once(dataclasses.replace(CONSTANT, group_scale={'heads': 1.0}))
  with pytest.raises(ValueError, match='freezes every group'):
    update_once(dataclasses.replace(CONSTANT, group_scale={'all': 0.0}))


@pytest.mark.parametrize('bad', [
    dict(name='sgd'), dict(schedule='linear'), dict(learning_rate=-1.0),
    dict(learning_rate=float('nan')), dict(b1=1.0), dict(warmup_steps=-1)])
def test_bad_optimizer_settings(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    OptimizerConfig(**bad)


@pytest.mark.parametrize('bad', [
    dict(steps=0), dict(log_every=0), dict(save_every=-1), dict(keep=1), dict(ema_decay=1.0),
    dict(seed=-1), dict(eval_every=-1), dict(max_skipped_in_a_row=0)])
def test_bad_train_settings(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    TrainConfig(**bad)
