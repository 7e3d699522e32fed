"""The teacher's objective: what is dropped, what is learned. A run: test_clips.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax.models.tokenizer import Tokenizer
from pf_jax.pipeline import PACKAGED
from pf_jax.train.flow_matching import ClipBatch, FirstBlocks, FlowBatch
from pf_jax.train.teacher import TeacherObjective, TeacherSpec, clip_loss
from tests.evals import micro
from tests.train import learns

pytestmark = pytest.mark.timeout(400)
TOKENIZER = Tokenizer.from_file(PACKAGED / 'tokenizer.json', max_tokens=16)
EMPTY = TOKENIZER([''], allow_empty=True)


@pytest.fixture(scope='module')
def models():
  return micro.models()


def batch_of(prompts, seed=0):
  rng = np.random.default_rng(seed)
  shape = (len(prompts), 3 * micro.VIDEO.frames_per_block, *micro.VIDEO.block_latent_shape[1:])
  text = TOKENIZER(list(prompts))
  return ClipBatch(jnp.asarray(rng.standard_normal(shape), jnp.float32), None, text.ids, text.mask)


def loss_of(models, prompts, drop):
  spec = TeacherSpec(noise_levels=2, drop_text=drop)
  return float(micro.once(lambda m, batch: clip_loss(m, batch, EMPTY, jax.random.key(3), spec),
                          models, batch_of(prompts)))


def test_a_dropped_prompt_is_the_empty_one(models):
  one, other = ['a white seven', 'a red three'], ['a white two', 'a red one']
  assert loss_of(models, one, 1.0) == loss_of(models, other, 1.0)
  assert loss_of(models, one, 0.0) != loss_of(models, other, 0.0)


def test_text_is_dropped_per_clip(models):
  """With a half of them dropped, some clip sees its prompt and some clip does not."""
  prompts = [f'a white {digit}' for digit in ('one', 'two', 'six', 'nine', 'four', 'five')]
  losses = [loss_of(models, prompts, drop) for drop in (0.0, 0.5, 1.0)]
  assert len(set(losses)) == 3


def test_it_learns_clips_and_first_blocks(models):
  clips_, first = batch_of(['a white seven', 'a red three']), batch_of(['a blue one'], 1)
  frames = micro.VIDEO.frames_per_block
  batch = FlowBatch(clips_, FirstBlocks(first.latents[:, :frames], first.ids, first.mask))
  objective = TeacherObjective(models, EMPTY, TeacherSpec(noise_levels=1, first_levels=1))
  assert learns.fall(objective, batch, steps=25) < 0.6
  assert set(objective.init(0)) == {'transformer', 'text'}
