"""Noise levels of flow matching.

  sigma in [0, 1] mixes: x_t = (1 - sigma) x0 + sigma noise; timestep = 1000 sigma feeds the
  network.
  shift s moves levels towards noise: sigma' = s sigma / (1 + (s - 1) sigma).

Everything is in closed form and in float64 on the host.

  flow_match_sigmas   the 1000 levels that Wan2.1 and Self-Forcing train on.
  few_step_sigmas     a distilled student's few levels. It is trained at 1000, 750, 500, 250, which
                      shift 5 warps to timesteps 1000, 937.5, 833.33 and 625: floats, never
                      truncated.
  *_levels            what the base model is sampled at, one list a solver. Wan2.1 truncates the
                      timesteps of UniPC and DPM++ to integers, while the solver keeps the floats:
                      the network is told of slightly less noise than it sees.

Source: Wan2.1 and Self-Forcing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

TIMESTEPS = 1000.0
# Where Wan2.1's UniPC starts: 1 - 1/1000 as float32 has it, so that its timesteps agree as well.
UNIPC_START = 0.9990000128746033


class Levels(NamedTuple):
  """The noise levels of a sampler of n steps.

  Attributes:
    sigmas: [n + 1] float64, falling to the final 0.
    timesteps: [n] float64, what the network is told at all but the last.
  """

  sigmas: np.ndarray
  timesteps: np.ndarray


def shift_sigma(sigma, shift: float):
  """Shifts noise levels (array or float) towards 1 for shift > 1."""
  return shift * sigma / (1 + (shift - 1) * sigma)


def few_step_sigmas(steps: Sequence[float], shift: float) -> np.ndarray:
  """Levels of a few-step sampler, with the final 0 appended: [len(steps) + 1] float64.

  Args:
    steps: unshifted timesteps in (0, 1000], falling.
    shift: timestep shift.

  Raises:
    ValueError: no steps, or they do not fall within (0, 1000].
  """
  levels = np.asarray(steps, np.float64) / TIMESTEPS
  if not levels.size or levels.max() > 1 or levels.min() <= 0 or np.any(np.diff(levels) >= 0):
    raise ValueError(f'steps={tuple(steps)} must fall strictly within (0, 1000], e.g. '
                     f'(1000, 750, 500, 250).')
  return np.append(shift_sigma(levels, shift), 0.0)


def uniform_steps(count: int) -> tuple[float, ...]:
  """`count` unshifted timesteps that divide (0, 1000] evenly: 4 -> (1000, 750, 500, 250)."""
  if count < 1:
    raise ValueError(f'{count=} steps cannot denoise; use at least 1.')
  return tuple(TIMESTEPS * (count - i) / count for i in range(count))


def timestep(sigma):
  """The network's timestep of a noise level."""
  return jnp.asarray(sigma, jnp.float32) * TIMESTEPS


def flow_match_sigmas(shift: float) -> np.ndarray:
  """The whole table of training levels, [1000] float64, falling from 1; its last is not 0.

  Entry i is the shifted 1 - i / 1000, so the few-step timestep t stands at entry 1000 - t.
  """
  return shift_sigma(1 - np.arange(TIMESTEPS) / TIMESTEPS, shift)


def unipc_levels(count: int, shift: float) -> Levels:
  """Wan2.1's levels for UniPC: evenly from 0.999, shifted; timesteps truncated."""
  return _truncated(_evenly(UNIPC_START, count, shift))


def dpm_levels(count: int, shift: float) -> Levels:
  """Wan2.1's levels for DPM++: evenly from 1, shifted; timesteps truncated."""
  return _truncated(_evenly(1.0, count, shift))


def euler_levels(count: int, shift: float) -> Levels:
  """Levels for Euler: those of DPM++ with timesteps left as they are, like the few-step list."""
  sigmas = _evenly(1.0, count, shift)
  return Levels(sigmas, TIMESTEPS * sigmas[:-1])


def _evenly(start: float, count: int, shift: float) -> np.ndarray:
  """[count + 1] levels from `start`, evenly spaced before the shift, and the final 0.

  Raises:
    ValueError: fewer than one step, or a shift that is not positive.
  """
  if count < 1:
    raise ValueError(f'{count=} steps cannot denoise; use at least 1.')
  if not shift > 0:
    raise ValueError(f'{shift=} must be positive; Wan2.1 uses 5.')
  return shift_sigma(np.linspace(start, 0, count + 1), shift)


def _truncated(sigmas: np.ndarray) -> Levels:
  return Levels(sigmas, np.trunc(TIMESTEPS * sigmas[:-1]))
