"""The evaluator: true clips score the ceiling, and every kind of damage is noticed."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import ndimage

from pf_jax import types
from pf_jax.data import digits
from pf_jax.evals import classifier as classifier_lib
from pf_jax.evals import evaluator

WORLD = digits.DigitsWorld()
VIDEO = types.VideoSpec()
SPEC = evaluator.EvalSpec(blocks=(1, 3), resamples=200)
FRAMES = VIDEO.pixel_frames(3)
CLIPS = [WORLD.clip(i, 0, FRAMES, 'test') for i in range(8)]
BLOCK_3 = slice(VIDEO.pixel_frames(2), FRAMES)


@pytest.fixture(scope='module')
def classifier():
  return classifier_lib.load().model


def judge(classifier, videos, prompts=None, spec=SPEC, **options):
  prompts = prompts or [clip.prompt for clip in CLIPS]
  return evaluator.evaluate(videos, prompts, video=VIDEO, world=WORLD, classifier=classifier,
                            spec=spec, **options)


@pytest.fixture(scope='module')
def truth(classifier):
  return judge(classifier, [clip.pixels for clip in CLIPS],
               image_ids=[clip.attributes.image_id for clip in CLIPS])


def in_block_3(change):
  """True clips with something done to the frames of block 3."""
  videos = []
  for clip in CLIPS:
    video = clip.pixels.copy()
    video[BLOCK_3] = change(clip)
    videos.append(video)
  return videos


def mean(report, metric, column):
  return float(np.nanmean(report.values[metric][:, column]))


def test_true_clips_score_the_ceiling(truth):
  for column in (0, 1):
    assert mean(truth, 'class_accuracy', column) >= 0.95
    assert mean(truth, 'class_probability', column) >= 0.95
    assert mean(truth, 'instance_rank1', column) == 1
    assert mean(truth, 'instance_similarity', column) > 0.99
    assert mean(truth, 'colour_accuracy', column) == 1
    assert mean(truth, 'background_drift', column) < 1e-6
    assert mean(truth, 'dynamic_degree', column) == pytest.approx(1, abs=0.01)
    assert mean(truth, 'sharpness', column) > 0.4
  assert np.isnan(truth.values['seam'][:, 0]).all()  # nothing comes before the first block
  assert mean(truth, 'seam', 1) == pytest.approx(1, abs=0.1)
  assert truth.once['direction_accuracy'].mean() == 1


def another(clip, **changes):
  return WORLD.render(dataclasses.replace(clip.attributes, **changes), FRAMES).pixels[BLOCK_3]


def other_instance(clip):
  ids = WORLD.images('test', clip.attributes.digit)
  return another(clip, image_id=int(ids[ids != clip.attributes.image_id][0]))


def other_class(clip):
  digit = (clip.attributes.digit + 1) % 10
  return another(clip, image_id=int(WORLD.images('test', digit)[0]))


def drifted(clip):
  return another(clip, rgb=tuple(min(c + 0.2, 1.0) for c in clip.attributes.rgb))


def frozen(clip):
  return np.repeat(clip.pixels[BLOCK_3][:1], VIDEO.block_frames, 0)


def blurred(clip):
  return ndimage.gaussian_filter(clip.pixels[BLOCK_3], (0, 2, 2, 0))


def jump(clip):
  return np.roll(clip.pixels[BLOCK_3], 8, axis=1)


@pytest.mark.parametrize(('change', 'metric', 'at_most', 'at_least'), [
    (other_class, 'class_accuracy', 0.3, 0),
    (other_class, 'class_probability', 0.3, 0),
    (other_instance, 'instance_rank1', 0.4, 0),
    (other_instance, 'instance_similarity', 0.9, 0),
    (drifted, 'background_drift', 0.21, 0.15),
    (drifted, 'colour_accuracy', 0.9, 0),
    (frozen, 'dynamic_degree', 0.0, 0),
    (blurred, 'sharpness', 0.25, 0),
    (jump, 'seam', 10, 1.5),
])
def test_damage_is_noticed_where_it_is(classifier, truth, change, metric, at_most, at_least):
  report = judge(classifier, in_block_3(change),
                 image_ids=[clip.attributes.image_id for clip in CLIPS])
  assert at_least <= mean(report, metric, 1) <= at_most
  np.testing.assert_array_equal(report.values[metric][:, 0], truth.values[metric][:, 0])


def test_swapped_prompts_are_noticed(classifier):
  def opposite(clip):
    truth = clip.attributes
    colour = 'navy' if truth.colour != 'navy' else 'orange'
    return digits.make_prompt((truth.digit + 5) % 10,
                              'left' if truth.direction == 'right' else 'right', colour)
  report = judge(classifier, [clip.pixels for clip in CLIPS], [opposite(clip) for clip in CLIPS])
  assert mean(report, 'class_accuracy', 0) < 0.2
  assert mean(report, 'colour_accuracy', 0) == 0
  assert report.once['direction_accuracy'].mean() == 0


def test_without_a_known_instance_the_first_block_is_the_anchor(classifier):
  same = judge(classifier, [clip.pixels for clip in CLIPS])
  assert mean(same, 'instance_rank1', 1) == 1
  other = judge(classifier, in_block_3(other_instance))
  assert mean(other, 'instance_rank1', 1) < 0.5


def test_floats_and_bytes_are_judged_alike(classifier, truth):
  floats = judge(classifier, np.stack([digits.to_float(clip.pixels) for clip in CLIPS]),
                 image_ids=[clip.attributes.image_id for clip in CLIPS])
  for name, values in truth.values.items():
    np.testing.assert_allclose(floats.values[name], values, atol=1e-4, err_msg=name)


def test_rows_intervals_and_chance(truth):
  rows = truth.rows()
  assert len(rows) == len(evaluator.METRICS) * 3 + 1  # two blocks, their mean; direction
  mean_row = next(r for r in rows if r['metric'] == 'sharpness' and r['block'] == evaluator.MEAN)
  assert mean_row['mean'] == pytest.approx(truth.values['sharpness'].mean())
  row = next(r for r in rows if r['metric'] == 'sharpness' and r['block'] == 3)
  assert row['low'] <= row['mean'] == truth.values['sharpness'][:, 1].mean() <= row['high']
  assert (row['videos'], row['chance']) == (8, None)
  chance = {r['metric']: r['chance'] for r in rows if r['chance'] is not None}
  assert chance == {'class_accuracy': 0.1, 'instance_rank1': 0.1, 'colour_accuracy': 0.1,
                    'direction_accuracy': 0.5}


def test_reports_are_strict_json(truth):
  data = json.loads(truth.to_json())
  assert data['values']['seam'][0][0] is None
  assert data['spec']['blocks'] == [1, 3]


def test_ground_truth_report_of_a_wide_world(classifier):
  world = digits.DigitsWorld(height=48, width=96)
  video = types.VideoSpec(height=48, width=96)
  report = evaluator.ground_truth_report(world, video, classifier, clips=4, spec=SPEC)
  assert report.videos == 4
  assert mean(report, 'class_accuracy', 1) >= 0.75
  assert mean(report, 'dynamic_degree', 1) == pytest.approx(1, abs=0.01)


def test_bad_input_says_what_is_wanted(classifier):
  videos = [clip.pixels for clip in CLIPS]
  with pytest.raises(ValueError, match='one prompt per video'):
    judge(classifier, videos, ['a white one drifts left on a teal background'])
  with pytest.raises(ValueError, match=r'video 0 has shape \(45, 64, 64, 3\).*sample a longer'):
    judge(classifier, videos, spec=dataclasses.replace(SPEC, blocks=(4,)))
  with pytest.raises(ValueError, match='does not read'):
    judge(classifier, videos[:1], ['a cat'])
  with pytest.raises(ValueError, match=r'blocks=.* counted from 1'):
    evaluator.EvalSpec(blocks=(0,))
  with pytest.raises(ValueError, match='instances=1'):
    evaluator.EvalSpec(instances=1)
  with pytest.raises(ValueError, match='instances=900 exceeds'):
    judge(classifier, videos, spec=dataclasses.replace(SPEC, instances=900))
