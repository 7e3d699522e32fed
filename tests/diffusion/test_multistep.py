"""The solvers on an ODE with a known solution, and against stored results of diffusers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax.diffusion import multistep, schedule
from pf_jax.diffusion import solver as solver_lib
from pf_jax.diffusion.multistep import SOLVERS
from tests.diffusion import gaussian
from tests.models.cached import load, relative_error

START = np.linspace(-2, 2, 9)
NOT_CORRECTED = dataclasses.replace(SOLVERS['unipc'], corrector=False)


def test_coefficients_of_three_steps():
  """Levels whose log signal-to-noise ratios are log 4 apart."""
  table = multistep.coefficients(SOLVERS['unipc'], np.array([0.8, 0.5, 0.2, 0]))
  log4 = math.log(4)
  b_1 = 4 / 3 - 1 / log4
  b_2 = 4 / 3 - 2 * b_1 / log4
  a = (b_1 - b_2) / 2
  np.testing.assert_array_equal(table.sigma, [0.8, 0.5, 0.2])
  np.testing.assert_allclose(table.predict, [
      [.625, .375, 0], [.4, .6 * 1.5, -.6 * .5], [0, 1, 0]], atol=1e-15)
  np.testing.assert_allclose(table.correct, [
      [1, 0, 0, 0, 0], [0, .625, .375 / 2, .375 / 2, 0],
      [0, .4, .6 * (b_1 - a), .6 * (1 + 2 * a - b_1), -.6 * a]], atol=1e-15)


def test_solvers_differ_in_order_and_corrector_only():
  sigmas = np.array([0.8, 0.5, 0.2, 0])
  euler, dpm, unipc = (multistep.coefficients(SOLVERS[name], sigmas)
                       for name in ('euler', 'dpm++', 'unipc'))
  np.testing.assert_array_equal(dpm.predict, unipc.predict)
  np.testing.assert_array_equal(dpm.correct, [[1, 0, 0, 0, 0]] * 3)
  np.testing.assert_array_equal(euler.correct, dpm.correct)
  np.testing.assert_allclose(euler.predict, [[.625, .375, 0], [.4, .6, 0], [0, 1, 0]], atol=1e-15)


@pytest.mark.parametrize('name', SOLVERS)
@pytest.mark.parametrize('count', [1, 2, 3, 4, 50, 1000])
@pytest.mark.parametrize('start', [1.0, 0.999, 1 - 1e-12, 0.3])
def test_coefficients_are_finite_and_add_up_to_one(name, count, start):
  """Where x is x0 already, every step leaves it alone."""
  for power in (1, 3):
    table = multistep.coefficients(SOLVERS[name], start * np.linspace(1, 0, count + 1)**power)
    for weights in (table.correct, table.predict):
      assert np.isfinite(weights).all()
      np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-9)
    np.testing.assert_allclose(table.predict[[0, -1], 2], 0)
    np.testing.assert_allclose(table.predict[-1], [0, 1, 0])


@pytest.mark.parametrize('name', SOLVERS)
@pytest.mark.parametrize('count', [1, 2, 3, 50])
def test_a_single_picture_is_found_exactly(name, count):
  """x0 = 3 with certainty: the flow is (x - 3) / sigma, and x stays on its line."""
  levels = SOLVERS[name].levels(count, 5.0)
  table = multistep.coefficients(SOLVERS[name], levels.sigmas)
  state = multistep.init((1 - levels.sigmas[0]) * 3 + levels.sigmas[0] * START)
  for i, sigma in enumerate(levels.sigmas[:-1]):
    np.testing.assert_allclose(state.x, (1 - sigma) * 3 + sigma * START, atol=1e-12)
    row = multistep.Coefficients(*(column[i] for column in table))
    state = multistep.step(state, (state.x - 3) / sigma, row)
  np.testing.assert_allclose(state.x, 3, atol=1e-12)


def _measured_order(solver, sigmas_of) -> float:
  """How fast the error falls from 160 to 320 steps."""
  errors = []
  for count in (160, 320):
    sigmas = sigmas_of(count)
    ours = gaussian.sample(solver, schedule.Levels(sigmas, 1000 * sigmas[:-1]), START)
    errors.append(np.abs(ours - gaussian.solution(START, sigmas[0])).max())
  return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(('solver', 'order'), [
    (SOLVERS['euler'], 1), (SOLVERS['dpm++'], 2), (NOT_CORRECTED, 2), (SOLVERS['unipc'], 3),
    (dataclasses.replace(SOLVERS['unipc'], order=1), 2)])
def test_order_of_convergence(solver, order):
  """A corrector adds one, as its authors promise. The levels are dense where the ODE is stiff."""
  measured = _measured_order(solver, lambda count: 0.9 * np.linspace(1, 0, count + 1)**2)
  assert abs(measured - order) < 0.1, measured


@pytest.mark.parametrize(('name', 'least'), [('euler', 0.95), ('dpm++', 1.7), ('unipc', 1.95)])
def test_order_of_convergence_at_even_levels(name, least):
  """Wan2.1's spacing costs UniPC one order and DPM++ a logarithm: the last steps are coarse."""
  measured = _measured_order(SOLVERS[name], lambda n: SOLVERS[name].levels(n, 1.0).sigmas)
  assert least < measured < least + 0.35, measured


def test_euler_is_the_few_step_solver():
  levels = SOLVERS['euler'].levels(5, 5.0)
  x = START
  for sigma, lower in zip(levels.sigmas[:-1], levels.sigmas[1:], strict=True):
    x = solver_lib.step('euler', x, gaussian.flow(x, 1000 * sigma), sigma, lower, x)
  np.testing.assert_allclose(gaussian.sample(SOLVERS['euler'], levels, START), x, rtol=1e-13)


@pytest.mark.parametrize('name', ['unipc', 'dpm++'])
@pytest.mark.parametrize('count', [1, 2, 3, 5, 50])
def test_stored_results_of_diffusers(name, count):
  """In float64 the two agree to rounding; in float32 they differ by the rounding of each step."""
  case = load('schedulers')
  wanted, noise = case[f'{name}_{count}_output'], case['noise']
  levels = SOLVERS[name].levels(count, 5.0)
  ours = gaussian.sample(SOLVERS[name], levels, noise.astype(np.float64))
  assert relative_error(ours, wanted) <= 1e-12
  assert relative_error(gaussian.sample(SOLVERS[name], levels, noise), wanted) <= 2e-6


@pytest.mark.parametrize('name', ['unipc', 'dpm++'])
def test_stored_results_tell_mistakes(name):
  case = load('schedulers')
  solver, wanted, noise = SOLVERS[name], case[f'{name}_5_output'], case['noise'].astype(np.float64)
  levels = solver.levels(5, 5.0)
  mistakes = [gaussian.sample(dataclasses.replace(solver, order=1), levels, noise),
              gaussian.sample(dataclasses.replace(solver, corrector=not solver.corrector), levels,
                              noise),
              gaussian.sample(solver, levels._replace(timesteps=1000 * levels.sigmas[:-1]), noise)]
  for ours in mistakes:
    assert relative_error(ours, wanted) > 2e-5


def test_a_compiled_scan_takes_the_same_steps():
  solver = SOLVERS['unipc']
  levels = solver.levels(20, 5.0)
  table = multistep.coefficients(solver, levels.sigmas)

  @jax.jit
  def run(x):
    def body(state, inputs):
      row, timestep = inputs
      return multistep.step(state, gaussian.flow(state.x, timestep), row), None
    rows = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (table, levels.timesteps))
    return jax.lax.scan(body, multistep.init(x), rows)[0].x

  ours = run(START.astype(np.float32))
  assert ours.dtype == jnp.float32
  assert relative_error(ours, gaussian.sample(solver, levels, START)) <= 2e-6


@pytest.mark.parametrize('sigmas', [
    [0.5], [1.1, 0], [1, 0.5], [1, 0.5, 0.5, 0], [0.5, 1, 0], [1, float('nan'), 0],
    [[1, 0.5], [0.5, 0]]])
def test_levels_that_do_not_fall_to_zero_are_refused(sigmas):
  with pytest.raises(ValueError, match='must fall strictly from at most 1 to 0'):
    multistep.coefficients(SOLVERS['unipc'], sigmas)
