"""Gaussian data, x0 ~ N(MEAN, DEVIATION^2): flow and solution of its ODE have closed forms."""

import numpy as np

from pf_jax.diffusion import multistep
from pf_jax.diffusion.schedule import Levels

MEAN, DEVIATION = 0.7, 0.4


def _variance(sigma):
  return ((1 - sigma) * DEVIATION)**2 + sigma**2


def flow(x, timestep):
  """The mean of noise - x0 given x; NumPy, JAX or torch arrays."""
  sigma = timestep / 1000
  score = (x - (1 - sigma) * MEAN) / _variance(sigma)
  return sigma * score - (MEAN + (1 - sigma) * DEVIATION**2 * score)


def solution(x, sigma):
  """Where the flow carries x from level sigma to level 0."""
  return MEAN + DEVIATION * (x - (1 - sigma) * MEAN) / np.sqrt(_variance(sigma))


def sample(solver: multistep.MultistepSolver, levels: Levels, x: np.ndarray) -> np.ndarray:
  """Solves the ODE in plain NumPy, in x's dtype."""
  table = multistep.coefficients(solver, levels.sigmas)
  state = multistep.init(x)
  for i, timestep in enumerate(levels.timesteps):
    row = multistep.Coefficients(*(column[i].astype(x.dtype) for column in table))
    state = multistep.step(state, flow(state.x, timestep.astype(x.dtype)), row)
  return state.x
