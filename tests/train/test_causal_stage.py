"""Stage "causal" on a micro model: what is encoded, what is read, what a run leaves behind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax import pipeline
from pf_jax.data import digits
from pf_jax.rollout.block import SamplerSpec
from pf_jax.train import causal_stage, clips
from pf_jax.train.causal_stage import CausalStage
from pf_jax.train.clips import ClipPhase
from pf_jax.train.config import TrainConfig
from pf_jax.train.teacher_forcing import TeacherForcingSpec
from pf_jax.weights import package
from tests.evals import micro

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope='module')
def models():
  return micro.models()


@pytest.fixture(scope='module')
def stage(models, tmp_path_factory):
  root = tmp_path_factory.mktemp('causal')
  package.save_vae(root / 'vae', models.vae, models.spec.vae)
  return CausalStage(
      model=micro.spec(), vae=str(root / 'vae'), store=str(root / 'store'), clips=3, clip_blocks=3,
      encode_batch=2, phases=(ClipPhase(2, clips=0, first_blocks=2), ClipPhase(3, clips=2)),
      cache=micro.CHOICES['cache'],
      teacher_forcing=TeacherForcingSpec(noise_levels=1, sink_blocks=()),
      sampler=SamplerSpec(steps=(1000.0,)), world=micro.WORLD, eval_blocks=1)


@pytest.fixture(scope='module')
def store(stage, models):
  return clips.open_store(stage, models, clips.load_tokenizer(stage))


def test_store_holds_the_clips_latents_at_both_resolutions(stage, models, store):
  clip = stage.world.clip(1, 0, stage.frames)
  pixels = jnp.asarray(digits.to_float(clip.pixels)[None])
  record = store[1]
  np.testing.assert_allclose(record['latents'], micro.once(models.vae.encode, pixels)[0],
                             rtol=2e-3, atol=2e-3)
  first, whole = stage.model.video.first_block_frames, stage.model.video.block_frames
  low = micro.once(models.encode_low_resolution, pixels[:, first:first + whole])
  np.testing.assert_allclose(record['lr_latents'][1], low[0], rtol=2e-3, atol=2e-3)
  # The short first block counts its first frame several times, as while sampling.
  low = micro.once(models.encode_low_resolution, pixels[:, :first])
  np.testing.assert_allclose(record['lr_latents'][0], low[0], rtol=2e-3, atol=2e-3)
  tokens = clips.load_tokenizer(stage)(clip.prompt)
  assert record['ids'].tolist() == tokens.ids[0].tolist()


def test_batches_are_a_function_of_the_step(stage, store):
  batches = clips.clip_batches(stage, store, 0)
  stream = batches(0)
  seen = [next(stream) for _ in range(6)]
  assert [(b.clips is None, b.first is None) for b in seen] == [(True, False)] * 2 + [
      (False, True)] * 4
  for step in (1, 2, 5):
    again = next(batches(step))
    jax.tree.map(np.testing.assert_array_equal, again, seen[step])
  assert seen[5].clips.latents.dtype == jnp.float32
  assert seen[0].first.latents.shape[1] == stage.model.video.frames_per_block
  # Batches of two see each of the three clips at least once.
  assert len({float(clip[0, 0, 0, 0]) for b in seen[2:] for clip in b.clips.latents}) == 3


def test_clips_without_a_middle_are_refused(stage):
  with pytest.raises(ValueError, match=r'clip_blocks=2 leave .* use at least 3'):
    dataclasses.replace(stage, clip_blocks=2)


def test_a_cache_in_8_bits_is_refused(stage):
  with pytest.raises(ValueError, match="storage='int8' has no gradient; train with 'full'"):
    dataclasses.replace(stage, cache={**stage.cache, 'storage': 'int8'})


def test_a_missing_vae_is_named(stage, tmp_path):
  lost = dataclasses.replace(stage, vae=str(tmp_path))
  with pytest.raises(package.PackageError, match=r'cannot read a VAE .* configs/digits/vae\.py'):
    causal_stage.train_causal(lost, TrainConfig(steps=1), tmp_path / 'run')


def test_a_run_moves_everything_but_the_vae_and_leaves_a_model_to_sample(stage, store, tmp_path):
  config = TrainConfig(steps=3, log_every=1, save_every=3, eval_every=3, ema_decay=0.0, mfu=False)
  result = causal_stage.train_causal(stage, config, tmp_path)
  assert np.isfinite(result.metrics['loss'])
  loaded = pipeline.load(tmp_path)
  assert loaded.spec.cache.mid_capacity == 3
  trained = result.state.params['transformer'].head.kernel
  assert np.abs(trained).max() > 0  # it starts at zero
  np.testing.assert_allclose(loaded.models.transformer.head.kernel[...], trained[...], atol=1e-4)
  original = package.load_vae(stage.vae)
  assert np.array_equal(loaded.models.vae.decoder.conv_in.kernel[...],
                        original.decoder.conv_in.kernel[...])
  assert (tmp_path / 'samples.png').stat().st_size > 1000
  again = dataclasses.replace(stage, start=str(tmp_path / 'model'))
  start = clips.initial_models(again, seed=5)
  np.testing.assert_array_equal(start.compressor.hr.out.kernel[...],
                                loaded.models.compressor.hr.out.kernel[...])


def test_a_start_of_other_sizes_is_refused(stage, models, tmp_path):
  package.save_model(tmp_path, models, choices=micro.CHOICES)
  other = dataclasses.replace(stage.model.text, max_tokens=9)
  other = dataclasses.replace(stage, start=str(tmp_path),
                              model=dataclasses.replace(stage.model, text=other))
  with pytest.raises(package.PackageError, match=r"another text: .*start='' for random"):
    clips.initial_models(other, seed=0)
