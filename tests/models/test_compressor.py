"""The compressor: sizes at full scale, pooling by hand, its start as the LR branch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pf_jax.models.compressor import Compressor, CompressorSpec, pool_pixels
from pf_jax.types import VideoSpec

FULL = VideoSpec(height=480, width=832, latent_channels=16)


@pytest.mark.parametrize(('frames', 'stride', 'tokens'), [(4, 2, 182), (3, 1, 273)])
def test_tokens_at_full_scale(frames, stride, tokens):
  video = VideoSpec(height=480, width=832, latent_channels=16, frames_per_block=frames)
  spec = CompressorSpec(in_channels=16, channels=(32, 128, 512, 2048), width=1536,
                        temporal_stride=stride)
  assert np.prod(spec.mid_grid(video)) == tokens

  def run():
    compressor = Compressor(spec, rngs=nnx.Rngs(0))
    return compressor(jnp.zeros((1, *video.block_latent_shape)), jnp.zeros((1, tokens, 1536)))

  assert jax.eval_shape(run).shape == (1, tokens, 1536)


def test_pooling_by_hand():
  """Frame t is t everywhere: frames 0-7 become 3.5, then pairs (8, 9) ... (14, 15)."""
  video, spec = VideoSpec(height=64, width=64), CompressorSpec()
  pixels = jnp.broadcast_to(jnp.arange(16.0)[None, :, None, None, None], (1, 16, 64, 64, 3))
  pooled = pool_pixels(pixels, video, spec)
  assert pooled.shape == (1, 5, 16, 16, 3)
  assert pooled[0, :, 3, 5, 1].tolist() == [3.5, 8.5, 10.5, 12.5, 14.5]


@pytest.mark.parametrize(('height', 'width'), [(480, 832), (720, 1280), (464, 848), (112, 208),
                                               (368, 640)])
def test_any_multiple_of_16_reaches_the_compressor(height, width):
  """Of 720 rows pooled to 180 the VAE takes 176: 22 latent rows, 11 patches like the HR branch."""
  video = VideoSpec(height=height, width=width, latent_channels=16)
  spec = CompressorSpec(in_channels=16, channels=(32, 128, 512, 2048), width=1536)
  pooled = jax.eval_shape(lambda x: pool_pixels(x, video, spec),
                          jax.ShapeDtypeStruct((1, 16, height, width, 3), jnp.float32)).shape
  assert pooled[2] % 8 == pooled[3] % 8 == 0
  _, rows, columns = spec.mid_grid(video)
  assert 2 * rows <= pooled[2] // 8 <= 2 * rows + 1
  assert 2 * columns <= pooled[3] // 8 <= 2 * columns + 1


def test_the_first_block_repeats_its_first_frame():
  video, spec = VideoSpec(height=64, width=64), CompressorSpec()
  pixels = jnp.broadcast_to(jnp.arange(13.0)[None, :, None, None, None], (1, 13, 64, 64, 3))
  pooled = pool_pixels(pixels, video, spec)
  assert pooled[0, :, 0, 0, 0].tolist() == [(0 * 4 + 1 + 2 + 3 + 4) / 8, 5.5, 7.5, 9.5, 11.5]


def test_untrained_it_is_the_low_resolution_branch():
  spec = CompressorSpec()
  compressor = Compressor(spec, rngs=nnx.Rngs(0))
  latents = jax.random.normal(jax.random.key(0), (1, 4, 8, 8, 8))
  low = jax.random.normal(jax.random.key(1), (1, 2, 128))
  np.testing.assert_array_equal(compressor(latents, low), low)


def test_each_branch_alone():
  latents = jax.random.normal(jax.random.key(0), (1, 4, 8, 8, 8))
  low = jax.random.normal(jax.random.key(1), (1, 2, 128))
  outputs = {}
  for branches in ('both', 'hr', 'lr', 'none'):
    compressor = Compressor(CompressorSpec(branches=branches), rngs=nnx.Rngs(0))
    compressor.hr.out.kernel[...] = jnp.ones_like(compressor.hr.out.kernel[...])
    outputs[branches] = np.asarray(compressor(latents, low))
  np.testing.assert_allclose(outputs['hr'] + outputs['lr'], outputs['both'], rtol=1e-6)
  assert np.abs(outputs['hr']).max() > 0.01
  assert not outputs['none'].any()


def test_receptive_fields_are_centred():
  """The HR token's sensitivity to its 8 latent rows is centred at 8j + 3.5, as the LR branch's."""
  spec = CompressorSpec(in_channels=1, channels=(1, 1, 1, 1), width=1)
  compressor = Compressor(spec, rngs=nnx.Rngs(0))
  for conv in compressor.hr.convs:
    conv.kernel[...] = jnp.ones_like(conv.kernel[...])
  compressor.hr.out.kernel[...] = jnp.ones_like(compressor.hr.out.kernel[...])
  # Rows 64..71 belong to token 8: far from both borders.
  latents = jnp.full((1, 4, 136, 8, 1), 1e-3)
  gradient = jax.grad(lambda x: compressor.hr(x)[0, 0, 8, 0, 0])(latents)[0].sum((0, 2, 3))
  rows = np.arange(136)
  assert float((rows * gradient).sum() / gradient.sum()) == pytest.approx(8 * 8 + 3.5, abs=0.05)


@pytest.mark.parametrize(('video', 'message'), [
    ({'frames_per_block': 3}, 'frames_per_block=3 is not a multiple.*temporal_stride=1'),
    ({'height': 48, 'width': 48}, 'leaves')])
def test_blocks_that_cannot_be_compressed_are_refused(video, message):
  with pytest.raises(ValueError, match=message):
    CompressorSpec().mid_grid(VideoSpec(**video))
