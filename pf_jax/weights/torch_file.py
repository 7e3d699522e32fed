"""Reads what torch.save wrote, without torch and without running anything of the file.

Two formats, told apart by their first bytes:

  zip (since 1.6)  entries <root>/data.pkl (a pickle), <root>/data/<key> (one storage each, raw,
                   stored without compression) and <root>/byteorder
  legacy           five pickles in a row (magic number, version, system, the object, storage keys),
                   then for each key an int64 number of elements and the raw values

A pickle is a program for a small stack machine that may name any function of any module and call
it. The interpreter here knows the instructions and the few names that checkpoints of tensors need,
imports nothing, and refuses the rest. All that a file claims is checked before any tensor of it is
handed out: entries lie apart and inside the file, a storage is as large as it says, a tensor lies
inside its storage. Memory and time stay bounded for any file (see the limits below).
"""

import collections
import dataclasses
import functools
import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import IO, Any

import ml_dtypes
import numpy as np

from pf_jax.weights.tensors import (
    MAX_DIMS,
    LazyTensor,
    OpenedFile,
    WeightsError,
    brief,
    is_count,
    is_shape,
    reason,
)

# 3,300 tensors, as of a training checkpoint of Wan2.1 14B (generator, its average, critic), take
# 0.4 MB of pickle, 106,000 instructions and three levels.
MAX_PICKLE_BYTES = 16 * 2**20
MAX_INSTRUCTIONS = 1_000_000
MAX_VALUES = 1_000_000  # counted as often as they are referred to
MAX_DEPTH = 64
MAX_DIRECTORY_BYTES = 4 * 2**20

_ZIP_MAGIC, _PICKLE_MAGIC = b'PK\x03\x04', b'\x80'
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

_DTYPES = {name: np.dtype(name) for name in
           ('float16', 'float32', 'float64', 'int8', 'int16', 'int32', 'int64', 'uint8', 'bool')}
_DTYPES['bfloat16'] = np.dtype(ml_dtypes.bfloat16)
_TORCH_DTYPES = {f'torch.{name}': dtype for name, dtype in _DTYPES.items()}
_STORAGES = {f'torch.{prefix}Storage': _DTYPES[name] for prefix, name in (
    ('Half', 'float16'), ('BFloat16', 'bfloat16'), ('Float', 'float32'), ('Double', 'float64'),
    ('Char', 'int8'), ('Short', 'int16'), ('Int', 'int32'), ('Long', 'int64'), ('Byte', 'uint8'),
    ('Bool', 'bool'))}
_UNTYPED = ('torch._utils._rebuild_tensor_v3', 'torch.storage.UntypedStorage')

_DAMAGED = 'the file is damaged; download it again.'
_SAVE_AGAIN = ('If you trust the file, load it in torch and save its tensors alone: '
               'torch.save(model.state_dict(), path).')


def read_torch(path: str | os.PathLike) -> Any:
  """Reads a checkpoint (.pt, .pth) of torch.save.

  Args:
    path: the file, which must not change while its tensors are in use.

  Returns:
    What was saved: dicts, OrderedDicts, lists, tuples, numbers, strings, None; torch's dtypes as
    NumPy's, its sizes as tuples; each tensor and parameter as a `LazyTensor`. Attributes of an
    OrderedDict (a state dict's `_metadata`) are left out.

  Raises:
    WeightsError: not a checkpoint, damaged, or holding anything else; one line.
  """
  file = OpenedFile.of(path)
  try:
    head = file.map(0, min(16, file.size)).tobytes()
    if head.startswith(_ZIP_MAGIC):
      return _read_zip(file)
    if head.startswith(_PICKLE_MAGIC):
      return _read_legacy(file)
    if head[8:9] == b'{':
      raise WeightsError('looks like a safetensors file; give it the ending .safetensors.')
    raise WeightsError(f'begins with {brief(head)}, unlike anything of torch.save; check that the '
                       'download is the checkpoint itself.')
  except WeightsError as error:
    raise WeightsError(f'{file.path}: {error}') from error


# --- storages and tensors -------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Storage:
  """A flat array in the file, which tensors are views of; where it lies may be found out later."""

  file: OpenedFile
  dtype: np.dtype
  count: int
  offset: int = 0


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any,
            metadata: Any = None) -> LazyTensor:
  """Stands for torch._utils._rebuild_tensor_v2; offset and stride count elements."""
  if not isinstance(storage, _Storage):
    raise WeightsError(f'a tensor without storage; {_DAMAGED}')
  size, stride = _counts(size, 'size'), _counts(stride, 'stride')
  if not is_count(offset) or len(size) != len(stride):
    raise WeightsError(f'a tensor of size {brief(size)} and stride {brief(stride)}, of two ranks '
                       f'or at an offset that is none; {_DAMAGED}')
  if metadata:
    raise WeightsError('a tensor that is stored conjugated or negated; resolve_conj() and '
                       'resolve_neg() it in torch and save again.')
  count = math.prod(size)
  extent = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
  if offset + extent > storage.count:
    raise WeightsError(f'a tensor of size {brief(size)} and stride {brief(stride)} reaches beyond '
                       f'its storage of {storage.count} elements; {_DAMAGED}')
  if count > storage.count:
    raise WeightsError(f'a tensor of size {brief(size)} repeats elements of its storage, which has '
                       f'{storage.count}; make it contiguous() in torch and save again.')
  read = functools.partial(_read_tensor, storage, offset, extent, size, stride)
  return LazyTensor(size, storage.dtype, read)


def _counts(value: Any, what: str) -> tuple[int, ...]:
  if not is_shape(value):
    raise WeightsError(f'a tensor whose {what} is not a tuple of at most {MAX_DIMS} integers >= 0; '
                       f'{_DAMAGED}')
  return value


def _read_tensor(storage: _Storage, offset: int, extent: int, size: tuple[int, ...],
                 stride: tuple[int, ...]) -> np.ndarray:
  dtype = storage.dtype
  if not extent:
    return np.empty(size, dtype)
  data = storage.file.map(storage.offset + offset * dtype.itemsize, extent * dtype.itemsize)
  # The stride of a single element means nothing and may be anything.
  strides = [step * dtype.itemsize if n > 1 else 0 for n, step in zip(size, stride, strict=True)]
  return np.ndarray(size, dtype, data, strides=strides)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> LazyTensor:
  """Stands for torch._utils._rebuild_parameter."""
  if not isinstance(data, LazyTensor):
    raise WeightsError(f'a parameter without tensor; {_DAMAGED}')
  return data


def _size(values: Any) -> tuple[int, ...]:
  """Stands for torch.Size."""
  return _counts(values, 'size')


def _ordered_dict() -> collections.OrderedDict:
  """Stands for collections.OrderedDict; items follow as instructions."""
  return collections.OrderedDict()


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    'collections.OrderedDict': _ordered_dict,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_parameter': _parameter,
    'torch.Size': _size,
}


# --- pickles --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Global:
  """A name that a pickle gave, of a function or a kind of storage; it is never imported."""

  name: str


def _find(name: str) -> Any:
  """What a name in a pickle stands for."""
  if name in _FUNCTIONS or name in _STORAGES:
    return _Global(name)
  if name in _TORCH_DTYPES:
    return _TORCH_DTYPES[name]
  if name in _UNTYPED:
    raise WeightsError('holds fp8 or another dtype without a typed storage of its own, which is '
                       'not supported; convert it in torch, tensor.to(torch.bfloat16), and save '
                       'again.')
  raise WeightsError(f'its pickle names {brief(name)}, which no checkpoint of tensors needs; '
                     f'nothing of it was run. {_SAVE_AGAIN}')


_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_LITERALS = frozenset(('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE',
                       'SHORT_BINUNICODE'))
_CONTAINERS: dict[str, Callable[[], Any]] = {'EMPTY_DICT': dict, 'EMPTY_LIST': list,
                                             'EMPTY_TUPLE': tuple}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_FRAMING = frozenset(('PROTO', 'FRAME'))


class _Unpickler:
  """Interprets the instructions that torch.save writes, and no others.

  Attributes:
    storages: those referred to so far, by key.
  """

  def __init__(self, new_storage: Callable[[str, np.dtype, int], _Storage], extras: int):
    """Sets up a machine for all pickles of one file.

    Args:
      new_storage: makes the storage of a key, dtype and number of elements.
      extras: how many values follow these in a reference to a storage; they must be None.
    """
    self.storages: dict[str, _Storage] = {}
    self._new_storage, self._extras = new_storage, extras
    self._left = MAX_INSTRUCTIONS
    self._stack: list[Any] = []
    self._below: list[list[Any]] = []  # the stacks under each mark
    self._memo: dict[int, Any] = {}

  def load(self, stream: IO[bytes]) -> Any:
    """Runs the next pickle of a stream and leaves the stream behind it."""
    self._stack, self._below, self._memo = [], [], {}
    try:
      for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == 'STOP':
          break
        self._left -= 1
        if self._left < 0:
          raise WeightsError(f'its pickle has over {MAX_INSTRUCTIONS} instructions. {_SAVE_AGAIN}')
        self._step(opcode.name, argument)
      [value] = self._stack
    except WeightsError:
      raise
    except (LookupError, TypeError, ValueError, struct.error) as error:
      raise WeightsError(f'its pickle cannot be followed ({reason(error)}); {_DAMAGED}') from error
    _check_tree(value)
    return value

  def _step(self, name: str, argument: Any) -> None:
    if name in _LITERALS:
      self._stack.append(argument)
    elif name in _CONSTANTS:
      self._stack.append(_CONSTANTS[name])
    elif name in _CONTAINERS:
      self._stack.append(_CONTAINERS[name]())
    elif name in _TUPLES:
      self._stack.append(tuple(reversed([self._stack.pop() for _ in range(_TUPLES[name])])))
    elif name in _ACTIONS:
      _ACTIONS[name](self, argument)
    elif name not in _FRAMING:
      raise WeightsError(f'its pickle has the instruction {name}, which no checkpoint of tensors '
                         f'needs; nothing of it was run. {_SAVE_AGAIN}')

  def _mark(self, _: Any) -> None:
    self._below.append(self._stack)
    self._stack = []

  def _pop_mark(self) -> list[Any]:
    items, self._stack = self._stack, self._below.pop()
    return items

  def _tuple(self, _: Any) -> None:
    items = self._pop_mark()
    self._stack.append(tuple(items))

  def _append(self, _: Any) -> None:
    self._extend([self._stack.pop()])

  def _appends(self, _: Any) -> None:
    self._extend(self._pop_mark())

  def _extend(self, items: list[Any]) -> None:
    if type(self._stack[-1]) is not list:
      raise TypeError('items for something that is not a list')
    self._stack[-1].extend(items)

  def _set_item(self, _: Any) -> None:
    value, key = self._stack.pop(), self._stack.pop()
    self._update([key, value])

  def _set_items(self, _: Any) -> None:
    self._update(self._pop_mark())

  def _update(self, items: list[Any]) -> None:
    target = self._stack[-1]
    if type(target) not in (dict, collections.OrderedDict):
      raise TypeError('items for something that is not a dict')
    for key, value in zip(items[::2], items[1::2], strict=True):
      # Nothing else: to hash deeply nested tuples would overflow the interpreter's own stack, and
      # large integers can be chosen to have one hash, which makes a dict of them take hours.
      if type(key) is not str and not (type(key) is int and abs(key) < 2**31):
        raise TypeError('a key that is neither a string nor a small integer')
      target[key] = value

  def _put(self, index: Any) -> None:
    # MEMOIZE has no argument, and picklers count up: a gap is an attempt at a huge table.
    index = len(self._memo) if index is None else index
    if not 0 <= index <= len(self._memo):
      raise ValueError(f'memo {index} after {len(self._memo)} others')
    self._memo[index] = self._stack[-1]

  def _get(self, index: Any) -> None:
    self._stack.append(self._memo[index])

  def _global(self, name: Any) -> None:
    self._stack.append(_find(name.replace(' ', '.', 1)))

  def _stack_global(self, _: Any) -> None:
    name, module = self._stack.pop(), self._stack.pop()
    if type(name) is not str or type(module) is not str:
      raise TypeError('a global without name')
    self._stack.append(_find(f'{module}.{name}'))

  def _reduce(self, _: Any) -> None:
    arguments, function = self._stack.pop(), self._stack.pop()
    if (type(function) is not _Global or function.name not in _FUNCTIONS
        or type(arguments) is not tuple):
      raise TypeError('a call of something that is not a function')
    self._stack.append(_FUNCTIONS[function.name](*arguments))

  def _build(self, _: Any) -> None:
    """Attributes: those of a state dict are dropped, nothing else may have any."""
    self._stack.pop()
    if type(self._stack[-1]) is not collections.OrderedDict:
      raise TypeError('attributes for something that is not an OrderedDict')

  def _persistent(self, _: Any) -> None:
    kind, storage, key, _device, count, *extras = self._stack.pop()
    if (kind != 'storage' or type(storage) is not _Global or storage.name not in _STORAGES
        or type(key) is not str or not is_count(count) or extras != [None] * self._extras):
      raise TypeError('a reference to something that is not a storage')
    dtype = _STORAGES[storage.name]
    known = self.storages.get(key)
    if known is None:
      known = self.storages[key] = self._new_storage(key, dtype, count)
    if (known.dtype, known.count) != (dtype, count):
      raise WeightsError(f'storage {brief(key)} is {known.count} x {known.dtype} and also {count} '
                         f'x {dtype}; {_DAMAGED}')
    self._stack.append(known)


_ACTIONS: dict[str, Callable[[_Unpickler, Any], None]] = {
    'MARK': _Unpickler._mark, 'TUPLE': _Unpickler._tuple,
    'APPEND': _Unpickler._append, 'APPENDS': _Unpickler._appends,
    'SETITEM': _Unpickler._set_item, 'SETITEMS': _Unpickler._set_items,
    'BINPUT': _Unpickler._put, 'LONG_BINPUT': _Unpickler._put, 'MEMOIZE': _Unpickler._put,
    'BINGET': _Unpickler._get, 'LONG_BINGET': _Unpickler._get,
    'GLOBAL': _Unpickler._global, 'STACK_GLOBAL': _Unpickler._stack_global,
    'REDUCE': _Unpickler._reduce, 'BUILD': _Unpickler._build,
    'BINPERSID': _Unpickler._persistent,
}


def _check_tree(value: Any) -> None:
  """Refuses what a caller could not safely walk over: too deep, endless or swelling."""
  waiting, seen = [(value, 0)], 1
  while waiting:
    item, depth = waiting.pop()
    children: Sequence[Any] = ()
    if isinstance(item, dict):
      children = list(item.values())
    elif isinstance(item, (list, tuple)):
      children = item
    elif isinstance(item, (_Global, _Storage)):
      raise WeightsError(f'holds a bare storage or function. {_SAVE_AGAIN}')
    seen += len(children)
    if depth > MAX_DEPTH or seen > MAX_VALUES:
      raise WeightsError(f'is nested over {MAX_DEPTH} levels deep or holds over {MAX_VALUES} '
                         f'values. {_SAVE_AGAIN}')
    waiting += [(child, depth + 1) for child in children]


# --- the zip format -------------------------------------------------------------------------------


class _SmallReads(io.FileIO):
  """A file for zipfile, which reads an archive's whole directory however large it claims to be."""

  def read(self, size: int | None = -1) -> bytes:
    if size is not None and size > MAX_DIRECTORY_BYTES:
      raise WeightsError(f'has an archive directory of {size} bytes, wanted at most '
                         f'{MAX_DIRECTORY_BYTES}. {_SAVE_AGAIN}')
    return super().read(size) or b''


def _read_zip(file: OpenedFile) -> Any:
  entries = _entries(file)
  roots = [name.removesuffix('data.pkl') for name in entries if name.endswith('/data.pkl')]
  if len(roots) != 1:
    raise WeightsError(f'is a zip archive with {len(roots)} entries */data.pkl, wanted one; if it '
                       'wraps a checkpoint, unpack it first.')
  [root] = roots
  _check_byteorder(_entry_bytes(file, entries, f'{root}byteorder').strip() or b'little')

  def storage(key: str, dtype: np.dtype, count: int) -> _Storage:
    if f'{root}data/{key}' not in entries:
      raise WeightsError(f'lacks the entry data/{brief(key)[1:-1]} that a tensor is stored in; '
                         f'{_DAMAGED}')
    offset, size = entries[f'{root}data/{key}']
    if size != count * dtype.itemsize:
      raise WeightsError(f'storage {brief(key)} has {size} bytes, wanted {count} x '
                         f'{dtype.itemsize}; {_DAMAGED}')
    return _Storage(file, dtype, count, offset)

  pickle = _entry_bytes(file, entries, f'{root}data.pkl')
  return _Unpickler(storage, extras=0).load(io.BytesIO(pickle))


def _check_byteorder(order: bytes) -> None:
  if order != b'little':
    raise WeightsError(f'was saved in byte order {brief(order)}, wanted little; save it again on '
                       'an ordinary machine.')


def _entry_bytes(file: OpenedFile, entries: dict[str, tuple[int, int]], name: str) -> bytes:
  offset, size = entries.get(name, (0, 0))
  if size > MAX_PICKLE_BYTES:
    raise WeightsError(f'entry {brief(name)} has {size} bytes, wanted at most {MAX_PICKLE_BYTES}. '
                       f'{_SAVE_AGAIN}')
  return file.map(offset, size).tobytes() if size else b''


def _entries(file: OpenedFile) -> dict[str, tuple[int, int]]:
  """Name -> (offset, size) of an archive's entries, all of them checked."""
  with _SmallReads(file.path) as stream:
    try:
      archive = zipfile.ZipFile(stream)
      listed = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
      ends = [entry.header_offset for entry in listed[1:]] + [archive.start_dir]
      entries = {entry.filename: (_data_offset(stream, entry, end), entry.file_size)
                 for entry, end in zip(listed, ends, strict=True)}
    except WeightsError:
      raise
    except (ArithmeticError, LookupError, NotImplementedError, OSError, ValueError, struct.error,
            zipfile.BadZipFile) as error:
      raise WeightsError('begins as a zip archive, but its directory is missing or damaged '
                         f'({reason(error)}); download it again.') from error
  if len(entries) < len(listed):
    raise WeightsError(f'has two entries of one name in its archive; {_DAMAGED}')
  return entries


def _data_offset(stream: IO[bytes], entry: zipfile.ZipInfo, end: int) -> int:
  """Where an entry's bytes begin, by its local header; they must lie before `end`."""
  name = brief(entry.filename)
  encrypted = entry.flag_bits & 1
  if entry.compress_type != zipfile.ZIP_STORED or encrypted:
    raise WeightsError(f'entry {name} is {"encrypted" if encrypted else "compressed"}, which '
                       'torch.save never does; unpack the archive and save it again in torch.')
  stream.seek(entry.header_offset)
  magic, flags, method, name_bytes, extra_bytes = struct.unpack(
      '<4s2xHH16xHH', stream.read(30))
  encoding = 'utf-8' if flags & 0x800 else 'cp437'
  if (magic != _ZIP_MAGIC or method != zipfile.ZIP_STORED
      or stream.read(name_bytes).decode(encoding) != entry.orig_filename):
    raise WeightsError(f'entry {name} is another one in its own header; {_DAMAGED}')
  offset = entry.header_offset + 30 + name_bytes + extra_bytes
  if entry.file_size != entry.compress_size or offset + entry.file_size > end:
    raise WeightsError(f'entry {name} reaches into the next; {_DAMAGED}')
  return offset


# --- the legacy format ----------------------------------------------------------------------------


def _read_legacy(file: OpenedFile) -> Any:
  stream = io.BytesIO(file.map(0, min(file.size, MAX_PICKLE_BYTES)).tobytes())
  # Where storages lie is known after the pickles only.
  unpickler = _Unpickler(lambda _, dtype, count: _Storage(file, dtype, count), extras=1)
  # The type is asked for: 1 == True, and hostile values may be anything.
  magic = unpickler.load(stream)
  if type(magic) is not int or magic != _LEGACY_MAGIC:
    raise WeightsError('is a pickle, but not of torch.save; wanted a checkpoint of tensors.')
  version, system = unpickler.load(stream), unpickler.load(stream)
  if type(version) is not int or version != _LEGACY_VERSION or type(system) is not dict:
    raise WeightsError(f'is of another version than {_LEGACY_VERSION}. {_SAVE_AGAIN}')
  _check_byteorder(b'little' if system.get('little_endian') is True else b'big')
  value, keys = unpickler.load(stream), unpickler.load(stream)
  if (type(keys) is not list or not all(type(key) is str for key in keys)
      or sorted(keys) != sorted(unpickler.storages)):
    raise WeightsError(f'lists other storages than its tensors lie in; {_DAMAGED}')
  _locate(file, stream.tell(), [(key, unpickler.storages[key]) for key in keys])
  return value


def _locate(file: OpenedFile, position: int, storages: list[tuple[str, _Storage]]) -> None:
  """Finds where each storage lies after the pickles."""
  for key, storage in storages:
    end = position + 8 + storage.count * storage.dtype.itemsize
    if end > file.size:
      raise WeightsError(f'ends within storage {brief(key)}; {_DAMAGED}')
    [count] = file.map(position, 8).view('<i8').tolist()
    if count != storage.count:
      raise WeightsError(f'storage {brief(key)} has {count} elements, wanted {storage.count}; '
                         f'{_DAMAGED}')
    storage.offset, position = position + 8, end
  if position != file.size:
    raise WeightsError(f'goes on for {file.size - position} bytes after its last storage; '
                       f'{_DAMAGED}')
