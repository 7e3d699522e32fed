"""Every config file: documented, locked, and buildable."""

import importlib
import pathlib

import pytest

from configs import arguments
from configs.wan import model as wan_model
from launch import config_flags
from launch.build import build
from pf_jax import pipeline
from pf_jax.evals.config import EvaluateConfig
from pf_jax.models.bundle import ModelSpec
from pf_jax.models.text import TextSpec
from pf_jax.models.transformer import TransformerSpec
from pf_jax.models.vae import VaeSpec
from pf_jax.pipeline import rollout_spec
from pf_jax.sampling.config import SampleSpec
from pf_jax.train import stages
from pf_jax.train.config import TrainConfig
from pf_jax.types import DTypes

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(p for p in (ROOT / 'configs').rglob('*.py')
               if p.name not in ('__init__.py', 'arguments.py', 'model.py', 'sampling.py'))


def module_of(path):
  return importlib.import_module('.'.join(path.relative_to(ROOT).with_suffix('').parts))


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_config_is_documented_and_locked(path):
  module = module_of(path)
  assert 'Command:' in module.__doc__
  assert f'--config={path.relative_to(ROOT)}' in module.__doc__
  config = module.get_config()
  assert config.is_locked
  assert list(config_flags.leaves(config))


@pytest.mark.parametrize('variant', [None, 'tiny'])
@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_training_configs_build(path, variant):
  if 'stage' not in module_of(path).get_config():
    pytest.skip('not a training config')
  config = module_of(path).get_config(variant)
  build(TrainConfig, config.train, 'config.train')
  stage_type = stages.STAGES[config.stage].settings
  build(stage_type, {name: config[name] for name in config if name not in ('stage', 'train')})


@pytest.mark.parametrize('variant', [None, 'tiny'])
@pytest.mark.parametrize('name', ['evaluate', 'compare'])
def test_evaluations_build_and_their_models_are_there(name, variant):
  config = importlib.import_module(f'configs.digits.{name}').get_config(variant)
  ablation = build(EvaluateConfig, config).ablation
  for checkpoint in ablation.checkpoints.values():
    assert pipeline.find_model(checkpoint) == pipeline.PACKAGED.parent / checkpoint


@pytest.mark.parametrize(('size', 'transformer', 'width'), [
    ('1_3b', TransformerSpec.wan_1_3b, 1536), ('14b', TransformerSpec.wan_14b, 5120)])
def test_wan_configs_are_the_released_sizes(size, transformer, width):
  config = importlib.import_module(f'configs.wan.t2v_{size}').get_config()
  model, half = build(ModelSpec, config.model), DTypes('bfloat16', 'bfloat16', 'bfloat16')
  assert model.transformer == transformer(dtypes=half)
  assert model.transformer.width == width
  assert model.vae == VaeSpec.wan21(dtypes=half)
  assert model.text == TextSpec.umt5_xxl(dtypes=half)
  assert (model.grid, model.mid_grid) == ((4, 30, 52), (2, 7, 13))
  spec = build(SampleSpec, {name: config[name] for name in config if name != 'model'})
  cache = rollout_spec(model, {'cache': spec.chosen('cache')}).cache
  assert (cache.attention_tokens, cache.steady_block, cache.largest_position) == (27_872, 19, 79)


@pytest.mark.parametrize(('frames', 'mid_grid'), [(3, (3, 7, 13)), (4, (2, 7, 13)),
                                                  (6, (3, 7, 13))])
def test_wan_blocks_of_other_lengths(frames, mid_grid):
  model = build(ModelSpec, wan_model.get_config(f'frames={frames}'))
  assert model.mid_grid == mid_grid


def test_arguments():
  assert arguments.parse(None, tiny=False, frames=5) == {'tiny': False, 'frames': 5}
  assert arguments.parse('tiny,frames=21', tiny=False, frames=5) == {'tiny': True, 'frames': 21}
  for bad, message in (('tny', 'did you mean tiny'), ('frames=x', "frames='x' is not int"),
                       ('frames', "frames='' is not int"), ('tiny=1', 'takes no value')):
    with pytest.raises(ValueError, match=message):
      arguments.parse(bad, tiny=False, frames=5)
  with pytest.raises(ValueError, match='there are none'):
    arguments.parse('tiny')
