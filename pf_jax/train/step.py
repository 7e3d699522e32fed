"""One optimizer step: loss, gradients per group, update, average; skipped when not finite."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pf_jax.train import sharding
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


def split(batch: PyTree, parts: int) -> Iterator[PyTree]:
  """Cuts a batch into equal parts along the leading axis of every leaf.

  Raises:
    ValueError: an axis that does not divide.
  """
  if parts == 1:
    yield batch
    return
  for leaf in jax.tree.leaves(batch):
    if leaf.shape[0] % parts:
      raise ValueError(f'a batch of {leaf.shape[0]} does not divide into accumulate={parts} parts; '
                       'make it a multiple.')
  for part in range(parts):
    yield jax.tree.map(lambda x, i=part: x[i * (n := x.shape[0] // parts):(i + 1) * n], batch)


class Sums(NamedTuple):
  """What the parts of a batch add up to.

  Attributes:
    loss: float32 [].
    metrics: scalars.
    gradients: of the parameters that move.
  """

  loss: Array
  metrics: dict[str, Array]
  gradients: PyTree


class TrainStep:
  """One optimizer step, compiled. It donates the state: keep using the returned one only.

  A step whose loss or gradient is not finite changes nothing but the counters, so parameters,
  moments and average stay finite whatever a batch does.

  Args:
    objective: the loss.
    optimizer: from `make_optimizer`, or from `take_turns` if the objective has players.
    labels: group name of each parameter leaf.
    ema_decay: decay of the parameter average (unused when the state has none).
  """

  def __init__(self, objective: Objective, optimizer: optax.GradientTransformation, labels: PyTree,
               ema_decay: float):
    self._objective, self._optimizer = objective, optimizer
    self._labels, self._ema_decay = labels, ema_decay
    self._metrics: dict[frozenset[str] | None, tuple[str, ...]] = {}  # names, by who moves
    self.whole = jax.jit(self._whole, donate_argnums=0, static_argnames='moving')
    self.add = jax.jit(self._add_part, donate_argnums=0, static_argnames='moving')
    self.apply = jax.jit(self._apply_sums, donate_argnums=0,
                          static_argnames=('moving', 'parts'))

  def __call__(self, state: TrainState, batch: PyTree, moving: frozenset[str] | None = None
               ) -> tuple[TrainState, dict[str, Array]]:
    """A step on a batch.

    Args:
      state: is donated.
      batch: of the objective.
      moving: names of the players that move; None: there are no players.

    Returns:
      The next state, and metrics: float32 scalars on the device, NaN for gradients of players that
      rest.
    """
    return self.whole(state, batch, moving=moving)

  def in_parts(self, state: TrainState, batches: Iterable[PyTree],
               moving: frozenset[str] | None = None) -> tuple[TrainState, dict[str, Array]]:
    """A step on the mean gradient of several batches, of which only one is in memory at a time.

    Args:
      state: is donated.
      batches: at least one.
      moving: as in a step on one batch.
    """
    sums, parts = None, 0
    for batch in batches:
      sums = self._zeros(state, batch, moving) if sums is None else sums
      sums = self.add(sums, state, batch, jnp.int32(parts), moving=moving)
      parts += 1
    return self.apply(state, sums, moving=moving, parts=parts)

  def gradients(self, state: TrainState, batch: PyTree, *, moving: frozenset[str] | None) -> Sums:
    """Loss, metrics and gradients of one batch; not compiled."""
    return self._gradients(state, batch, self._key(state), moving)

  def _whole(self, state: TrainState, batch: PyTree, moving: frozenset[str] | None = None
             ) -> tuple[TrainState, dict[str, Array]]:
    return self._update(state, self.gradients(state, batch, moving=moving), moving)

  def _add_part(self, sums: Sums, state: TrainState, batch: PyTree, part: Array,
                moving: frozenset[str] | None) -> Sums:
    key = jax.random.fold_in(self._key(state), part)
    return jax.tree.map(jnp.add, sums, self._gradients(state, batch, key, moving))

  def _apply_sums(self, state: TrainState, sums: Sums, moving: frozenset[str] | None, parts: int
                  ) -> tuple[TrainState, dict[str, Array]]:
    return self._update(state, jax.tree.map(lambda x: x / parts, sums), moving)

  def _zeros(self, state: TrainState, batch: PyTree, moving: frozenset[str] | None) -> Sums:
    if moving not in self._metrics:
      shapes = jax.eval_shape(lambda params, batch, key: self._loss(params, batch, key, moving)[1],
                              state.params, batch, state.rng)
      self._metrics[moving] = tuple(shapes)
    zeros = {name: jnp.zeros((), jnp.float32) for name in self._metrics[moving]}
    # Gradients lie where their parameters lie.
    return Sums(jnp.zeros((), jnp.float32), zeros,
                jax.tree.map(jnp.zeros_like, _part(state.params, moving)))

  def _key(self, state: TrainState) -> Array:
    return jax.random.fold_in(state.rng, state.step)

  def _loss(self, params: PyTree, batch: PyTree, key: Array, moving: frozenset[str] | None
            ) -> tuple[Array, dict[str, Array]]:
    turn: dict[str, Any] = {} if moving is None else {'moving': moving}
    return self._objective.loss(params, batch, key, **turn)

  def _gradients(self, state: TrainState, batch: PyTree, key: Array,
                 moving: frozenset[str] | None) -> Sums:
    def loss(part: PyTree):
      return self._loss(_replaced(state.params, part, moving), batch, key, moving)

    (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(
        _part(state.params, moving))
    return Sums(value, {name: jnp.asarray(v, jnp.float32) for name, v in metrics.items()},
                sharding.constrain(gradients))

  def _update(self, state: TrainState, sums: Sums, moving: frozenset[str] | None
              ) -> tuple[TrainState, dict[str, Array]]:
    norms = group_norms(sums.gradients, _part(self._labels, moving))
    total = jnp.sqrt(sum(jnp.square(norm) for norm in norms.values()))
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(total)
    turn: dict[str, Any] = {} if moving is None else {'moving': moving}
    old = _part(state.params, moving)
    updates, opt_state = self._optimizer.update(sums.gradients, state.opt_state, old, **turn)
    params = _replaced(state.params, optax.apply_updates(old, updates), moving)
    ema = _average_of(state, params, self._ema_decay, moving)
    params, opt_state, ema = sharding.constrain(jax.tree.map(
        lambda new, kept: jnp.where(finite, new, kept), (params, opt_state, ema),
        (state.params, state.opt_state, state.ema)))
    skip = (~finite).astype(jnp.int32)
    new_state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema,
                           rng=state.rng, skipped=state.skipped + skip,
                           skipped_in_a_row=(state.skipped_in_a_row + 1) * skip)
    groups = sorted(set(jax.tree.leaves(self._labels)))
    by_group = {f'grad_norm/{name}': norms.get(name, jnp.nan) for name in groups}
    metrics = {'loss': sums.loss, **sums.metrics, 'grad_norm': total,
               **(by_group if len(groups) > 1 else {}),
               'skipped': new_state.skipped, 'skipped_in_a_row': new_state.skipped_in_a_row}
    return new_state, {name: jnp.asarray(v, jnp.float32) for name, v in metrics.items()}


def _part(params: PyTree, moving: frozenset[str] | None) -> PyTree:
  """What moves."""
  return params if moving is None else {name: params[name] for name in sorted(moving)}


def _replaced(params: PyTree, part: PyTree, moving: frozenset[str] | None) -> PyTree:
  """All parameters, with what moves put in."""
  return part if moving is None else {**params, **part}


def _average_of(state: TrainState, params: PyTree, decay: float, moving: frozenset[str] | None
                ) -> PyTree:
  """The average after a step; that of parts that rest does not change."""
  if state.ema is None or moving is None:
    return _average(state.ema, params, decay, state.step)
  return {name: _average(part, params[name], decay, state.step) if name in moving else part
          for name, part in state.ema.items()}
