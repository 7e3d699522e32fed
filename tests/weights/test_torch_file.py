"""torch.save's formats without torch: bit-exact values, and nothing that a file may do to a reader.

`tests/parity/test_torch_file_parity.py` repeats the good cases with files of the real torch.save.
"""

import collections
import pathlib
import pickle
import random
import re
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from pf_jax.weights.tensors import LazyTensor, WeightsError
from pf_jax.weights.torch_file import read_torch
from tests.weights import hostile, hostile_cases
from tests.weights.hostile import Attributes, Call, Global, parameter, tensor

KINDS = {'Half': np.float16, 'BFloat16': ml_dtypes.bfloat16, 'Float': np.float32,
         'Double': np.float64, 'Char': np.int8, 'Short': np.int16, 'Int': np.int32,
         'Long': np.int64, 'Byte': np.uint8, 'Bool': np.bool_}
SIX = np.arange(6, dtype=np.float32)
SIX_BYTES = SIX.tobytes()


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'checkpoint.pth'


# --- good files -----------------------------------------------------------------------------------


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_every_dtype_is_bit_exact(path, kind, legacy):
  values = np.array([0, 1, 1, 0, 1], np.uint8).astype(KINDS[kind])
  if values.dtype.kind == 'f' or kind == 'BFloat16':
    values[:3] = [np.nan, -0.0, 1.0078125]
  data, whole = values.tobytes(), tensor('0', 5, (5,), (1,), 0, kind, legacy=legacy)
  if legacy:
    hostile.write_legacy(path, whole, {'0': data}, counts={'0': 5})
  else:
    hostile.write_zip(path, whole, {'0': data})
  lazy = read_torch(path)
  assert (lazy.shape, lazy.dtype, lazy.nbytes) == ((5,), values.dtype, values.nbytes)
  assert hostile.same(lazy.read(), values)


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize(('size', 'stride', 'offset', 'wanted'), [
    ((2, 3), (3, 1), 0, [[0, 1, 2], [3, 4, 5]]),
    ((3, 2), (1, 3), 0, [[0, 3], [1, 4], [2, 5]]),  # transposed
    ((2, 2), (3, 1), 1, [[1, 2], [4, 5]]),  # columns of a matrix
    ((2, 1, 2), (2, 2**70, 1), 2, [[[2, 3]], [[4, 5]]]),  # the stride of one element means nothing
    ((), (), 5, 5),
    ((1,), (1,), 5, [5]),
    ((0, 3), (3, 1), 6, np.zeros((0, 3))),
], ids=str)
def test_views_share_a_storage(path, legacy, size, stride, offset, wanted):
  tree = {'view': tensor('0', 6, size, stride, offset, legacy=legacy),
          'all': tensor('0', 6, (6,), (1,), legacy=legacy)}
  (hostile.write_legacy if legacy else hostile.write_zip)(path, tree, {'0': SIX_BYTES})
  read = read_torch(path)
  assert hostile.same(read['view'].read(), np.array(wanted, np.float32))
  assert hostile.same(read['all'].read(), SIX)


def test_tree_keeps_its_containers_and_scalars(path):
  weights = collections.OrderedDict(b=tensor('0', 6, (6,), (1,)),
                                    a=parameter(tensor('1', 1, (), (), kind='Long')))
  hostile.write_zip(path, {
      'weights': Attributes(weights, {'_metadata': collections.OrderedDict(x={'version': 1})}),
      'step': 70_000, 'big': -2**70, 'loss': 0.5, 'done': True, 'none': None, 'text': 'ümläut',
      'list': [1, (2, [3]), []], 3: 'three', 'size': Call(Global('torch.Size'), ((2, 3),)),
      'dtype': Global('torch.bfloat16'),
  }, {'0': SIX_BYTES, '1': np.int64(-7).tobytes()})
  tree = read_torch(path)
  weights = tree.pop('weights')
  assert type(weights) is collections.OrderedDict
  assert list(weights) == ['b', 'a']  # not sorted
  assert not hasattr(weights, '_metadata')
  assert weights['a'].read() == -7
  assert weights['b'].read().tolist() == SIX.tolist()
  assert tree == {'step': 70_000, 'big': -2**70, 'loss': 0.5, 'done': True, 'none': None,
                  'text': 'ümläut', 'list': [1, (2, [3]), []], 3: 'three', 'size': (2, 3),
                  'dtype': ml_dtypes.bfloat16}
  assert type(tree['done']) is bool


def test_two_legacy_storages_are_told_apart(path):
  tree = [tensor('b', 2, (2,), (1,), legacy=True),
          tensor('a', 3, (3,), (1,), kind='Half', legacy=True)]
  half = np.array([1, 2, 3], np.float16)
  hostile.write_legacy(path, tree, {'a': half.tobytes(), 'b': SIX_BYTES[8:16]},
                       counts={'a': 3})
  assert [lazy.read().tolist() for lazy in read_torch(path)] == [[2, 3], [1, 2, 3]]


def test_storage_behind_four_gigabytes(path):
  """As in an 11 GB checkpoint, here with a hole in the file."""
  code = hostile.pickled(tensor('0', 6, (6,), (1,)))
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('m/data.pkl', code)
    archive.fp.seek(5 * 2**30)
    archive.start_dir = 5 * 2**30
    archive.writestr('m/data/0', SIX_BYTES)
  assert path.stat().st_size > 5 * 2**30
  assert hostile.same(read_torch(path).read(), SIX)


def test_a_lazy_tensor_holds_no_data_and_notices_a_changed_file(path):
  hostile.write_zip(path, tensor('0', 6, (6,), (1,)), {'0': SIX_BYTES})
  lazy = read_torch(path)
  first = lazy.read()
  assert not first.flags.writeable
  with pytest.raises(ValueError, match='read-only'):
    first[0] = 1
  assert lazy.read() is not first
  assert len(pickle.dumps(lazy)) < 1000
  hostile.write_zip(path, tensor('0', 6, (6,), (1,)), {'0': SIX_BYTES[::-1]})
  with pytest.raises(WeightsError, match='has changed since it was opened'):
    lazy.read()
  path.unlink()
  with pytest.raises(WeightsError, match='has changed since it was opened'):
    lazy.read()


def test_streaming_keeps_little_in_memory(path):
  """Ten tensors of 8 MB, read one after the other; the process may grow by three of them."""
  count = 2 * 2**20
  tree = [tensor(str(i), count, (1024, 2048), (1, 1024)) for i in range(10)]
  hostile.write_zip(path, tree, {str(i): bytes(4 * count) for i in range(10)})
  assert 4 < hostile.streaming_megabytes('torch', path) < 24


# --- hostile files --------------------------------------------------------------------------------


CASES = hostile_cases.torch_cases(pathlib.Path('marker'))


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
  """What one process with little memory makes of all hostile files; (outcomes, marker)."""
  folder = tmp_path_factory.mktemp('hostile')
  marker = folder / 'marker'
  for name, case in hostile_cases.torch_cases(marker).items():
    case.write(folder / name)
  return hostile.observe('torch', [folder / name for name in CASES]), marker


@pytest.mark.parametrize('name', CASES)
def test_hostile_file_is_refused(outcomes, name):
  outcome = outcomes[0][name]
  assert re.search(CASES[name].message, outcome.message), outcome.message
  assert outcome.message.isprintable()
  assert outcome.message.isascii()
  assert len(outcome.message) < 600
  assert outcome.seconds < 10


def test_nothing_ran_and_memory_stayed_bounded(outcomes):
  results, marker = outcomes
  assert len(results) == len(CASES)
  assert not marker.exists()
  assert sum(outcome.megabytes for outcome in results.values()) < 256


@pytest.mark.parametrize('name', hostile_cases.RUNS)
def test_hostile_pickles_do_run_elsewhere(tmp_path, name):
  """Otherwise it would prove nothing that they did not run above."""
  marker = tmp_path / 'marker'
  code = hostile_cases.executing(marker)[name]
  subprocess.run([sys.executable, '-c', 'import pickle, sys; pickle.load(sys.stdin.buffer)'],
                 input=code, capture_output=True, check=False)
  assert marker.exists()


def test_missing_file(tmp_path):
  with pytest.raises(WeightsError, match=r'cannot read .*nowhere.pth .No such file'):
    read_torch(tmp_path / 'nowhere.pth')


@pytest.mark.parametrize('legacy', [False, True])
def test_any_damage_is_noticed_or_harmless(path, legacy):
  """Random bytes changed anywhere: a tree of lazy tensors that can be read, or one clear error."""
  hostile_cases.cut_torch(10**9, legacy)(path)
  good, rng, refused = path.read_bytes(), random.Random(0), 0
  for _ in range(800):
    data = bytearray(good)
    for _ in range(rng.choice([1, 1, 3])):
      data[rng.randrange(len(data))] = rng.choice([0, 1, 40, 46, 81, 82, 255, rng.randrange(256)])
    path.write_bytes(data)
    try:
      tree = read_torch(path)
    except WeightsError:
      refused += 1
      continue
    for leaf in [tree] if legacy else tree.values() if isinstance(tree, dict) else []:
      if isinstance(leaf, LazyTensor):
        assert leaf.read().shape == leaf.shape
  assert 200 < refused < 800
