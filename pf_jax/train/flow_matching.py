"""Flow matching: batches of encoded clips, noisy versions of latents, and the loss on them.

Loss: mean over noisy versions of |flow - predicted flow|^2, weighted by sigma^2 if errors of x0 are
meant to count alike. Levels are drawn logit-normally, plus a share of uniform ones, and shifted
towards noise.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pf_jax.diffusion import flow as flow_lib
from pf_jax.diffusion import schedule
from pf_jax.models.bundle import Models
from pf_jax.types import Array, PyTree


def check_shares(spec: Any, *names: str) -> None:
  """Refuses fields that are no shares.

  Raises:
    ValueError: one is not within 0..1.
  """
  for name in names:
    if not 0 <= getattr(spec, name) <= 1:
      raise ValueError(f'{name}={getattr(spec, name)} must be within 0..1.')


@dataclasses.dataclass(frozen=True)
class FlowMatchingSpec:
  """How noisy versions are drawn and weighed.

  Attributes:
    noise_levels: noisy versions of each block (or clip) of a step.
    first_levels: noisy versions of each extra first block, see `FirstBlocks`.
    first_weight: weight of their loss.
    shift: timestep shift of the noise levels.
    uniform_share: share of levels drawn uniformly instead of logit-normally.
    loss: 'x0' weighs the squared flow error by sigma^2, 'flow' by 1.

  Raises:
    ValueError: a value out of range.
  """

  noise_levels: int = 3
  first_levels: int = 2
  first_weight: float = 1.0
  shift: float = 5.0
  uniform_share: float = 0.2
  loss: str = 'x0'

  def __post_init__(self):
    for name in ('noise_levels', 'first_levels'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.first_weight < 0:
      raise ValueError(f'first_weight={self.first_weight} must not be negative.')
    if self.loss not in ('x0', 'flow'):
      raise ValueError(f"loss={self.loss!r} is unknown; use 'x0' or 'flow'.")
    check_shares(self, 'uniform_share')


class FirstBlocks(NamedTuple):
  """First blocks of clips, trained without the rest of their clip.

  Only a first block has to be invented from text alone, and later ones copy what it shows. One in
  five targets, from a handful of clips a step, teaches that far more slowly than copying.

  Attributes:
    latents: [E, F, h, w, C].
    ids: [E, rows] token ids of the prompts.
    mask: [E, rows] bool.
  """

  latents: Array
  ids: Array
  mask: Array


class ClipBatch(NamedTuple):
  """Encoded clips.

  Attributes:
    latents: [B, blocks * F, h, w, C].
    lr_latents: [B, blocks, f, h', w', C].
    ids: [B, rows] token ids of the prompts.
    mask: [B, rows] bool.
    trajectory: [B, S, blocks * F, h, w, C], the same clips on a teacher's way from noise, at the
      levels of a student's passes; None if the noise is to be drawn.
  """

  latents: Array
  lr_latents: Array
  ids: Array
  mask: Array
  trajectory: Array | None = None


class FlowBatch(NamedTuple):
  """What one step sees: whole clips, first blocks of others, or both.

  Attributes:
    clips: whole clips, or None.
    first: first blocks, or None.
  """

  clips: ClipBatch | None = None
  first: FirstBlocks | None = None


def draw_sigmas(key: Array, shape: tuple[int, ...], spec: FlowMatchingSpec) -> Array:
  """Noise levels in (0, 1): logit-normal with a share of uniform ones, then shifted."""
  normal, uniform, choose = jax.random.split(key, 3)
  levels = jnp.where(jax.random.bernoulli(choose, spec.uniform_share, shape),
                     jax.random.uniform(uniform, shape), jax.nn.sigmoid(
                         jax.random.normal(normal, shape)))
  return schedule.shift_sigma(levels, spec.shift)


class Noised(NamedTuple):
  """Noisy versions of some blocks and what the network should say about them."""

  x_t: Array
  sigma: Array
  timesteps: Array
  target: Array


def add_levels(latents: Array, key: Array, levels: int, spec: FlowMatchingSpec) -> Noised:
  """`levels` noisy versions of each block [B, F, h, w, C]: [B * levels, ...]."""
  level_key, noise_key = jax.random.split(key)
  x0 = jnp.repeat(latents, levels, axis=0)
  sigma = draw_sigmas(level_key, (x0.shape[0], 1, 1, 1, 1), spec)
  noise = jax.random.normal(noise_key, x0.shape)
  timesteps = jnp.broadcast_to(schedule.timestep(sigma[:, :, 0, 0, 0]), x0.shape[:2])
  return Noised(flow_lib.add_noise(x0, noise, sigma), sigma[:, 0, 0, 0, 0], timesteps,
                flow_lib.flow_target(x0, noise))


def from_trajectory(latents: Array, trajectory: Array, sigmas: Sequence[float]) -> Noised:
  """The noisy versions of blocks that a teacher passed on its way to them: [B * S, ...].

  Args:
    latents: [B, F, h, w, C], where the way ended.
    trajectory: [B, S, F, h, w, C], the way at S levels.
    sigmas: the levels.
  """
  batch, steps = trajectory.shape[:2]
  x_t = trajectory.reshape(batch * steps, *trajectory.shape[2:])
  sigma = jnp.tile(jnp.asarray(sigmas, jnp.float32), batch)
  level = sigma[:, None, None, None, None]
  timesteps = jnp.broadcast_to(schedule.timestep(sigma)[:, None], x_t.shape[:2])
  return Noised(x_t, sigma, timesteps, (x_t - jnp.repeat(latents, steps, axis=0)) / level)


def flow_loss(flow: Array, noised: Noised, spec: FlowMatchingSpec) -> Array:
  """Weighted squared error of each predicted flow: [B]."""
  error = jnp.mean((flow - noised.target)**2, axis=(1, 2, 3, 4))
  return error * (noised.sigma**2 if spec.loss == 'x0' else 1.0)


class PartsObjective:
  """What `fit` asks of an objective that trains some networks of a model.

  Args:
    models: the networks to start from; those that are not trained are carried along untouched.
    trained: names of the others. Gradient norms are reported for each.
  """

  def __init__(self, models: Models, trained: Sequence[str]):
    self._models, self._trained = models, tuple(trained)

  def init(self, seed: int) -> dict[str, nnx.Module]:
    """The trained parts; `seed` is unused, the models come initialised."""
    del seed
    return {name: getattr(self._models, name) for name in self._trained}

  def place(self, put: Callable[[PyTree], PyTree]) -> None:
    """Moves the networks that are carried along."""
    self._models = put(self._models)

  def param_groups(self, params: PyTree) -> PyTree:
    """The name of the part that each parameter belongs to."""
    return {name: jax.tree.map(lambda _, name=name: name, part) for name, part in params.items()}

  def assemble(self, params: dict[str, nnx.Module]) -> Models:
    """All networks, with the trained parts put in."""
    return self._models.replaced(**params)


def first_loss(models: Models, first: FirstBlocks, key: Array, spec: FlowMatchingSpec) -> Array:
  """Mean loss of first blocks, which have no history."""
  noised = add_levels(first.latents, key, spec.first_levels, spec)
  text = models.text_keys_values(first.ids, first.mask)
  out = models.transformer(noised.x_t, noised.timesteps, text)
  return jnp.mean(flow_loss(out.flow, noised, spec))
