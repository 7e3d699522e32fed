"""Released weights in every form: found, named, compared, and refused where they do not fit."""

import json

import pytest

from pf_jax.pipeline import PACKAGED
from pf_jax.testing import random_models, tiny_model_spec
from pf_jax.weights import export, networks, sources
from pf_jax.weights.load import load_network
from pf_jax.weights.networks import to_released
from pf_jax.weights.tensors import WeightsError
from tests.weights import checkpoints
from tests.weights.checkpoints import assert_same

SPEC = tiny_model_spec()
PARTS = ('transformer', 'vae', 'text')


@pytest.fixture(scope='module')
def exported(models, tmp_path_factory):
  return export.export_diffusers(models, PACKAGED / 'tokenizer.json',
                                 tmp_path_factory.mktemp('exported'))


@pytest.mark.parametrize('part', PARTS)
def test_wan_s_own_layout(models, wan, part):
  said = []
  assert_same(load_network(wan, getattr(SPEC, part), say=said.append), getattr(models, part))
  assert not said


@pytest.mark.parametrize('part', PARTS)
def test_diffusers_there_and_back_is_bit_equal(models, exported, part):
  said = []
  assert_same(load_network(exported, getattr(SPEC, part), say=said.append), getattr(models, part))
  assert said == ['names are those of diffusers and transformers.']


def test_the_folder_of_one_network_and_a_single_file(models, wan, exported):
  assert_same(load_network(exported / 'transformer', SPEC.transformer), models.transformer)
  assert_same(load_network(wan / 'Wan2.1_VAE.pth', SPEC.vae), models.vae)


def test_a_training_checkpoint_gives_its_average_unless_told_otherwise(models, tmp_path):
  ema, said = random_models(SPEC, 2), []
  path = checkpoints.write_self_forcing(tmp_path / 'dmd.pt', models, ema)
  assert_same(load_network(path, SPEC.transformer, say=said.append), ema.transformer)
  assert said == ["dmd.pt: entry 'generator_ema' is used; 'generator', 'critic' left."]
  assert_same(load_network(path, SPEC.transformer, entry='generator'), models.transformer)
  with pytest.raises(WeightsError, match=r"no entry 'teacher' of tensors; it has 'generator', "):
    load_network(path, SPEC.transformer, entry='teacher')


def test_text_weights_may_hold_their_embedding_twice(models, exported, tmp_path):
  tensors = {networks.network(SPEC.text).diffusers(name): value
             for name, value in to_released(models.text).items()}
  tensors['encoder.embed_tokens.weight'] = tensors['shared.weight']
  checkpoints.write_safetensors(tmp_path / 'text.safetensors', tensors)
  assert_same(load_network(tmp_path / 'text.safetensors', SPEC.text), models.text)
  del tensors['shared.weight']
  checkpoints.write_safetensors(tmp_path / 'other.safetensors', tensors)
  assert_same(load_network(tmp_path / 'other.safetensors', SPEC.text), models.text)


@pytest.mark.parametrize(('names', 'wanted'), [
    (['a.b', 'a.c'], ['a.b', 'a.c']),
    (['model.a', 'model.b'], ['a', 'b']),
    (['model.a', 'b'], ['model.a', 'b']),
    (['module.model.a._fsdp_wrapped_module.b'], ['a.b']),
    (['model._fsdp_wrapped_module.a', 'model.b'], ['a', 'b']),
    (['_orig_mod.a', '_orig_mod.b'], ['a', 'b'])])
def test_wrappers_are_taken_off(names, wanted):
  assert list(sources.plain_names(names).values()) == wanted


def test_a_near_miss_is_reported_in_full(models, tmp_path):
  tensors = to_released(models.transformer)
  tensors['blocks.2.modulation'] = tensors.pop('blocks.1.modulation')
  tensors['head.head.bias'] = tensors['head.head.bias'][:-1]
  checkpoints.write_safetensors(tmp_path / 'a.safetensors', tensors)
  with pytest.raises(WeightsError) as error:
    load_network(tmp_path / 'a.safetensors', SPEC.transformer)
  assert str(error.value).splitlines()[1:] == [
      '  missing: blocks.1.modulation', '  unexpected: blocks.2.modulation',
      '  shape: head.head.bias is (15,), wanted (16,)']


def test_another_model_is_named_in_one_line(wan, models, tmp_path):
  with pytest.raises(WeightsError, match=r'holds a VAE; wanted a transformer with width=24'):
    load_network(wan / 'Wan2.1_VAE.pth', SPEC.transformer)
  with pytest.raises(WeightsError, match=r'holds a text encoder of width 12; wanted a vae with'):
    load_network(wan / 'models_t5_umt5-xxl-enc-bf16.pth', SPEC.vae)
  other = tiny_model_spec().transformer.wan_1_3b()
  with pytest.raises(WeightsError, match=r'holds a transformer of width 24 and 2 layers; wanted '
                     r'a transformer with width=1536, num_layers=30\. Give') as error:
    load_network(wan, other)
  assert '\n' not in str(error.value)


def test_directories_that_are_not_whole(wan, models, tmp_path):
  with pytest.raises(WeightsError, match='there is no file or directory'):
    load_network(tmp_path / 'nowhere', SPEC.vae)
  with pytest.raises(WeightsError, match=r'holds no vae; wanted one of vae/, Wan2\.1_VAE\.\*'):
    load_network(tmp_path, SPEC.vae)
  checkpoints.write_sharded(tmp_path / 'shards', to_released(models.transformer), 3)
  (tmp_path / 'shards' / 'diffusion_pytorch_model-00002-of-00003.safetensors').unlink()
  with pytest.raises(WeightsError, match=r'lacks 1 of 3 shards: .*00002-of-00003.*finish the'):
    load_network(tmp_path / 'shards', SPEC.transformer)
  (tmp_path / 'shards' / 'more.safetensors.index.json').write_text('{}')
  with pytest.raises(WeightsError, match='has 2 indices'):
    load_network(tmp_path / 'shards', SPEC.transformer)


@pytest.mark.parametrize(('index', 'message'), [
    ('{', 'is not an index'), ('[]', 'is not an index'), ('{"weight_map": 3}', 'is not an index'),
    (json.dumps({'weight_map': {'a': '../../etc/passwd'}}), 'which is not a file beside it'),
    (json.dumps({'weight_map': {'a': 3}}), 'is not')])
def test_indices_that_lead_astray(models, tmp_path, index, message):
  checkpoints.write_safetensors(tmp_path / 'a.safetensors', to_released(models.transformer))
  (tmp_path / 'a.safetensors.index.json').write_text(index)
  with pytest.raises(WeightsError, match=message):
    load_network(tmp_path, SPEC.transformer)


def test_two_checkpoints_in_one_directory(models, tmp_path):
  for name in 'ab':
    checkpoints.write_safetensors(tmp_path / f'diffusion_pytorch_model-{name}.safetensors',
                                  to_released(models.transformer))
  with pytest.raises(WeightsError, match='keep one checkpoint in the directory'):
    load_network(tmp_path, SPEC.transformer)


def test_trees_that_hold_no_tensors(tmp_path):
  checkpoints.write_torch(tmp_path / 'a.pt', {'step': 3, 'generator': {'lr': 0.5}})
  with pytest.raises(WeightsError, match=r'it has none\. Choose one with --entry'):
    load_network(tmp_path / 'a.pt', SPEC.transformer)
  (tmp_path / 'a.txt').write_text('hello')
  with pytest.raises(WeightsError, match=r'is not a checkpoint; wanted one of \.safetensors'):
    load_network(tmp_path / 'a.txt', SPEC.transformer)
