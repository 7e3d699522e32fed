"""Memory plans: bytes by hand, and what changes with parts and cards."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pf_jax.aot.targets import TARGETS
from pf_jax.rollout.block import SamplerSpec
from pf_jax.train import causal_stage, dmd_stage, plan
from pf_jax.train.causal_stage import CausalStage
from pf_jax.train.clips import ClipPhase
from pf_jax.train.config import OptimizerConfig, TrainConfig
from pf_jax.train.dmd_stage import DmdStage
from pf_jax.train.lora import LoraSpec
from pf_jax.train.self_forcing import SelfForcingSpec
from pf_jax.types import tree_bytes
from pf_jax.weights import package
from tests.evals import micro

CARD = TARGETS['h200']
CONFIG = TrainConfig(steps=1, ema_decay=0.9, optimizer=OptimizerConfig(b1=0.0))


@pytest.fixture(scope='module')
def stage(tmp_path_factory):
  start = package.save_model(tmp_path_factory.mktemp('plan') / 'start', micro.models())
  return DmdStage(start=str(start), teacher=str(start), videos=4, cache=micro.CHOICES['cache'],
                  sampler=SamplerSpec('renoise', (1000.0, 500.0)), world=micro.WORLD,
                  self_forcing=SelfForcingSpec(window_blocks=3, warmup_blocks=1))


@pytest.fixture(scope='module', autouse=True)
def no_compiler():
  """Counts are the same where the card's compiler happens to be installed."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan.aot, 'PLUGIN', 'no_such_plugin')
    yield


@pytest.fixture(scope='module')
def whole(stage, no_compiler):
  """The plan of one card that computes a step in one part."""
  return plan.make_plan(dmd_stage.sketch(stage, CONFIG), CONFIG, CARD, 1)


def test_bytes_lie_on_one_card_or_are_split():
  mesh = AbstractMesh((4,), ('data',), (AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec(None, 'data'))
  assert plan.bytes_of(jax.ShapeDtypeStruct((3, 8), jnp.bfloat16)) == 48
  assert plan.bytes_of(jax.ShapeDtypeStruct((3, 8), jnp.bfloat16, sharding=split)) == 12
  assert plan.bytes_of({'a': jnp.zeros(5), 'b': None}) == 20


def test_resident_bytes_of_a_distillation(whole):
  models, sizes = micro.models(), whole.resident
  trained = tree_bytes(models.transformer) + tree_bytes(models.compressor)
  assert sizes['trained parameters'] == trained + tree_bytes(models.transformer)
  assert sizes['average'] == trained
  assert sizes['teacher (frozen)'] == tree_bytes(models.transformer)
  assert sizes['VAE (frozen)'] == tree_bytes(models.vae)
  # Two moments of each parameter, and counters.
  assert 0 <= sizes['optimizer'] - 2 * sizes['trained parameters'] < 100
  assert 'gradients of earlier parts' not in sizes


def test_parts_and_cards_share_what_a_step_is_given(stage, whole):
  parts = dataclasses.replace(CONFIG, accumulate=4)
  part = plan.make_plan(dmd_stage.sketch(stage, parts), parts, CARD, 1)
  cards = plan.make_plan(dmd_stage.sketch(stage, CONFIG), CONFIG, CARD, 4)
  assert whole.batch == pytest.approx(4 * part.batch, rel=0.01)
  assert cards.batch == pytest.approx(part.batch, rel=0.01)
  assert part.resident['gradients of earlier parts'] == part.resident['trained parameters']
  assert whole.peak == sum(whole.resident.values()) + whole.batch
  assert whole.lines()[-2].endswith('at least')
  with pytest.raises(ValueError, match='1 videos of a part do not divide over 2 cards'):
    plan.make_plan(dmd_stage.sketch(stage, parts), parts, CARD, 2)


def test_half_precision_and_adapters_are_smaller(stage, whole):
  full = whole.resident
  small = dataclasses.replace(stage, frozen_dtype='bfloat16', lora=LoraSpec(rank=2),
                              critic_lora=LoraSpec(rank=2))
  got = plan.make_plan(dmd_stage.sketch(small, CONFIG), CONFIG, CARD, 1).resident
  assert got['teacher (frozen)'] == full['teacher (frozen)'] / 2
  assert got['weights under adapters (frozen)'] == full['teacher (frozen)'] / 2
  assert got['trained parameters'] < 0.5 * full['trained parameters']


def test_clips_of_the_dearest_phase():
  stage = CausalStage(model=micro.spec(), vae='', store='', clip_blocks=4, world=micro.WORLD,
                      cache=micro.CHOICES['cache'], phases=(
                          ClipPhase(1, clips=0, first_blocks=6), ClipPhase(2, clips=3)))
  made = plan.make_plan(causal_stage.sketch(stage, CONFIG), CONFIG, CARD, 1)
  # Three clips of four blocks: 4 x 16 x 16 x 4 latents and 2 x 8 x 8 x 4 of the LR branch, float32.
  # Sixteen tokens of int32, and of bool whether they count.
  blocks = 3 * 4 * (4 * 16 * 16 * 4 + 2 * 8 * 8 * 4)
  assert made.batch == 4 * blocks + 3 * 16 * (4 + 1)
