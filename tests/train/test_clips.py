"""Stages on a directory of real videos: what is encoded, refused, trained on and sampled."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax import pipeline
from pf_jax.data import digits, latents, media, videos
from pf_jax.rollout.bidirectional import ClipSamplerSpec
from pf_jax.rollout.block import SamplerSpec
from pf_jax.train import causal_stage, clips, evaluation, ode_stage, teacher_stage
from pf_jax.train.causal_stage import CausalStage
from pf_jax.train.clips import ClipPhase
from pf_jax.train.config import OptimizerConfig, TrainConfig
from pf_jax.train.ode_stage import OdeStage
from pf_jax.train.teacher import TeacherSpec
from pf_jax.train.teacher_forcing import CausalObjective, TeacherForcingSpec
from pf_jax.train.teacher_stage import TeacherStage
from pf_jax.viz.video import VideoWriter
from pf_jax.weights import package
from tests.evals import micro

pytestmark = pytest.mark.timeout(400)
CAPTIONS = {'street': 'a grey street', 'cat': 'a red cat'}


@pytest.fixture(scope='module')
def models():
  return micro.models()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Two clips of a cat, one of a street that is larger and quicker; no caption; too short."""
  root, rng = tmp_path_factory.mktemp('videos'), np.random.default_rng(0)
  for name, size, frames, fps in (('cat', (32, 32), 50, 16), ('street', (40, 60), 60, 32),
                                  ('mute', (32, 32), 23, 16), ('short', (32, 32), 22, 16)):
    with VideoWriter(root / f'{name}.mp4', *size, fps) as writer:
      writer.write(rng.integers(0, 256, (frames, *size, 3), np.uint8))
    if name != 'mute':
      (root / f'{name}.txt').write_text(CAPTIONS.get(name, 'a'))
  return root


@pytest.fixture(scope='module')
def stage(models, tmp_path_factory):
  root = tmp_path_factory.mktemp('stage')
  package.save_vae(root / 'vae', models.vae, models.spec.vae)
  return CausalStage(
      model=micro.spec(), vae=str(root / 'vae'), store=str(root / 'never'),
      dataset=str(root / 'dataset'), clip_blocks=3, encode_batch=2,
      phases=(ClipPhase(1, clips=2),), cache=micro.CHOICES['cache'],
      teacher_forcing=TeacherForcingSpec(noise_levels=1, sink_blocks=()),
      sampler=SamplerSpec(steps=(1000.0,)), eval_blocks=1)


@pytest.fixture(scope='module')
def said():
  return []


@pytest.fixture(scope='module')
def store(stage, folder, said):
  # Prepared with another start: it takes no part.
  without = dataclasses.replace(stage, start='/nowhere')
  return clips.encode_videos(without, folder, clips_per_video=2, clips_per_shard=2,
                             say=said.append)


def other(stage, kind, **fields):
  """The same settings of clips for another stage."""
  shared = {field.name: getattr(stage, field.name) for field in dataclasses.fields(clips.ClipStage)}
  return kind(**shared | fields)


def test_the_store_holds_what_the_networks_see_of_the_files(stage, models, folder, store):
  texts = ['a red cat', 'a red cat', 'a grey street']
  assert [store.prompt(i) for i in range(len(store))] == texts
  pixels = jnp.asarray(digits.to_float(np.stack([
      media.read_video(folder / name, 32, 32, 16, max_frames=23, start_seconds=start).frames
      for name, start in (('cat.mp4', 0), ('cat.mp4', 23 / 16), ('street.mp4', 0))])))
  records, models = store.read(slice(None)), models.replaced(vae=package.load_vae(stage.vae))
  wanted = micro.once(models.vae.encode, pixels)
  np.testing.assert_allclose(records['latents'], wanted, rtol=2e-3, atol=2e-3)
  assert np.abs(np.diff(np.asarray(wanted), axis=0)).max() > 0.1  # no clip stands for another
  low = micro.once(lambda m, p: clips.encode_low(m, p), models, pixels)
  np.testing.assert_allclose(records['lr_latents'], low, rtol=2e-3, atol=2e-3)
  tokens = clips.load_tokenizer(stage)(texts)
  np.testing.assert_array_equal(records['ids'], tokens.ids)
  np.testing.assert_array_equal(records['mask'], tokens.mask)
  assert set(records) == {'latents', 'lr_latents', 'ids', 'mask', 'text'}
  opened = clips.open_store(stage, models, clips.load_tokenizer(stage))
  assert opened.crc32 == store.crc32


def test_what_is_not_used_is_said_and_kept(folder, store, said):
  names = {'mute.mp4': 'there is no caption; wanted mute.txt beside it',
           'short.mp4': '22 frames at 16 fps, a clip has 23'}
  assert said == [*(f'skipped: {name}: {reason}' for name, reason in names.items()),
                  f'{folder}: 3 clips of 2 videos; 2 files skipped, 0 cut short.']
  assert json.loads((store.path / 'skipped.json').read_text()) == {
      'skipped': names, 'cut_short': {}}


def test_the_same_command_again_encodes_nothing(stage, folder, store, monkeypatch):
  monkeypatch.setattr(clips, 'clip_encoder', lambda *unused: None)
  again = clips.encode_videos(stage, folder, clips_per_video=2, say=lambda line: None)
  assert again.crc32 == store.crc32
  with pytest.raises(latents.StoreError, match=r'holds other data: videos_sha256: got .*, wanted'):
    clips.encode_videos(stage, folder, say=lambda line: None)


def test_a_directory_without_a_usable_video(stage, tmp_path):
  (tmp_path / 'a.mp4').write_bytes(b'')
  (tmp_path / 'a.txt').write_text('a')
  said = []
  with pytest.raises(videos.VideosError, match=r'wanted files such as .* at least 23 frames at 16'):
    clips.encode_videos(stage, tmp_path, say=said.append)
  assert said[0] == 'skipped: a.mp4: is empty; wanted a file with a picture or a video in it.'


def changed(stage, tmp_path, what):
  if what == 'vae':
    weights = micro.models()
    weights.vae.decoder.conv_in.kernel = weights.vae.decoder.conv_in.kernel * 2
    package.save_vae(tmp_path, weights.vae, weights.spec.vae)
    return dataclasses.replace(stage, vae=str(tmp_path))
  if what == 'tokenizer':
    path = tmp_path / 'tokenizer.json'
    path.write_text(clips.tokenizer_file('').read_text() + '\n')
    return dataclasses.replace(stage, tokenizer=str(path))
  if what == 'blocks':
    return dataclasses.replace(stage, clip_blocks=4)
  video = dataclasses.replace(stage.model.video, **{what: {'fps': 8, 'height': 64}[what]})
  return dataclasses.replace(stage, model=dataclasses.replace(stage.model, video=video))


@pytest.mark.parametrize(('what', 'message'), [
    ('vae', r'vae_crc32: got \d+, wanted \d+; encode it again'),
    ('tokenizer', "tokenizer: got '?[0-9a-f]+'?, wanted"),
    ('blocks', r'blocks: got 3, wanted 4; latents: got \(12, 16, 16, 4\), wanted \(16, 16, '),
    ('fps', 'fps: got 16, wanted 8; encode'), ('height', 'height: got 32, wanted 64')])
def test_clips_of_another_encoding_are_refused(stage, models, store, tmp_path, what, message):
  wrong = changed(stage, tmp_path, what)
  with pytest.raises(latents.StoreError, match=rf'dataset does not fit: .*{message}') as caught:
    clips.open_store(wrong, models, clips.load_tokenizer(wrong))
  assert '\n' not in str(caught.value)


def test_nothing_prepared(stage, models, tmp_path):
  lost = dataclasses.replace(stage, dataset=str(tmp_path / 'lost'))
  with pytest.raises(latents.StoreError, match=r'no latent store at .*lost; make it with launch'):
    clips.open_store(lost, models, clips.load_tokenizer(lost))


def test_the_world_has_no_say(stage, store):
  assert clips.evaluation_prompts(stage) == (None, ['a red cat', 'a red cat', 'a grey street'])
  world = digits.DigitsWorld(height=64, width=64)  # of another size than the model
  assert dataclasses.replace(stage, world=world).world == world
  with pytest.raises(ValueError, match='world is 64x64'):
    dataclasses.replace(stage, world=world, dataset='')
  made = dataclasses.replace(stage, world=micro.WORLD, dataset='')
  assert clips.evaluation_prompts(made) == (micro.WORLD, evaluation.prompts(micro.WORLD))


def test_captions_of_evaluations_are_spread_over_the_store(stage, monkeypatch):
  class Store:
    def __init__(self, path):
      self.count = int(path)

    def __len__(self):
      return self.count

    def prompt(self, index):
      return str(index)

  monkeypatch.setattr(latents, 'LatentStore', Store)
  got = {count: clips.evaluation_prompts(dataclasses.replace(stage, dataset=count))[1]
         for count in ('1', '3', '4', '7', '41')}
  assert got == {'1': ['0'], '3': ['0', '1', '2'], '4': ['0', '1', '2', '3'],
                 '7': ['0', '1', '2', '3'], '41': ['0', '10', '20', '30']}


def test_the_causal_stage_reads_it_and_samples_captions(stage, models, store, tmp_path,
                                                        monkeypatch):
  batch = next(clips.clip_batches(stage, store, 0)(0)).clips
  shapes = clips.clip_shapes(stage)
  assert batch.latents.shape == (2, *shapes['latents']) == (2, 12, 16, 16, 4)
  assert batch.lr_latents.shape == (2, *shapes['lr_latents'])
  seen = {}

  class Sampler:
    def __init__(self, world, rollout, *, texts, clip_blocks):
      seen.update(world=world, texts=texts)

    def judge(self, models, encode, lengths, step, workdir):
      return {'sharpness/block_1': 1.0}

  monkeypatch.setattr(causal_stage.evaluation, 'Sampler', Sampler)
  tokenizer = clips.load_tokenizer(stage)
  objective = CausalObjective(models, stage.cache_spec, stage.teacher_forcing)
  evaluate = causal_stage.sample_evaluation(stage, objective, tokenizer, tmp_path)
  assert evaluate(objective.init(0), 3) == {'sharpness/block_1': 1.0}
  assert seen == {'world': None, 'texts': ['a red cat', 'a red cat', 'a grey street']}


def test_the_teacher_trains_on_it_and_leaves_a_model_and_pictures(stage, store, tmp_path):
  teacher = other(stage, TeacherStage, objective=TeacherSpec(noise_levels=1),
                  sampler=ClipSamplerSpec(solver='euler', steps=1, guidance=2.0))
  config = TrainConfig(steps=1, log_every=1, save_every=1, eval_every=1, ema_decay=0.0, mfu=False,
                       optimizer=OptimizerConfig(warmup_steps=0))
  result = teacher_stage.train_teacher(teacher, config, tmp_path)
  assert {'loss', 'clips', 'grad_norm'} <= set(result.metrics)
  trained = result.state.params['transformer'].head.kernel
  assert np.abs(trained).max() > 0  # it starts at zero
  np.testing.assert_allclose(pipeline.load(tmp_path).models.transformer.head.kernel[...],
                             trained[...], atol=1e-3)
  record = json.loads((tmp_path / 'drift.jsonl').read_text())
  assert set(record['values']) == {'colour_drift', 'contrast', 'sharpness', 'frame_difference'}
  assert (tmp_path / 'samples.png').stat().st_size > 1000
  assert not pathlib.Path(stage.store).exists()


def test_trajectories_begin_with_its_captions(stage, store):
  ode = other(stage, OdeStage, start='a', teacher='b', cache=stage.cache,
              sampler=SamplerSpec('renoise', (1000.0, 750.0, 500.0, 250.0), 5.0))
  prompt = ode_stage.prompts(ode, seed=5)
  assert [prompt(i) for i in (0, 2, 3, 5)] == ['a red cat', 'a grey street'] * 2
  prompt = ode_stage.prompts(dataclasses.replace(ode, dataset='', world=micro.WORLD), seed=5)
  assert prompt(1) == micro.WORLD.describe(1, 5).prompt
