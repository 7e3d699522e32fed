"""Reads and writes safetensors one tensor at a time, whatever the file's size.

Format: an int64 length, that many bytes of JSON (name -> dtype, shape, data_offsets; strings under
`__metadata__`), then the values, contiguous and little-endian. Reading is the safetensors library's
work; it can write only what is in memory as a whole, so that `SafetensorsWriter` is ours.
"""

import contextlib
import functools
import hashlib
import json
import math
import mmap
import os
import pathlib
import shutil
import struct
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from pf_jax.weights.tensors import (
    LazyTensor,
    OpenedFile,
    WeightsError,
    brief,
    is_count,
    map_bytes,
    reason,
)

# The header of Wan2.1 14B takes 0.2 MB.
MAX_HEADER_BYTES = 4 * 2**20

_DTYPES = {
    'F64': np.dtype(np.float64), 'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16), 'I64': np.dtype(np.int64), 'I32': np.dtype(np.int32),
    'I16': np.dtype(np.int16), 'I8': np.dtype(np.int8), 'U64': np.dtype(np.uint64),
    'U32': np.dtype(np.uint32), 'U16': np.dtype(np.uint16), 'U8': np.dtype(np.uint8),
    'BOOL': np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = '__metadata__'
_ALIGNMENT = 8
_JOURNAL_VERSION = 1


# --- reading --------------------------------------------------------------------------------------


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, LazyTensor], dict[str, str]]:
  """Reads a safetensors file's header.

  Args:
    path: the file, which must not change while its tensors are in use.

  Returns:
    The tensors by name, and the metadata.

  Raises:
    WeightsError: not such a file, damaged, or of a dtype that is not supported; one line.
  """
  file = OpenedFile.of(path)
  try:
    header = _header(file)
    metadata = header.pop(_METADATA, None) or {}  # the library lets it be null
    return {name: _tensor(file, name, entry) for name, entry in header.items()}, metadata
  except WeightsError as error:
    raise WeightsError(f'{file.path}: {error}') from error


def _header(file: OpenedFile) -> dict[str, Any]:
  """A header that the library has checked, with what it does not check."""
  import safetensors

  start = file.map(0, min(8, file.size)).tobytes()
  if start.startswith(b'PK\x03\x04'):
    raise WeightsError('is a zip archive, not safetensors; if it is a checkpoint of torch, give it '
                       'the ending .pth.')
  size = int.from_bytes(start, 'little')
  if size > MAX_HEADER_BYTES:
    raise WeightsError(f'begins with {brief(start)}, a header of {size} bytes; wanted safetensors '
                       f'with at most {MAX_HEADER_BYTES}. Check that the download is the '
                       'checkpoint itself.')
  try:
    with safetensors.safe_open(file.path, framework='np'):
      pass
    return json.loads(file.map(8, size).tobytes(), object_pairs_hook=_unique)
  except WeightsError:
    raise
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise WeightsError(f'is not a whole safetensors file ({reason(error)}); download it '
                       'again.') from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """JSON lets later entries replace earlier ones, and the library does so in silence."""
  entries = dict(pairs)
  if len(entries) < len(pairs):
    raise WeightsError('has two entries of one name in its header; the file is damaged.')
  return entries


def _tensor(file: OpenedFile, name: str, entry: dict[str, Any]) -> LazyTensor:
  dtype = _DTYPES.get(entry['dtype'])
  if dtype is None:
    raise WeightsError(f'tensor {brief(name)} is {entry["dtype"]}, wanted one of '
                       f'{", ".join(_DTYPES)}; convert it, as by tensor.to(torch.bfloat16) in '
                       'torch, and save again.')
  return LazyTensor(tuple(entry['shape']), dtype, functools.partial(_read_tensor, file, name))


def _read_tensor(file: OpenedFile, name: str) -> np.ndarray:
  import safetensors

  file.check()
  # Opened anew: an open file would keep every page that was ever read.
  with safetensors.safe_open(file.path, framework='np') as opened:
    return opened.get_tensor(name)


# --- writing --------------------------------------------------------------------------------------


class _Slot(NamedTuple):
  """Where a tensor, or a layer of one, lies in the file."""

  shape: tuple[int, ...]
  dtype: np.dtype
  offset: int

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def layer(self, index: int) -> '_Slot':
    """One entry along the leading axis."""
    inner = _Slot(self.shape[1:], self.dtype, self.offset)
    return inner._replace(offset=self.offset + index * inner.nbytes)


def _layout(tensors: Mapping[str, tuple[tuple[int, ...], Any]], metadata: Mapping[str, str]
            ) -> tuple[bytes, dict[str, _Slot]]:
  """A file's bytes up to its first value, and where each tensor lies.

  Wide dtypes come first, then names, as in the library: so every tensor is aligned to its dtype.
  """
  if any(not isinstance(text, str) for item in metadata.items() for text in item):
    raise WeightsError(f'metadata {dict(metadata)} is not text; wanted strings only.')
  slots, offset = {}, 0
  for name, (shape, dtype) in sorted(
      tensors.items(), key=lambda item: (-np.dtype(item[1][1]).itemsize, item[0])):
    dtype = np.dtype(dtype)
    if dtype not in _NAMES or name == _METADATA or not all(map(is_count, shape)):
      raise WeightsError(f'cannot write {name!r} as {dtype} of {shape}; wanted another name than '
                         f'{_METADATA}, sizes >= 0 and one of {", ".join(map(str, _NAMES))}.')
    slots[name] = _Slot(tuple(shape), dtype, offset)
    offset += slots[name].nbytes
  header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
  header |= {name: {'dtype': _NAMES[slot.dtype], 'shape': slot.shape,
                    'data_offsets': [slot.offset, slot.offset + slot.nbytes]}
             for name, slot in slots.items()}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % _ALIGNMENT)
  start = struct.pack('<Q', len(text)) + text
  return start, {name: slot._replace(offset=len(start) + slot.offset)
                 for name, slot in slots.items()}


class SafetensorsWriter:
  """Writes a safetensors file piece by piece: a tensor, or one layer of a stacked one, at a time.

  The values go to `<path>.partial`, which has its full size from the start, and `finish` gives it
  its name. `<path>.journal` lists the pieces that are on disk. A writer made with the same
  arguments after an interruption goes on where the journal ends:

    writer = SafetensorsWriter(path, {'kernel': ((30, 8, 8), 'bfloat16')}, {'source': checksum})
    for layer in range(30):
      if not writer.is_done('kernel', layer):
        with writer.piece('kernel', layer) as array:
          array[...] = values(layer)
    writer.finish()

  "The same" is decided by the header, so that metadata should say what the values are made of.
  Whoever writes holds the directory (`outputs.claim_directory`): two writers of one file would not
  notice each other.

  Attributes:
    path: the finished file.
    partial: the file that is being written.
    journal: what is done.
    resumed: number of pieces that an earlier writer left.
  """

  def __init__(self, path: str | os.PathLike, tensors: Mapping[str, tuple[tuple[int, ...], Any]],
               metadata: Mapping[str, str] | None = None, *, restart: bool = False):
    """Reserves the whole file, or takes up an interrupted one.

    Args:
      path: of the finished file; an older one stays until `finish` replaces it.
      tensors: name -> (shape, dtype).
      metadata: strings for the header.
      restart: drop what an earlier writer left instead of continuing or refusing it.

    Raises:
      WeightsError: a dtype or name that cannot be written, too little disk (nothing was written),
        or an interrupted file with another header (nothing was changed).
    """
    self.path = pathlib.Path(path)
    self.partial = self.path.with_name(f'{self.path.name}.partial')
    self.journal = self.path.with_name(f'{self.path.name}.journal')
    self._start, self._slots = _layout(tensors, metadata or {})
    self._size = len(self._start) + sum(slot.nbytes for slot in self._slots.values())
    self._done: set[tuple[str, int | None]] = set()
    if self.path.is_dir():
      raise WeightsError(f'{self.path} is a directory; choose another name.')
    lines = [] if restart else self._journal_lines()
    try:
      if lines and self.partial.exists():
        self._resume(lines)
      else:
        self._create()
    except OSError as error:
      raise WeightsError(f'cannot write {self.partial} ({error.strerror}); make room or choose '
                         'another directory.') from error
    self.resumed = len(self._done)

  def is_done(self, name: str, layer: int | None = None) -> bool:
    """Whether a tensor (all of it, for None) or a layer of it is on disk."""
    layers = self._slots[name].shape[:1]  # () for a scalar
    if layer is not None or (name, None) in self._done:
      return not self._done.isdisjoint(((name, layer), (name, None)))
    return layers > (0,) and all((name, index) in self._done for index in range(*layers))

  @contextlib.contextmanager
  def piece(self, name: str, layer: int | None = None) -> Iterator[np.ndarray]:
    """Lends a part of the file as an array to fill; it counts as done if the body succeeds.

    Args:
      name: of the tensor.
      layer: index along its leading axis; None for the whole tensor.

    Yields:
      A writable array that shows the file, read-only afterwards.

    Raises:
      KeyError: no such tensor.
      IndexError: no such layer.
      ValueError: the piece, or a part of it, is done.
    """
    slot = self._slots[name]
    if layer is not None and not (slot.shape and 0 <= layer < slot.shape[0]):
      raise IndexError(f'{name!r} of {slot.shape} has no layer {layer}.')
    if self.is_done(name, layer) or (layer is None and any(n == name for n, _ in self._done)):
      raise ValueError(f'{name!r}, {layer=} is done, or a layer of it is; ask is_done() before.')
    slot = slot if layer is None else slot.layer(layer)
    if slot.nbytes:
      with open(self.partial, 'r+b') as stream:
        mapping, data = map_bytes(stream.fileno(), slot.offset, slot.nbytes, mmap.ACCESS_WRITE)
      array = data.view(slot.dtype).reshape(slot.shape)
      yield array
      array.flags.writeable = False
      mapping.flush()
      # The caller's array may live on; its pages need not.
      mapping.madvise(mmap.MADV_DONTNEED)
    else:
      yield np.empty(slot.shape, slot.dtype)
    # Only now: whatever happens, no piece is marked that is not on disk.
    with open(self.journal, 'ab') as stream:
      _write_line(stream, [name, layer])
    self._done.add((name, layer))

  def finish(self) -> pathlib.Path:
    """Gives the file its name and removes the journal.

    Returns:
      The finished file.

    Raises:
      WeightsError: pieces are missing.
    """
    if missing := [name for name in self._slots if not self.is_done(name)]:
      raise WeightsError(f'{self.partial} lacks {len(missing)} of {len(self._slots)} tensors, '
                         f'first {missing[0]!r}; write them before finish().')
    _sync(self.partial)
    os.replace(self.partial, self.path)
    _sync(self.path.parent)
    self.journal.unlink()
    return self.path

  def _identity(self) -> dict[str, Any]:
    return {'version': _JOURNAL_VERSION, 'header_sha256': hashlib.sha256(self._start).hexdigest()}

  def _journal_lines(self) -> list[bytes]:
    """Whole lines of the journal; a kill or power failure may have torn the last."""
    try:
      return self.journal.read_bytes().split(b'\n')[:-1]
    except FileNotFoundError:
      return []

  def _resume(self, lines: list[bytes]) -> None:
    if (_parsed(lines[0]) != self._identity()
        or self.partial.stat().st_size != self._size):
      raise WeightsError(
          f'{self.partial} was begun with other tensors or from another source; finish it with '
          'those, or drop it: restart, or delete it and its journal.')
    length = len(lines[0]) + 1
    for line in lines[1:]:
      match _parsed(line):
        case [str(name), None | int() as layer] if name in self._slots:
          self._done.add((name, layer))
          length += len(line) + 1
        case _:
          break
    os.truncate(self.journal, length)

  def _create(self) -> None:
    """Reserves the file. The order matters: no journal may ever speak of a newer file's pieces."""
    self.journal.unlink(missing_ok=True)
    self.partial.unlink(missing_ok=True)
    _sync(self.path.parent)
    free = shutil.disk_usage(self.path.parent).free
    if free < self._size:
      raise WeightsError(f'{self.path} takes {self._size / 1e9:.2f} GB, and {self.path.parent} has '
                         f'{free / 1e9:.2f} GB free; nothing was written. Make room or choose '
                         'another disk.')
    try:
      with open(self.partial, 'xb') as stream:
        # Not truncate(): writing to a mapped hole of a full disk would kill the process.
        os.posix_fallocate(stream.fileno(), 0, self._size)
        stream.write(self._start)
        stream.flush()
        os.fsync(stream.fileno())
    except OSError:
      self.partial.unlink(missing_ok=True)
      raise
    with open(self.journal, 'xb') as stream:
      _write_line(stream, self._identity())
    _sync(self.path.parent)


def _write_line(stream: IO[bytes], value: Any) -> None:
  """Adds a line to the journal and puts it on disk."""
  stream.write(json.dumps(value).encode() + b'\n')
  stream.flush()
  os.fsync(stream.fileno())


def _parsed(line: bytes) -> Any:
  """A line of the journal; None for what is not JSON."""
  try:
    return json.loads(line)
  except ValueError:
    return None


def _sync(path: pathlib.Path) -> None:
  """Puts a file, or a directory's names, on disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
