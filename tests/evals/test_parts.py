"""VAE and compressor on true clips, against the same numbers by hand."""

import numpy as np
import pytest

from pf_jax.data import digits
from pf_jax.evals import classifier as classifier_lib
from pf_jax.evals import evaluator, parts, rollouts
from pf_jax.models import compressor
from tests.evals import micro

pytestmark = pytest.mark.timeout(400)


def test_psnr_by_hand():
  black, grey = np.full((2, 2), -1.0), np.full((2, 2), -0.8)
  assert float(parts.psnr(black, grey)) == pytest.approx(20, abs=1e-4)  # a tenth of the range
  assert float(parts.psnr(black, black)) == pytest.approx(100)


def test_parts_of_a_clip_by_hand():
  models, world, video = micro.models(), micro.WORLD, micro.VIDEO
  draws = rollouts.held_out(world, 1, 0)
  latents = rollouts.encode_clips(models, world, draws, 2)
  judge = evaluator.Judge([draws[0].prompt], video=video, world=world, image_ids=[
      draws[0].image_id], classifier=classifier_lib.load().model,
                          spec=evaluator.EvalSpec(blocks=(2,), resamples=10))
  report = parts.measure(models, world, draws, latents, judge)

  true = digits.to_float(world.render(draws[0], video.pixel_frames(2)).pixels)
  decoded = np.asarray(micro.once(lambda vae, z: vae.decode(z), models.vae,
                                  latents.reshape(1, 8, *latents.shape[3:])))[0]
  error = ((true - decoded) / 2) ** 2
  assert report.values['psnr'][0] == pytest.approx(-10 * np.log10(error.mean()), abs=1e-2)
  pooled = compressor.pool_pixels(true[None, 7:], video, models.spec.compressor)
  low = np.asarray(micro.once(lambda vae, x: vae.decode(vae.encode(x)), models.vae, pooled))
  error = ((np.asarray(pooled) - low) / 2) ** 2
  assert report.values['psnr_low_resolution'][0] == pytest.approx(-10 * np.log10(error.mean()),
                                                                  abs=1e-2)
  hr, lr = (np.asarray(tokens)[0] for tokens in micro.once(
      parts.branch_tokens, models, latents[:, 1], decoded[None, 7:]))
  ratio = np.linalg.norm(hr, axis=-1) / np.linalg.norm(lr, axis=-1)
  assert report.values['hr_to_lr'][0] == pytest.approx(ratio.mean(), rel=1e-3)
  cosine = (hr * lr).sum(-1) / np.linalg.norm(hr, axis=-1) / np.linalg.norm(lr, axis=-1)
  assert report.values['cosine'][0] == pytest.approx(cosine.mean(), abs=1e-3)
  colour = report.reconstructions.values['background_drift']
  assert colour.shape == (1, 1)
  assert np.isfinite(colour).all()
