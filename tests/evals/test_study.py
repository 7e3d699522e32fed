"""A whole study in small: what is kept, what is done again, and that the numbers are right."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from pf_jax import outputs
from pf_jax.evals import classifier as classifier_lib
from pf_jax.evals import evaluator, results, rollouts, study, tables
from pf_jax.evals.config import AblationConfig, EvaluateConfig, PartsConfig
from pf_jax.weights import package
from tests.evals import micro

pytestmark = pytest.mark.timeout(400)

# `same` is `pack` under another name: every difference between the two is exactly zero.
CONFIG = EvaluateConfig(
    AblationConfig({'pack': {}, 'same': {'selection': 'top_k'}}, start_blocks=1, blocks=3,
                   judged=(2, 3), curve_every=0),
    PartsConfig(clip_blocks=2, branches=('both',), blocks=2, judged=(2,)),
    world=micro.WORLD, videos=4, batch=2, resamples=50, sheet_videos=2, sheet_columns=3)
RUNS = ['prompt-pack', 'clip-pack', 'parts-both', 'parts-swapped', 'prompt-same', 'clip-same']


@pytest.fixture(scope='module')
def pipeline():
  return micro.pipeline()


@pytest.fixture(scope='module')
def finished(pipeline, tmp_path_factory):
  return results.run(CONFIG, pipeline, tmp_path_factory.mktemp('study'), show=False)


@pytest.fixture
def executed(monkeypatch):
  """Names of the runs that are really made."""
  names, original = [], rollouts.execute

  def execute(run, *arguments, **options):
    names.append(run.name)
    return original(run, *arguments, **options)
  monkeypatch.setattr(rollouts, 'execute', execute)
  return names


def test_values_are_those_of_the_finished_videos(finished, pipeline):
  """Judged block by block and batch by batch, or all at once when they are done."""
  assert [run.name for run in finished.runs] == RUNS
  draws = rollouts.held_out(micro.WORLD, 4, 0)
  prompts = [draw.prompt for draw in draws]
  videos = []
  for first in (0, 2):
    blocks = rollouts.sample(pipeline, prompts[first:first + 2], [first, first + 1], blocks=3)
    videos += list(np.concatenate([np.asarray(b.frames) for b in blocks], axis=1))
  wanted = evaluator.evaluate(
      videos, prompts, video=micro.VIDEO, world=micro.WORLD,
      classifier=classifier_lib.load().model, spec=evaluator.EvalSpec(blocks=(2, 3), resamples=50))
  for name in evaluator.METRICS:
    np.testing.assert_allclose(finished.report('prompt-pack').values[name], wanted.values[name],
                               atol=1e-6, err_msg=name)


def test_what_is_written(finished):
  root = finished.root
  data = json.loads((root / 'results.json').read_text())
  assert list(data['runs']) == RUNS
  assert {row['mean'] for row in data['runs']['clip-same']['difference']} <= {0.0, None}
  assert data['config']['ablation']['policies']['same'] == {'selection': 'top_k'}
  assert data['prompts'] == [draw.prompt for draw in finished.draws]
  assert {'jax', 'pf_jax', 'numpy'} <= set(data['versions'])
  assert len(data['truth']['parts']['psnr']) == 4
  table = (root / 'table.md').read_text()
  assert '| same |' + ' +0.000 [+0.000, +0.000] |' * 3 in table
  assert '| chance | 0.100 | 0.100 | 0.100 |' in table
  blocks = len(finished.config.ablation.all_judged)
  assert f'| block 2 | block 3 | mean of {blocks} blocks |' in table
  for heading in ('## From the prompt alone', '## After 1 true blocks', '### Compressor branches',
                  'swapped prompts, judged by the old one', 'PSNR at full resolution'):
    assert heading in table
  truth = finished.report('truth')
  assert f'| true clips | {tables.cell(tables.lookup(truth)["class_accuracy", 2])} |' in table
  assert truth.values['background_drift'].max() < 1e-6
  pictures = {path.name for path in root.glob('*.png')}
  assert pictures == {f'sheet-{name}.png' for name in RUNS} | {'curves-prompt.png',
                                                               'curves-clip.png'}


def test_swapped_videos_are_judged_by_both_prompts(finished):
  stored = finished.done['parts-swapped']
  assert stored['inputs']['swapped'] is True
  new, old = finished.report('parts-swapped'), finished.report('parts-swapped', 'unswapped')
  # The same videos: what does not depend on the prompt is equal.
  np.testing.assert_array_equal(new.values['background_drift'], old.values['background_drift'])
  np.testing.assert_array_equal(new.values['sharpness'], old.values['sharpness'])
  assert np.abs(new.values['class_probability'] - old.values['class_probability']).max() > 0


def test_finished_runs_are_kept(finished, pipeline, executed):
  before = (finished.root / 'results.json').read_text()
  results.run(CONFIG, pipeline, finished.root, show=False)
  assert executed == []
  (finished.root / 'runs' / 'clip-pack.json').unlink()
  again = study.Study(CONFIG, pipeline, finished.root)
  assert again.blocks_left == 3 * 2  # three blocks, two batches
  results.run(CONFIG, pipeline, finished.root, show=False)
  assert executed == ['clip-pack']

  def values(text):
    return [run['report']['values'] for run in json.loads(text)['runs'].values()]
  assert values((finished.root / 'results.json').read_text()) == values(before)


def test_other_settings_are_refused_before_any_work(finished, pipeline, executed, tmp_path):
  other = dataclasses.replace(CONFIG, seed=1)
  with pytest.raises(study.StudyError, match=r'truth.json was made with other settings \(seed\)'):
    results.run(other, pipeline, finished.root, show=False)
  policies = {'pack': {}, 'same': {'selection': 'fifo'}}
  other = dataclasses.replace(CONFIG, ablation=dataclasses.replace(CONFIG.ablation,
                                                                   policies=policies))
  with pytest.raises(study.StudyError, match=r'prompt-same.json .* \(cache\).*--overwrite'):
    results.run(other, pipeline, finished.root, show=False)
  assert executed == []
  left = study.Study(other, pipeline, finished.root, overwrite=True)
  assert [name for name, done in left.done.items() if done is None] == ['prompt-same', 'clip-same']
  with pytest.raises(study.StudyError, match='world is 64x64 at 16 fps'):
    study.Study(dataclasses.replace(CONFIG, world=type(micro.WORLD)()), pipeline, tmp_path)
  with pytest.raises(study.StudyError, match=r"headline=\('fid',\)"):
    study.Study(dataclasses.replace(CONFIG, headline=('fid',)), pipeline, tmp_path)
  with pytest.raises(study.StudyError, match='instances=900 exceeds'):
    study.Study(dataclasses.replace(CONFIG, instances=900), pipeline, tmp_path)


def test_policies_may_sample_other_models_in_other_passes(finished, pipeline, tmp_path,
                                                          monkeypatch):
  """Which pipeline makes which run; one model's weights are not another one's results."""
  models = micro.models()

  def save_other(factor):
    models.transformer.head.kernel = factor * pipeline.models.transformer.head.kernel
    package.save_model(tmp_path / 'other', models, choices=micro.CHOICES)

  save_other(2)
  ablation = AblationConfig(
      {'pack': {}, 'other': {'top_k': 0}}, samplers={'other': {'steps': (1000.0, 500.0)}},
      checkpoints={'other': str(tmp_path / 'other')}, starts=('prompt',), blocks=3, judged=(2, 3),
      curve_every=0)
  config = dataclasses.replace(CONFIG, ablation=ablation, parts=PartsConfig(2, blocks=0))
  (tmp_path / 'study').mkdir()
  shutil.copytree(finished.root / 'runs', tmp_path / 'study' / 'runs')
  made = {}

  def execute(self, run, *arguments):
    made[run.name] = self._variant(run)
    return {'report': finished.report('prompt-pack').to_dict()}

  monkeypatch.setattr(study.Study, '_execute', execute)
  results.run(config, pipeline, tmp_path / 'study', show=False)
  assert set(made) == {'prompt-other'}  # the rest is kept
  other = made['prompt-other']
  assert (other.spec.cache.top_k, other.spec.sampler.steps) == (0, (1000.0, 500.0))
  np.testing.assert_allclose(other.models.transformer.head.kernel,
                             2 * pipeline.models.transformer.head.kernel, rtol=1e-3)
  assert study.Study(config, pipeline, tmp_path / 'study').done['prompt-other'] is not None
  save_other(3)
  with pytest.raises(study.StudyError, match=r'prompt-other.json was made .* \(model\)'):
    study.Study(config, pipeline, tmp_path / 'study')


def test_checkpoints_of_unknown_policies_are_refused():
  with pytest.raises(ValueError, match=r'checkpoints names teacher; wanted some of .* pack'):
    AblationConfig({'pack': {}}, checkpoints={'teacher': 'x'})


def test_damaged_results_and_directories_in_use(finished, pipeline, tmp_path):
  runs = tmp_path / 'runs'
  runs.mkdir()
  (runs / 'truth.json').write_text('{"inp')
  with pytest.raises(study.StudyError, match=r'truth\.json cannot be read'):
    study.Study(CONFIG, pipeline, tmp_path)
  assert study.Study(CONFIG, pipeline, tmp_path, overwrite=True).done['truth'] is None
  with outputs.claim_directory(tmp_path / 'busy'):
    with pytest.raises(outputs.DirectoryInUse, match='is in use by process'):
      results.run(CONFIG, pipeline, tmp_path / 'busy', show=False)


def literal_report(accuracy):
  values = {name: np.zeros((4, 2)) for name in evaluator.METRICS}
  values['class_accuracy'] = np.array(accuracy, float)
  return evaluator.Report(values, {'direction_accuracy': np.ones(4)}, {'class_accuracy': 0.1},
                          evaluator.EvalSpec(blocks=(5, 30), resamples=4000))


def test_paired_differences_by_hand():
  pack = literal_report([[0.9, 1.0], [0.1, 0.2], [0.5, 0.5], [0.3, np.nan]])
  other = literal_report([[0.8, 0.0], [0.0, 0.4], [0.4, 0.1], [0.2, 0.3]])
  difference = evaluator.paired(other, pack)
  np.testing.assert_allclose(difference.values['class_accuracy'],
                             [[-0.1, -1.0], [-0.1, 0.2], [-0.1, -0.4], [-0.1, np.nan]])
  rows = tables.lookup(difference)
  row = rows['class_accuracy', 5]  # every video loses 0.1, however different the videos are
  assert (row['mean'], row['low'], row['high']) == pytest.approx((-0.1, -0.1, -0.1))
  alone = tables.lookup(pack)['class_accuracy', 5]
  assert alone['high'] - alone['low'] > 0.3
  row = rows['class_accuracy', 30]
  assert (row['mean'], row['videos'], row['chance']) == (pytest.approx(-0.4), 3, None)
  # Means of three draws from {-1, .2, -.4}: all -1 has probability 1/27 > 2.5%, so has all .2.
  assert (row['low'], row['high']) == pytest.approx((-1.0, 0.2))
  assert tables.metric_table({'other': rows}, 'class_accuracy', (5, 30), signed=True) == (
      '| policy | block 5 | block 30 |\n|---|---|---|\n'
      '| other | -0.100 [-0.100, -0.100] | -0.400 [-1.000, +0.200] |')
  # Each video's mean over its blocks: -0.55, 0.05, -0.25, and -0.1 where block 30 has no value.
  assert rows['class_accuracy', evaluator.MEAN]['mean'] == pytest.approx(-0.2125)
  assert tables.metric_table({'other': rows}, 'class_accuracy', (5,), mean_of=(5, 30)).startswith(
      '| policy | block 5 | mean of 2 blocks |\n|---|---|---|\n| other | -0.100 [-0.100, -0.100] '
      '| -0.212 [')
  with pytest.raises(ValueError, match='cannot be paired'):
    evaluator.paired(other.at((5,)), pack)


def test_reports_survive_json():
  report = literal_report([[0.9, 1.0], [0.1, 0.2], [0.5, 0.5], [0.3, np.nan]])
  again = evaluator.Report.from_dict(json.loads(report.to_json()))
  assert again.spec == report.spec
  assert again.chance == report.chance
  np.testing.assert_array_equal(again.values['class_accuracy'], report.values['class_accuracy'])
  np.testing.assert_array_equal(report.at((30,)).values['class_accuracy'][:, 0],
                                report.values['class_accuracy'][:, 1])
  with pytest.raises(ValueError, match='block 60 was not judged'):
    report.at((60,))
