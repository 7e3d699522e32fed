"""Whether an objective learns: its loss on one batch, before and after a few steps of Adam."""

import jax
import optax

from pf_jax.train.state import Objective
from pf_jax.types import PyTree


def fall(objective: Objective, batch: PyTree, *, steps: int, rate: float = 3e-3) -> float:
  """Loss after `steps` over the loss before, batch and noise being the same."""
  params, optimizer = objective.init(0), optax.adam(rate)

  @jax.jit
  def advance(params, state):
    (loss, _), gradient = jax.value_and_grad(objective.loss, has_aux=True)(
        params, batch, jax.random.key(0))
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, loss

  state, losses = optimizer.init(params), []
  for _ in range(steps + 1):
    params, state, loss = advance(params, state)
    losses.append(float(loss))
  return losses[-1] / losses[0]
