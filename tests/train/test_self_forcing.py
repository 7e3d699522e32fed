"""Training rollouts: the sampler's own blocks, replayed; and where gradients go."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax import cache as cache_lib
from pf_jax.diffusion import schedule
from pf_jax.models.bundle import VideoModels
from pf_jax.pipeline import rollout_spec
from pf_jax.rollout import block as block_lib
from pf_jax.rollout import step
from pf_jax.rollout.stream import Programs, stream
from pf_jax.train import self_forcing
from pf_jax.train.self_forcing import SelfForcingSpec, Window, generate, replay
from tests.evals import micro

pytestmark = pytest.mark.timeout(400)
STEPS = (1000.0, 500.0, 250.0)
SPEC = SelfForcingSpec(window_blocks=4, warmup_blocks=2)
MODELS = micro.models().without_text()
BASE = rollout_spec(MODELS.spec, {'cache': micro.CHOICES['cache'] | {'top_k': 2},
                                  'sampler': {'solver': 'renoise', 'steps': STEPS}})
ROLLOUT = dataclasses.replace(BASE, cache=SPEC.cache(BASE.cache))
KEYS = jax.random.split(jax.random.key(7), 2)
LAST = len(STEPS) - 1


@functools.cache
def text():
  spec = MODELS.spec.text
  rows = np.random.default_rng(0).standard_normal((2, spec.max_tokens, spec.width))
  return micro.once(lambda m, r: m.transformer.text_keys_values(r), MODELS,
                    jnp.asarray(rows, jnp.float32))


@functools.cache
def window(warmup: int, exit_step: int) -> Window:
  return generate(MODELS, text(), KEYS, warmup=warmup, exit_step=exit_step, rollout=ROLLOUT,
                  spec=SPEC)


@functools.cache
def sampled():
  """Six blocks from the sampler, [6, B, ...], and what they selected."""
  programs = Programs(MODELS, 2, ROLLOUT)
  blocks = list(stream(programs, [text()], [0] * 6, KEYS))
  return [np.stack([np.asarray(getattr(b, name)) for b in blocks])
          for name in ('latents', 'selected')]


def replayed(models: VideoModels, kept: Window):
  return replay(models, text(), kept, rollout=ROLLOUT)


replay_once = jax.jit(replayed)


def test_a_training_rollout_is_a_sampled_one():
  """Six blocks with every pass: sink 1, recent 1, an archive of which two are attended."""
  latents, selected = sampled()
  assert selected[5].max() == 3, 'the archive is populated'
  for warmup in (0, 2):
    blocks = window(warmup, LAST).blocks
    np.testing.assert_array_equal(blocks.selected, selected[warmup:warmup + 4])
    np.testing.assert_allclose(blocks.latents, latents[warmup:warmup + 4], atol=2e-5)


@pytest.mark.parametrize('exit_step', range(len(STEPS)))
def test_the_replay_is_the_rollout(exit_step):
  kept = window(2, exit_step)
  assert float(kept.sigma) == pytest.approx(BASE.sampler.sigmas[exit_step])
  np.testing.assert_allclose(replay_once(MODELS, kept), kept.blocks.latents, atol=2e-5)


def test_noise_is_in_memories_of_blocks_that_are_clean():
  spec = dataclasses.replace(SPEC, context_noise=0.1)
  kept = generate(MODELS, text(), KEYS, warmup=2, exit_step=1, rollout=ROLLOUT, spec=spec)
  blocks, clean = kept.blocks, window(2, 1)
  np.testing.assert_allclose(replay_once(MODELS, kept), blocks.latents, atol=2e-5)
  # The first block of the window is made and decoded without noise; the second one remembers it.
  np.testing.assert_array_equal(blocks.latents[0], clean.blocks.latents[0])
  np.testing.assert_array_equal(blocks.lr_latents[0], clean.blocks.lr_latents[0])
  assert np.abs(blocks.latents[1] - clean.blocks.latents[1]).max() > 1e-4

  @jax.jit
  def remember(cache, latents, low, selected, sigma):
    layout = cache_lib.layout(cache.blocks, ROLLOUT.cache)
    return step.clean_pass(
        MODELS, latents, MODELS.compress(blocks.latents[0], low), text(), sigma=sigma,
        slices=(cache.layers, selected),
        context_fn=step.selected_history(cache.blocks, layout, ROLLOUT.cache))[0]

  noise = block_lib.block_noise(KEYS, jnp.int32(2), len(STEPS) + 1, blocks.latents.shape[2:])
  given = 0.9 * blocks.latents[0] + 0.1 * noise
  wanted = remember(kept.cache, given, blocks.lr_latents[0], blocks.selected[0], 0.1)
  np.testing.assert_allclose(kept.full.k[:, :, 0], wanted.k, atol=1e-4)
  assert np.abs(kept.full.k[:, :, 0] - clean.full.k[:, :, 0]).max() > 1e-2


def test_blocks_exit_at_the_same_pass_and_warm_up_blocks_at_the_last():
  first, last = window(2, 0), window(2, LAST)
  np.testing.assert_array_equal(first.cache.layers.sink.k, last.cache.layers.sink.k)
  # The first pass of the first window block sees the same history and noise in both.
  noise = first.blocks.x_t[0]
  assert float(jnp.std(noise)) == pytest.approx(1, abs=0.1)
  assert np.abs(first.blocks.latents[0] - last.blocks.latents[0]).max() > 1e-2
  with pytest.raises(ValueError, match='exit_step=3 is none of the 3 passes'):
    generate(MODELS, text(), KEYS, warmup=0, exit_step=3, rollout=ROLLOUT, spec=SPEC)


# --- gradients ------------------------------------------------------------------------------------


def norm(tree) -> float:
  return float(jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))))


@jax.jit
def block_gradient(models, kept: Window, direction, index):
  """Gradient of a projection of one window block's x0; compiled once for all windows and blocks."""
  def value(models):
    return jnp.sum((replayed(models, kept) * direction)[index])
  return jax.grad(value)(models)


@functools.cache
def block_gradients(warmup: int):
  """Gradient of a random projection of each window block's x0, per block."""
  kept = window(warmup, 1)
  direction = jax.random.normal(jax.random.key(1), kept.blocks.x_t.shape)
  return [block_gradient(MODELS, kept, direction, index) for index in range(SPEC.window_blocks)]


def test_the_compressor_learns_from_blocks_that_attend_the_window_s_own_archive():
  """Sink 1, recent 1. From the start only block 3 attends an archived block (1), so that three of
  four blocks teach the compressor nothing; after a warm-up of two, blocks 4 and 5 attend block 2
  (and 3) of the window."""
  for warmup, learns in ((0, [False, False, False, True]), (2, [False, False, True, True])):
    norms = [norm(gradient.compressor) for gradient in block_gradients(warmup)]
    assert [value > 1e-6 for value in norms] == learns, norms


def test_history_takes_no_gradient():
  """The transformer's gradient of a block is that of its last pass over a history of constants."""
  kept = window(2, 1)
  direction = jax.random.normal(jax.random.key(1), kept.blocks.x_t.shape)
  caches, cache = [], kept.cache
  blocks = [jax.tree.map(lambda x, i=i: x[i], kept.blocks) for i in range(SPEC.window_blocks)]

  @jax.jit
  def remember(cache, block):
    layout = cache_lib.layout(cache.blocks, ROLLOUT.cache)
    full, compressed, _ = step.clean_pass(
        MODELS, block.latents, MODELS.compress(block.latents, block.lr_latents), text(),
        slices=(cache.layers, block.selected),
        context_fn=step.selected_history(cache.blocks, layout, ROLLOUT.cache))
    return cache_lib.commit(cache, full, compressed, spec=ROLLOUT.cache)

  for block in blocks:
    caches.append(cache)
    cache = remember(cache, block)

  @jax.jit
  def alone(transformer, cache, block, direction):
    def value(transformer):
      layout = cache_lib.layout(cache.blocks, ROLLOUT.cache)
      timesteps = jnp.full(block.x_t.shape[:2], schedule.timestep(kept.sigma))
      out = transformer(block.x_t, timesteps, text(), slices=(cache.layers, block.selected),
                        context_fn=step.selected_history(cache.blocks, layout, ROLLOUT.cache))
      return jnp.sum((block.x_t - kept.sigma * out.flow) * direction)
    return jax.grad(value)(transformer)

  for index in (0, 3):
    wanted = alone(MODELS.transformer, caches[index], blocks[index], direction[index])
    got = block_gradients(2)[index].transformer
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-4 * scale)


def test_a_gradient_through_history_would_be_seen(monkeypatch):
  """The mutation of the test above: without stop_gradient the last block's gradient changes by
  more than that test allows. What changes is the way through the compressed keys/values.
  """
  kept = window(2, 1)
  before = block_gradients(2)[3].transformer
  direction = jax.random.normal(jax.random.key(1), kept.blocks.x_t.shape)
  monkeypatch.setattr(self_forcing.jax.lax, 'stop_gradient', lambda x: x)
  gradient = jax.jit(jax.grad(lambda transformer: jnp.sum(
      (replayed(MODELS.replaced(transformer=transformer), kept) * direction)[3])))(
          MODELS.transformer)
  scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(before))
  difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), gradient, before)
  assert max(jax.tree.leaves(difference)) > 10 * 2e-4 * scale


# --- the window as a clip -------------------------------------------------------------------------


def test_a_window_inside_a_video_begins_with_a_picture():
  """The first latent frame of a later block stands for a stride of pictures; a clip's for one."""
  latents, _ = sampled()
  vae, stride = MODELS.vae, MODELS.spec.video.temporal_stride
  whole = jnp.moveaxis(jnp.asarray(latents), 0, 1).reshape(2, -1, *latents.shape[3:])
  pixels = micro.once(vae.decode, whole)
  frame = stride * 2 * MODELS.spec.video.frames_per_block  # the last one of latent frame 8
  wanted = micro.once(vae.encode, pixels[:, frame:frame + 1])
  for warmup in (0, 2):
    kept = window(warmup, LAST)
    clip, own = self_forcing.clips_of(kept.blocks.latents, kept)
    inside = jnp.moveaxis(kept.blocks.latents, 0, 1).reshape(clip.shape)
    np.testing.assert_array_equal(clip[:, 1:], inside[:, 1:])
    assert own.shape == (2, clip.shape[1], 1, 1, 1)
    assert own[:, :, 0, 0, 0].tolist() == 2 * [[0.0 if warmup else 1.0] + [1.0] * 15]
    np.testing.assert_allclose(clip[:, :1], wanted if warmup else inside[:, :1], atol=1e-4)


def test_sizes_that_cannot_be():
  with pytest.raises(ValueError, match='warmup_blocks=-1 not negative'):
    SelfForcingSpec(warmup_blocks=-1)
  with pytest.raises(ValueError, match=r'context_noise=1\.0 must be at least 0 and below 1'):
    SelfForcingSpec(context_noise=1.0)


def test_the_archive_is_no_larger_than_needed_nor_than_the_sampler_s():
  for capacity, wanted in ((3, 3), (128, 6)):
    sampler = dataclasses.replace(BASE.cache, mid_capacity=capacity)
    assert SPEC.cache(sampler).mid_capacity == wanted
