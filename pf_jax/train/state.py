"""What a training run carries from step to step, and the optimizer that moves it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from pf_jax.train.config import OptimizerConfig

Array = jax.Array
PyTree = Any

# A module of this name holds layers stacked on a leading axis, which is not a matrix axis.
STACKED = 'layers'


class Objective(Protocol):
  """What `fit` trains. Methods beyond these two are optional and looked up by name.

  Optional:
    param_groups(params) -> pytree of str, one label per leaf: gradient norms are reported for
      each group, and `OptimizerConfig.group_scale` scales or freezes a group.
    muon_axes(params) -> pytree of optax.contrib.MuonDimensionNumbers or None (None: Adam).
    players: {part: n}, where `params` is a dict of parts that play against each other: a part moves
      in every n-th step, with an optimizer of its own. `loss` then takes `moving`, the parts that
      move in this step; the gradient is taken in these alone.
    averaged: parts of `params` that have a moving average; all without it.
    place(put): replaces the arrays that the objective itself holds by put(arrays), for several
      cards.
    generation_flops(params, batch, step) -> what `generate` computes, in FLOPs.
    generate(params, batch, step) -> batch: makes the batch of a step, or of a part of it, with the
      networks as they are, before the compiled step and outside of it. A function of its arguments
      alone.
  """

  def init(self, seed: int) -> PyTree:
    """Fresh parameters: an nnx.Module or any other pytree of arrays."""

  def loss(self, params: PyTree, batch: PyTree, key: Array) -> tuple[Array, dict[str, Array]]:
    """The scalar loss and scalar metrics of one batch; pure, traced by jax.jit."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything a resumed run needs; the batch of a step is a function of `step` alone.

  Attributes:
    step: optimizer steps done, int32 [].
    params: the trained pytree.
    opt_state: optax state.
    ema: exponential moving average of `params`, or None.
    rng: base PRNG key; step i draws from fold_in(rng, i).
    skipped: steps skipped so far because loss or gradients were not finite, int32 [].
    skipped_in_a_row: how many of them directly before now, int32 [].
  """

  step: Array
  params: PyTree
  opt_state: PyTree
  ema: PyTree
  rng: Array
  skipped: Array
  skipped_in_a_row: Array


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
  """The readable names along a pytree path, without nnx.Variable's inner `value`."""
  names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
  return tuple(names[:-1] if len(names) > 1 and names[-1] == 'value' else names)


def map_with_names(function: Any, tree: PyTree) -> PyTree:
  """Applies `function(names, leaf)` to every leaf; see `path_names`."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_names(path), leaf), tree)


def label_by_prefix(params: PyTree, prefixes: Mapping[str, str], default: str) -> PyTree:
  """Labels each leaf by the longest matching path prefix, as `param_groups` returns.

  Args:
    params: any pytree.
    prefixes: path prefix such as 'compressor/lr' -> group name.
    default: group of everything else.
  """
  by_length = sorted(prefixes, key=len, reverse=True)

  def label(names: tuple[str, ...], leaf: Array) -> str:
    del leaf
    path = '/'.join(names) + '/'
    return next((prefixes[p] for p in by_length if path.startswith(p.rstrip('/') + '/')), default)

  return map_with_names(label, params)


def _matrix_rank(names: tuple[str, ...], leaf: Array) -> int:
  """Rank without the axis of stacked layers."""
  return leaf.ndim - (1 if STACKED in names else 0)


def default_muon_axes(params: PyTree) -> PyTree:
  """Muon for [in, out] matrices, stacked or not; Adam for embeddings, heads and the rest."""

  def axes(names: tuple[str, ...], leaf: Array) -> Any:
    outer = any('embed' in name or name == 'head' for name in names)
    if outer or _matrix_rank(names, leaf) != 2 or 'modulation' in names[-1]:
      return None
    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

  return map_with_names(axes, params)


def learning_rate(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
  """Linear warm-up, then what `config.schedule` says over the remaining steps."""
  warmup = min(config.warmup_steps, steps)
  after: optax.Schedule
  if config.schedule == 'constant':
    after = optax.constant_schedule(peak)
  elif config.schedule == 'wsd':
    decay = min(config.decay_steps, steps - warmup)
    after = optax.linear_schedule(peak, peak * config.final_fraction, decay,
                                  transition_begin=steps - warmup - decay)
  else:
    after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config.final_fraction)
  if warmup == 0:
    return after
  # The first step already moves: the warm-up runs over (i + 1) / warmup.
  ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([ramp, after], [warmup])


def _base_optimizer(config: OptimizerConfig, steps: int, muon_axes: Any) -> Any:
  def decays(params: PyTree) -> PyTree:
    return map_with_names(lambda names, leaf: _matrix_rank(names, leaf) >= 2, params)

  rate = learning_rate(config, steps, config.learning_rate)
  if config.name == 'adamw':
    return optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay,
                       mask=decays)
  adam_rate = learning_rate(config, steps, config.adam_learning_rate or config.learning_rate)
  return optax.contrib.muon(
      rate, beta=config.muon_momentum, weight_decay=config.weight_decay, consistent_rms=0.2,
      adam_b1=config.b1, adam_b2=config.b2, adam_learning_rate=adam_rate,
      muon_weight_dimension_numbers=muon_axes)


def _scale_groups(labels: PyTree, scale: Mapping[str, float]) -> optax.GradientTransformation:
  def update(updates: PyTree, params: PyTree) -> PyTree:
    del params
    return jax.tree.map(lambda label, u: u * scale.get(label, 1.0), labels, updates)

  return optax.stateless(update)


def make_optimizer(config: OptimizerConfig, steps: int, params: PyTree, labels: PyTree,
                   muon_axes: PyTree | None = None) -> optax.GradientTransformation:
  """Clipping, AdamW or Muon on a schedule, and per-group factors.

  Frozen groups (factor 0) have no optimizer state, take no part in the clipping norm and stay
  bit-equal.

  Args:
    config: see `OptimizerConfig`.
    steps: length of the run, for the schedule.
    params: the pytree to train (shapes only).
    labels: pytree of group names, as `Objective.param_groups` returns.
    muon_axes: pytree of MuonDimensionNumbers or None; default `default_muon_axes`.

  Raises:
    ValueError: `group_scale` names a group that does not exist, or freezes everything.
  """
  groups = set(jax.tree.leaves(labels))
  scale = dict(config.group_scale)
  if unknown := sorted(set(scale) - groups):
    raise ValueError(f'group_scale names {unknown}; the groups here are {sorted(groups)}.')
  frozen = {name for name, factor in scale.items() if factor == 0}
  if frozen == groups:
    raise ValueError(f'group_scale freezes every group {sorted(groups)}; leave one to train.')
  if muon_axes is None and config.name == 'muon':
    muon_axes = default_muon_axes(params)
  parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  parts.append(_base_optimizer(config, steps, muon_axes))
  optimizer = optax.chain(*parts)
  if frozen:
    trained = jax.tree.map(lambda label: label not in frozen, labels)
    still = jax.tree.map(lambda label: label in frozen, labels)
    optimizer = optax.chain(optax.masked(optax.set_to_zero(), still),
                            optax.masked(optimizer, trained))
  if any(factor != 1 for factor in scale.values()):
    optimizer = optax.chain(optimizer, _scale_groups(labels, scale))
  return optimizer


def moving_parts(players: Mapping[str, int], step: int) -> frozenset[str]:
  """The parts that move in a step; all of them do in step 0."""
  return frozenset(name for name, period in players.items() if step % period == 0)


def take_turns(optimizers: Mapping[str, optax.GradientTransformation]
               ) -> optax.GradientTransformationExtraArgs:
  """An optimizer for each part of a dict; only the parts named by `moving` move.

  Updates and parameters are those of the moving parts alone; the others keep their moments as if
  there had been no step.
  """

  def init(params: PyTree) -> PyTree:
    return {name: optimizer.init(params[name]) for name, optimizer in optimizers.items()}

  def update(updates: PyTree, state: PyTree, params: PyTree = None, *, moving: frozenset[str]):
    moved, states = {}, dict(state)
    for name in sorted(moving):
      moved[name], states[name] = optimizers[name].update(updates[name], state[name], params[name])
    return moved, states

  return optax.GradientTransformationExtraArgs(init, update)


def init_state(params: PyTree, optimizer: optax.GradientTransformation, seed: int,
               *, ema: bool, averaged: tuple[str, ...] | None = None) -> TrainState:
  """The state before the first step. `params` are copied: the train step donates its input.

  Args:
    params: from `Objective.init`.
    optimizer: from `make_optimizer` or `take_turns`.
    seed: of the steps' randomness.
    ema: whether to keep a moving average.
    averaged: see `Objective.averaged`.
  """
  params = jax.tree.map(jnp.array, params)
  kept = params if averaged is None else {name: params[name] for name in averaged}

  def zero() -> Array:
    return jnp.zeros((), jnp.int32)  # a buffer each, because each is donated

  return TrainState(
      step=zero(), params=params, opt_state=optimizer.init(params),
      ema=jax.tree.map(jnp.array, kept) if ema else None,
      rng=jax.random.key(seed), skipped=zero(), skipped_in_a_row=zero())
