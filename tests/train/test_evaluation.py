"""Evaluations: numbers at blocks, drift curves and their file, videos with and without truth."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from PIL import Image

from pf_jax.train import evaluation
from pf_jax.types import VideoSpec
from tests.evals import micro

# Blocks of 8 frames, the first of 7.
VIDEO, WORLD = micro.VIDEO, dataclasses.replace(micro.WORLD, brightness_jitter=0.0)
PLAIN = VideoSpec(height=8, width=8, temporal_stride=2, spatial_stride=2, frames_per_block=2,
                  patch=(1, 2, 2))  # blocks of 4 frames, the first of 3


@pytest.fixture(scope='module')
def true():
  draws = [WORLD.describe(i, 0) for i in range(2)]
  videos = np.stack([WORLD.render(draw, VIDEO.pixel_frames(6)).pixels for draw in draws])
  return videos, [draw.prompt for draw in draws]


def records(workdir):
  return [json.loads(line) for line in (workdir / 'drift.jsonl').read_text().splitlines()]


def size_of(path):
  with Image.open(path) as picture:
    return picture.size


@pytest.mark.parametrize(('total', 'most', 'blocks'), [
    (1, 24, (1,)), (4, 24, (1, 2, 3, 4)), (6, 3, (1, 2, 4, 6)), (7, 3, (1, 3, 6, 7)),
    (120, 24, (1, *range(5, 121, 5)))])
def test_which_blocks_are_measured(total, most, blocks):
  assert evaluation.drift_blocks(total, most) == blocks


def test_true_videos_until_they_change_colour(true, tmp_path):
  videos, prompts = true
  broken = videos.copy()
  stop = VIDEO.pixel_frames(4)
  # From block 5 on the first video's background has the colours of red and blue exchanged, and
  # both stand still.
  broken[0, stop:] = broken[0, stop:, :, :, ::-1]
  broken[:, stop:] = broken[:, stop:stop + 1]
  values = evaluation.judge(broken, prompts, WORLD, VIDEO, (1, 6), 40, tmp_path, clip_blocks=4)
  assert set(values) == {f'{name}/block_{block}' for block in (1, 6) for name in (
      'class_accuracy', 'colour_accuracy', 'background_drift', 'dynamic_degree')}
  assert values['colour_accuracy/block_1'] == 1
  assert values['colour_accuracy/block_6'] == 0.5
  assert values['dynamic_degree/block_1'] == pytest.approx(1, abs=0.1)
  assert values['dynamic_degree/block_6'] == 0
  record, = records(tmp_path)
  assert (record['step'], record['blocks']) == (40, [1, 2, 3, 4, 5, 6])
  assert record['values']['colour_accuracy'] == [1, 1, 1, 1, 0.5, 0.5]
  drift = record['values']['background_drift']
  assert max(drift[:4]) < 0.02 < 0.1 < min(drift[4:])
  assert drift[5] == values['background_drift/block_6']
  assert size_of(tmp_path / 'samples.png')[1] > 2 * 64
  assert size_of(tmp_path / 'drift.png')[0] > 1000


def test_long_videos_are_measured_here_and_there_and_where_asked(true, tmp_path, monkeypatch):
  videos, prompts = true
  monkeypatch.setattr(evaluation, 'drift_blocks', lambda total: (1, 4, total))
  values = evaluation.judge(videos, prompts, WORLD, VIDEO, (5,), 1, tmp_path)
  assert records(tmp_path)[0]['blocks'] == [1, 4, 5, 6]
  assert {name.split('/')[1] for name in values} == {'block_5'}


def test_evaluations_are_kept_and_those_done_again_replaced(tmp_path):
  def evaluate(step, brightness):
    videos = np.zeros((1, PLAIN.pixel_frames(2), 8, 8, 3), np.uint8)
    videos[:, 3:] = brightness
    evaluation.judge(videos, ['a'], None, PLAIN, (1,), step, tmp_path)
    return [(record['step'], round(255 * record['values']['colour_drift'][1]))
            for record in records(tmp_path)]

  assert evaluate(10, 50) == [(10, 50)]
  assert evaluate(20, 60) == [(10, 50), (20, 60)]
  assert evaluate(20, 70) == [(10, 50), (20, 70)]
  with open(tmp_path / 'drift.jsonl', 'a', encoding='utf-8') as stream:
    stream.write('{"step": 1')  # the run was killed
  assert evaluate(15, 80) == [(10, 50), (15, 80)]


def test_videos_without_truth(tmp_path):
  near = functools.partial(pytest.approx, rel=1e-5, abs=1e-6)
  videos = np.zeros((2, PLAIN.pixel_frames(3), 8, 8, 3), np.uint8)
  videos[:, :] = 51  # 0.2
  # Block 2 of the first video is the same half a picture brighter; block 3 flickers.
  videos[0, 3:7, :4] = 153
  videos[0, 7::2] = 153
  values = evaluation.judge(videos, ['a', 'b'], None, PLAIN, (1, 2, 3), 1, tmp_path)
  assert len(values) == 3 * 4
  for name in ('colour_drift', 'contrast', 'sharpness', 'frame_difference'):
    assert values[f'{name}/block_1'] == near(0)
  # Means over the two videos, of which one stays as it was. Half of 0.4 more; a deviation of 0.2.
  assert values['colour_drift/block_2'] == near(0.2 / 2)
  assert values['contrast/block_2'] == near(0.2 / 2)
  # One edge of 0.4, one pixel wide: weighted by itself it is 0.4.
  assert values['sharpness/block_2'] == near(0.4 / 2)
  # Only the first of the four differences, to the frame of block 1, over half of the picture.
  assert values['frame_difference/block_2'] == near(0.4 / 2 / 4 / 2)
  # 0.6, 0.2, 0.6, 0.2 after a half picture of 0.6.
  assert values['frame_difference/block_3'] == near((0.2 + 3 * 0.4) / 4 / 2)
  assert values['colour_drift/block_3'] == near(0.2 / 2)
  assert values['sharpness/block_3'] == near(0)
  assert size_of(tmp_path / 'samples.png')[1] > 2 * 128


def test_the_picture_shows_every_evaluation_and_where_clips_end():
  def record(step, height):
    return {'step': step, 'blocks': [1, 2, 3], 'values': {'colour_accuracy': [1.0, height, None]}}

  alone = evaluation.drift_curves([record(2, 0.2)])
  both = evaluation.drift_curves([record(1, 0.9), record(2, 0.2)])
  ended = evaluation.drift_curves([record(2, 0.2)], clip_blocks=2)
  assert alone.dtype == np.uint8
  newest = np.array([0x1b, 0x4f, 0x8f])

  def pixels(picture, colour):
    return int((picture == colour).all(-1).sum())

  assert pixels(alone, newest) > 100
  assert pixels(both, newest) > 100
  older = (both[..., 0].astype(int) - both[..., 2] > 60).sum()  # orange
  assert older > 100 > (alone[..., 0].astype(int) - alone[..., 2] > 60).sum()
  # A dashed line: one column or two with much grey in it.
  grey = [((picture.max(-1) < 0xd0) & (picture.min(-1) > 0x60) & (np.ptp(picture, axis=-1) < 8))
          .sum(0).max() for picture in (alone, ended)]
  assert grey[0] < 60 < 100 < grey[1]


def test_blocks_that_are_not_there(true, tmp_path):
  videos, prompts = true
  for world in (WORLD, None):
    with pytest.raises(ValueError, match=r'blocks=\(1, 7\) must lie within 1\.\.6'):
      evaluation.judge(videos, prompts, world, VIDEO, (1, 7), 1, tmp_path)
  with pytest.raises(ValueError, match=r'must lie within 1\.\.0'):
    evaluation.judge(videos[:, :5], prompts, None, VIDEO, (1,), 1, tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_world_without_motion_has_no_degree(tmp_path):
  still = dataclasses.replace(WORLD, speed=0.0)
  draw = still.describe(0, 0)
  video = still.render(draw, VIDEO.pixel_frames(1)).pixels[None]
  values = evaluation.judge(video, [draw.prompt], still, VIDEO, (1,), 1, tmp_path)
  assert np.isnan(values['dynamic_degree/block_1'])
  assert records(tmp_path)[0]['values']['dynamic_degree'] == [None]


def test_a_sampler_of_any_videos(tmp_path, monkeypatch):
  """What is sampled is another test's business: here blocks arrive, one by one."""
  monkeypatch.setattr(evaluation, 'Programs', lambda *_: FakePrograms())
  monkeypatch.setattr(evaluation, 'stream', lambda *_: iter(FakeBlock(i) for i in range(3)))
  models = type('Models', (), {'spec': type('Spec', (), {'video': PLAIN})})
  with pytest.raises(ValueError, match='no prompt to sample'):
    evaluation.Sampler(None, None)
  sampler = evaluation.Sampler(None, None, texts=['a cat'], clip_blocks=2)
  seen = []
  values = sampler.judge(models, seen.append, (2, 3), 5, tmp_path)
  assert seen == [['a cat']]
  assert {name.split('/')[1] for name in values} == {'block_1', 'block_2', 'block_3'}
  assert values['colour_drift/block_3'] == pytest.approx(2 * 51 / 255)
  assert records(tmp_path)[0]['blocks'] == [1, 2, 3]


class FakePrograms:
  def text_keys_values(self, rows):
    return rows


class FakeBlock:
  def __init__(self, index):
    frames = PLAIN.block_frames if index else PLAIN.first_block_frames
    self.frames = np.full((1, frames, 8, 8, 3), 51 * index, np.uint8)
