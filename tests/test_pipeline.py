"""Load, sample, write: what comes back, what is refused."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import pf_jax
from pf_jax import outputs
from pf_jax import pipeline as pipeline_lib
from pf_jax.models.tokenizer import build_tokenizer
from pf_jax.pipeline import Pipeline
from pf_jax.viz.video import read_video
from pf_jax.weights import package
from tests.sampled import CHOICES, tiny_fixture  # noqa: F401 (found by pytest)

pytestmark = pytest.mark.timeout(400)
PROMPT = 'a white seven'


def test_three_lines(tiny, tmp_path):
  video = tiny.pipeline.sample(PROMPT, seconds=2.5, seed=3, progress=False)
  path = video.write(tmp_path / 'seven.mp4')
  assert video.frames.shape == (13 + 2 * 16, 32, 48, 3)
  assert video.latents.shape == (3 * 4, 4, 6, 4)
  assert (video.fps, video.prompt, video.seed) == (16, PROMPT, 3)
  clip = read_video(path)
  assert clip.fps == 16
  assert clip.pixels.shape == video.frames.shape
  assert np.corrcoef(clip.pixels.ravel(), video.frames.ravel())[0, 1] > 0.95
  with pytest.raises(outputs.OutputExists):
    video.write(path)
  again = tiny.pipeline.sample(PROMPT, seconds=2.5, seed=3, progress=False)
  np.testing.assert_array_equal(again.frames, video.frames)
  other = tiny.pipeline.sample(PROMPT, seconds=2.5, seed=4, progress=False)
  assert np.abs(other.latents - video.latents).max() > 0.1


def test_the_front_door_loads(tiny):
  pipeline = pf_jax.load(tiny.directory)
  assert pipeline.directory == tiny.directory
  assert pipeline.choices == tiny.pipeline.choices
  for got, want in zip(jax.tree.leaves(pipeline.models), jax.tree.leaves(tiny.pipeline.models),
                       strict=True):
    np.testing.assert_array_equal(got, want)


def test_blocks_are_those_of_sample(tiny, capsys):
  prompt = 'a white seven | 2: a red three'
  video = tiny.pipeline.sample(prompt, seconds=4, seed=1)
  blocks = list(tiny.pipeline.blocks([prompt], 4, [1]))
  assert [block.number for block in blocks] == [0, 1, 2, 3]
  np.testing.assert_array_equal(
      np.concatenate([np.asarray(block.frames)[0] for block in blocks]), video.frames)
  assert 'block 4/4' in capsys.readouterr().err
  plain = [np.asarray(block.latents) for block in tiny.pipeline.blocks(['a white seven'], 4, [1])]
  for number in (0, 1):
    np.testing.assert_array_equal(plain[number], blocks[number].latents)
  assert np.abs(plain[2] - blocks[2].latents).max() > 1e-3


def test_choices_come_from_the_model_and_yield_to_arguments(tiny):
  spec = tiny.pipeline.spec
  assert (spec.cache.top_k, spec.cache.mid_capacity, spec.cache.sink_blocks) == (1, 2, 1)
  assert spec.sampler.steps == (1000.0, 500.0)
  other = pf_jax.load(tiny.directory, cache={'top_k': 2, 'positions': 'absolute'},
                      sampler={'solver': 'renoise', 'steps': [1000, 250]})
  assert (other.spec.cache.top_k, other.spec.cache.mid_capacity) == (2, 2)
  assert other.spec.cache.positions == 'absolute'
  assert (other.spec.sampler.solver, other.spec.sampler.steps) == ('renoise', (1000, 250))
  assert other.choices['cache']['top_k'] == 2
  json.dumps(other.choices)


@pytest.mark.parametrize(('options', 'message'), [
    ({'cache': {'topk': 2}}, r"cache has no choice 'topk' \(did you mean top_k\?\)"),
    ({'cache': {'num_layers': 2}}, "no choice 'num_layers'"),
    ({'cache': {'top_k': 3, 'mid_capacity': 2}}, 'cannot be selected from an archive'),
    ({'sampler': {'solver': 'heun'}}, 'use one of'),
    ({'sampler': {'steps': [0.0]}}, 'steps')])
def test_impossible_choices(tiny, options, message):
  with pytest.raises(ValueError, match=message):
    Pipeline(tiny.pipeline.models, tiny.pipeline.prompts, choices=options)


def test_where_models_are_found(tiny, tmp_path):
  assert pipeline_lib.find_model(None) == package.ROOT / 'digits'
  assert pipeline_lib.find_model('digits/causal') == package.ROOT / 'digits' / 'causal'
  shutil.copytree(tiny.directory, tmp_path / 'run' / 'model')
  assert pipeline_lib.find_model(tmp_path / 'run') == tmp_path / 'run' / 'model'
  assert pipeline_lib.find_model(tmp_path / 'run' / 'model') == tmp_path / 'run' / 'model'
  with pytest.raises(package.PackageError, match=r'does not exist; wanted a directory with'):
    pf_jax.load(tmp_path / 'nowhere')
  with pytest.raises(package.PackageError, match=r'holds no model.*one of digits, digits/causal'):
    pf_jax.load(tmp_path)


def test_a_model_may_bring_its_tokenizer(tiny, tmp_path):
  shutil.copytree(tiny.directory, tmp_path / 'model')
  build_tokenizer(['zebra'], vocab_size=128).save(str(tmp_path / 'model' / 'tokenizer.json'))
  assert pf_jax.load(tmp_path / 'model').tokenizer.pieces('zebra') == ['▁zebra']
  assert len(tiny.pipeline.tokenizer.pieces('zebra')) > 1
  large = build_tokenizer([f'word{i}' for i in range(90)], vocab_size=200)
  large.save(str(tmp_path / 'model' / 'tokenizer.json'))
  with pytest.raises(ValueError, match=r'tokenizer has .* tokens, the text encoder embeds 128'):
    pf_jax.load(tmp_path / 'model')


@pytest.mark.parametrize(('prompts', 'count', 'seeds', 'message'), [
    ([], 1, [], 'at least one video'), (['a'], 1, [1, 2], 'one seed per'),
    (['a', 'a | 1: b'], 3, [0, 1], 'equal switches'), (['a'], 0, [0], 'at least 1'),
    (['a | 3: b'], 3, [0], 'never reached'), (['a'], 1, [-1], 'seed=-1'),
    (['a'], 1, [2**32], 'within 0'), ([' '], 1, [0], 'empty')])
def test_impossible_batches_are_refused_before_anything_is_sampled(tiny, prompts, count, seeds,
                                                                   message):
  with pytest.raises(ValueError, match=message):
    tiny.pipeline.blocks(prompts, count, seeds)


@pytest.mark.parametrize('seconds', [0, -2.0, float('nan'), float('inf')])
def test_impossible_lengths(tiny, seconds):
  with pytest.raises(ValueError, match='positive number of seconds'):
    tiny.pipeline.sample(PROMPT, seconds=seconds)


def test_sampling_needs_no_training_packages():
  code = ("import sys\nfor name in ('grain', 'sklearn', 'tensorboardX'):\n"
          "  sys.modules[name] = None  # as if it were not installed\n"
          "import pf_jax.pipeline, pf_jax.sampling.job, pf_jax.sampling.decode\n"
          "print('fine')")
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert (done.stdout, done.returncode) == ('fine\n', 0), done.stderr


def test_the_choices_of_the_fixture_are_complete():
  assert set(CHOICES['cache']) < set(pipeline_lib.cache_choices())
