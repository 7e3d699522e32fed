"""Files made to harm whoever reads them, and what must be said about each.

Apart from the tools that they are built with: the processes that are watched while they read these
files import those, and building bombs takes memory of its own.
"""

import functools
import json
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.weights.hostile import (
    ORDERED_DICT,
    Attributes,
    Call,
    Global,
    Persistent,
    Raw,
    parameter,
    pickled,
    tensor,
    write_legacy,
    write_safetensors,
    write_zip,
)

Writer = Callable[[pathlib.Path], object]


class Case(NamedTuple):
  """A file that must be refused."""

  write: Writer
  message: str  # pattern


# --- checkpoints of torch that must be refused ----------------------------------------------------


def executing(marker: pathlib.Path) -> dict[str, bytes]:
  """Pickles that leave a file behind if anything of them runs."""
  touch, create = f'touch {marker}', f'open({str(marker)!r}, "w").close()'
  posix_system = Call(Global('builtins.getattr'), (
      Call(Global('importlib.import_module'), ('posix',)), 'system'))
  argument = pickled(touch)[2:-1]  # without PROTO and STOP
  stack_global = (b'\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x8c' + bytes([len(touch)])
                  + touch.encode() + b'\x85R.')
  return {
      'os.system': pickled({'a': Call(Global('os.system'), (touch,))}),
      'eval': pickled(Call(Global('builtins.eval'), (create,))),
      'exec': pickled([Call(Global('builtins.exec'), (create,))]),
      'getattr chain': pickled(Call(posix_system, (touch,))),
      'stack global': stack_global,
      'INST': b'\x80\x02(' + argument + b'iposix\nsystem\n.',
      'OBJ': b'\x80\x02(cposix\nsystem\n' + argument + b'o.',
      'dropped': b'\x80\x02' + b'cposix\nsystem\n' + argument + b'\x85R0N.',
      'as a key': pickled(Raw(b'}' + b'cposix\nsystem\n' + argument + b'\x85RNs')),
      'nested pickle': pickled(Call(Global('pickle.loads'), (
          Call(Global('codecs.encode'), (
              pickled(Call(Global('os.system'), (touch,))).decode('latin-1'),
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
_SIX = np.arange(6, dtype=np.float32).tobytes()
_DEEP, _WIDE, _BOMB = 120_000, 1_100_000, 100 << 20
_VIEW = tensor('0', 6, (6,), (1,))
# A tuple of 900,000 integers of 255 bytes: their product would take hours.
_MANY = Raw(b'(\x8a\xff' + b'\x7f' * 255 + b'q\x05' + b'h\x05' * 900_000 + b't')
# Keys and values; the hashes of all keys are 0, so that a dict of them would take hours.
_ALIKE = b''.join(b'\x8a\x0a' + (n * (2**61 - 1)).to_bytes(10, 'little') + b'N'
                  for n in range(200_000))


def _laughs(depth: int = 0) -> bytes:
  """A list that holds a list twice, which holds a list twice...: a few bytes, 2^40 values."""
  if depth == 40:
    return b']q%c' % depth
  return b']q%c(' % depth + _laughs(depth + 1) + b'h%ce' % (depth + 1)


# name -> (pickle or tree, storages, message): what a zip checkpoint may hold.
_PICKLES = {
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
    'attributes of a tensor': (Attributes(_VIEW, {'shape': (10**9,)}), {'0': _SIX},
                               'attributes for something that is not an OrderedDict'),
    'attributes of a function': (Attributes(ORDERED_DICT, {'name': 'x'}), {},
                                 'attributes for something that is not an OrderedDict'),
    'call of a storage': (Call(Global('torch.FloatStorage'), (10**12,)), {}, 'not a function'),
    'call of a tensor': (Call(_VIEW, ()), {'0': _SIX}, 'not a function'),
    'arguments as list': (Call(ORDERED_DICT, []), {}, 'not a function'),
    'bare function': ([ORDERED_DICT], {}, 'holds a bare storage or function'),
    'bare storage': ([_VIEW.arguments[0]], {'0': _SIX}, 'holds a bare storage or function'),
    'module': (Persistent(('module', Global('torch.FloatStorage'), 'a', 'cpu', 1)), {},
               'not a storage'),
    'deep lists': (b'\x80\x02' + b']' * _DEEP + b'a' * (_DEEP - 1) + b'.', {},
                   'nested over 64 levels'),
    'deep tuples': (b'\x80\x02)' + b'\x85' * _DEEP + b'.', {}, 'nested over 64 levels'),
    'deep tuple as key': (b'\x80\x02})' + b'\x85' * _DEEP + b'Ns.', {}, 'neither a string nor'),
    'keys of one hash': (Raw(b'}(' + _ALIKE + b'u'), {}, 'nor a small integer'),
    'deep marks': (b'\x80\x02' + b'(' * _DEEP + b't' * _DEEP + b'.', {}, 'nested over 64 levels'),
    'deep ordered dicts': (b'\x80\x02ccollections\nOrderedDict\nq\x00)R'
                           + b'K\x00h\x00)R' * _DEEP + b's' * _DEEP + b'.', {},
                           'nested over 64 levels'),
    'list in itself': (b'\x80\x02]q\x00h\x00a.', {}, 'nested over 64 levels'),
    'dict in itself': (b'\x80\x02}q\x00K\x01h\x00s.', {}, 'nested over 64 levels'),
    'billion laughs': (b'\x80\x02' + _laughs() + b'.', {}, 'holds over 1000000 values'),
    'memo bomb': (b'\x80\x02Nr\xff\xff\xff\x7f.', {}, 'memo 2147483647 after 0 others'),
    'empty dicts': (b'\x80\x02(' + b'}' * _WIDE + b't.', {}, 'over 1000000 instructions'),
    'references': (b'\x80\x02(}q\x00' + b'h\x00' * _WIDE + b't.', {}, 'over 1000000 instructions'),
    'long pickle': (b'\x80\x02X' + (17 << 20).to_bytes(4, 'little') + b'x' * (17 << 20) + b'.', {},
                    'entry .*data.pkl.* has .* bytes, wanted at most 16777216'),
    'long string': (b'\x80\x02X\xff\xff\xff\xff.', {}, 'cannot be followed'),
    'very long string': (b'\x80\x02\x8d' + b'\xff' * 7 + b'\x7f.', {}, 'cannot be followed'),
    'long integer': (b'\x80\x02\x8b\xff\xff\xff\x7f.', {}, 'cannot be followed'),
    'cut': (pickled({'a': [1, 2]})[:-3], {}, 'cannot be followed'),
    'empty stack': (b'\x80\x02.', {}, 'cannot be followed'),
    'pop of nothing': (b'\x80\x02R.', {}, 'cannot be followed'),
    'mark of nothing': (b'\x80\x02t.', {}, 'cannot be followed'),
    'no such memo': (b'\x80\x02h\x05.', {}, 'cannot be followed'),
    'odd items': (b'\x80\x02}(K\x01u.', {}, 'cannot be followed'),
    'items of a tuple': (b'\x80\x02)K\x01K\x02s.', {}, 'not a dict'),
    'appended to a tuple': (b'\x80\x02)K\x01a.', {}, 'not a list'),
    'not text': (b'\x80\x02X\x01\x00\x00\x00\xff.', {}, 'cannot be followed'),
    'too many arguments': (Call(ORDERED_DICT, ([('a', 1)],)), {}, 'cannot be followed'),
    'parameter of a string': (parameter('x'), {}, 'a parameter without tensor'),
    'tensor of a string': (Call(_VIEW.function, ('x', *_VIEW.arguments[1:])), {},
                           'a tensor without storage'),
    'view too long': (tensor('0', 6, (7,), (1,)), {'0': _SIX}, 'reaches beyond its storage'),
    'view too wide': (tensor('0', 6, (2, 3), (4, 1)), {'0': _SIX}, 'reaches beyond its stor'),
    'offset too far': (tensor('0', 6, (1,), (1,), 6), {'0': _SIX}, 'reaches beyond its stor'),
    'offset of nothing': (tensor('0', 6, (0,), (1,), 7), {'0': _SIX}, 'reaches beyond'),
    'negative offset': (tensor('0', 6, (1,), (1,), -1), {'0': _SIX}, 'an offset that is none'),
    'fractional offset': (tensor('0', 6, (1,), (1,), 0.5), {'0': _SIX}, 'offset that is none'),
    'negative stride': (tensor('0', 6, (6,), (-1,), 5), {'0': _SIX}, 'whose stride is not'),
    'negative size': (tensor('0', 6, (-6, -1), (1, 1)), {'0': _SIX}, 'whose size is not'),
    'size of truths': (tensor('0', 6, (True,), (1,)), {'0': _SIX}, 'whose size is not'),
    'size as list': (tensor('0', 6, [6], (1,)), {'0': _SIX}, 'whose size is not'),
    'two ranks': (tensor('0', 6, (2, 3), (1,)), {'0': _SIX}, 'of two ranks'),
    'overflow': (tensor('0', 6, (2**62, 4), (1, 1)), {'0': _SIX}, 'reaches beyond'),
    'overflow of stride': (tensor('0', 6, (2, 3), (2**64 - 3, 1)), {'0': _SIX},
                           'reaches beyond'),
    'overflow beside zero': (tensor('0', 6, (0, 2**62, 2**62), (1, 1, 1)), {'0': _SIX},
                             'more than can be addressed'),
    'many sizes': (tensor('0', 6, (1,) * 40, (1,) * 40), {'0': _SIX}, 'at most 32 integers'),
    'many large sizes': (tensor('0', 6, _MANY, (1,)), {'0': _SIX}, 'at most 32 integers'),
    'repeated element': (tensor('0', 6, (2**50,), (0,)), {'0': _SIX}, 'repeats elements'),
    'conjugated': (tensor('0', 6, (6,), (1,), extra=({'neg': True},)), {'0': _SIX},
                   'conjugated or negated'),
    'storage too large': (tensor('0', 7, (6,), (1,)), {'0': _SIX}, 'has 24 bytes, wanted 7 x'),
    'storage too small': (tensor('0', 5, (5,), (1,)), {'0': _SIX}, 'has 24 bytes, wanted 5 x'),
    'storage of another dtype': (tensor('0', 6, (6,), (1,), kind='Double'), {'0': _SIX},
                                 'has 24 bytes, wanted 6 x 8'),
    'storage of two dtypes': ([_VIEW, tensor('0', 12, (12,), (1,), kind='Half')],
                              {'0': _SIX}, 'is 6 x float32 and also 12 x float16'),
    'negative count': (tensor('0', -6, (0,), (1,)), {'0': _SIX}, 'not a storage'),
    'missing storage': (_VIEW, {'1': _SIX}, 'lacks the entry data/0'),
    'storage elsewhere': (tensor('../data.pkl', 1, (1,), (1,)), {}, 'lacks the entry data/../data'),
}


def _spoil(path: pathlib.Path, change: Callable[[bytearray], bytes]) -> None:
  """Changes a good zip checkpoint's bytes; the function returns the new ones."""
  write_zip(path, {'a': _VIEW}, {'0': _SIX})
  path.write_bytes(change(bytearray(path.read_bytes())))


def _central(field: int, value: bytes, name: bytes = b'archive/data/0'):
  """Changes a field of an entry's record in the archive's directory."""
  def change(data):
    record = data.rindex(name) - 46
    assert data[record:record + 4] == b'PK\x01\x02'
    data[record + field:record + field + len(value)] = value
    return data
  return change


def _legacy(**changes: Any) -> Writer:
  def write(path: pathlib.Path) -> None:
    write_legacy(path, tensor('0', 6, (6,), (1,), legacy=True),
                 **{'storages': {'0': _SIX}} | changes)
  return write


def cut_torch(count: int, legacy: bool) -> Writer:
  """Writes the first bytes of a good checkpoint."""
  def write(path: pathlib.Path) -> None:
    _legacy()(path) if legacy else write_zip(path, {'a': _VIEW}, {'0': _SIX})
    path.write_bytes(path.read_bytes()[:count])
  return write


def _zip(**options: Any) -> Writer:
  return lambda path: write_zip(path, {'a': _VIEW}, {'0': _SIX}, **options)


def _wrapper(path: pathlib.Path) -> None:
  write_zip(path, {'a': _VIEW}, {'0': _SIX})
  data = path.read_bytes()
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('model/checkpoint.pth', data)


def _big_directory(path: pathlib.Path) -> None:
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a' * 40, '')
    archive.filelist *= 60_000


# name -> (writer of the file, message): what is wrong around the pickle.
_FILES = {
    'empty': (lambda path: path.write_bytes(b''), 'is empty; download it again'),
    'text': (lambda path: path.write_text('version https://git-lfs.github.com/spec/v1\n'),
             "begins with b'version https://', unlike anything of torch.save"),
    'directory': (lambda path: path.mkdir(), 'is not a file'),
    'pipe': (os.mkfifo, 'is not a file'),
    'safetensors': (lambda path: write_safetensors(path, {}), 'looks like a safetensors'),
    'other pickle': (lambda path: path.write_bytes(pickle.dumps([0], 2)), 'is a pickle, but not'),
    'bomb in the pickle': (
        lambda path: write_zip(path, bytes(_BOMB), compressed=['archive/data.pkl']),
        "entry 'archive/data.pkl' is compressed"),
    'bomb in a storage': (
        lambda path: write_zip(path, _VIEW, {'0': bytes(_BOMB)}, compressed=['archive/data/0']),
        "'archive/data/0' is compressed"),
    'wrapper': (_wrapper, 'with 0 entries [*]/data.pkl, wanted one; if it wraps'),
    'two roots': (_zip(extra=[('b/data.pkl', b'')]), 'with 2 entries'),
    'two storages of one name': (_zip(extra=[('archive/data/0', _SIX)]), 'two entries of one'),
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
    'cut zip, 20': (cut_torch(20, False), 'directory is missing or damaged'),
    'cut zip, 300': (cut_torch(300, False), 'directory is missing or damaged'),
    'cut zip, -1': (cut_torch(-1, False), 'directory is missing or damaged'),
    'cut legacy, 1': (cut_torch(1, True), 'cannot be followed'),
    'cut legacy, 100': (cut_torch(100, True), 'cannot be followed'),
    'cut legacy, -1': (cut_torch(-1, True), 'ends within storage'),
    'cut legacy, -24': (cut_torch(-24, True), 'ends within storage'),
    'cut legacy, -30': (cut_torch(-30, True), 'ends within storage'),
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
        lambda path: write_legacy(path, _VIEW, {'0': _SIX}), 'not a storage'),
    'legacy reference in zip': (lambda path: write_zip(
        path, tensor('0', 6, (6,), (1,), legacy=True), {'0': _SIX}), 'not a storage'),
    'legacy without end': (lambda path: path.write_bytes(b'\x80\x02' + b'N' * (18 << 20)),
                           'over 1000000 instructions'),
}


def torch_cases(marker: pathlib.Path) -> dict[str, Case]:
  """All of the above; what `executing` makes in both formats."""
  cases = {}
  for name, code in executing(marker).items():
    cases[name] = Case(functools.partial(write_zip, value=code), RUNS[name])
    cases[f'legacy {name}'] = Case(functools.partial(write_legacy, value=code), RUNS[name])
  for name, (value, storages, message) in _PICKLES.items():
    cases[name] = Case(functools.partial(write_zip, value=value, storages=storages), message)
  return cases | {name: Case(*row) for name, row in _FILES.items()}


# --- safetensors that must be refused -------------------------------------------------------------


def _entry(dtype='F32', shape=(1,), offsets=(0, 4)):
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': list(offsets)}


def _json(**entries) -> bytes:
  return json.dumps(entries).encode()


_TWICE = b'{"a":%s,"a":%s}' % (_json(**_entry()), _json(**_entry('I32')))
# name -> (header, data, size given for the header, message)
_HEADERS = {
    'huge header': ({}, b'', 2**60, f'a header of {2**60} bytes; wanted safetensors'),
    'large header': (b' ' * (5 << 20), b'', None, 'a header of 5242880 bytes; wanted'),
    'many tensors': (b'{%s}' % b','.join(b'"%d":%s' % (i, _json(**_entry('U8', (0,), (0, 0))))
                                         for i in range(62_000)), b'x', None, 'not a whole'),
    'overlapping': ({'a': _entry(), 'b': _entry()}, b'0123', None, 'not a whole safetensors file'),
    'negative shape': ({'a': _entry(shape=(-1,))}, b'0123', None, 'not a whole safetensors file'),
    'overflowing shape': ({'a': _entry(shape=(2**62, 2**62))}, b'0123', None, 'not a whole'),
    'overflow beside zero': ({'a': _entry(shape=(0, 2**62, 4), offsets=(0, 0))}, b'', None,
                             'more than can be addressed'),
    'many sizes': ({'a': _entry(shape=(1,) * 40)}, b'0123', None, 'at most 32 integers'),
    'fractional shape': ({'a': _entry(shape=(1.5,))}, b'0123', None, 'not a whole'),
    'truncated values': ({'a': _entry()}, b'012', None, 'not a whole safetensors file'),
    'truncated header': ({'a': _entry()}, b'', 300, 'not a whole safetensors file'),
    'unknown dtype': ({'a': _entry('F12')}, b'0123', None, 'not a whole safetensors file'),
    'not JSON': (b'hello', b'', None, 'not a whole safetensors file'),
    'not an object': (b'[1]', b'', None, 'not a whole safetensors file'),
    'not text': (b'\xff\xfe', b'', None, 'not a whole safetensors file'),
    'nested': (b'[' * 10**6, b'', None, 'not a whole safetensors file'),
    'nested beside': (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":' + b'[' * 10**6
                      + b']' * 10**6 + b'}}', b'0123', None, 'not a whole safetensors file'),
    'no header': (b'', b'', None, 'not a whole safetensors file'),
    'one name twice': (_TWICE, b'0123', None, 'has two entries of one name'),
    'one field twice': (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                        b'0123', None, 'not a whole safetensors file'),
    'gap': ({'a': _entry(offsets=(4, 8))}, b'01234567', None, 'not a whole safetensors file'),
    'more values': ({'a': _entry()}, b'01234567', None, 'not a whole safetensors file'),
    'offsets backwards': ({'a': _entry(offsets=(4, 0))}, b'0123', None, 'not a whole'),
    'offsets beyond': ({'a': _entry(offsets=(2**64 - 4, 2**64))}, b'0123', None, 'not a whole'),
    'size of another dtype': ({'a': _entry('F64')}, b'0123', None, 'not a whole'),
    'metadata of numbers': ({'__metadata__': {'a': 1}}, b'', None, 'not a whole'),
    'fp8': ({'a': _entry('F8_E4M3', (4,))}, b'0123', None,
            "tensor 'a' is F8_E4M3, wanted one of F64, .*; convert it, as by tensor.to"),
}
_STARTS = {
    'empty': (b'', 'is empty; download it again'),
    'short': (b'ab', 'not a whole safetensors file'),
    'torch': (b'PK\x03\x04' + b'\0' * 60, 'is a zip archive, .* give it the ending .pth'),
    'pointer': (b'version https://git-lfs.github.com/spec/v1\n',
                "begins with b'version ', a header of .* Check that the download"),
}


def _billion(path: pathlib.Path) -> None:
  """A header of the size that a billion tensors take; all but its beginning is a hole."""
  size = 100 * 10**9
  write_safetensors(path, b'{"0":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},', size=size)
  os.truncate(path, 8 + size)


def safetensors_cases() -> dict[str, Case]:
  """All of the above, and a directory and a pipe."""
  cases = {name: Case(functools.partial(write_safetensors, header=header, data=data, size=size),
                      message) for name, (header, data, size, message) in _HEADERS.items()}
  for name, (start, message) in _STARTS.items():
    cases[name] = Case(functools.partial(pathlib.Path.write_bytes, data=start), message)
  return cases | {
      'a billion tensors': Case(_billion, 'a header of 100000000000 bytes; wanted safetensors'),
      'directory': Case(pathlib.Path.mkdir, 'is not a file'),
      'pipe': Case(os.mkfifo, 'is not a file')}
