"""One rollout four ways: scan, stream, plain loop, replay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec, SamplerSpec
from pf_jax.rollout.rollout import rollout, to_frames
from pf_jax.rollout.stream import Programs, stream
from pf_jax.testing import random_models, tiny_model_spec

pytestmark = pytest.mark.timeout(400)

BLOCKS, BATCH, SWITCH = 9, 2, 5
PROMPTS = [0] * SWITCH + [1] * (BLOCKS - SWITCH)


@jax.jit
def text_rows(models, ids, mask):
  return models.text(ids, mask)


@pytest.fixture(scope='module')
def world():
  """Models, spec, compiled programs, two prompts' text, keys, and the streamed blocks."""
  models = random_models(tiny_model_spec(), 1)
  spec = RolloutSpec(block_lib.cache_spec(models.spec, sink_blocks=1, recent_blocks=2, top_k=1,
                                          mid_capacity=3), SamplerSpec(steps=(1000.0, 500.0)))
  programs = Programs(models, BATCH, spec)
  ids = np.array([[3, 4, 5, 1, 0, 0], [7, 8, 1, 0, 0, 0]])
  text = [programs.text_keys_values(text_rows(models, i, ids > 0)) for i in (ids, ids + 20)]
  keys = jax.random.split(jax.random.key(5), BATCH)
  blocks = [jax.tree.map(np.asarray, block._replace(state=None))
            for block in stream(programs, text, PROMPTS, keys)]
  return models, spec, programs, text, keys, blocks


def test_scan_equals_stream(world):
  models, spec, _, text, keys, blocks = world
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *text)
  out = jax.jit(functools.partial(rollout, spec=spec))(models, stacked, jnp.array(PROMPTS), keys)
  latents = np.concatenate([block.latents for block in blocks], axis=1)
  np.testing.assert_allclose(out.latents, latents, atol=2e-5 * np.abs(latents).max())
  np.testing.assert_array_equal(out.selected, np.stack([block.selected for block in blocks]))
  frames = np.concatenate([block.frames for block in blocks], axis=1).astype(int)
  assert np.abs(np.asarray(out.frames) - frames).max() <= 1
  assert out.frames.shape[1] == models.spec.video.pixel_frames(BLOCKS)


def test_plain_loop_equals_stream(world):
  models, spec, _, text, keys, blocks = world
  sample = {first: jax.jit(functools.partial(block_lib.sample_block, first=first, spec=spec))
            for first in (True, False)}
  state = block_lib.init(models, BATCH, spec)
  for block in blocks[:SWITCH]:
    state, pixels, latents, selected = sample[block.number == 0](models, state, text[0], keys)
    np.testing.assert_allclose(latents, block.latents, atol=1e-4)
    np.testing.assert_array_equal(selected, block.selected)
    assert np.abs(np.asarray(to_frames(pixels), int) - block.frames).max() <= 1


def test_replay_continues_bit_for_bit(world):
  _, _, programs, text, keys, blocks = world
  known = [(block.latents, block.selected) for block in blocks[:SWITCH + 2]]
  again = list(stream(programs, text, PROMPTS, keys, replay=known))
  assert [block.replayed for block in again] == [True] * len(known) + [False] * (
      BLOCKS - len(known))
  for block, other in zip(blocks, again, strict=True):
    np.testing.assert_array_equal(block.latents, other.latents)
    np.testing.assert_array_equal(block.frames, other.frames)
    np.testing.assert_array_equal(block.selected, other.selected)


def test_videos_of_a_batch_do_not_touch_each_other(world):
  """Another prompt and seed for the second video leaves the first one's latents alone."""
  models, _, programs, _, keys, _ = world
  ids = np.array([[3, 4, 5, 1, 0, 0], [7, 8, 1, 0, 0, 0]])
  other = np.array([[3, 4, 5, 1, 0, 0], [50, 60, 70, 1, 0, 0]])
  runs = []
  for tokens, seeds in ((ids, keys), (other, keys.at[1].set(jax.random.key(77)))):
    text = [programs.text_keys_values(text_rows(models, tokens, tokens > 0))]
    runs.append([np.asarray(b.latents) for b in stream(programs, text, [0] * 6, seeds)])
  for one, two in zip(*runs, strict=True):
    np.testing.assert_array_equal(one[0], two[0])
    assert np.abs(one[1] - two[1]).max() > 1e-3


def test_the_switch_recomputes_the_recent_blocks(world):
  """Without the switch program the first block of the new prompt comes out differently."""
  _, _, programs, text, keys, blocks = world
  state = programs.start()
  for block in blocks[:SWITCH]:
    state, _ = programs.finish(block.number, state, block.latents, block.selected, text[0])
  kept, _ = programs.denoise(state, text[1], keys)
  before = jax.tree.map(np.asarray, state.cache.layers)
  state = programs.switch(state, text[1])
  switched, _ = programs.denoise(state, text[1], keys)
  np.testing.assert_array_equal(switched, blocks[SWITCH].latents)
  assert np.abs(np.asarray(kept) - switched).max() > 1e-4
  after = jax.tree.map(np.asarray, state.cache.layers)
  assert np.abs(before.recent.k - after.recent.k).max() > 1e-4
  for name in ('sink', 'archive'):
    np.testing.assert_array_equal(getattr(before, name).k, getattr(after, name).k)


def test_switching_to_the_same_prompt_restores_full_context_keys_where_nothing_was_dropped(world):
  """Early on (no block archived yet) recomputing under the old prompt changes nothing."""
  _, _, programs, text, _, blocks = world
  state = programs.start()
  for block in blocks[:3]:
    state, _ = programs.finish(block.number, state, block.latents, block.selected, text[0])
  before = jax.tree.map(np.asarray, state.cache.layers)
  after = jax.tree.map(np.asarray, programs.switch(state, text[0]).cache.layers)
  for name in ('recent', 'pending'):
    got, wanted = getattr(after, name), getattr(before, name)
    np.testing.assert_allclose(got.k, wanted.k, atol=2e-5)
    np.testing.assert_allclose(got.v, wanted.v, atol=2e-5)


def test_too_much_to_replay_is_refused(world):
  _, _, programs, text, keys, blocks = world
  with pytest.raises(ValueError, match='3 blocks to replay do not fit into 2'):
    next(stream(programs, text, [0, 0], keys,
                replay=[(block.latents, block.selected) for block in blocks[:3]]))


@pytest.mark.parametrize(('choices', 'message'), [
    ({'solver': 'heun'}, "solver='heun' is unknown; use one of euler, renoise"),
    ({'steps': ()}, 'must fall strictly'), ({'steps': (500.0, 750.0)}, 'must fall strictly'),
    ({'shift': 0.0}, 'shift=0.0 must be positive')])
def test_samplers_that_cannot_work_are_refused(choices, message):
  with pytest.raises(ValueError, match=message):
    SamplerSpec(**choices)


def test_few_step_sigmas():
  np.testing.assert_allclose(SamplerSpec().sigmas, [1, 0.9375, 5 / 6, 0.625, 0])
