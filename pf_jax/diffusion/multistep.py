"""Multistep solvers of the flow ODE: Euler, DPM++ and UniPC as one recurrence.

Let s_0 > s_1 > ... > s_n = 0 be the noise levels, x_i the latents at s_i, and
m_i = x_i - s_i flow(x_i) the x0 that the network predicts there. With log signal-to-noise ratio
l = log((1 - s) / s), the ODE is linear in x for a constant m, and solved exactly by

  x_{i+1} = r x_i + (1 - r) m,   r = s_{i+1} / s_i,   h = l_{i+1} - l_i.

Euler takes m = m_i. The others extrapolate m along l. Let h' = l_i - l_{i-1}, q = h' / h:

  predictor   m = m_i + (m_i - m_{i-1}) / (2 q)                              (order 2)

This is DPM++ (2M, midpoint) and the predictor of UniPC (bh2) alike. UniPC then corrects x_{i+1}
once the network was evaluated there and goes on from the corrected one, without evaluating again.
With e = 1 - exp(-h):

  corrector   m = m_i + (m_{i+1} - m_i) / 2                                  (predicted at order 1)
              m = m_i + a (m_i - m_{i-1}) / q + (b_1 - a) (m_{i+1} - m_i)    (predicted at order 2)
              b_1 = 1/e - 1/h,   b_2 = 1/e - 2 b_1 / h,   a = (b_1 - b_2) / (1 + q)

where r, h, q are those of the step that is corrected. The first step has no past and is of order 1;
so is the last, whose h is infinite: r = 0 there and x_n = m_{n-1}. At s_0 = 1 l is infinite, too:
q = inf makes the second step's extrapolation vanish.

All of it is linear in what is known, so `coefficients` writes it down as a table, in float64 on the
host, and `step` is a few multiply-adds, the same for every solver. Whoever samples scans over the
table's rows:

  state = init(noise)
  for row in table: state = step(state, flow(state.x), row)

Source: Zhao et al., UniPC (arXiv:2302.04867); Lu et al., DPM-Solver++ (arXiv:2211.01095); the
orders and the noise levels are those of Wan2.1.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pf_jax.diffusion import flow as flow_lib
from pf_jax.diffusion import schedule
from pf_jax.types import Array


@dataclasses.dataclass(frozen=True)
class MultistepSolver:
  """One member of the family.

  Attributes:
    levels: (steps, shift) -> the noise levels it is used with.
    order: 1 or 2, of the predictor; the first and the last step are of order 1.
    corrector: whether a step is corrected by the prediction at its end.
  """

  levels: Callable[[int, float], schedule.Levels]
  order: int
  corrector: bool = False


SOLVERS = {
    'euler': MultistepSolver(schedule.euler_levels, order=1),
    'dpm++': MultistepSolver(schedule.dpm_levels, order=2),
    'unipc': MultistepSolver(schedule.unipc_levels, order=2, corrector=True),
}


class Coefficients(NamedTuple):
  """What the steps multiply by; one row a step, [n, ...] in a table.

  Attributes:
    sigma: [], level of the step.
    correct: [5], weights of (x_i, corrected x_{i-1}, m_i, m_{i-1}, m_{i-2}) in the corrected x_i.
    predict: [3], weights of (corrected x_i, m_i, m_{i-1}) in x_{i+1}.
  """

  sigma: Array | np.ndarray
  correct: Array | np.ndarray
  predict: Array | np.ndarray


class SolverState(NamedTuple):
  """Where a sampler stands; arrays are all shaped like the latents.

  Attributes:
    x: x_i, where the network is evaluated next.
    corrected: the x_{i-1} that x_i was predicted from.
    predictions: (m_{i-1}, m_{i-2}).
  """

  x: Array
  corrected: Array
  predictions: tuple[Array, Array]


def init(x: Array) -> SolverState:
  """The state before the first step; `x` is noise at the first level."""
  return SolverState(x, x, (x, x))  # the first rows weigh the past by 0


def step(state: SolverState, flow: Array, row: Coefficients) -> SolverState:
  """One step to the next level, for every solver.

  Args:
    state: before the step.
    flow: the network's prediction at `state.x`.
    row: the step's coefficients, in the latents' dtype.
  """
  x0 = flow_lib.predict_x0(state.x, flow, row.sigma)
  last, before = state.predictions
  corrected = _weigh(row.correct, state.x, state.corrected, x0, last, before)
  return SolverState(_weigh(row.predict, corrected, x0, last), corrected, (x0, last))


def _weigh(weights, *arrays: Array) -> Array:
  first, *rest = (weights[i] * array for i, array in enumerate(arrays))
  return sum(rest, first)


def coefficients(solver: MultistepSolver, sigmas: np.ndarray) -> Coefficients:
  """The table of all steps, float64, finite whatever the levels.

  Args:
    solver: one of `SOLVERS`.
    sigmas: [n + 1] levels, n >= 1, falling strictly from at most 1 to 0.

  Raises:
    ValueError: levels that do not.
  """
  sigmas = np.asarray(sigmas, np.float64)
  if (sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[0] > 1 or sigmas[-1] != 0
      or not np.all(np.diff(sigmas) < 0)):
    raise ValueError(f'{sigmas=} must fall strictly from at most 1 to 0, in one step or more; take '
                     f'them from pf_jax.diffusion.schedule.')
  with np.errstate(divide='ignore'):
    widths = np.diff(np.log1p(-sigmas) - np.log(sigmas))
  count = len(widths)
  correct, predict = np.zeros((count, 5)), np.zeros((count, 3))
  correct[:, 0] = 1
  for i, ratio in enumerate(sigmas[1:] / sigmas[:-1]):
    order = min(solver.order, i + 1, count - i)
    quotient = widths[i - 1] / widths[i] if order == 2 else math.inf
    predict[i] = _predictor(ratio, quotient)
    if solver.corrector and i + 1 < count:
      correct[i + 1] = _corrector(ratio, widths[i], quotient, order)
  return Coefficients(sigmas[:-1], correct, predict)


def _predictor(ratio: float, quotient: float) -> tuple[float, ...]:
  """A row of `Coefficients.predict`; without a past, `quotient` is infinite."""
  slope = 0.5 / quotient
  return ratio, (1 - ratio) * (1 + slope), -(1 - ratio) * slope


def _corrector(ratio: float, width: float, quotient: float, order: int) -> tuple[float, ...]:
  """The row of `Coefficients.correct` that follows a step."""
  slope, newest = 0.0, 0.5
  if order == 2:
    inverse = -1 / math.expm1(-width)
    first = inverse - 1 / width
    second = inverse - 2 * first / width
    share = (first - second) / (1 + quotient)
    slope, newest = share / quotient, first - share
  fresh = 1 - ratio
  return 0.0, ratio, fresh * newest, fresh * (1 + slope - newest), -fresh * slope
