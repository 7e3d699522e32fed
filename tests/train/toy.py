"""A regression that trains in milliseconds. As a script: python toy.py WORKDIR STEPS SAVE_EVERY."""

import hashlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pf_jax.train import config, loop, state


class Net(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(4, 8, rngs=rngs)
    self.last = nnx.Linear(8, 1, rngs=rngs)


class Toy:
  """Fits the sum of the inputs; inputs get noise from the step's key."""

  def init(self, seed):
    return Net(nnx.Rngs(seed))

  def loss(self, net, batch, key):
    x = batch['x'] + 0.01 * jax.random.normal(key, batch['x'].shape)
    error = jnp.mean((net.last(jax.nn.relu(net.first(x)))[:, 0] - batch['y']) ** 2)
    return error, {'rmse': jnp.sqrt(error)}


class GroupedToy(Toy):
  def param_groups(self, params):
    return state.label_by_prefix(params, {'first': 'trunk'}, default='head')


def batch_of(step):
  x = np.random.default_rng((7, step)).normal(size=(16, 4)).astype(np.float32)
  return {'x': x, 'y': x.sum(1)}


def batches(step):
  while True:
    yield batch_of(step)
    step += 1


def settings(steps=20, **overrides):
  optimizer = config.OptimizerConfig(learning_rate=1e-2, schedule='constant', warmup_steps=2,
                                     weight_decay=0.01)
  values = dict(steps=steps, log_every=5, save_every=5, ema_decay=0.9, optimizer=optimizer)
  return config.TrainConfig(**(values | overrides))


def digest(train_state):
  """One hash over parameters, moments, average, key and counters."""
  leaves = jax.tree.leaves((train_state.params, train_state.opt_state, train_state.ema,
                            train_state.step, jax.random.key_data(train_state.rng)))
  return hashlib.sha256(b''.join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def main():
  def slowly(step):
    for batch in batches(step):
      time.sleep(0.02)
      print('step', flush=True)
      yield batch

  result = loop.fit(Toy(), slowly, settings(int(sys.argv[2]), save_every=int(sys.argv[3])),
                    sys.argv[1])
  print('digest', digest(result.state), flush=True)


if __name__ == '__main__':
  main()
