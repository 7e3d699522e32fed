"""torch.save's formats without torch: bit-exact values, and nothing that a file may do to a reader.

`tests/parity/test_torch_file_parity.py` repeats the good cases with files of the real torch.save.
"""

import collections
import os
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
from tests.weights import hostile
from tests.weights.hostile import Attributes, Call, Global, Persistent, Raw, parameter, tensor

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


def executing(marker: pathlib.Path) -> dict[str, bytes]:
  """Pickles that leave a file behind if anything of them runs."""
  touch, create = f'touch {marker}', f'open({str(marker)!r}, "w").close()'
  posix_system = Call(Global('builtins.getattr'), (
      Call(Global('importlib.import_module'), ('posix',)), 'system'))
  argument = hostile._Writer()(touch)
  stack_global = (b'\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x8c' + bytes([len(touch)])
                  + touch.encode() + b'\x85R.')
  return {
      'os.system': hostile.pickled({'a': Call(Global('os.system'), (touch,))}),
      'eval': hostile.pickled(Call(Global('builtins.eval'), (create,))),
      'exec': hostile.pickled([Call(Global('builtins.exec'), (create,))]),
      'getattr chain': hostile.pickled(Call(posix_system, (touch,))),
      'stack global': stack_global,
      'INST': b'\x80\x02(' + argument + b'iposix\nsystem\n.',
      'OBJ': b'\x80\x02(cposix\nsystem\n' + argument + b'o.',
      'dropped': b'\x80\x02' + b'cposix\nsystem\n' + argument + b'\x85R0N.',
      'as a key': hostile.pickled(Raw(b'}' + b'cposix\nsystem\n' + argument + b'\x85RNs')),
      'nested pickle': hostile.pickled(Call(Global('pickle.loads'), (
          Call(Global('codecs.encode'), (
              hostile.pickled(Call(Global('os.system'), (touch,))).decode('latin-1'),
              'latin-1')),))),
  }


RUNS = {
    'os.system': "names 'os.system', which no checkpoint of tensors needs; nothing of it was run",
    'eval': "names 'builtins.eval'", 'exec': "names 'builtins.exec'",
    'getattr chain': "names 'builtins.getattr'", 'stack global': "names 'posix.system'",
    'INST': 'has the instruction INST', 'OBJ': "names 'posix.system'",
    'dropped': "names 'posix.system'", 'as a key': "names 'posix.system'",
    'nested pickle': "names 'pickle.loads'",
}
DEEP, WIDE = 120_000, 1_100_000
VIEW = tensor('0', 6, (6,), (1,))
# A tuple of 900,000 integers of 255 bytes: their product would take hours.
MANY = Raw(b'(\x8a\xff' + b'\x7f' * 255 + b'q\x05' + b'h\x05' * 900_000 + b't')
# Keys and values; the hashes of all keys are 0, so that a dict of them would take hours.
ALIKE = b''.join(b'\x8a\x0a' + (n * (2**61 - 1)).to_bytes(10, 'little') + b'N'
                 for n in range(200_000))


def _laughs(depth: int = 0) -> bytes:
  """A list that holds a list twice, which holds a list twice...: a few bytes, 2^40 values."""
  if depth == 40:
    return b']q%c' % depth
  return b']q%c(' % depth + _laughs(depth + 1) + b'h%ce' % (depth + 1)


# name -> (pickle or tree, storages, message): what a zip checkpoint may hold.
PICKLES = {
    'attribute of a function': (
        b'\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.', {},
        "names 'torch._utils._rebuild_tensor_v2.__globals__'"),
    'name to fool a terminal': (
        b'\x80\x04\x8c\x06\xe2\x80\xae\xc3\xa9\n\x8c\x01b\x93.', {}, r"names '\\u202e\\xe9\\n\.b'"),
    'torch function': (Global('torch.storage._load_from_bytes'), {},
                       "names 'torch.storage._load_from_bytes'"),
    'fp8': (Global('torch._utils._rebuild_tensor_v3'), {}, 'holds fp8 or another dtype .* convert'),
    'quantised': (tensor('0', 6, (6,), (1,), kind='QInt8'), {}, "names 'torch.QInt8Storage'"),
    'EXT': (b'\x80\x02\x82\x01.', {}, 'cannot be followed|instruction EXT1'),
    'NEWOBJ': (Raw(b'ccollections\nOrderedDict\n)\x81'), {}, 'has the instruction NEWOBJ'),
    'text instruction': (Raw(b'I5\n'), {}, 'has the instruction INT'),
    'attributes of a tensor': (Attributes(VIEW, {'shape': (10**9,)}), {'0': SIX_BYTES},
                               'attributes for something that is not an OrderedDict'),
    'attributes of a function': (Attributes(hostile.ORDERED_DICT, {'name': 'x'}), {},
                                 'attributes for something that is not an OrderedDict'),
    'call of a storage': (Call(Global('torch.FloatStorage'), (10**12,)), {}, 'not a function'),
    'call of a tensor': (Call(VIEW, ()), {'0': SIX_BYTES}, 'not a function'),
    'arguments as list': (Call(hostile.ORDERED_DICT, []), {}, 'not a function'),
    'bare function': ([hostile.ORDERED_DICT], {}, 'holds a bare storage or function'),
    'bare storage': ([VIEW.arguments[0]], {'0': SIX_BYTES}, 'holds a bare storage or function'),
    'module': (Persistent(('module', Global('torch.FloatStorage'), 'a', 'cpu', 1)), {},
               'not a storage'),
    'deep lists': (b'\x80\x02' + b']' * DEEP + b'a' * (DEEP - 1) + b'.', {},
                   'nested over 64 levels'),
    'deep tuples': (b'\x80\x02)' + b'\x85' * DEEP + b'.', {}, 'nested over 64 levels'),
    'deep tuple as key': (b'\x80\x02})' + b'\x85' * DEEP + b'Ns.', {}, 'neither a string nor'),
    'keys of one hash': (Raw(b'}(' + ALIKE + b'u'), {}, 'nor a small integer'),
    'deep marks': (b'\x80\x02' + b'(' * DEEP + b't' * DEEP + b'.', {}, 'nested over 64 levels'),
    'deep ordered dicts': (b'\x80\x02ccollections\nOrderedDict\nq\x00)R'
                           + b'K\x00h\x00)R' * DEEP + b's' * DEEP + b'.', {},
                           'nested over 64 levels'),
    'list in itself': (b'\x80\x02]q\x00h\x00a.', {}, 'nested over 64 levels'),
    'dict in itself': (b'\x80\x02}q\x00K\x01h\x00s.', {}, 'nested over 64 levels'),
    'billion laughs': (b'\x80\x02' + _laughs() + b'.', {}, 'holds over 1000000 values'),
    'memo bomb': (b'\x80\x02Nr\xff\xff\xff\x7f.', {}, 'memo 2147483647 after 0 others'),
    'empty dicts': (b'\x80\x02(' + b'}' * WIDE + b't.', {}, 'over 1000000 instructions'),
    'references': (b'\x80\x02(}q\x00' + b'h\x00' * WIDE + b't.', {}, 'over 1000000 instructions'),
    'long pickle': (b'\x80\x02X' + (17 << 20).to_bytes(4, 'little') + b'x' * (17 << 20) + b'.', {},
                    'entry .*data.pkl.* has .* bytes, wanted at most 16777216'),
    'long string': (b'\x80\x02X\xff\xff\xff\xff.', {}, 'cannot be followed'),
    'very long string': (b'\x80\x02\x8d' + b'\xff' * 7 + b'\x7f.', {}, 'cannot be followed'),
    'long integer': (b'\x80\x02\x8b\xff\xff\xff\x7f.', {}, 'cannot be followed'),
    'cut': (hostile.pickled({'a': [1, 2]})[:-3], {}, 'cannot be followed'),
    'empty stack': (b'\x80\x02.', {}, 'cannot be followed'),
    'pop of nothing': (b'\x80\x02R.', {}, 'cannot be followed'),
    'mark of nothing': (b'\x80\x02t.', {}, 'cannot be followed'),
    'no such memo': (b'\x80\x02h\x05.', {}, 'cannot be followed'),
    'odd items': (b'\x80\x02}(K\x01u.', {}, 'cannot be followed'),
    'items of a tuple': (b'\x80\x02)K\x01K\x02s.', {}, 'not a dict'),
    'appended to a tuple': (b'\x80\x02)K\x01a.', {}, 'not a list'),
    'not text': (b'\x80\x02X\x01\x00\x00\x00\xff.', {}, 'cannot be followed'),
    'too many arguments': (Call(hostile.ORDERED_DICT, ([('a', 1)],)), {}, 'cannot be followed'),
    'parameter of a string': (parameter('x'), {}, 'a parameter without tensor'),
    'tensor of a string': (Call(VIEW.function, ('x', *VIEW.arguments[1:])), {},
                           'a tensor without storage'),
    'view too long': (tensor('0', 6, (7,), (1,)), {'0': SIX_BYTES}, 'reaches beyond its storage'),
    'view too wide': (tensor('0', 6, (2, 3), (4, 1)), {'0': SIX_BYTES}, 'reaches beyond its stor'),
    'offset too far': (tensor('0', 6, (1,), (1,), 6), {'0': SIX_BYTES}, 'reaches beyond its stor'),
    'offset of nothing': (tensor('0', 6, (0,), (1,), 7), {'0': SIX_BYTES}, 'reaches beyond'),
    'negative offset': (tensor('0', 6, (1,), (1,), -1), {'0': SIX_BYTES}, 'an offset that is none'),
    'fractional offset': (tensor('0', 6, (1,), (1,), 0.5), {'0': SIX_BYTES}, 'offset that is none'),
    'negative stride': (tensor('0', 6, (6,), (-1,), 5), {'0': SIX_BYTES}, 'whose stride is not'),
    'negative size': (tensor('0', 6, (-6, -1), (1, 1)), {'0': SIX_BYTES}, 'whose size is not'),
    'size of truths': (tensor('0', 6, (True,), (1,)), {'0': SIX_BYTES}, 'whose size is not'),
    'size as list': (tensor('0', 6, [6], (1,)), {'0': SIX_BYTES}, 'whose size is not'),
    'two ranks': (tensor('0', 6, (2, 3), (1,)), {'0': SIX_BYTES}, 'of two ranks'),
    'overflow': (tensor('0', 6, (2**62, 4), (1, 1)), {'0': SIX_BYTES}, 'reaches beyond'),
    'overflow of stride': (tensor('0', 6, (2, 3), (2**64 - 3, 1)), {'0': SIX_BYTES},
                           'reaches beyond'),
    'overflow beside zero': (tensor('0', 6, (0, 2**62, 2**62), (1, 1, 1)), {'0': SIX_BYTES},
                             'more than can be addressed'),
    'many sizes': (tensor('0', 6, (1,) * 40, (1,) * 40), {'0': SIX_BYTES}, 'at most 32 integers'),
    'many large sizes': (tensor('0', 6, MANY, (1,)), {'0': SIX_BYTES}, 'at most 32 integers'),
    'repeated element': (tensor('0', 6, (2**50,), (0,)), {'0': SIX_BYTES}, 'repeats elements'),
    'conjugated': (tensor('0', 6, (6,), (1,), extra=({'neg': True},)), {'0': SIX_BYTES},
                   'conjugated or negated'),
    'storage too large': (tensor('0', 7, (6,), (1,)), {'0': SIX_BYTES}, 'has 24 bytes, wanted 7 x'),
    'storage too small': (tensor('0', 5, (5,), (1,)), {'0': SIX_BYTES}, 'has 24 bytes, wanted 5 x'),
    'storage of another dtype': (tensor('0', 6, (6,), (1,), kind='Double'), {'0': SIX_BYTES},
                                 'has 24 bytes, wanted 6 x 8'),
    'storage of two dtypes': ([VIEW, tensor('0', 12, (12,), (1,), kind='Half')],
                              {'0': SIX_BYTES}, 'is 6 x float32 and also 12 x float16'),
    'negative count': (tensor('0', -6, (0,), (1,)), {'0': SIX_BYTES}, 'not a storage'),
    'missing storage': (VIEW, {'1': SIX_BYTES}, 'lacks the entry data/0'),
    'storage elsewhere': (tensor('../data.pkl', 1, (1,), (1,)), {}, 'lacks the entry data/../data'),
}


def _spoil(path: pathlib.Path, change) -> None:
  """Changes a good zip checkpoint's bytes; the function returns the new ones."""
  hostile.write_zip(path, {'a': VIEW}, {'0': SIX_BYTES})
  path.write_bytes(change(bytearray(path.read_bytes())))


def _central(field: int, value: bytes, name: bytes = b'archive/data/0'):
  """Changes a field of an entry's record in the archive's directory."""
  def change(data):
    record = data.rindex(name) - 46
    assert data[record:record + 4] == b'PK\x01\x02'
    data[record + field:record + field + len(value)] = value
    return data
  return change


def _legacy(**changes):
  def write(path):
    hostile.write_legacy(path, tensor('0', 6, (6,), (1,), legacy=True),
                         **{'storages': {'0': SIX_BYTES}} | changes)
  return write


def _cut(count: int, legacy: bool):
  def write(path):
    _legacy()(path) if legacy else hostile.write_zip(path, {'a': VIEW}, {'0': SIX_BYTES})
    path.write_bytes(path.read_bytes()[:count])
  return write


def _zip(**options):
  return lambda path: hostile.write_zip(path, {'a': VIEW}, {'0': SIX_BYTES}, **options)


def _wrapper(path):
  hostile.write_zip(path, {'a': VIEW}, {'0': SIX_BYTES})
  data = path.read_bytes()
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('model/checkpoint.pth', data)


def _big_directory(path):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a' * 40, '')
    archive.filelist *= 60_000


BIG = b'\0' * (100 << 20)
# name -> (writer of the file, message): what is wrong around the pickle.
FILES = {
    'empty': (lambda path: path.write_bytes(b''), 'is empty; download it again'),
    'text': (lambda path: path.write_text('version https://git-lfs.github.com/spec/v1\n'),
             "begins with b'version https://', unlike anything of torch.save"),
    'directory': (lambda path: path.mkdir(), 'is not a file'),
    'pipe': (os.mkfifo, 'is not a file'),
    'safetensors': (lambda path: hostile.write_safetensors(path, {}), 'looks like a safetensors'),
    'other pickle': (lambda path: path.write_bytes(pickle.dumps([0], 2)), 'is a pickle, but not'),
    'bomb in the pickle': (lambda path: hostile.write_zip(
        path, BIG, compressed=['archive/data.pkl']), "entry 'archive/data.pkl' is compressed"),
    'bomb in a storage': (lambda path: hostile.write_zip(
        path, VIEW, {'0': BIG}, compressed=['archive/data/0']), "'archive/data/0' is compressed"),
    'wrapper': (_wrapper, 'with 0 entries [*]/data.pkl, wanted one; if it wraps'),
    'two roots': (_zip(extra=[('b/data.pkl', b'')]), 'with 2 entries'),
    'two storages of one name': (_zip(extra=[('archive/data/0', SIX_BYTES)]), 'two entries of one'),
    'two pickles of one name': (_zip(extra=[('archive/data.pkl', b'N.')]), 'two entries of one'),
    'big endian': (_zip(byteorder='big'), "byte order b'big', wanted little"),
    'many entries': (_big_directory, 'archive directory of .* bytes, wanted at most'),
    'other local name': (lambda path: _spoil(path, lambda data: data.replace(
        b'archive/data/0', b'archive/data/1', 1)), "'archive/data/0' is another one in its own"),
    'compressed in its header': (lambda path: _spoil(path, lambda data: data[:8] + b'\x08\0'
                                                     + data[10:]), 'another one in its own header'),
    'encrypted': (lambda path: _spoil(path, _central(8, b'\x01\0')), 'is encrypted'),
    'entry too large': (lambda path: _spoil(path, _central(20, b'\xff\0\0\0\xff\0\0\0')),
                        'reaches into the next'),
    'entry of two sizes': (lambda path: _spoil(path, _central(20, b'\x10\0\0\0')),
                           'reaches into the next'),
    'entry in another': (lambda path: _spoil(path, _central(42, b'\0\0\0\0')),
                         'is another one in its own header|reaches into the next'),
    'entry beyond the end': (lambda path: _spoil(path, _central(42, b'\0\0\0\x7f')),
                             'missing or damaged|reaches into the next'),
    'cut zip, 20': (_cut(20, False), 'directory is missing or damaged'),
    'cut zip, 300': (_cut(300, False), 'directory is missing or damaged'),
    'cut zip, -1': (_cut(-1, False), 'directory is missing or damaged'),
    'cut legacy, 1': (_cut(1, True), 'cannot be followed'),
    'cut legacy, 100': (_cut(100, True), 'cannot be followed'),
    'cut legacy, -1': (_cut(-1, True), 'ends within storage'),
    'cut legacy, -24': (_cut(-24, True), 'ends within storage'),
    'cut legacy, -30': (_cut(-30, True), 'ends within storage'),
    'more than legacy': (_legacy(after=b'xy'), 'goes on for 2 bytes'),
    'legacy count': (_legacy(counts={'0': 2**62}), f'has {2**62} elements, wanted 6'),
    'legacy negative count': (_legacy(counts={'0': -1}), 'has -1 elements, wanted 6'),
    'legacy big endian': (_legacy(little_endian=False), 'wanted little'),
    'legacy version': (_legacy(version=1002), 'another version than 1001'),
    'legacy magic': (_legacy(magic=[[]]), 'is a pickle, but not'),
    'legacy keys missing': (_legacy(keys=[]), 'lists other storages'),
    'legacy keys twice': (_legacy(keys=['0', '0']), 'lists other storages'),
    'legacy keys of another kind': (_legacy(keys=[0]), 'lists other storages'),
    'legacy system': (_legacy(magic=Call(Global('os.system'), ('x',))), "names 'os.system'"),
    'zip reference in legacy': (
        lambda path: hostile.write_legacy(path, VIEW, {'0': SIX_BYTES}), 'not a storage'),
    'legacy reference in zip': (lambda path: hostile.write_zip(
        path, tensor('0', 6, (6,), (1,), legacy=True), {'0': SIX_BYTES}), 'not a storage'),
    'legacy without end': (lambda path: path.write_bytes(b'\x80\x02' + b'N' * (18 << 20)),
                           'over 1000000 instructions'),
}
MESSAGES = RUNS | {name: row[-1] for name, row in (PICKLES | FILES).items()}


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
  """What one process with little memory makes of all hostile files; (outcomes, marker)."""
  folder = tmp_path_factory.mktemp('hostile')
  marker = folder / 'marker'
  for name, code in executing(marker).items():
    hostile.write_zip(folder / name, code)
  for name, (value, storages, _) in PICKLES.items():
    hostile.write_zip(folder / name, value, storages)
  for name, (write, _) in FILES.items():
    write(folder / name)
  return hostile.observe('torch', [folder / name for name in MESSAGES]), marker


@pytest.mark.parametrize('name', MESSAGES)
def test_hostile_file_is_refused(outcomes, name):
  outcome = outcomes[0][name]
  assert re.search(MESSAGES[name], outcome.message), outcome.message
  assert outcome.message.isprintable()
  assert outcome.message.isascii()
  assert len(outcome.message) < 600
  assert outcome.seconds < 10


def test_nothing_ran_and_memory_stayed_bounded(outcomes):
  results, marker = outcomes
  assert len(results) == len(MESSAGES)
  assert not marker.exists()
  assert sum(outcome.megabytes for outcome in results.values()) < 256


@pytest.mark.parametrize('name', RUNS)
def test_hostile_pickles_do_run_elsewhere(tmp_path, name):
  """Otherwise it would prove nothing that they did not run above."""
  marker = tmp_path / 'marker'
  code = executing(marker)[name]
  subprocess.run([sys.executable, '-c', 'import pickle, sys; pickle.load(sys.stdin.buffer)'],
                 input=code, capture_output=True, check=False)
  assert marker.exists()


def test_missing_file(tmp_path):
  with pytest.raises(WeightsError, match=r'cannot read .*nowhere.pth .No such file'):
    read_torch(tmp_path / 'nowhere.pth')


@pytest.mark.parametrize('legacy', [False, True])
def test_any_damage_is_noticed_or_harmless(path, legacy):
  """Random bytes changed anywhere: a tree of lazy tensors that can be read, or one clear error."""
  _cut(10**9, legacy)(path)
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
