"""Checkpoints built byte by byte, without torch: good ones, and files made to harm their reader.

Pickles are written with the instructions that torch.save writes, from the small vocabulary below;
what a reader or a launcher does with hostile ones is observed in a process of its own, with little
memory.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pf_jax.weights.safetensors_file import SafetensorsWriter, read_safetensors
from pf_jax.weights.tensors import LazyTensor, WeightsError
from pf_jax.weights.torch_file import read_torch

# --- a vocabulary for pickles ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Global:
  """A name to look up, 'module.attribute'."""

  name: str


@dataclasses.dataclass(frozen=True)
class Call:
  """A function applied to arguments."""

  function: Any
  arguments: tuple


@dataclasses.dataclass(frozen=True)
class Attributes:
  """A value whose attributes are set."""

  value: Any
  state: Any


@dataclasses.dataclass(frozen=True)
class Persistent:
  """A reference to something outside the pickle."""

  reference: tuple


@dataclasses.dataclass(frozen=True)
class Raw:
  """Instructions as they are."""

  instructions: bytes


_ATOMS = {None: b'N', True: b'\x88', False: b'\x89'}
ORDERED_DICT = Global('collections.OrderedDict')


class _Writer:
  """Encodes values with pickle protocol 2; strings and globals are remembered, as torch does."""

  def __init__(self):
    self.memo: dict[Any, int] = {}

  def __call__(self, value: Any) -> bytes:
    if isinstance(value, (str, Global)):
      return self._remembered(value)
    if value is None or isinstance(value, bool):
      return _ATOMS[value]
    return _ENCODERS[type(value)](self, value)

  def _remembered(self, value: str | Global) -> bytes:
    if value in self.memo:
      return b'j' + struct.pack('<I', self.memo[value])
    index = self.memo[value] = len(self.memo)
    if isinstance(value, Global):
      module, _, attribute = value.name.rpartition('.')
      code = f'c{module}\n{attribute}\n'.encode()
    else:
      code = b'X' + struct.pack('<I', len(value.encode())) + value.encode()
    return code + b'r' + struct.pack('<I', index)

  def _int(self, value: int) -> bytes:
    if 0 <= value < 256:
      return b'K' + bytes([value])
    if -2**31 <= value < 2**31:
      return b'J' + struct.pack('<i', value)
    data = pickle.encode_long(value)
    return b'\x8a' + bytes([len(data)]) + data

  def _float(self, value: float) -> bytes:
    return b'G' + struct.pack('>d', value)

  def _tuple(self, value: tuple) -> bytes:
    items = b''.join(map(self, value))
    short = {0: b')', 1: b'\x85', 2: b'\x86', 3: b'\x87'}
    return items + short[len(value)] if len(value) in short else b'(' + items + b't'

  def _list(self, value: list) -> bytes:
    return b'](' + b''.join(map(self, value)) + b'e'

  def _items(self, value: Mapping) -> bytes:
    return b'(' + b''.join(self(key) + self(item) for key, item in value.items()) + b'u'

  def _dict(self, value: dict) -> bytes:
    return b'}' + self._items(value)

  def _ordered(self, value: collections.OrderedDict) -> bytes:
    return self(Call(ORDERED_DICT, ())) + self._items(value)

  def _call(self, value: Call) -> bytes:
    return self(value.function) + self(value.arguments) + b'R'

  def _attributes(self, value: Attributes) -> bytes:
    return self(value.value) + self(value.state) + b'b'

  def _persistent(self, value: Persistent) -> bytes:
    return self(value.reference) + b'Q'

  def _raw(self, value: Raw) -> bytes:
    return value.instructions


_ENCODERS: Mapping[type, Callable[[_Writer, Any], bytes]] = {
    int: _Writer._int, float: _Writer._float, tuple: _Writer._tuple, list: _Writer._list,
    dict: _Writer._dict, collections.OrderedDict: _Writer._ordered, Call: _Writer._call,
    Attributes: _Writer._attributes, Persistent: _Writer._persistent, Raw: _Writer._raw}


def pickled(value: Any) -> bytes:
  return b'\x80\x02' + _Writer()(value) + b'.'


def tensor(key: str, count: int, size: Any, stride: Any, offset: Any = 0, kind: str = 'Float', *,
           legacy: bool = False, extra: tuple = ()) -> Call:
  """A view of storage `key`, which has `count` elements."""
  reference = ('storage', Global(f'torch.{kind}Storage'), key, 'cpu', count)
  reference += (None,) if legacy else ()
  return Call(Global('torch._utils._rebuild_tensor_v2'),
              (Persistent(reference), offset, size, stride, False, Call(ORDERED_DICT, ()), *extra))


def parameter(data: Any) -> Call:
  return Call(Global('torch._utils._rebuild_parameter'), (data, True, Call(ORDERED_DICT, ())))


# --- files ----------------------------------------------------------------------------------------


def write_zip(path: pathlib.Path, value: Any, storages: Mapping[str, bytes] = {}, *,
              root: str = 'archive', byteorder: str | None = 'little',
              extra: Sequence[tuple[str, bytes]] = (), compressed: Sequence[str] = ()) -> None:
  """Writes the format of torch >= 1.6; `value` may be a whole pickle."""
  code = value if isinstance(value, bytes) else pickled(value)
  entries = [('data.pkl', code), *((f'data/{key}', data) for key, data in storages.items()),
             ('version', b'3\n')]
  entries += [('byteorder', byteorder.encode())] if byteorder else []
  with warnings.catch_warnings(), zipfile.ZipFile(path, 'w') as archive:
    warnings.simplefilter('ignore')  # two entries of one name, on purpose
    for name, data in [*((f'{root}/{name}', data) for name, data in entries), *extra]:
      method = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
      archive.writestr(zipfile.ZipInfo(name), data, compress_type=method)


def write_legacy(path: pathlib.Path, value: Any, storages: Mapping[str, bytes] = {}, *,
                 counts: Mapping[str, int] = {}, keys: Any = None, little_endian: Any = True,
                 magic: Any = 0x1950A86A20F9469CFC6C, version: Any = 1001,
                 after: bytes = b'') -> None:
  """Writes the format before torch 1.6; elements are counted as float32 unless `counts` says."""
  keys = list(storages) if keys is None else keys
  parts = [pickled(part) for part in (magic, version, {'little_endian': little_endian})]
  parts += [value if isinstance(value, bytes) else pickled(value), pickled(keys)]
  for key, data in storages.items():
    parts += [struct.pack('<q', counts.get(key, len(data) // 4)), data]
  path.write_bytes(b''.join(parts) + after)


def write_safetensors(path: pathlib.Path, header: Any, data: bytes = b'', *,
                      size: int | None = None) -> None:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text) if size is None else size) + text + data)


def same(got: np.ndarray, wanted: np.ndarray) -> bool:
  """Whether arrays agree in dtype, shape and every bit."""
  return (got.dtype == wanted.dtype and got.shape == wanted.shape
          and np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(wanted).tobytes())


# --- observing readers and launchers --------------------------------------------------------------


class Outcome(NamedTuple):
  """What a reader did with a file."""

  message: str  # of its WeightsError; else 'read' or 'crashed: ...'
  megabytes: float  # by which memory grew beyond all earlier peaks
  seconds: float


def observe(reader: str, paths: Iterable[pathlib.Path]) -> dict[str, Outcome]:
  """Opens files in one process of their own with little memory; outcomes by file name."""
  rows = map(json.loads, _run('open', reader, *paths).splitlines())
  return {pathlib.Path(path).name: Outcome(*rest) for path, *rest in rows}


def streaming_megabytes(reader: str, path: pathlib.Path) -> float:
  """Reads all tensors of a file in turn, in a process of its own; by how much its peak grew."""
  return float(_run('stream', reader, path))


def writing_megabytes(path: pathlib.Path, tensor: tuple[tuple[int, ...], str]) -> float:
  """Writes a (shape, dtype) layer by layer in a process of its own; by how much its peak grew."""
  return float(_run('write', 'safetensors', path, json.dumps(tensor)))


class Launched(NamedTuple):
  """How a launcher ended."""

  code: int
  out: str
  err: str
  megabytes: float  # by which memory grew at most
  seconds: float


def launch(launcher: str, commands: Sequence[Sequence[Any]], *, seconds: int = 30
           ) -> list[Launched]:
  """Runs command lines of a launcher in turn, in one process of their own.

  What the first command takes, the later ones share: they have little memory beside it. Each of
  them counts as hanging after some seconds.
  """
  rows = _run('launch', launcher, seconds, standard_input=json.dumps(
      [[str(argument) for argument in command] for command in commands]))
  return [Launched(*json.loads(row)) for row in rows.splitlines()]


def _run(*arguments: Any, standard_input: str = '') -> str:
  result = subprocess.run([sys.executable, '-m', __name__, *map(str, arguments)],
                          input=standard_input, capture_output=True, text=True, check=False,
                          timeout=100)
  assert result.returncode == 0, (result.returncode, result.stderr, result.stdout[-500:])
  return result.stdout


def _read_flat(path: str) -> list[LazyTensor]:
  return list(read_safetensors(path)[0].values())


_READERS: Mapping[str, Callable[[str], Any]] = {'torch': read_torch, 'safetensors': _read_flat}
_MEMORY_BYTES, _LAUNCHED_BYTES = 384 * 2**20, 1024 * 2**20


def _peak_megabytes() -> float:
  [line] = [line for line in pathlib.Path('/proc/self/status').read_text().splitlines()
            if line.startswith('VmHWM')]  # not ru_maxrss, which remembers the parent process
  return int(line.split()[1]) / 1024


def _limit_memory(limit: int, column: int, more: int) -> None:
  """Lets this process have some bytes beside those it has, by a limit and its column of statm."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[column])
  bound = pages * resource.getpagesize() + more
  resource.setrlimit(limit, (bound, bound))


def _open_all(read: Callable[[str], Any], paths: Sequence[str]) -> None:
  importlib.import_module('safetensors')  # before memory is limited
  _limit_memory(resource.RLIMIT_AS, 0, _MEMORY_BYTES)
  for path in paths:
    before, start = _peak_megabytes(), time.process_time()
    try:
      read(path)
      message = 'read'
    except WeightsError as error:
      message = str(error)
    except BaseException as error:
      message = f'crashed: {error!r}'
    print(json.dumps([path, message, _peak_megabytes() - before, time.process_time() - start]),
          flush=True)


def _stream(read: Callable[[str], Any], paths: Sequence[str]) -> None:
  tensors = read(*paths)
  before = _peak_megabytes()
  for tensor in tensors:
    tensor.read().max()
  print(_peak_megabytes() - before)


def _write(_: Any, arguments: Sequence[str]) -> None:
  path, (shape, dtype) = arguments[0], json.loads(arguments[1])
  before, kept = _peak_megabytes(), []
  writer = SafetensorsWriter(path, {'a': (shape, dtype)})
  for layer in range(shape[0]):
    with writer.piece('a', layer) as array:
      array[...] = layer
    kept.append(array)  # which must not keep its pages
  print(_peak_megabytes() - before)


# launcher -> its main function, what it hands to `config_flags.run`, and what works out sizes, from
# specs alone: repeated for every command that would take most of the time.
_NETWORK = 'pf_jax.weights.networks.network'
_LAUNCHERS = {
    'convert': ('_convert', ('source', 'model', 'output'), (_NETWORK,)),
    'sample': ('_sample', ('config',), (_NETWORK, 'pf_jax.sampling.budget.budget'))}


class _Hangs(BaseException):
  """A command that does not end."""


def _hangs(*_: Any) -> None:
  raise _Hangs


def _launch_all(launcher: str, seconds: int) -> None:
  name, required, sizes = _LAUNCHERS[launcher]
  for function in sizes:
    module, _, attribute = function.rpartition('.')
    owner = importlib.import_module(module)
    setattr(owner, attribute, functools.cache(getattr(owner, attribute)))
  signal.signal(signal.SIGALRM, _hangs)
  main = getattr(importlib.import_module(f'launch.{launcher}'), name)
  run = functools.partial(importlib.import_module('launch.config_flags').run, main,
                          required=required)
  for number, command in enumerate(json.load(sys.stdin)):
    row = _launch(run, [f'{launcher}.py', *command], seconds)
    print(json.dumps(row), flush=True)
    if number == 0:
      # Not RLIMIT_AS: whole networks may be mapped, as long as they are not read.
      _limit_memory(resource.RLIMIT_DATA, 5, _LAUNCHED_BYTES)


def _launch(run: Callable[[], None], argv: list[str], seconds: int) -> Launched:
  """What a command line would do in a process that has imported everything."""
  flags = importlib.import_module('absl.flags').FLAGS
  flags.unparse_flags()
  for name in flags:
    flags[name].unparse()
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak starts from here
  before, start, sys.argv = _peak_megabytes(), time.process_time(), argv
  with _captured() as texts:
    signal.alarm(seconds)
    try:
      run()
      code = 0
    except SystemExit as stop:
      code = int(stop.code or 0)
    except BaseException:
      traceback.print_exc()
      code = 1
    signal.alarm(0)
  return Launched(code, *texts, _peak_megabytes() - before, time.process_time() - start)


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
  """Collects what is written to both streams, by C++ as well; filled in at the end."""
  texts: list[str] = []
  with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
    streams = ((sys.stdout, out), (sys.stderr, err))
    kept = [os.dup(stream.fileno()) for stream, _ in streams]
    for stream, file in streams:
      os.dup2(file.fileno(), stream.fileno())
    try:
      yield texts
    finally:
      for (stream, file), descriptor in zip(streams, kept, strict=True):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
        file.seek(0)
        texts.append(file.read())


if __name__ == '__main__':
  mode, subject, *rest = sys.argv[1:]
  if mode == 'launch':
    _launch_all(subject, int(rest[0]))
  else:
    {'open': _open_all, 'stream': _stream, 'write': _write}[mode](_READERS[subject], rest)
