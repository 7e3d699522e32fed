"""Given frames: encoded block by block, and one picture around which a block is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax.rollout import block as block_lib
from pf_jax.rollout.beginning import encode_blocks, encode_picture, given_selection
from pf_jax.rollout.block import RolloutSpec, SamplerSpec
from pf_jax.testing import random_models, tiny_model_spec

SPEC = tiny_model_spec()
VIDEO = SPEC.video


@pytest.fixture(scope='module')
def models():
  return random_models(SPEC, 1)


def frames_of(count):
  return np.random.default_rng(3).integers(0, 256, (count, 32, 48, 3), np.uint8)


def test_blocks_are_those_of_encoding_in_one_shot(models):
  frames = frames_of(13 + 2 * 16)
  blocks = list(encode_blocks(models.vae, frames, VIDEO))
  whole = jax.jit(lambda vae, x: vae.encode(x))(models.vae,
                                                jnp.float32(frames)[None] / 127.5 - 1)
  assert [block.shape for block in blocks] == [VIDEO.block_latent_shape] * 3
  np.testing.assert_allclose(np.concatenate(blocks), whole[0], atol=2e-5)
  np.testing.assert_allclose(encode_picture(models.vae, frames[0]), whole[0, 0], atol=2e-5)


@pytest.mark.parametrize('count', [1, 12, 14, 28, 30])
def test_frames_that_fill_no_whole_blocks_are_refused(models, count):
  with pytest.raises(ValueError, match=rf'{count} frames do not fill whole blocks; wanted 13 \+ n'):
    list(encode_blocks(models.vae, frames_of(count), VIDEO))


@pytest.mark.parametrize(('block', 'wanted'), [
    (0, [-1, -1]), (3, [-1, -1]), (4, [2, -1]), (5, [2, 3]), (6, [3, 4]), (9, [6, 7])])
def test_given_blocks_attend_what_is_archived(block, wanted):
  """Two sink blocks, one recent: block 2 is archived when block 4 is made; then the newest two."""
  spec = block_lib.cache_spec(SPEC, sink_blocks=2, recent_blocks=1, top_k=2, mid_capacity=4)
  selected = given_selection(spec, block, 3)
  np.testing.assert_array_equal(selected, np.broadcast_to(wanted, (2, 3, 2)))


def test_a_picture_takes_part_at_timestep_zero_and_stays(models):
  """One pass, written out: the other frames are what the network predicts beside a clean frame."""
  spec = RolloutSpec(block_lib.cache_spec(SPEC, sink_blocks=1, top_k=1, mid_capacity=2),
                     SamplerSpec(solver='renoise', steps=(1000.0,)))
  state = block_lib.init(models, 1, spec)
  text = models.text_keys_values(np.array([[3, 4, 1, 0, 0, 0]]), np.array([[1, 1, 1, 0, 0, 0]]))
  keys = jax.random.split(jax.random.key(5), 1)
  picture = jax.random.normal(jax.random.key(6), (1, 1, *VIDEO.block_latent_shape[1:]))
  latents, _ = block_lib.denoise_block(models, state.cache, text, keys, picture, spec=spec)
  noise = block_lib.block_noise(keys, 0, 0, VIDEO.block_latent_shape)
  x = jnp.concatenate([picture, noise[:, 1:]], axis=1)

  def beside(timesteps):
    flow = models.transformer(x, jnp.float32([timesteps]), text).flow
    return np.asarray(noise - flow)[:, 1:]

  np.testing.assert_array_equal(latents[:, :1], picture)
  np.testing.assert_allclose(latents[:, 1:], beside([0, 1000, 1000, 1000]), atol=2e-5)
  assert np.abs(latents[:, 1:] - beside([1000] * 4)).max() > 1e-2
  free, _ = block_lib.denoise_block(models, state.cache, text, keys, spec=spec)
  assert np.abs(latents[:, 1:] - free[:, 1:]).max() > 1e-2
