"""Noise levels of flow matching.

  sigma in [0, 1] mixes: x_t = (1 - sigma) x0 + sigma noise; timestep = 1000 sigma feeds the
  network.
  shift s moves levels towards noise: sigma' = s sigma / (1 + (s - 1) sigma).

Source: Wan2.1 and Self-Forcing. The few-step student is trained at 1000, 750, 500, 250, which shift
5 warps to timesteps 1000, 937.5, 833.33 and 625: floats, never truncated.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

TIMESTEPS = 1000.0


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
