"""Metrics on arrays small enough to check by hand, and on true clips."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pf_jax.data import digits
from pf_jax.evals import metrics

WORLD = digits.DigitsWorld()


def test_to_unit():
  np.testing.assert_array_equal(metrics.to_unit(np.array([0, 255], np.uint8)), [0, 1])
  np.testing.assert_array_equal(metrics.to_unit(np.array([-1.0, 0.0, 1.0, 1.5])), [0, 0.5, 1, 1])


def test_coverage_is_the_place_between_background_and_white():
  background = np.array([0.2, 0.4, 0.0])
  frame = np.stack([background + part * (1 - background) for part in (0.0, 0.25, 1.0)])
  np.testing.assert_allclose(metrics.coverage(frame[None, None], background),
                             [[[0, 0.25, 1]]], atol=1e-6)
  darker = (background - 0.1)[None, None, None]
  np.testing.assert_array_equal(metrics.coverage(darker, background), [[[0]]])


def test_coverage_of_a_white_background_is_not_blown_up():
  frames = np.full((1, 2, 2, 3), 0.97)
  assert metrics.coverage(frames, np.full(3, 0.96)).max() < 0.1


def test_locate_centres_a_dot_in_its_window():
  cover = np.zeros((1, 9, 12))
  cover[0, 5, 6] = 1
  np.testing.assert_array_equal(metrics.locate(cover, 5), [[3, 4]])


def test_a_window_may_stick_out_by_a_quarter():
  cover = np.zeros((1, 12, 12))
  cover[0, 0, 11] = 1
  np.testing.assert_array_equal(metrics.locate(cover, 8), [[-2, 6]])
  window = metrics.crop(cover, np.array([[-2, 6]]), 8)[0]
  assert window[2, 5] == 1
  assert window.sum() == 1


def test_locate_refuses_a_window_larger_than_the_picture():
  with pytest.raises(ValueError, match='size=5 of the window exceeds the picture 4x9'):
    metrics.locate(np.zeros((1, 4, 9)), 5)


def test_centred_is_what_locate_finds_anywhere():
  glyphs = digits.glyphs(32)[:8]
  picture = np.zeros((8, 64, 80), np.float32)
  picture[:, 16:48, 23:55] = glyphs
  found = metrics.crop(picture, metrics.locate(picture, 32), 32)
  np.testing.assert_array_equal(found, metrics.centred(glyphs))
  np.testing.assert_array_equal(metrics.centred(metrics.centred(glyphs)), metrics.centred(glyphs))


def test_background_is_the_median_outside_the_window():
  frames = np.full((1, 4, 4, 3), 0.25)
  frames[0, :3, :3] = 1.0  # nine of sixteen pixels: the plain median would be white
  np.testing.assert_array_equal(metrics.background_colour(frames), [[1, 1, 1]])
  np.testing.assert_array_equal(metrics.background_colour(frames, np.array([[0, 0]]), 3),
                                [[0.25, 0.25, 0.25]])
  np.testing.assert_array_equal(metrics.background_colour(frames, np.array([[-1, -1]]), 4),
                                [[0.25, 0.25, 0.25]])
  np.testing.assert_array_equal(metrics.background_colour(frames, np.array([[0, 0]]), 4),
                                [[1, 1, 1]])


def test_centre_of_mass():
  images = np.zeros((2, 3, 5))
  images[0, 1, 1] = images[0, 1, 4] = 2
  np.testing.assert_allclose(metrics.centre_of_mass(images), [[1, 2.5], [1, 2]])


def test_colour_distance_is_a_root_mean_square():
  assert metrics.colour_distance([0.5, 0.5, 0.5], [0.5, 0.5, 0.8]) == pytest.approx(0.3 / 3**0.5)
  np.testing.assert_allclose(metrics.colour_distance(np.ones((2, 3)), np.zeros(3)), [1, 1])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.floats(0.9, 1.1), st.integers(-4, 4), st.integers(-4, 4))
def test_nearest_colour_forgives_brightness_and_a_little_drift(i, gain, red, green):
  shade = np.array(WORLD.colours[i].rgb) * gain + [red, green, 0]
  assert metrics.nearest_colour(np.clip(shade / 255, 0, 1), WORLD) == i


def test_nearest_colour_notices_another_colour():
  names = [WORLD.colours[i].name for i in metrics.nearest_colour(
      np.array([[0.0, 0.5, 0.5], [0.9, 0.5, 0.1]]), WORLD)]
  assert names == ['teal', 'orange']


def test_dynamic_degree():
  x = np.arange(16.0)
  moving = np.stack([np.full(16, 3.0), 2 * x], -1)
  assert metrics.dynamic_degree(moving, speed=2) == pytest.approx(1)
  assert metrics.dynamic_degree(moving, speed=4) == pytest.approx(0.5)
  bouncing = np.stack([np.zeros(16), np.abs(x - 6)], -1)
  assert metrics.dynamic_degree(bouncing, speed=1) == pytest.approx(1)
  trembling = np.stack([np.zeros(16), x % 2], -1)
  assert metrics.dynamic_degree(trembling, speed=1) == 0
  with pytest.raises(ValueError, match='more than lag=4'):
    metrics.dynamic_degree(moving[:4], speed=1)


def test_direction():
  assert metrics.direction(np.array([[0, 1], [0, 2], [0, 3], [0, 2]])) == 'right'
  assert metrics.direction(np.array([[0, 5], [0, 4], [0, 3]])) == 'left'


def test_sharpness_is_the_inverse_width_of_an_edge():
  step = np.tile([0.0, 0, 0, 1, 1, 1, 1], (7, 1))
  ramp = np.tile([0.0, 0, 0.25, 0.5, 0.75, 1, 1], (7, 1))
  np.testing.assert_allclose(metrics.sharpness(np.stack([step, ramp, 0 * step])), [1, 0.25, 0])


def test_seam_compares_the_first_change_with_the_others():
  level = np.array([0.0, 0.3, 0.4, 0.5, 0.6])
  frames = level[:, None, None, None] * np.ones((5, 2, 2, 3))
  assert metrics.seam(frames) == pytest.approx(3, rel=0.01)
  assert metrics.seam(frames[1:]) == pytest.approx(1)
  assert metrics.seam(np.ones((4, 2, 2, 3))) == 1  # nothing moves, nothing shows
  with pytest.raises(ValueError, match='at least'):
    metrics.seam(frames[:2])


def test_similarity():
  a = np.zeros((1, 6, 6))
  a[0, 2:4, 2:4] = 1
  moved = np.roll(a, (2, -1), (1, 2))
  assert metrics.similarity(a, a)[0, 0] == pytest.approx(1)
  assert metrics.similarity(a, moved)[0, 0] == pytest.approx(1)
  assert metrics.similarity(a, moved, shift=1)[0, 0] < 0.9
  assert metrics.similarity(0.3 * a + 0.1, a)[0, 0] == pytest.approx(1)  # contrast is forgiven
  assert metrics.similarity(a, 1 - a, shift=0)[0, 0] == pytest.approx(-1)
  assert metrics.similarity(np.zeros((1, 6, 6)), a).max() == 0


def test_bootstrap_on_known_values():
  assert metrics.bootstrap([0.5, 0.5, np.nan]) == (0.5, 0.5, 0.5)
  mean, low, high = metrics.bootstrap([0, 1] * 50)
  assert mean == 0.5
  # The mean of 100 coin flips: 0.5 +- 1.96 * 0.05.
  assert low == pytest.approx(0.402, abs=0.015)
  assert high == pytest.approx(0.598, abs=0.015)
  assert metrics.bootstrap([0, 1] * 50) == (mean, low, high)
  assert np.isnan(metrics.bootstrap([np.nan])).all()
  with pytest.raises(ValueError, match=r'confidence=1\.0'):
    metrics.bootstrap([1], confidence=1.0)


@pytest.mark.parametrize('world', [WORLD, digits.DigitsWorld(height=48, width=96)],
                         ids=['square', 'wide'])
def test_analyse_finds_what_was_drawn(world):
  for index in range(8):
    clip = world.clip(index, frames=30, split='test')
    found = metrics.analyse(metrics.to_unit(clip.pixels), 32)
    np.testing.assert_allclose(found['background'], [clip.attributes.rgb] * 30, atol=1e-6)
    # The window follows the glyph at a constant distance, at borders too.
    offset = found['corners'] - np.stack([np.full(30, clip.attributes.y), clip.xs], -1)
    assert (offset == offset[0]).all()
    assert np.abs(offset).max() <= 8
    np.testing.assert_allclose(np.diff(found['centres'][:, 1]), np.diff(clip.xs), atol=0.05)
    true = metrics.centred(digits.glyphs(32)[clip.attributes.image_id][None])
    np.testing.assert_allclose(found['glyphs'][0], true[0], atol=0.02)
