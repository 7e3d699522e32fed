"""Boxes of clips: where they lie, that they are the clip's pixels, and that they repeat."""

import numpy as np
import pytest

from pf_jax.data import digits
from pf_jax.data.crops import CropSource, CropSpec

WORLD = digits.DigitsWorld()


def test_a_box_is_a_piece_of_its_clip():
  spec = CropSpec(size=(5, 16, 24), glyph_share=0.5, pooled_share=0.0)
  boxes = CropSource(WORLD, spec, seed=3)
  for index in range(5):
    box = boxes[index]['pixels']
    assert box.shape == (5, 16, 24, 3)
    clip = WORLD.clip(index, 3, 17).pixels
    starts = np.lib.stride_tricks.sliding_window_view(clip[::4], (16, 24), axis=(1, 2))
    # The first frame lies somewhere in frames 0, 4, 8 or 12 of the clip.
    assert (starts[:4] == np.moveaxis(box[0], -1, 0)[None, None, None]).all((-3, -2, -1)).any()


def test_boxes_at_the_glyph_show_ink():
  def inked(share):
    boxes = CropSource(WORLD, CropSpec(glyph_share=share, pooled_share=0.0))
    return np.mean([(boxes[i]['pixels'].min(-1) > 250).any() for i in range(60)])

  assert inked(1.0) > 0.85
  assert inked(0.0) < 0.75


def test_records_are_a_function_of_seed_and_index():
  first, again, other = (CropSource(WORLD, CropSpec(pooled_share=0.0), seed=s) for s in (1, 1, 2))
  assert np.array_equal(first[7]['pixels'], again[7]['pixels'])
  assert not np.array_equal(first[7]['pixels'], other[7]['pixels'])


def test_pooled_clips_take_their_share():
  seen = []

  def pool(frames):
    seen.append(frames.shape)
    return np.zeros((5, 16, 16, 3), np.uint8)

  boxes = CropSource(WORLD, CropSpec(pooled_share=0.25), pool=pool, pool_frames=16)
  zeros = sum(not boxes[i]['pixels'].any() for i in range(80))
  assert zeros == len(seen)
  assert 10 <= zeros <= 30
  assert set(seen) == {(16, 64, 64, 3)}


def test_refusals():
  with pytest.raises(ValueError, match='does not fit into pictures of 64x64'):
    CropSource(WORLD, CropSpec(size=(5, 80, 16), pooled_share=0.0))
  with pytest.raises(ValueError, match='needs a pool function'):
    CropSource(WORLD, CropSpec(pooled_share=0.1))
  with pytest.raises(ValueError, match=r'glyph_share=1\.5 must be within'):
    CropSpec(glyph_share=1.5)
  with pytest.raises(IndexError):
    CropSource(WORLD, CropSpec(pooled_share=0.0), length=3)[3]
