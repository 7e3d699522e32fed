"""Two vectors that play against each other: all that `fit` does for the stage "dmd", in a toy."""

import jax
import jax.numpy as jnp

from tests.train import toy


class Duel:
  """The judge learns from what the maker made; every third step the maker follows the judge."""

  averaged = ('maker',)

  def __init__(self):
    self.players = {'maker': 3, 'judge': 1}

  def init(self, seed):
    keys = jax.random.split(jax.random.key(seed))
    return {name: {'w': jax.random.normal(key, (4,))}
            for name, key in zip(self.players, keys, strict=True)}

  def param_groups(self, params):
    return {name: {'w': name} for name in params}

  def generate(self, params, batch, step):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(5), step), batch['x'].shape)
    return {**batch, 'made': batch['x'] * params['maker']['w'] + 0.1 * noise}

  def loss(self, params, batch, key, moving=()):
    maker, judge = params['maker']['w'], params['judge']['w']
    x = batch['x'] + 0.01 * jax.random.normal(key, batch['x'].shape)
    loss = jnp.mean((x * judge - batch['made'])**2)
    if 'maker' in moving:
      made = jnp.sum(x * (maker + jax.lax.stop_gradient(judge)), axis=1)
      loss += jnp.mean((made - batch['y'])**2)
    return loss, {'apart': jnp.sqrt(jnp.sum((maker - judge)**2))}


OBJECTIVES = {'toy': toy.Toy, 'duel': Duel}
