"""One optimizer step: loss, gradients per group, update, average; skipped when not finite."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pf_jax.train.state import Objective, TrainState

Array = jax.Array
PyTree = Any


def group_norms(tree: PyTree, labels: PyTree) -> dict[str, Array]:
  """Euclidean norm of each labelled group of leaves, float32 []."""
  squares: dict[str, Array] = {}
  for label, leaf in zip(jax.tree.leaves(labels), jax.tree.leaves(tree), strict=True):
    square = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    squares[label] = squares.get(label, jnp.zeros(())) + square
  return {label: jnp.sqrt(square) for label, square in sorted(squares.items())}


def _average(ema: PyTree, params: PyTree, decay: float, step: Array) -> PyTree:
  """Moves the average towards `params`; young averages move faster, or they stay at the start."""
  if ema is None:
    return None
  young = (1.0 + step) / (10.0 + step)
  keep = jnp.minimum(decay, young)
  return jax.tree.map(lambda a, p: (keep * a + (1.0 - keep) * p).astype(a.dtype), ema, params)


def _average_of(state: TrainState, params: PyTree, decay: float, moving: frozenset[str] | None
                ) -> PyTree:
  """The average after a step; that of parts that rest does not change."""
  if state.ema is None or moving is None:
    return _average(state.ema, params, decay, state.step)
  return {name: _average(part, params[name], decay, state.step) if name in moving else part
          for name, part in state.ema.items()}


def _resting(labels: PyTree, moving: frozenset[str] | None) -> set[str]:
  """Groups of which no part moves."""
  if moving is None:
    return set()
  groups = {name: set(jax.tree.leaves(part)) for name, part in labels.items()}
  return set().union(*groups.values()) - set().union(*(groups[name] for name in moving))


def make_train_step(objective: Objective, optimizer: optax.GradientTransformation,
                    labels: PyTree, ema_decay: float,
                    ) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
  """Compiles the step. It donates the state: keep using the returned one only.

  A step whose loss or gradient is not finite changes nothing but the counters, so parameters,
  moments and average stay finite whatever a batch does.

  Args:
    objective: the loss.
    optimizer: from `make_optimizer`, or from `take_turns` if the objective has players.
    labels: group name of each parameter leaf.
    ema_decay: decay of the parameter average (unused when the state has none).

  Returns:
    A jitted (state, batch, moving=None) -> (state, metrics); metrics are float32 scalars on the
    device, NaN for gradients of parts that do not move. `moving` is static: a frozenset of parts.
  """

  def train_step(state: TrainState, batch: PyTree, moving: frozenset[str] | None = None
                 ) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(state.rng, state.step)
    turn: dict[str, Any] = {} if moving is None else {'moving': moving}
    (loss, metrics), gradients = jax.value_and_grad(objective.loss, has_aux=True)(
        state.params, batch, key, **turn)
    norms = group_norms(gradients, labels)
    total = jnp.sqrt(sum(jnp.square(norm) for norm in norms.values()))
    finite = jnp.isfinite(loss) & jnp.isfinite(total)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, **turn)
    params = optax.apply_updates(state.params, updates)
    ema = _average_of(state, params, ema_decay, moving)
    old = (state.params, state.opt_state, state.ema)
    params, opt_state, ema = jax.tree.map(
        lambda new, kept: jnp.where(finite, new, kept), (params, opt_state, ema), old)
    skip = (~finite).astype(jnp.int32)
    in_a_row = (state.skipped_in_a_row + 1) * skip
    new_state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema,
                           rng=state.rng, skipped=state.skipped + skip, skipped_in_a_row=in_a_row)
    resting = _resting(labels, moving)
    by_group = {f'grad_norm/{name}': jnp.nan if name in resting else norm
                for name, norm in norms.items()}
    metrics = {'loss': loss, **metrics, 'grad_norm': total,
               **(by_group if len(norms) > 1 else {}),
               'skipped': new_state.skipped, 'skipped_in_a_row': in_a_row}
    return new_state, {name: jnp.asarray(v, jnp.float32) for name, v in metrics.items()}

  return jax.jit(train_step, donate_argnums=0, static_argnames='moving')
