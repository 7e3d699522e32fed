"""Sources and batches: a batch is a pure function of the step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pf_jax.data import digits, source

WORLD = digits.DigitsWorld()


class Numbers:
  """Record i is the number i."""

  def __init__(self, count):
    self.count = count

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    return {'i': np.asarray(index, np.int32)}


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def test_records_hold_pixels_truth_and_tokens():
  clips = source.ClipSource(WORLD, 5, seed=2, split='test',
                            encode_prompt=lambda prompt: {'ids': np.array([len(prompt)])})
  clip, record = WORLD.clip(3, 2, 5, 'test'), clips[3]
  np.testing.assert_array_equal(record['pixels'], clip.pixels)
  truth = clip.attributes
  assert record['digit'] == truth.digit
  assert record['image_id'] == truth.image_id
  assert record['direction'] == digits.DIRECTIONS.index(truth.direction)
  assert WORLD.colours[record['colour']].name == truth.colour
  assert (record['x'], record['y'], record['index']) == (truth.x, truth.y, 3)
  np.testing.assert_allclose(record['rgb'], truth.rgb)
  np.testing.assert_array_equal(record['ids'], [len(clip.prompt)])


def test_batches_in_order():
  batches = take(source.batches(Numbers(5), 3), 4)  # passes over the source join seamlessly
  np.testing.assert_array_equal([b['i'] for b in batches],
                                [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]])


@pytest.mark.parametrize('threads', [0, 1, 3])
def test_resuming_at_a_step_continues_the_run(threads):
  whole = take(source.batches(Numbers(11), 2, shuffle_seed=4, num_threads=threads), 9)
  rest = take(source.batches(Numbers(11), 2, shuffle_seed=4, start_step=4), 5)
  for a, b in zip(whole[4:], rest, strict=True):
    np.testing.assert_array_equal(a['i'], b['i'])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 20), st.integers(0, 3))
def test_random_access_equals_iteration(count, size, step, seed):
  dataset = source.batch_dataset(Numbers(count), size, shuffle_seed=seed)
  later = next(source.batches(Numbers(count), size, shuffle_seed=seed, start_step=step,
                              num_threads=0))
  np.testing.assert_array_equal(dataset[step]['i'], later['i'])


def test_every_pass_sees_every_record_once_in_another_order():
  seen = np.concatenate([b['i'] for b in take(source.batches(Numbers(12), 4, shuffle_seed=0), 6)])
  np.testing.assert_array_equal(np.sort(seen[:12]), range(12))
  np.testing.assert_array_equal(np.sort(seen[12:]), range(12))
  assert (seen[:12] != seen[12:]).any()


def test_processes_share_a_pass():
  parts = [source.batch_dataset(Numbers(12), 2, shuffle_seed=1, process=(p, 3)) for p in range(3)]
  seen = np.concatenate([part[step]['i'] for part in parts for step in range(2)])
  np.testing.assert_array_equal(np.sort(seen), range(12))


def test_clip_batches_are_stacked():
  batch = next(source.batches(source.ClipSource(WORLD, 2), 3, start_step=7))
  assert batch['pixels'].shape == (3, 2, 64, 64, 3)
  np.testing.assert_array_equal(batch['index'], [21, 22, 23])


def test_bad_arguments():
  with pytest.raises(ValueError, match='frames=0'):
    source.ClipSource(WORLD, 0)
  with pytest.raises(ValueError, match="split='dev'"):
    source.ClipSource(WORLD, 1, split='dev')
  with pytest.raises(ValueError, match='batch_size=0'):
    source.batches(Numbers(1), 0)
  with pytest.raises(ValueError, match=r'process=\(2, 2\)'):
    source.batches(Numbers(1), 1, process=(2, 2))
  with pytest.raises(ValueError, match='start_step=-1'):
    source.batches(Numbers(1), 1, start_step=-1)
  with pytest.raises(ValueError, match='source is empty'):
    source.batches(Numbers(0), 1)
  with pytest.raises(IndexError, match='index=4 is outside'):
    source.ClipSource(WORLD, 1, length=4)[4]
