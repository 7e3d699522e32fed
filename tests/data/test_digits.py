"""The digits world: geometry, determinism, splits and prompts."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pf_jax.data import digits

WORLD = digits.DigitsWorld()


def at(x, direction, world=WORLD):
  return dataclasses.replace(world.describe(0), x=x, direction=direction)


def test_a_glyph_moves_one_pixel_a_frame_and_bounces():
  world = digits.DigitsWorld(height=32, width=36)  # four pixels of way
  right = world.positions(at(1, 'right', world), 12)
  left = world.positions(at(3, 'left', world), 12)
  np.testing.assert_array_equal(right, [1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3, 4])
  np.testing.assert_array_equal(left, [3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1, 0])


def test_no_room_means_no_motion():
  world = digits.DigitsWorld(height=32, width=32)
  np.testing.assert_array_equal(world.positions(at(0, 'right', world), 3), [0, 0, 0])
  assert world.rows == (0,)


def test_speed_zero_stands_still():
  world = digits.DigitsWorld(speed=0)
  clip = world.clip(5, frames=4)
  assert (clip.pixels == clip.pixels[0]).all()


def test_rows_that_fit_are_centred():
  assert WORLD.rows == (16,)
  assert digits.DigitsWorld(row_step=8).rows == (0, 8, 16, 24, 32)
  assert digits.DigitsWorld(height=52, row_step=8).rows == (2, 10, 18)


def test_glyphs_start_at_few_phases_of_the_latent_grid():
  starts = {direction: {WORLD.describe(i, direction=direction).x for i in range(60)}
            for direction in digits.DIRECTIONS}
  assert starts == {'right': {0, 8, 16}, 'left': {32, 24, 16}}


def test_pixels_are_background_plus_white_glyph():
  attributes = dataclasses.replace(WORLD.describe(3), rgb=(51 / 255, 0.0, 1.0), x=7, y=8)
  clip = WORLD.render(attributes, 1)
  cover = digits.glyphs(32)[attributes.image_id]
  outside = np.ones((64, 64), bool)
  outside[8:40, 7:39] = False
  np.testing.assert_array_equal(np.unique(clip.pixels[0][outside], axis=0), [[51, 0, 255]])
  expected = np.round(51 + cover * (255 - 51))
  np.testing.assert_allclose(clip.pixels[0, 8:40, 7:39, 0], expected, atol=1)
  np.testing.assert_array_equal(clip.pixels[0, 8:40, 7:39, 2], 255)


def test_the_glyph_is_where_the_positions_say():
  clip = WORLD.clip(11, frames=40)
  y = clip.attributes.y
  first = clip.pixels[0, y:y + 32, clip.xs[0]:clip.xs[0] + 32]
  for frame, x in zip(clip.pixels, clip.xs, strict=True):
    np.testing.assert_array_equal(frame[y:y + 32, x:x + 32], first)


@pytest.mark.parametrize('index', range(20))
def test_the_prompt_s_direction_holds_for_the_first_block(index):
  clip = WORLD.clip(index, frames=13)
  step = 1 if clip.attributes.direction == 'right' else -1
  np.testing.assert_array_equal(np.diff(clip.xs), step)


def test_same_arguments_same_clip_other_seed_other_clip():
  one, two = WORLD.clip(4, 7, 20, 'test'), WORLD.clip(4, 7, 20, 'test')
  np.testing.assert_array_equal(one.pixels, two.pixels)
  assert one.attributes == two.attributes
  others = [WORLD.describe(4, 8, 'test'), WORLD.describe(5, 7, 'test'), WORLD.describe(4, 7)]
  assert all(dataclasses.replace(o, index=4, seed=7, split='test') != one.attributes
             for o in others)


def test_longer_clips_continue_shorter_ones():
  np.testing.assert_array_equal(WORLD.clip(2, frames=77).pixels[:30],
                                WORLD.clip(2, frames=30).pixels)


def test_clips_are_the_same_in_another_process():
  code = ('import zlib; from pf_jax.data import digits; '
          'print(zlib.crc32(digits.DigitsWorld().clip(9, 3, 16).pixels.tobytes()))')
  import zlib
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert int(result.stdout) == zlib.crc32(WORLD.clip(9, 3, 16).pixels.tobytes())


def test_fixing_one_attribute_leaves_the_others():
  free = WORLD.describe(6)
  colour = 'navy' if free.colour != 'navy' else 'teal'
  direction = 'left' if free.direction == 'right' else 'right'
  fixed = WORLD.describe(6, colour=colour, direction=direction)
  assert (fixed.colour, fixed.direction) == (colour, direction)
  assert (fixed.digit, fixed.image_id, fixed.y) == (free.digit, free.image_id, free.y)
  assert WORLD.describe(6, digit=3).digit == 3


def test_a_fifth_of_every_class_is_held_out():
  train, test = digits.split_ids()['train'], digits.split_ids()['test']
  assert not set(train) & set(test)
  assert len(train) + len(test) == 1797
  for digit in range(10):
    share = len(WORLD.images('test', digit)) / (digits.digit_labels() == digit).sum()
    assert share == pytest.approx(0.2, abs=0.003)
  # The split is part of every published number: it must never change unnoticed.
  np.testing.assert_array_equal(test[:5], EXPECTED_TEST_IDS)


EXPECTED_TEST_IDS = [1, 6, 11, 15, 18]


def test_clips_show_images_of_their_split_only():
  for split in digits.SPLITS:
    ids = set(WORLD.images(split).tolist())
    drawn = [WORLD.describe(i, split=split) for i in range(300)]
    assert {d.image_id for d in drawn} <= ids
    assert all(digits.digit_labels()[d.image_id] == d.digit for d in drawn)


def test_every_attribute_occurs():
  drawn = [WORLD.describe(i) for i in range(300)]
  assert {d.digit for d in drawn} == set(range(10))
  assert {d.colour for d in drawn} == {c.name for c in digits.COLOURS}
  assert {d.direction for d in drawn} == set(digits.DIRECTIONS)
  assert {d.y for d in drawn} == set(WORLD.rows)


def test_brightness_stays_within_the_jitter():
  for i in range(100):
    drawn = WORLD.describe(i)
    named = np.array(WORLD.colour(drawn.colour).rgb) / 255
    np.testing.assert_allclose(np.array(drawn.rgb), named, atol=0.1 * named.max() + 1 / 255)


def test_backgrounds_are_well_apart_whatever_their_brightness():
  shades = np.array([[np.array(c.rgb) / 255 * gain for gain in (0.9, 1.0, 1.1)]
                     for c in digits.COLOURS])
  for i in range(len(shades)):
    for j in range(i):
      distance = np.sqrt(((shades[i][:, None] - shades[j][None])**2).mean(-1))
      assert distance.min() > 0.1, (digits.COLOURS[i].name, digits.COLOURS[j].name)


def test_white_stands_out_from_every_background():
  for colour in digits.COLOURS:
    assert np.sqrt(((1 - np.array(colour.rgb) * 1.1 / 255)**2).mean()) > 0.3, colour.name


def test_glyphs_are_crisp_and_smooth():
  glyphs = digits.glyphs(32)
  assert glyphs.shape == (1797, 32, 32)
  assert glyphs.min() == 0
  assert glyphs.max() == 1
  edge = ((glyphs > 0.02) & (glyphs < 0.98)).mean()
  assert 0.02 < edge < 0.15  # some anti-aliasing, mostly plain ink or paper
  assert not glyphs.flags.writeable


def test_cubic_weights_keep_constants_and_lines():
  weights = digits._cubic_weights(8, 32)
  inner = slice(8, 24)
  np.testing.assert_allclose(weights[inner].sum(1), 1, atol=1e-12)
  centres = (np.arange(32) + 0.5) / 4 - 0.5
  np.testing.assert_allclose((weights @ np.arange(8))[inner], centres[inner], atol=1e-12)
  np.testing.assert_array_equal(digits._cubic_weights(8, 8), np.eye(8))


def test_non_square_pictures_and_other_glyph_sizes():
  world = digits.DigitsWorld(height=48, width=96, glyph_size=24, speed=3)
  clip = world.clip(0, frames=30)
  assert clip.pixels.shape == (30, 48, 96, 3)
  assert clip.pixels.dtype == np.uint8
  assert set(np.abs(np.diff(clip.xs))) <= {0, 1, 2, 3}  # less than 3 only where it bounces


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 10**9), st.sampled_from(digits.SPLITS))
def test_prompts_read_back(index, seed, split):
  drawn = WORLD.describe(index, seed, split)
  assert digits.parse_prompt(drawn.prompt) == (drawn.digit, drawn.direction, drawn.colour)


def test_prompt_grammar():
  assert digits.make_prompt(7, 'right', 'teal') == 'a white seven drifts right on a teal background'
  forgiven = '  A white SEVEN  drifts right on an teal background. '
  assert digits.parse_prompt(forgiven) == (7, 'right', 'teal')
  assert len(WORLD.prompts) == len(set(WORLD.prompts)) == 200
  assert 'a white zero drifts left on a crimson background' in WORLD.prompts


@pytest.mark.parametrize('prompt', [
    '', 'a cat', 'a white eleven drifts left on a teal background',
    'a white seven drifts up on a teal background', 'a white seven drifts left on a teal',
    'x a white seven drifts left on a teal background',
])
def test_other_prompts_are_refused(prompt):
  with pytest.raises(ValueError, match='does not read'):
    digits.parse_prompt(prompt)


def test_unknown_colours_are_named():
  with pytest.raises(ValueError, match=r'mauve.*crimson'):
    digits.parse_prompt('a white seven drifts left on a mauve background')


def test_pixel_conversions_round_trip():
  every = np.arange(256, dtype=np.uint8)
  floats = digits.to_float(every)
  assert (floats[0], floats[-1]) == (-1, 1)
  np.testing.assert_array_equal(digits.to_uint8(floats), every)
  np.testing.assert_array_equal(digits.to_uint8(np.array([-3.0, 3.0])), [0, 255])


@pytest.mark.parametrize(('bad', 'message'), [
    ({'height': 24}, 'height=24 is smaller than glyph_size=32'),
    ({'width': 0}, 'width=0 must be at least 1'),
    ({'speed': 0.5}, 'speed=0.5 must be a whole number'),
    ({'brightness_jitter': 1.0}, 'brightness_jitter=1.0 must be in'),
    ({'colours': ()}, 'colours is empty'),
])
def test_worlds_that_cannot_be(bad, message):
  with pytest.raises(ValueError, match=message):
    digits.DigitsWorld(**bad)


def test_bad_arguments_say_what_is_wanted():
  with pytest.raises(ValueError, match='must not be negative'):
    WORLD.describe(-1)
  with pytest.raises(ValueError, match="split='valid' is not one of train, test"):
    WORLD.describe(0, split='valid')
  with pytest.raises(ValueError, match='digit=10 is not one of'):
    WORLD.describe(0, digit=10)
  with pytest.raises(ValueError, match="colour='mauve' is unknown"):
    WORLD.describe(0, colour='mauve')
  with pytest.raises(ValueError, match='frames=0 must be at least 1'):
    WORLD.clip(0, frames=0)


def test_missing_scikit_learn_names_the_remedy(monkeypatch):
  digits._digits.cache_clear()
  monkeypatch.setitem(sys.modules, 'sklearn', None)
  try:
    with pytest.raises(ImportError, match=r'pip install pf_jax\[train\]'):
      digits._digits()
  finally:
    digits._digits.cache_clear()


def test_importing_the_world_does_not_import_scikit_learn_or_grain():
  code = ('import sys; import pf_jax.data.digits, pf_jax.data.source, pf_jax.data.latents; '
          'print([m for m in ("sklearn", "grain", "tensorstore", "tqdm") if m in sys.modules])')
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == '[]'
