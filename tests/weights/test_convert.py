"""Conversion: values, precision, both forms, interruption, and nothing left behind on refusal."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax import outputs
from pf_jax.testing import random_models, tiny_model_spec
from pf_jax.types import DTypes
from pf_jax.weights import convert, networks
from pf_jax.weights.load import load_network, network_files
from pf_jax.weights.networks import to_released
from pf_jax.weights.tensors import WeightsError
from tests.weights import checkpoints
from tests.weights.checkpoints import assert_same

SPEC = tiny_model_spec()
HALF = DTypes('bfloat16', 'bfloat16', 'bfloat16')


@pytest.mark.parametrize('form', ['safetensors', 'orbax'])
@pytest.mark.parametrize('part', ['transformer', 'vae', 'text'])
def test_converted_networks_are_the_released_ones(models, wan, tmp_path, part, form):
  spec = getattr(SPEC, part)
  (path,) = convert.convert(wan, spec, tmp_path, form=form)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock', path.name]
  assert network_files(tmp_path, spec) == (path,)
  assert_same(load_network(tmp_path, spec), getattr(models, part))
  assert_same(load_network(path, spec), getattr(models, part))


def test_precision_is_rounded_once_and_norms_stay(models, wan, tmp_path):
  half = dataclasses.replace(SPEC.transformer, dtypes=HALF)
  convert.convert(wan, half, tmp_path, form='both')
  for path in (tmp_path / 'transformer.safetensors', tmp_path / 'transformer.orbax'):
    module = load_network(path, half)
    kernel = models.transformer.layers.ffn_in.kernel
    assert module.layers.ffn_in.kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(module.layers.ffn_in.kernel, kernel.astype(jnp.bfloat16))
    np.testing.assert_array_equal(module.layers.norm3.scale, models.transformer.layers.norm3.scale)
    wide = load_network(path, SPEC.transformer)  # another precision is a cast
    assert wide.layers.ffn_in.kernel.dtype == jnp.float32
    assert_same(wide.head.kernel, models.transformer.head.kernel)


def test_an_interrupted_conversion_goes_on(models, wan, tmp_path, monkeypatch):
  read, count, said, steps = networks.read_piece, [0], [], []

  def interrupted(tensors, piece):
    count[0] += 1
    if count[0] == 20:
      raise KeyboardInterrupt
    return read(tensors, piece)

  monkeypatch.setattr(networks, 'read_piece', interrupted)
  with pytest.raises(KeyboardInterrupt):
    convert.convert(wan, SPEC.transformer, tmp_path)
  assert not (tmp_path / 'transformer.safetensors').exists()
  with pytest.raises(WeightsError, match='holds no transformer'):
    load_network(tmp_path, SPEC.transformer)
  count[0] = 100
  convert.convert(wan, SPEC.transformer, tmp_path, say=said.append, progress=steps.append)
  assert said == ['resuming: 19 pieces are there already.']
  assert count[0] == 100 + convert.pieces_of(SPEC.transformer) - 19
  assert sum(steps) == convert.pieces_of(SPEC.transformer) == 69
  assert_same(load_network(tmp_path, SPEC.transformer), models.transformer)


def test_an_interruption_before_the_orbax_form_goes_on(models, wan, tmp_path):
  convert.convert(wan, SPEC.vae, tmp_path)  # as far as a killed 'both' got
  before = (tmp_path / 'vae.safetensors').stat().st_mtime_ns
  convert.convert(wan, SPEC.vae, tmp_path, form='both')
  assert (tmp_path / 'vae.safetensors').stat().st_mtime_ns == before
  assert_same(load_network(tmp_path / 'vae.orbax', SPEC.vae), models.vae)


def test_the_orbax_form_alone_spares_a_finished_file(models, wan, tmp_path):
  convert.convert(wan, SPEC.vae, tmp_path)
  convert.convert(wan, SPEC.vae, tmp_path, form='orbax')
  assert_same(load_network(tmp_path / 'vae.safetensors', SPEC.vae), models.vae)


def test_two_sources_are_never_mixed(models, tmp_path, monkeypatch):
  """Another entry of the same file, and another file of the same name and size."""
  path = checkpoints.write_self_forcing(tmp_path / 'dmd.pt', models, random_models(SPEC, 2))
  read, count = networks.read_piece, [0]

  def interrupted(tensors, piece):
    count[0] += 1
    if count[0] == 20:
      raise KeyboardInterrupt
    return read(tensors, piece)

  monkeypatch.setattr(networks, 'read_piece', interrupted)
  with pytest.raises(KeyboardInterrupt):
    convert.convert(path, SPEC.transformer, tmp_path / 'out', entry='generator')
  count[0] = 100
  with pytest.raises(WeightsError, match='was begun with other tensors or from another source'):
    convert.convert(path, SPEC.transformer, tmp_path / 'out')
  checkpoints.write_self_forcing(tmp_path / 'dmd.pt', random_models(SPEC, 3), models)
  with pytest.raises(WeightsError, match='was begun with other tensors or from another source'):
    convert.convert(path, SPEC.transformer, tmp_path / 'out', entry='generator')
  convert.convert(path, SPEC.transformer, tmp_path / 'out', overwrite=True)
  assert_same(load_network(tmp_path / 'out', SPEC.transformer), models.transformer)


def test_nothing_is_written_for_weights_that_do_not_fit(wan, tmp_path):
  with pytest.raises(WeightsError, match='holds a VAE; wanted a transformer'):
    convert.convert(wan / 'Wan2.1_VAE.pth', SPEC.transformer, tmp_path / 'out')
  broken = tmp_path / 'cut.pth'
  broken.write_bytes((wan / 'Wan2.1_VAE.pth').read_bytes()[:-100])
  with pytest.raises(WeightsError) as error:
    convert.convert(broken, SPEC.vae, tmp_path / 'out')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'out').exists()
  with pytest.raises(ValueError, match='use one of safetensors, orbax, both'):
    convert.convert(wan, SPEC.vae, tmp_path / 'out', form='npz')


def test_finished_conversions_are_replaced_when_asked_only(models, wan, tmp_path):
  convert.convert(wan, SPEC.vae, tmp_path, form='both')
  for form in ('safetensors', 'orbax'):
    with pytest.raises(outputs.OutputExists, match='exists already'):
      convert.convert(wan, SPEC.vae, tmp_path, form=form)
  other = random_models(SPEC, 2)
  checkpoints.write_torch(tmp_path / 'Wan2.1_VAE.pth', to_released(other.vae))
  convert.convert(tmp_path / 'Wan2.1_VAE.pth', SPEC.vae, tmp_path, form='both', overwrite=True)
  for path in (tmp_path / 'vae.safetensors', tmp_path / 'vae.orbax'):
    assert_same(load_network(path, SPEC.vae), other.vae)


def test_other_sizes_and_kinds_are_refused(wan, tmp_path):
  (path,) = convert.convert(wan, SPEC.vae, tmp_path)
  other = dataclasses.replace(SPEC.vae, latent_std=(2.0,) * 4)  # same shapes, other numbers
  with pytest.raises(WeightsError, match=r'was converted with latent_std=\(\), the config says'):
    load_network(tmp_path, other)
  with pytest.raises(WeightsError, match=r"holds 'vae' in version '1', wanted 'text'"):
    load_network(path, SPEC.text)
  assert dataclasses.replace(SPEC.vae, dtypes=HALF) != SPEC.vae
  load_network(tmp_path, dataclasses.replace(SPEC.vae, dtypes=HALF))


def test_the_header_says_what_it_was_made_of(wan, tmp_path):
  (path,) = convert.convert(wan, SPEC.text, tmp_path)
  header = convert.read_safetensors(path)[1]
  source = wan / 'models_t5_umt5-xxl-enc-bf16.pth'
  assert json.loads(header['source']) == {source.name: outputs.file_digest(source)}
  assert json.loads(header['spec'])['width'] == SPEC.text.width


def test_mapped_views_read_nothing(wan, tmp_path):
  (path,) = convert.convert(wan, SPEC.transformer, tmp_path)
  views = convert.map_tensors(pathlib.Path(path))
  for name, tensor in convert.read_safetensors(path)[0].items():
    assert not views[name].flags.owndata
    np.testing.assert_array_equal(views[name], tensor.read())
