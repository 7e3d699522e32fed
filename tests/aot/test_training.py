"""The distillation of Wan2.1-T2V-1.3B, compiled for cards that are not there (`make test-aot`)."""

import dataclasses

import pytest

from configs.wan import dmd_1_3b
from launch.build import build
from pf_jax.aot.targets import TARGETS
from pf_jax.train import dmd_stage, plan
from pf_jax.train.config import TrainConfig
from pf_jax.train.dmd_stage import DmdStage

pytestmark = pytest.mark.timeout(1800)
CARD_BYTES = 141 * 10**9


def settings():
  config = dmd_1_3b.get_config()
  stage = build(DmdStage, {n: config[n] for n in config if n not in ('stage', 'train')}, 'config')
  return stage, build(TrainConfig, config.train, 'config.train')


@pytest.mark.parametrize('cards', [1, 8])
def test_the_distillation_fits(cards):
  """`-s` prints the README's table. Equal work for each card: one video at a time."""
  stage, config = settings()
  config = dataclasses.replace(config, accumulate=config.accumulate // cards)
  assert stage.videos // config.accumulate == cards
  made = plan.make_plan(dmd_stage.sketch(stage, config), config, TARGETS['h200'], cards)
  print('\n'.join(made.lines()))
  assert {name.split(':')[0] for name in made.programs} >= {'rollout'}
  steps = [name for name in made.programs if name.startswith('step of')]
  assert len(steps) == 2
  assert made.peak < CARD_BYTES
  # A cache for each of five blocks, 4.3 GB by `CacheSpec.partition_bytes`, would be 21 GB more.
  assert max(made.programs[name] for name in steps) < 45e9
  if cards == 8:  # an eighth of what one card holds
    trained = made.resident['trained parameters'] + made.resident['optimizer']
    assert trained < 4.5e9
