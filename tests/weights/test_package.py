"""Model directories: bit-exact round trips, and every way a directory can be wrong."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pf_jax import outputs
from pf_jax.models.bundle import ModelSpec
from pf_jax.testing import random_models, tiny_model_spec
from pf_jax.weights import package
from pf_jax.weights.package import PackageError

CHOICES = {'cache': {'top_k': 4}, 'sampler': {'steps': (1000.0, 500.0)}}
ABOUT = {'recipe': 'none', 'cost': {'seconds': np.float32(1.5)}, 'psnr': float('nan')}


@functools.cache
def models():
  """Weights that float16 holds exactly."""
  return jax.tree.map(lambda x: jnp.asarray(np.float16(x), x.dtype),
                      random_models(tiny_model_spec()))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  return package.save_model(tmp_path_factory.mktemp('package') / 'model', models(),
                            choices=CHOICES, about=ABOUT)


@pytest.fixture
def copy(saved, tmp_path):
  """A model directory to spoil."""
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'model'))


def edit_spec(directory, **changes):
  path = directory / package.SPEC_FILE
  data = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def edit_weights(directory, change):
  """Changes tensors by hand, checksum left out, as for weights from elsewhere."""
  tensors = load_file(directory / package.WEIGHTS_FILE)
  change(tensors)
  save_file(tensors, directory / package.WEIGHTS_FILE)
  edit_spec(directory, weights_sha256=None)


def doubled():
  return jax.tree.map(lambda x: jnp.asarray(2 * np.asarray(x)), models())


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def test_round_trip_is_exact(saved):
  loaded = package.load_model(saved)
  equal(loaded.models, models())
  assert loaded.models.spec == tiny_model_spec()
  assert hash(loaded.models.spec) == hash(tiny_model_spec())  # specs are static under jit
  assert loaded.choices == {'cache': {'top_k': 4}, 'sampler': {'steps': [1000, 500]}}
  assert loaded.about == {'recipe': 'none', 'cost': {'seconds': 1.5}, 'psnr': None}
  assert loaded.directory == saved


def test_files_are_what_they_say(saved, tmp_path):
  assert sorted(p.name for p in saved.iterdir()) == [package.SPEC_FILE, package.WEIGHTS_FILE]
  tensors = load_file(saved / package.WEIGHTS_FILE)
  assert {x.dtype for x in tensors.values()} == {np.dtype('float16')}
  assert len(tensors) == len(jax.tree.leaves(models()))
  assert {'vae.encoder.down.0.conv1.kernel', 'compressor.hr.out.bias'} <= set(tensors)
  again = package.save_model(tmp_path, package.load_model(saved).models)
  assert ((again / package.WEIGHTS_FILE).read_bytes()
          == (saved / package.WEIGHTS_FILE).read_bytes())


def test_values_are_rounded_to_float16_and_come_back_in_the_modules_dtype(tmp_path):
  path = tmp_path / 'vae.safetensors'
  vae = jax.tree.map(lambda x: jnp.asarray(np.full(x.shape, 0.1, x.dtype)), models().vae)
  package.save_module(path, vae)
  loaded = package.load_module(path, jax.eval_shape(lambda: vae))
  assert {(x.dtype.name, float(np.ravel(x)[0])) for x in jax.tree.leaves(loaded)} == {
      ('float32', float(np.float16(0.1)))}


def test_defaults_are_empty(tmp_path):
  loaded = package.load_model(package.save_model(tmp_path, models()))
  assert (loaded.choices, loaded.about) == ({}, {})


def broken_tensors(tensors):
  del tensors['vae.quant_conv.bias']
  tensors['vae.extra'] = np.zeros(3, np.float16)
  tensors['text.norm.scale'] = np.zeros(5, np.float16)
  tensors['vae.post_quant_conv.bias'] = np.zeros(4, np.int32)
  tensors['transformer.head.bias'][0] = np.nan


def test_all_problems_are_named_at_once(copy):
  edit_weights(copy, broken_tensors)
  with pytest.raises(PackageError) as error:
    package.load_model(copy)
  for problem in ('vae.quant_conv.bias is missing', 'vae.extra is unexpected',
                  'text.norm.scale has shape (5,), wanted (12,)',
                  'vae.post_quant_conv.bias is int32, wanted floating point',
                  'transformer.head.bias is not finite'):
    assert problem in str(error.value)


def test_wider_weights_are_read(copy):
  def widen(tensors):
    for name, tensor in tensors.items():
      tensors[name] = tensor.astype(np.float32 if 'vae' in name else np.float64)

  edit_weights(copy, widen)
  equal(package.load_model(copy).models, models())


def test_weights_of_another_model_are_refused_though_they_fit(copy, tmp_path):
  other = package.save_model(tmp_path / 'other', doubled())
  shutil.copy(other / package.WEIGHTS_FILE, copy)
  with pytest.raises(PackageError, match=r'damaged or belongs to another model\.json'):
    package.load_model(copy)


@pytest.mark.parametrize('checksum', [True, False])
@pytest.mark.parametrize('spoil', [
    lambda data: data[:-1], lambda data: data[:40], lambda data: b'', lambda data: data + b'x',
    lambda data: b'not weights at all', lambda data: b'\xff' * 64, lambda data: data[9:],
    lambda data: b'PK\x03\x04' + data,
    lambda data: data.replace(b'F16', b'F99', 1), lambda data: data.replace(b'"F16"', b'"F8"', 1)])
def test_spoilt_weights_are_refused(copy, spoil, checksum):
  path = copy / package.WEIGHTS_FILE
  path.write_bytes(spoil(path.read_bytes()))
  if not checksum:
    edit_spec(copy, weights_sha256=None)
  with pytest.raises(PackageError, match=package.WEIGHTS_FILE):
    package.load_model(copy)


def test_missing_files_are_named(copy, tmp_path):
  (copy / package.WEIGHTS_FILE).unlink()
  with pytest.raises(PackageError, match=r'cannot read weights from .*model\.safetensors'):
    package.load_model(copy)
  with pytest.raises(PackageError, match='is not a model directory'):
    package.load_model(tmp_path)
  with pytest.raises(PackageError, match='is not a model directory'):
    package.load_model(tmp_path / 'nowhere')
  (tmp_path / 'file').write_text('')
  with pytest.raises(PackageError, match='is unreadable'):
    package.load_model(tmp_path / 'file')


@pytest.mark.parametrize('text', ['', '{', '[]', '{"version": 1', '\xff', 'null', '{"version": 2}',
                                  '{"version": "1"}', '{"version": 1}', '{"version": 1, "spec": 3}',
                                  '{"version": 1, "spec": {}}'])
def test_foreign_specs_are_refused(copy, text):
  (copy / package.SPEC_FILE).write_text(text, encoding='latin-1')
  with pytest.raises(PackageError, match=package.SPEC_FILE):
    package.read_spec(copy)


def test_another_version_says_what_to_do(copy):
  edit_spec(copy, version=2)
  with pytest.raises(PackageError, match=r'not of version 1; export the model again'):
    package.load_model(copy)


@pytest.mark.parametrize(('part', 'field', 'value', 'message'), [
    ('video', 'height', 65, 'height=65 is not a multiple of 16'),
    ('video', 'height', '64', r"VideoSpec\.height='64' is not int"),
    ('video', 'height', True, r'VideoSpec\.height=True is not int'),
    ('vae', 'latent_channels', 5, 'latent channels must agree between parts'),
    ('vae', 'depth', 3, 'depth'), ('text', None, 3, 'TextSpec is 3')])
def test_specs_that_cannot_be_built_are_explained(copy, part, field, value, message):
  spec = json.loads((copy / package.SPEC_FILE).read_text())['spec']
  spec[part] = value if field is None else spec[part] | {field: value}
  edit_spec(copy, spec=spec)
  with pytest.raises(PackageError, match=message):
    package.load_model(copy)


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e5])
def test_values_that_float16_cannot_hold_are_refused_before_anything_is_written(copy, value):
  before = {path.name: path.read_bytes() for path in copy.iterdir()}
  bad = jax.tree.map(lambda x: x, models())
  bad.vae.quant_conv.bias[...] = bad.vae.quant_conv.bias[...].at[0].set(value)
  for directory in (copy, copy.parent / 'new'):
    with pytest.raises(PackageError, match=r"1 tensors .* first 'vae\.quant_conv\.bias'; nothing"):
      package.save_model(directory, bad)
  assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
  assert not (copy.parent / 'new').exists()


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(TypeError, match='set'):
    package.save_model(tmp_path / 'new', models(), about={'seeds': {1, 2}})
  assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('fails', ['write_bytes', 'write_text'])
def test_a_failed_write_leaves_no_mixture(copy, fails, monkeypatch):
  """Old files, or a pair that is refused; never new weights under an old spec."""
  def full(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(outputs, fails, full)
  with pytest.raises(OSError, match='No space left'):
    package.save_model(copy, doubled())
  monkeypatch.undo()
  assert sorted(p.name for p in copy.iterdir()) == [package.SPEC_FILE, package.WEIGHTS_FILE]
  if fails == 'write_bytes':
    equal(package.load_model(copy).models, models())
  else:
    with pytest.raises(PackageError, match='belongs to another'):
      package.load_model(copy)


def test_specs_survive_json():
  spec = tiny_model_spec()
  text = json.dumps(dataclasses.asdict(spec))
  assert package.from_dict(ModelSpec, json.loads(text)) == spec


def test_a_vae_alone_round_trips(tmp_path):
  package.save_vae(tmp_path, models().vae, models().vae.spec)
  loaded = package.load_vae(tmp_path)
  equal(loaded, models().vae)
  with pytest.raises(PackageError):
    package.load_vae(tmp_path / 'nowhere')
