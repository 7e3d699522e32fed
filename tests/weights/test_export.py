"""Exports replace what they may, as a whole or not at all: kills, full disks, strange directories.

What the files hold is compared with the libraries in tests/parity, and there and back in
test_sources.
"""

import errno
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from pf_jax import outputs
from pf_jax.pipeline import PACKAGED
from pf_jax.testing import random_models, tiny_model_spec
from pf_jax.weights import export, networks
from pf_jax.weights.load import load_network
from pf_jax.weights.tensors import WeightsError

SPEC = tiny_model_spec()
TOKENIZER = PACKAGED / 'tokenizer.json'
FILES = {
    'model_index.json', 'scheduler/scheduler_config.json',
    'transformer/config.json', 'transformer/diffusion_pytorch_model.safetensors',
    'vae/config.json', 'vae/diffusion_pytorch_model.safetensors',
    'text_encoder/config.json', 'text_encoder/model.safetensors',
    'tokenizer/tokenizer.json', 'tokenizer/tokenizer_config.json',
    'compressor/config.json', 'compressor/compressor.safetensors'}


@pytest.fixture(scope='module', autouse=True)
def quick():
  """Shapes of a network are traced once, not for every export."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(networks, 'network', functools.cache(networks.network))
    yield


@pytest.fixture(scope='module')
def old():
  return random_models(SPEC, 1)


@pytest.fixture(scope='module')
def new(old):
  return jax.tree.map(lambda leaf: np.asarray(leaf) + 1, old)


def files(root):
  return {str(path.relative_to(root)): path.read_bytes()
          for path in root.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def pristine(old, new, tmp_path_factory):
  """Files of the exports of both models, written where nothing was."""
  root = tmp_path_factory.mktemp('pristine')
  for name, models in (('old', old), ('new', new)):
    assert export.export_diffusers(models, TOKENIZER, root / name) == root / name
  assert sorted(os.listdir(root)) == ['new', 'old']
  return root


@pytest.fixture
def out(pristine, tmp_path):
  """An export of `old`, alone in its parent."""
  return shutil.copytree(pristine / 'old', tmp_path / 'place' / 'out')


@pytest.fixture
def holds(out, pristine):
  """Whether `out` holds the export of 'old' or 'new', byte for byte, and nothing is beside it."""
  return lambda which: (
      files(out) == files(pristine / which) and os.listdir(out.parent) == ['out'])


def assert_loads(root, models):
  for part in ('transformer', 'vae', 'text'):
    jax.tree.map(np.testing.assert_array_equal,
                 load_network(root, getattr(SPEC, part), say=lambda line: None),
                 getattr(models, part))


@pytest.mark.parametrize('which', ['old', 'new'])
def test_an_export_is_its_files_and_no_others(which, pristine, request):
  assert set(files(pristine / which)) == FILES
  assert_loads(pristine / which, request.getfixturevalue(which))


def test_an_export_is_replaced_when_asked_only(out, holds, new):
  with pytest.raises(outputs.OutputExists, match='exists already; pass --overwrite'):
    export.export_diffusers(new, TOKENIZER, out)
  assert holds('old')
  export.export_diffusers(new, TOKENIZER, out, overwrite=True)
  assert holds('new')


def test_a_kill_in_the_middle_leaves_the_old_export(out, holds, pristine, old, new):
  code = ('import sys, time\n'
          'from pf_jax.testing import random_models, tiny_model_spec\n'
          'from pf_jax.weights import export\n'
          'def progress(name):\n  print(name, flush=True)\n  time.sleep(60)\n'
          'export.export_diffusers(random_models(tiny_model_spec(), 3), sys.argv[1], sys.argv[2],\n'
          '                        overwrite=True, progress=progress)\n')
  with subprocess.Popen([sys.executable, '-c', code, TOKENIZER, out], stdout=subprocess.PIPE,
                        text=True) as writer:
    first = 'transformer/diffusion_pytorch_model.safetensors'
    assert writer.stdout.readline().strip() == first
    writer.send_signal(signal.SIGKILL)
  assert (out.parent / f'.out.{writer.pid}.tmp' / first).is_file()
  assert files(out) == files(pristine / 'old')
  assert_loads(out, old)
  said = []
  export.export_diffusers(new, TOKENIZER, out, overwrite=True, say=said.append)
  assert holds('new')
  assert said == [f'{out}: taking over the lock of process {writer.pid}, which is gone.']


SHARD = 'transformer/diffusion_pytorch_model-00001-of-00002.safetensors'
STRANGE = {
    'shard': ([SHARD], SHARD),
    'index': (['vae/diffusion_pytorch_model.safetensors.index.json'],
              'vae/diffusion_pytorch_model.safetensors.index.json'),
    'config': (['text_encoder/generation_config.json'], 'text_encoder/generation_config.json'),
    'folder': (['unet/config.json'], 'unet'),
    'home': (['Desktop/a', 'Music/b', 'letter.txt', 'thesis.tex'], 'Desktop, Music, letter.txt'),
}


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('beside', ['nothing', 'an export'])
@pytest.mark.parametrize(('names', 'named'), STRANGE.values(), ids=STRANGE)
def test_what_is_strange_stays(names, named, beside, overwrite, new, out):
  if beside == 'nothing':
    shutil.rmtree(out)
  for name in names:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text('not ours')
  before = files(out)
  with pytest.raises(outputs.NotWritable) as error:
    export.export_diffusers(new, TOKENIZER, out, overwrite=overwrite)
  assert str(error.value).startswith(f'{out} holds {named}; wanted a new or empty directory, or')
  assert files(out) == before
  assert os.listdir(out.parent) == ['out']


def assert_refused(models, out, named):
  before = files(out)
  with pytest.raises(outputs.NotWritable) as error:
    export.export_diffusers(models, TOKENIZER, out, overwrite=True)
  assert str(error.value).startswith(f'{out} holds {named}; wanted ')
  assert files(out) == before


def test_a_model_that_only_looks_like_an_export_stays(new, out):
  """Files of our names alone do not make one: another pipeline, no index, no compressor, links."""
  index = json.loads((out / 'model_index.json').read_text())
  (out / 'model_index.json').write_text(json.dumps(index | {'_class_name': 'CogVideoXPipeline'}))
  assert_refused(new, out, 'compressor, model_index.json, scheduler')
  (out / 'model_index.json').write_text('[]')
  assert_refused(new, out, 'compressor, model_index.json, scheduler')
  (out / 'model_index.json').unlink()
  assert_refused(new, out, 'compressor, scheduler, text_encoder')
  (out / 'model_index.json').write_text(json.dumps(index))
  shutil.move(out / 'vae', out.parent / 'vae')
  (out / 'vae').symlink_to(out.parent / 'vae')
  assert_refused(new, out, 'vae')
  (out / 'vae').unlink()
  shutil.rmtree(out / 'compressor')
  assert_refused(new, out, 'model_index.json, scheduler, text_encoder')


def test_what_comes_while_an_export_is_written_stays(new, out):
  with pytest.raises(outputs.NotWritable, match=r'holds notes\.txt; wanted'):
    export.export_diffusers(new, TOKENIZER, out, overwrite=True,
                            progress=lambda name: (out / 'notes.txt').write_text('mine'))
  assert set(files(out)) == FILES | {'notes.txt'}
  assert os.listdir(out.parent) == ['out']


def test_an_export_of_a_version_that_locked_inside_is_replaced(new, out, holds):
  (out / outputs.LOCK_NAME).write_text('')
  export.export_diffusers(new, TOKENIZER, out, overwrite=True)
  assert holds('new')


def test_only_one_writes(out, holds, old, new):
  def second(name):
    with pytest.raises(outputs.DirectoryInUse, match=f'{out} is in use by process {os.getpid()}'):
      export.export_diffusers(old, TOKENIZER, out, overwrite=True)

  export.export_diffusers(new, TOKENIZER, out, overwrite=True, progress=second)
  assert holds('new')


# --- full disks ----------------------------------------------------------------------------------


def test_room_is_asked_for_before_anything_is_written(out, holds, new, monkeypatch):
  """Exactly for all values, the tokenizer, and 4 MiB of small files."""
  size = sum(map(len, files(out).values()))
  headers = sum(8 + int.from_bytes(data[:8], 'little')
                for name, data in files(out).items() if name.endswith('.safetensors'))
  configs = sum(len(data) for name, data in files(out).items()
                if name.endswith('.json') and name != 'tokenizer/tokenizer.json')
  needed = size - headers - configs + (4 << 20)
  assert headers + configs < 1 << 20
  usage = shutil.disk_usage('/')
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=needed - 1))
  with pytest.raises(WeightsError, match=r'out takes 0\.\d{3} GB, and its disk has 0\.\d{3} GB f'):
    export.export_diffusers(new, TOKENIZER, out, overwrite=True)
  assert holds('old')
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=needed))
  export.export_diffusers(new, TOKENIZER, out, overwrite=True)
  assert holds('new')


FULL = {'a network': (os, 'posix_fallocate', r'cannot write .*\.partial \(No space left'),
        'a small file': (os, 'replace', r'the disk of .* is full \(No space left'),
        'the tokenizer': (shutil, 'copyfile', r'the disk of .* is full \(No space left'),
        'the last sync': (outputs, '_sync', r'the disk of .* is full \(No space left')}


def full(*unused, **ignored):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(('module', 'name', 'message'), FULL.values(), ids=FULL)
def test_a_disk_that_fills_up_leaves_the_old_export(module, name, message, holds, out, new,
                                                    monkeypatch):
  monkeypatch.setattr(module, name, full)
  with pytest.raises(WeightsError, match=message):
    export.export_diffusers(new, TOKENIZER, out, overwrite=True)
  assert holds('old')


def test_a_disk_that_fills_up_leaves_nothing(new, tmp_path, monkeypatch):
  monkeypatch.setattr(export, '_write_compressor', full)
  with pytest.raises(WeightsError, match='is full'):
    export.export_diffusers(new, TOKENIZER, tmp_path / 'out')
  assert not os.listdir(tmp_path)


def test_a_missing_tokenizer_is_noticed_first(out, holds, new, monkeypatch):
  monkeypatch.setattr(export, 'SafetensorsWriter', None)  # whoever calls it fails otherwise
  with pytest.raises(FileNotFoundError, match='nowhere'):
    export.export_diffusers(new, pathlib.Path('nowhere'), out, overwrite=True)
  assert holds('old')
