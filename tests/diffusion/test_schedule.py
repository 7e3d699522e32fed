"""Noise levels against literal values of Wan2.1 and Self-Forcing."""

import numpy as np
import pytest

from pf_jax.diffusion import schedule

# Self-Forcing computes its table in float32.
FLOAT32 = 1.2e-7


@pytest.mark.parametrize(('shift', 'total', 'last'), [
    (3, 676.540565, .0029940121), (5, 747.550256, .0049800803), (8, 803.855831, .0079443902)])
def test_training_table(shift, total, last):
  table = schedule.flow_match_sigmas(shift)
  assert table.shape == (1000,)
  assert table.dtype == np.float64
  assert table[0] == 1
  np.testing.assert_allclose(table[-1], last, atol=FLOAT32)
  np.testing.assert_allclose(table.sum(), total, rtol=FLOAT32)


def test_training_table_of_shift_5():
  np.testing.assert_allclose(
      schedule.flow_match_sigmas(5)[[0, 1, 2, 3, 500, 998, 999]],
      [1, .9997997880, .9995993972, .9993985295, .8333333135, .0099206353, .0049800803],
      atol=FLOAT32)


@pytest.mark.parametrize(('shift', 'timesteps'), [
    (3, [1000, 900, 750, 500]), (5, [1000, 937.5, 833.333313, 625]),
    (8, [1000, 960, 888.888916, 727.272766])])
def test_few_steps_stand_in_the_training_table_and_are_not_truncated(shift, timesteps):
  few = schedule.few_step_sigmas((1000, 750, 500, 250), shift)
  np.testing.assert_allclose(schedule.timestep(few), [*timesteps, 0], rtol=FLOAT32)
  np.testing.assert_allclose(few[:-1], schedule.flow_match_sigmas(shift)[[0, 250, 500, 750]],
                             rtol=1e-14)


def test_unipc_levels():
  sigmas, timesteps = schedule.unipc_levels(50, 5)
  assert sigmas.shape == (51,)
  np.testing.assert_allclose(sigmas[:3], [.99979985, .99573237, .99153048], atol=1e-8)
  np.testing.assert_allclose(sigmas[-3:], [.17226514, .09250686, 0], atol=1e-8)
  assert timesteps.shape == (50,)
  np.testing.assert_array_equal(timesteps[:4], [999, 995, 991, 987])
  np.testing.assert_array_equal(timesteps[-2:], [172, 92])


def test_unipc_starts_below_one_whatever_the_shift():
  for shift in (1, 3, 8):
    sigmas, timesteps = schedule.unipc_levels(1, shift)
    np.testing.assert_allclose(sigmas, [shift * .999 / (1 + (shift - 1) * .999), 0], atol=2e-8)
    assert timesteps == [999]


def test_dpm_levels():
  sigmas, timesteps = schedule.dpm_levels(50, 5)
  np.testing.assert_allclose(sigmas[[0, 1, 25, 49, 50]], [1, 4.9 / 4.92, 2.5 / 3, .1 / 1.08, 0],
                             rtol=1e-14)
  np.testing.assert_array_equal(timesteps[:4], [1000, 995, 991, 987])
  np.testing.assert_array_equal(timesteps[-2:], [172, 92])


def test_euler_keeps_the_fractions_of_timesteps():
  sigmas, timesteps = schedule.euler_levels(4, 5)
  np.testing.assert_allclose(sigmas, [1, .9375, 5 / 6, .625, 0], rtol=1e-15)
  np.testing.assert_allclose(timesteps, [1000, 937.5, 2500 / 3, 625], rtol=1e-15)


@pytest.mark.parametrize('levels', [schedule.unipc_levels, schedule.dpm_levels,
                                    schedule.euler_levels])
@pytest.mark.parametrize(('count', 'shift', 'message'), [
    (0, 5, 'count=0 steps cannot denoise'), (50, 0, 'shift=0 must be positive; Wan2.1 uses 5'),
    (50, float('nan'), 'shift=nan must be positive')])
def test_levels_that_do_not_exist(levels, count, shift, message):
  with pytest.raises(ValueError, match=message):
    levels(count, shift)
