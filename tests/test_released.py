"""A pipeline from released weights samples what the same networks sample in memory."""

import jax
import numpy as np
import pytest

from pf_jax import released
from pf_jax.evals.rollouts import with_branches
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.pipeline import PACKAGED, Pipeline
from pf_jax.released import ReleasedWeights
from pf_jax.sampling.source import ModelSource
from pf_jax.testing import random_models, tiny_model_spec
from pf_jax.weights import convert, networks, package
from pf_jax.weights.tensors import WeightsError
from tests.weights import checkpoints

SPEC = tiny_model_spec()
CHOICES = {'cache': {'sink_blocks': 1, 'recent_blocks': 1, 'top_k': 1, 'mid_capacity': 2},
           'sampler': {'solver': 'renoise', 'steps': (1000.0, 500.0)}}
PROMPT = 'a white seven'


@pytest.fixture(scope='module')
def models():
  return random_models(SPEC, 1)


@pytest.fixture(scope='module')
def wan(models, tmp_path_factory):
  return checkpoints.write_wan(tmp_path_factory.mktemp('weights') / 'Wan2.1', models)


def silent(message):
  del message


def load(directory, **options):
  return released.load(ReleasedWeights(str(directory), SPEC, **options), say=silent, **CHOICES)


def test_zero_shot_is_the_lr_branch_alone(models, wan):
  """Released weights hold no compressor: four blocks (three partitions filled) equal those of the
  same networks with the HR branch switched off, but for the rounding of two programs."""
  said = []
  made = released.load(ReleasedWeights(str(wan), SPEC), say=said.append, texts=[PROMPT], **CHOICES)
  assert said == ['no compressor is given: the LR branch works alone (zero-shot).']
  assert np.abs(np.asarray(made.models.compressor.hr.out.kernel)).max() == 0
  video = with_branches(models.without_text(), 'lr')
  tokenizer = Tokenizer.from_file(PACKAGED / 'tokenizer.json', max_tokens=SPEC.text.max_tokens)
  other = Pipeline(video, PromptEncoder(tokenizer, SPEC.text, lambda: models.text),
                   choices=CHOICES)
  for got, wanted in zip(made.blocks([PROMPT], 4, [3]), other.blocks([PROMPT], 4, [3]),
                         strict=True):
    np.testing.assert_allclose(got.latents, wanted.latents, atol=1e-4)
  assert np.asarray(got.selected).max() >= 1  # the archive was attended


def test_the_text_encoder_is_read_for_new_prompts_only(wan, monkeypatch):
  loaded, open_network = [], released.open_network

  def watched(path, spec, **options):
    stored = open_network(path, spec, **options)

    def load():
      loaded.append(type(spec).__name__)
      return stored.load()

    return stored._replace(load=load)

  monkeypatch.setattr(released, 'open_network', watched)
  made = released.load(ReleasedWeights(str(wan), SPEC), say=silent, texts=[PROMPT, PROMPT])
  assert loaded == ['TextSpec', 'VaeSpec', 'TransformerSpec']
  made.prompts([PROMPT])
  assert len(loaded) == 3
  made.prompts(['a red one'])
  assert loaded[3:] == ['TextSpec']


def test_parts_from_elsewhere(models, wan, tmp_path):
  ema = random_models(SPEC, 2)
  path = checkpoints.write_self_forcing(tmp_path / 'dmd.pt', models, ema)
  package.save_module(tmp_path / 'compressor.safetensors', models.compressor, dtype='float32')
  made = load(wan, transformer=str(path), compressor=str(tmp_path / 'compressor.safetensors'))
  jax.tree.map(np.testing.assert_array_equal, made.models.transformer, ema.transformer)
  jax.tree.map(np.testing.assert_array_equal, made.models.compressor, models.compressor)
  jax.tree.map(np.testing.assert_array_equal, made.models.vae, models.vae)
  made = load(wan, transformer=str(path), entry='generator')
  jax.tree.map(np.testing.assert_array_equal, made.models.transformer, models.transformer)


def test_converted_networks_beside_a_tokenizer(models, wan, tmp_path):
  for spec in (SPEC.transformer, SPEC.vae, SPEC.text):
    convert.convert(wan, spec, tmp_path, say=silent)
  with pytest.raises(WeightsError, match=r'has no tokenizer; wanted one of tokenizer/tokenizer'):
    load(tmp_path)
  (tmp_path / 'tokenizer.json').write_bytes((PACKAGED / 'tokenizer.json').read_bytes())
  made = load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, made.models.transformer, models.transformer)
  files = ReleasedWeights(str(tmp_path), SPEC).files()
  assert {network: [path.name for path in paths] for network, paths in files.items()} == {
      'text': ['text.safetensors'], 'vae': ['vae.safetensors'],
      'transformer': ['transformer.safetensors'], 'tokenizer': ['tokenizer.json']}
  with pytest.raises(WeightsError, match=r"is converted and has no entries; leave out entry='gen"):
    load(tmp_path, entry='generator')


def test_nothing_large_is_read_before_everything_fits(models, wan, tmp_path, monkeypatch):
  monkeypatch.setattr(networks, 'fill', lambda *a, **k: pytest.fail('was read'))
  path = tmp_path / 'compressor.safetensors'
  package.save_module(path, models.compressor.hr, dtype='float32')
  with pytest.raises(package.PackageError, match=r'does not fit the model: hr\.\S+ is missing'):
    load(wan, compressor=str(path))
  with pytest.raises(WeightsError, match=r'holds a VAE; wanted a transformer with width=24'):
    load(wan, transformer=str(wan / 'Wan2.1_VAE.pth'))
  for name in ('Wan2.1_VAE.pth', 'models_t5_umt5-xxl-enc-bf16.pth'):
    (tmp_path / name).write_bytes((wan / name).read_bytes())
  with pytest.raises(WeightsError, match=r'holds no transformer; wanted one of transformer/'):
    load(tmp_path)


def test_sources_are_remembered_and_told_apart(wan, tmp_path):
  source = ModelSource(weights=ReleasedWeights(str(wan), SPEC))
  assert ModelSource.from_json(source.to_json()) == source
  digests = source.digests()
  shard = 'transformer/diffusion_pytorch_model-0000{}-of-00002.safetensors'
  assert sorted(digests) == [
      'text/models_t5_umt5-xxl-enc-bf16.pth', 'tokenizer/tokenizer.json', shard.format(1),
      shard.format(2), 'vae/Wan2.1_VAE.pth']
  other = ModelSource(weights=ReleasedWeights(str(wan), SPEC, transformer=str(
      checkpoints.write_self_forcing(tmp_path / 'a.pt', *[random_models(SPEC, 3)] * 2))))
  assert other.digests() != digests


def test_the_same_weights_in_another_place(wan, tmp_path):
  source = ModelSource(weights=ReleasedWeights(str(wan), SPEC))
  (tmp_path / 'elsewhere').symlink_to(wan)
  moved = source.moved({'directory': str(tmp_path / 'elsewhere')})
  assert moved.weights.directory == str(tmp_path / 'elsewhere')
  assert moved.digests() == source.digests()
  with pytest.raises(ValueError, match=r'--checkpoint does not belong to the model that was used, '
                     r'released weights; give --weights or --transformer or --compressor'):
    source.moved({'checkpoint': 'runs/x'})
  assert ModelSource('a').moved({'checkpoint': 'b'}) == ModelSource('b')
  with pytest.raises(ValueError, match=r'--weights does not belong to .* a model directory; give'):
    ModelSource('a').moved({'directory': 'b'})
