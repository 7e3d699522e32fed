"""The VAE's loss by hand, its optimizer's view, its batches by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.digits import vae as vae_config
from launch.build import build
from pf_jax.train import vae_objective
from pf_jax.train.vae_objective import VaeLossSpec
from pf_jax.train.vae_stage import VaeStage, crop_batches


class ByHand:
  """Encodes to zeros with log variance -2 and decodes to a constant."""

  def encode_moments(self, pixels):
    latents = jnp.zeros((*pixels.shape[:1], 1, 1, 1, 2))
    return latents, latents - 2.0

  def decode_sample(self, sample):
    del sample
    return jnp.full((2, 1, 2, 2, 3), 0.5)


def test_loss_of_a_constant():
  pixels = jnp.stack([jnp.full((1, 2, 2, 3), 0.5), jnp.full((1, 2, 2, 3), -0.5)])
  loss, metrics = vae_objective.vae_loss(ByHand(), pixels, jax.random.key(0),
                                         VaeLossSpec(l1=2.0, l2=3.0, kl=0.5))
  kl = 0.5 * (np.exp(-2) - 1 + 2)  # of N(0, e^-2)
  assert float(metrics['kl']) == pytest.approx(kl, rel=1e-6)
  assert float(loss) == pytest.approx(2 * 0.5 + 3 * 0.5 + 0.5 * kl, rel=1e-6)
  # One clip is exact (floor 1e-10), the other one off by 1 everywhere: 10 log10(4).
  exact, off = 10 * np.log10(4e10), 10 * np.log10(4)
  assert float(metrics['psnr']) == pytest.approx((exact + off) / 2, rel=1e-5)


def test_muon_moves_kernels_from_all_inputs_to_outputs():
  axes = vae_objective.VaeObjective.muon_axes(
      None, {'kernel': jnp.zeros((3, 3, 3, 4, 8)), 'bias': jnp.zeros(8)})
  assert axes['bias'] is None
  assert (axes['kernel'].reduction_axis, axes['kernel'].output_axis) == ((0, 1, 2, 3), 4)


@pytest.fixture(scope='module')
def stage():
  config = vae_config.get_config('tiny')
  return build(VaeStage, {k: config[k] for k in config if k not in ('stage', 'train')}, 'config')


def test_batches_are_a_function_of_the_step(stage):
  batches = crop_batches(stage, seed=0)
  stream = batches(0)
  whole = [next(stream)['pixels'] for _ in range(6)]
  assert [b.shape[:3] for b in whole] == [(2, 5, 16)] * 2 + [(1, 9, 16)] * 4  # the last one stays
  for start in (1, 3, 5):
    assert np.array_equal(next(batches(start))['pixels'], whole[start])
  assert not np.array_equal(whole[2], whole[3])


def test_pooled_clips_are_what_the_low_resolution_branch_sees(stage):
  """A pooled clip's frames: the mean of frames 0-7, then pair means, each over 4x4 pixels."""
  from pf_jax.data import digits
  from pf_jax.models import compressor

  frames = digits.DigitsWorld().clip(0, 0, 16).pixels
  pooled = compressor.pool_pixels(jnp.asarray(frames[None], jnp.float32), stage.model.video,
                                  stage.model.compressor)[0]
  boxes = frames.reshape(16, 16, 4, 16, 4, 3).mean((2, 4))
  np.testing.assert_allclose(pooled[0], boxes[:8].mean(0), atol=1e-3)
  np.testing.assert_allclose(pooled[2], boxes[10:12].mean(0), atol=1e-3)


def test_statistics_bring_latents_to_zero_mean_and_unit_deviation(stage):
  rng = np.random.default_rng(0)
  channels = stage.model.vae.latent_channels
  latents = rng.normal(3.0, 2.0, (500, channels))
  spec = vae_objective.latent_statistics(latents, stage.model.vae)
  scaled = (latents - spec.latent_mean) / spec.latent_std
  np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-9)
  np.testing.assert_allclose(scaled.std(0), 1, atol=1e-9)
