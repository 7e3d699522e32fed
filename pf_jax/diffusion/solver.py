"""One step of a sampler, from level sigma to the next lower one.

  euler    follow the flow: x + (sigma_next - sigma) flow. For models trained by flow matching.
  renoise  jump to x0 and add fresh noise at the next level. For distilled few-step students.

Source: Wan2.1 (Euler discrete), Self-Forcing (re-noising).
"""

from typing import Literal

from pf_jax.diffusion import flow as flow_lib
from pf_jax.types import Array

Solver = Literal['euler', 'renoise']
SOLVERS = ('euler', 'renoise')


def step(solver: Solver, x_t: Array, flow: Array, sigma, sigma_next, noise: Array) -> Array:
  """Moves x_t to `sigma_next`; at sigma_next = 0 both solvers return the predicted x0.

  Args:
    solver: 'euler' or 'renoise'.
    x_t: noisy latents at `sigma`.
    flow: the network's prediction there.
    sigma: current level.
    sigma_next: next level, lower.
    noise: fresh standard normal noise like x_t; only 'renoise' uses it.

  Raises:
    ValueError: unknown solver.
  """
  if solver == 'euler':
    return x_t + (sigma_next - sigma) * flow
  if solver == 'renoise':
    return flow_lib.add_noise(flow_lib.predict_x0(x_t, flow, sigma), noise, sigma_next)
  raise ValueError(f'{solver=} is unknown; use one of {", ".join(SOLVERS)}.')
