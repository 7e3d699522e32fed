"""Safetensors: lazy values, hostile headers, and a writer that survives being killed."""

import mmap
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pf_jax.weights.safetensors_file import SafetensorsWriter, read_safetensors
from pf_jax.weights.tensors import WeightsError
from tests.weights import hostile, hostile_cases

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ('float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16', 'int8', 'uint64',
          'uint32', 'uint16', 'uint8', 'bool')
# What the writer is asked for below: a stack of two layers, a scalar, and nothing at all.
LAYOUT = {'stack': ((2, 3), 'bfloat16'), 'scalar': ((), np.float64), 'none': ((0, 4), np.int8)}
VALUES = {'stack': np.array([[1, 2, 3], [-0.0, np.inf, 1.0078125]], BF16),
          'scalar': np.array(-7.5), 'none': np.zeros((0, 4), np.int8)}
PIECES = [('scalar', None), ('stack', 1), ('none', None), ('stack', 0)]


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'model.safetensors'


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', DTYPES)
def test_values_are_those_of_the_library(path, name):
  values = np.arange(-3, 3).astype(np.dtype(name)).reshape(2, 3)
  scalar = np.array(values[0, 2])
  save_file({'a': values, 'b': scalar}, path, metadata={'source': 'tëst'})
  tensors, metadata = read_safetensors(path)
  assert metadata == {'source': 'tëst'}
  assert tensors['a'].nbytes == values.nbytes
  for key, wanted in (('a', values), ('b', scalar)):
    assert (tensors[key].shape, tensors[key].dtype) == (wanted.shape, wanted.dtype)
    assert hostile.same(tensors[key].read(), wanted)


def test_metadata_that_is_null_is_none(path):
  hostile.write_safetensors(path, {'__metadata__': None})
  assert read_safetensors(path) == ({}, {})


def test_a_changed_file_is_noticed(path):
  save_file({'a': np.zeros(3)}, path)
  [lazy] = read_safetensors(path)[0].values()
  save_file({'a': np.ones(3)}, path)
  with pytest.raises(WeightsError, match='has changed since it was opened'):
    lazy.read()


def test_streaming_keeps_little_in_memory(path):
  """Ten tensors of 8 MB, read one after the other; the process may grow by three of them."""
  save_file({str(i): np.full((1024, 2048), i, np.float32) for i in range(10)}, path)
  assert 4 < hostile.streaming_megabytes('safetensors', path) < 24


CASES = hostile_cases.safetensors_cases()


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
  """What one process with little memory makes of all hostile files."""
  folder = tmp_path_factory.mktemp('hostile')
  for name, case in CASES.items():
    case.write(folder / name)
  return hostile.observe('safetensors', [folder / name for name in CASES])


@pytest.mark.parametrize('name', CASES)
def test_hostile_file_is_refused(outcomes, name):
  outcome = outcomes[name]
  assert re.search(CASES[name].message, outcome.message), outcome.message
  assert outcome.message.isprintable()
  assert outcome.message.isascii()
  assert len(outcome.message) < 600
  assert outcome.megabytes < 100
  assert outcome.seconds < 5


# --- writing --------------------------------------------------------------------------------------


def write_pieces(writer, pieces):
  for name, layer in pieces:
    with writer.piece(name, layer) as array:
      array[...] = VALUES[name] if layer is None else VALUES[name][layer]


def test_file_byte_for_byte(path):
  writer = SafetensorsWriter(path, LAYOUT, {'source': 'xyz'})
  write_pieces(writer, PIECES)
  assert writer.finish() == path
  header = (b'{"__metadata__":{"source":"xyz"},'
            b'"scalar":{"dtype":"F64","shape":[],"data_offsets":[0,8]},'
            b'"stack":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]},'
            b'"none":{"dtype":"I8","shape":[0,4],"data_offsets":[20,20]}}')
  header += b' ' * (-len(header) % 8)
  assert path.read_bytes() == (struct.pack('<Q', len(header)) + header
                               + VALUES['scalar'].tobytes() + VALUES['stack'].tobytes())
  assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize('name', DTYPES)
def test_library_reads_what_was_written(path, name):
  values = np.arange(-3, 3).astype(np.dtype(name)).reshape(2, 3)
  writer = SafetensorsWriter(path, {'b': ((2, 3), name), 'a': ((3, 2), name), 'c': ((1,), 'bool')})
  with writer.piece('a') as array:
    array[...] = values.T
  for name, layer, value in (('b', 1, values[1]), ('b', 0, values[0]), ('c', 0, True)):
    with writer.piece(name, layer) as array:
      array[...] = value
  writer.finish()
  loaded, (tensors, _) = load_file(path), read_safetensors(path)
  for name, wanted in (('a', values.T), ('b', values), ('c', np.array([True]))):
    assert hostile.same(loaded[name], wanted)
    assert hostile.same(tensors[name].read(), wanted)


def test_what_is_not_finished_has_no_name(path):
  path.write_text('old')
  writer = SafetensorsWriter(path, LAYOUT)
  assert [writer.is_done(*piece) for piece in PIECES] == [False] * 4
  write_pieces(writer, PIECES[:3])
  assert [writer.is_done(*piece) for piece in PIECES] == [True, True, True, False]
  assert not writer.is_done('stack')
  with pytest.raises(WeightsError, match="lacks 1 of 3 tensors, first 'stack'"):
    writer.finish()
  assert path.read_text() == 'old'
  write_pieces(writer, PIECES[3:])
  assert writer.is_done('stack')
  writer.finish()
  assert set(load_file(path)) == set(LAYOUT)


def test_pieces_are_written_once_and_closed(path):
  writer = SafetensorsWriter(path, LAYOUT)
  with writer.piece('stack', 0) as array:
    array[...] = 1
  with pytest.raises(ValueError, match='read-only'):
    array[...] = 2
  assert array.tolist() == [1, 1, 1]
  for layer in (0, None):
    with pytest.raises(ValueError, match='is done'), writer.piece('stack', layer):
      pass
  for layer in (-1, 2):
    with pytest.raises(IndexError, match='has no layer'), writer.piece('stack', layer):
      pass
  with pytest.raises(IndexError, match='has no layer'), writer.piece('scalar', 0):
    pass
  with pytest.raises(KeyError, match='other'), writer.piece('other'):
    pass


def test_failed_body_leaves_the_piece_undone(path):
  writer = SafetensorsWriter(path, LAYOUT)
  with pytest.raises(RuntimeError, match='broken'), writer.piece('stack', 0) as array:
    array[0] = 5
    raise RuntimeError('broken')
  assert not writer.is_done('stack', 0)
  assert SafetensorsWriter(path, LAYOUT).resumed == 0


# Writes pieces in order and is killed within the last of them, half of it written.
KILLED = """
import os, signal, sys
from tests.weights.test_safetensors_file import LAYOUT, PIECES, VALUES, write_pieces
from pf_jax.weights.safetensors_file import SafetensorsWriter
writer = SafetensorsWriter(sys.argv[1], LAYOUT, {'source': 'x'})
count = int(sys.argv[2])
write_pieces(writer, PIECES[writer.resumed:count])
with writer.piece(*PIECES[count]) as array:
  array[:2] = 99
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_writer_resumes(path):
  """Killed within one piece after another; the file equals that of an undisturbed run."""
  whole = SafetensorsWriter(path, LAYOUT, {'source': 'x'})
  write_pieces(whole, PIECES)
  wanted = whole.finish().read_bytes()
  path.unlink()
  for count in (1, 3):  # within layers 1 and 0 of the stack
    result = subprocess.run([sys.executable, '-c', KILLED, path, str(count)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert not path.exists()
  writer = SafetensorsWriter(path, LAYOUT, {'source': 'x'})
  assert writer.resumed == 3
  assert [writer.is_done(*piece) for piece in PIECES] == [True, True, True, False]
  write_pieces(writer, PIECES[3:])
  assert writer.finish().read_bytes() == wanted


def test_values_are_on_disk_before_the_journal_says_so(path, monkeypatch):
  """Every step in order: values, then the journal; and a failed step stops the next."""
  writer = SafetensorsWriter(path, LAYOUT)
  steps = []

  class Mapping(mmap.mmap):
    def flush(self, *args):
      steps.append('values')
      if full:
        raise OSError(28, 'No space left on device')
      super().flush(*args)

  fsync = os.fsync
  monkeypatch.setattr(os, 'fsync', lambda descriptor: (steps.append(
      pathlib.Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix), fsync(descriptor)))
  monkeypatch.setattr(mmap, 'mmap', Mapping)
  full = True
  with pytest.raises(OSError, match='No space'):
    write_pieces(writer, [('stack', 0)])
  assert steps == ['values']
  full = False
  assert SafetensorsWriter(path, LAYOUT).resumed == 0
  steps.clear()
  write_pieces(writer, PIECES)
  assert steps == ['values', '.journal', 'values', '.journal', '.journal', 'values', '.journal']
  steps.clear()
  replace = os.replace
  monkeypatch.setattr(os, 'replace', lambda *paths: (steps.append('rename'), replace(*paths)))
  monkeypatch.setattr(pathlib.Path, 'unlink', lambda path: steps.append(f'remove {path.suffix}'))
  writer.finish()
  assert steps == ['.partial', 'rename', '', 'remove .journal']


@pytest.mark.parametrize('tail', [b'["stack"', b'["stack",0]', b'\0' * 8 + b'\n', b'{}\n',
                                  b'["other",0]\n', b'["stack",1.5]\n', b'[["stack"],0]\n'])
def test_torn_end_of_the_journal_is_ignored(path, tail):
  write_pieces(SafetensorsWriter(path, LAYOUT), PIECES[:2])
  journal = path.with_name(f'{path.name}.journal')
  good = journal.read_bytes()
  journal.write_bytes(good + tail)
  writer = SafetensorsWriter(path, LAYOUT)
  assert writer.resumed == 2
  assert journal.read_bytes() == good
  write_pieces(writer, PIECES[2:])
  writer.finish()
  assert hostile.same(load_file(path)['stack'], VALUES['stack'])


@pytest.mark.parametrize('lost', ['partial', 'journal'])
def test_half_a_pair_is_started_again(path, lost):
  write_pieces(SafetensorsWriter(path, LAYOUT), PIECES)
  path.with_name(f'{path.name}.{lost}').unlink()
  assert SafetensorsWriter(path, LAYOUT).resumed == 0


@pytest.mark.parametrize('other', [
    (LAYOUT | {'scalar': ((), np.int64)}, {}), (LAYOUT | {'more': ((1,), 'bool')}, {}),
    (LAYOUT, {'source': 'another'})], ids=['dtype', 'tensor', 'source'])
def test_another_layout_is_refused_or_dropped_on_demand(path, other):
  write_pieces(SafetensorsWriter(path, LAYOUT), PIECES[:2])
  before = {file: file.read_bytes() for file in path.parent.iterdir()}
  with pytest.raises(WeightsError, match='begun with other tensors or from another source'):
    SafetensorsWriter(path, *other)
  assert {file: file.read_bytes() for file in path.parent.iterdir()} == before
  assert SafetensorsWriter(path, *other, restart=True).resumed == 0
  assert SafetensorsWriter(path, *other).resumed == 0
  with pytest.raises(WeightsError, match='begun with other tensors'):
    SafetensorsWriter(path, LAYOUT)


def test_partial_of_another_size_is_refused(path):
  write_pieces(SafetensorsWriter(path, LAYOUT), PIECES[:2])
  os.truncate(path.with_name(f'{path.name}.partial'), 10)
  with pytest.raises(WeightsError, match='begun with other tensors'):
    SafetensorsWriter(path, LAYOUT)


def test_small_disk_is_reported_before_anything_is_written(path, monkeypatch):
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(10**9, 0, 10**6))
  with pytest.raises(WeightsError, match=r'takes 4\.00 GB, and .* has 0\.00 GB free'):
    SafetensorsWriter(path, {'a': ((10**9,), np.float32)})
  assert list(path.parent.iterdir()) == []


def test_disk_that_fills_up_meanwhile_leaves_nothing(path, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(os, 'posix_fallocate', full)
  with pytest.raises(WeightsError, match=r'cannot write .*No space left on device'):
    SafetensorsWriter(path, LAYOUT)
  assert list(path.parent.iterdir()) == []


def test_the_disk_is_really_reserved(path):
  writer = SafetensorsWriter(path, {'a': ((2**20,), np.float32)})
  assert writer.partial.stat().st_blocks * 512 >= 2**22


@pytest.mark.parametrize(('tensors', 'metadata', 'message'), [
    ({'a': ((1,), np.complex64)}, {}, 'cannot write .a. as complex64'),
    ({'a': ((1,), ml_dtypes.float8_e4m3fn)}, {}, 'cannot write .a. as float8_e4m3fn'),
    ({'a': ((-1,), np.float32)}, {}, r'of \(-1,\)'),
    ({'__metadata__': ((1,), np.float32)}, {}, 'another name than __metadata__'),
    ({}, {'a': 1}, 'is not text'),
])
def test_what_cannot_be_written_is_refused_at_once(path, tensors, metadata, message):
  with pytest.raises(WeightsError, match=message):
    SafetensorsWriter(path, tensors, metadata)
  assert list(path.parent.iterdir()) == []


def test_unusable_places(path):
  path.mkdir()
  with pytest.raises(WeightsError, match='is a directory'):
    SafetensorsWriter(path, LAYOUT)
  with pytest.raises(WeightsError, match=r'cannot write .*No such file or directory'):
    SafetensorsWriter(path / 'a' / 'b', LAYOUT)


def test_writing_keeps_little_in_memory(path):
  """Ten layers of 8 MB, written one after the other; the process may grow by three of them."""
  assert 4 < hostile.writing_megabytes(path, ((10, 1024, 2048), 'float32')) < 24
