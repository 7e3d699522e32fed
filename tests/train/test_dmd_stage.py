"""Stage "dmd" on a micro model: a run, its prompts, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from pf_jax import pipeline
from pf_jax.data import text_rows
from pf_jax.rollout.block import SamplerSpec
from pf_jax.train import dmd_stage
from pf_jax.train.config import OptimizerConfig, TrainConfig
from pf_jax.train.dmd import DmdSpec
from pf_jax.train.dmd_stage import DmdStage
from pf_jax.train.lora import LoraSpec
from pf_jax.train.self_forcing import SelfForcingSpec
from pf_jax.weights import package
from tests.evals import micro

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope='module')
def models():
  return micro.models()


@pytest.fixture(scope='module')
def stage(models, tmp_path_factory):
  start = package.save_model(tmp_path_factory.mktemp('dmd') / 'start', models,
                             choices=micro.CHOICES)
  return DmdStage(start=str(start), teacher=str(start), videos=2, cache=micro.CHOICES['cache'],
                  sampler=SamplerSpec('renoise', (1000.0, 500.0)), world=micro.WORLD,
                  self_forcing=SelfForcingSpec(window_blocks=3, warmup_blocks=1),
                  objective=DmdSpec(generator_every=2), critic_learning_rate=1e-3, eval_blocks=(2,))


def test_a_run_moves_student_and_critic_and_leaves_a_model(stage, models, tmp_path):
  config = TrainConfig(steps=2, log_every=2, save_every=2, eval_every=2, ema_decay=0.9, mfu=False,
                       optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, b1=0.0))
  result = dmd_stage.train_dmd(stage, config, tmp_path)
  params, start = result.state.params, package.load_model(stage.start).models
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params['generator'],
                       {'transformer': start.transformer, 'compressor': start.compressor})
  assert min(max(jax.tree.leaves(moved[part])) for part in moved) > 1e-5
  # Step 1 moves the critic only: two steps of Adam, one of the generator's.
  counts = {name: [int(leaf) for leaf in jax.tree.leaves(state) if leaf.dtype == np.int32]
            for name, state in result.state.opt_state.items()}
  assert set(counts['generator']) == {1}
  assert set(counts['critic']) == {2}
  records = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert len(records) == 2
  # One record of both steps: the generator's numbers are those of the step in which it moved.
  assert {'critic', 'fake_minus_real', 'grad_norm/generator'} <= set(result.metrics)
  assert np.isfinite(result.metrics['grad_norm/compressor'])
  assert 'class_accuracy/block_2' in records[-1]
  loaded = pipeline.load(tmp_path)
  np.testing.assert_allclose(loaded.models.transformer.head.kernel,
                             result.state.ema['generator']['transformer'].head.kernel, atol=1e-3)
  assert loaded.spec.sampler.steps == (1000.0, 500.0)


def test_adapters_learn_from_a_store_of_prompts_in_parts(stage, models, tmp_path):
  """No world and no text encoder: what training on released weights is like."""
  origin = stage.student_origin()
  text_rows.write(origin.prompt_encoder(), ['a white one', 'two ☃', 'three'], tmp_path / 'prompts',
                  about={})
  small = dataclasses.replace(
      stage, prompts=str(tmp_path / 'prompts'), lora=LoraSpec(rank=2), critic_lora=LoraSpec(rank=2),
      remat=True, eval_videos=1)
  config = TrainConfig(steps=1, log_every=1, save_every=1, ema_decay=0.0, mfu=False, accumulate=2,
                       optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0))
  result = dmd_stage.train_dmd(small, config, tmp_path / 'run')
  generator = result.state.params['generator']
  trained = generator['transformer']
  assert {type(adapter).__name__ for adapter in trained.values()} == {'Adapter'}
  assert min(float(np.abs(adapter.b).max()) for adapter in trained.values()) > 1e-4
  student = dmd_stage.make_objective(small, origin, 0).student(generator)
  dmd_stage.save(small, origin, student, 1, tmp_path / 'run')
  start, loaded = (package.load_model(path).models
                   for path in (stage.start, tmp_path / 'run' / 'model'))
  moved = np.abs(loaded.transformer.layers.self_attn.q.kernel
                 - start.transformer.layers.self_attn.q.kernel).max()
  assert moved > 1e-4  # merged
  np.testing.assert_array_equal(loaded.transformer.head.kernel, start.transformer.head.kernel)


def test_evaluations_without_a_world_sample_the_first_prompts(stage, models, tmp_path, monkeypatch):
  seen = {}

  class Sampler:
    def __init__(self, world, rollout, *, texts, clip_blocks):
      seen.update(world=world, texts=texts, clip_blocks=clip_blocks)

    def judge(self, student, encode, lengths, step, workdir):
      seen.update(rows=encode(seen['texts']), lengths=lengths)
      return {'sharpness/block_2': 1.0}

  monkeypatch.setattr(dmd_stage.evaluation, 'Sampler', Sampler)
  rows = np.arange(3, dtype=np.float32)[:, None, None] * np.ones((1, 2, 3), np.float32)
  small = dataclasses.replace(stage, prompts='a store', eval_videos=2)
  origin = stage.student_origin()
  objective = dmd_stage.make_objective(small, origin, 0)
  evaluate = dmd_stage.sample_evaluation(
      small, objective, origin, dmd_stage.PromptRows(['one', 'two', 'three'], rows), tmp_path)
  assert evaluate(objective.init(0), 7) == {'sharpness/block_2': 1.0}
  assert (seen['world'], seen['texts'], seen['clip_blocks']) == (None, ['one', 'two'], 3)
  np.testing.assert_array_equal(seen['rows'][:, 0, 0], [0, 1])
  assert package.load_model(tmp_path / 'model').about == {'stage': 'dmd', 'step': 7}


def test_prompts_are_functions_of_the_step():
  rows = np.arange(5, dtype=np.float32)[:, None, None] * np.ones((1, 2, 3), np.float32)
  batches = dmd_stage.prompt_batches(dmd_stage.PromptRows('abcde', rows), 2, seed=3)
  stream = batches(0)
  seen = [next(stream) for _ in range(5)]
  again = next(batches(2))
  np.testing.assert_array_equal(again.rows, seen[2].rows)
  assert (again.keys == seen[2].keys).all()
  assert len({str(key) for batch in seen for key in jax.random.key_data(batch.keys)}) == 10
  # Two passes over five prompts, each of them once.
  drawn = [int(row[0, 0]) for batch in seen for row in batch.rows]
  assert sorted(drawn[:5]) == sorted(drawn[5:]) == [0, 1, 2, 3, 4]


def test_every_prompt_of_the_world_once():
  prompts = dmd_stage.world_prompts(micro.WORLD)
  assert len(set(prompts)) == len(prompts) == 10 * 2 * len(micro.WORLD.colours)


def test_training_may_have_another_sink(stage, models):
  with_none = dataclasses.replace(stage, train_sink_blocks=0)
  assert with_none.rollout(models.spec, training=True).cache.sink_blocks == 0
  assert with_none.rollout(models.spec, training=False).cache.sink_blocks == 1
  assert stage.rollout(models.spec, training=True).cache.sink_blocks == 1
  rounded = dataclasses.replace(stage, cache={**stage.cache, 'storage': 'int8'})
  with pytest.raises(ValueError, match="storage='int8' has no gradient; train with 'full'"):
    rounded.rollout(models.spec, training=True)


@pytest.mark.parametrize(('change', 'message'), [
    (dict(videos=0), 'videos=0 must be at least 1'),
    (dict(critic_learning_rate=-1.0), r'critic_learning_rate=-1\.0 must not be negative'),
    (dict(model=micro.spec()), 'must name a store of text rows'),
    (dict(transformer='a.pt'), 'are for released weights'),
    (dict(eval_blocks=()), 'must name lengths')])
def test_settings_that_cannot_be(stage, change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(stage, **change)
