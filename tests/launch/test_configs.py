"""Every config file: documented, locked, and buildable."""

import importlib
import pathlib

import pytest

from configs import arguments
from launch import config_flags
from launch.build import build
from pf_jax.train import stages
from pf_jax.train.config import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(p for p in (ROOT / 'configs').rglob('*.py')
               if p.name not in ('__init__.py', 'arguments.py', 'model.py'))


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
  stage_type, _ = stages.STAGES[config.stage]
  build(stage_type, {name: config[name] for name in config if name not in ('stage', 'train')})


def test_arguments():
  assert arguments.parse(None, tiny=False, frames=5) == {'tiny': False, 'frames': 5}
  assert arguments.parse('tiny,frames=21', tiny=False, frames=5) == {'tiny': True, 'frames': 21}
  for bad, message in (('tny', 'did you mean tiny'), ('frames=x', "frames='x' is not int"),
                       ('frames', "frames='' is not int"), ('tiny=1', 'takes no value')):
    with pytest.raises(ValueError, match=message):
      arguments.parse(bad, tiny=False, frames=5)
  with pytest.raises(ValueError, match='there are none'):
    arguments.parse('tiny')
