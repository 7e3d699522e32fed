"""Tensors that stay on disk: their shapes are known at once, their values are read when needed.

A `LazyTensor` holds no data. Every read maps the tensor's own bytes of the file anew, and the
mapping goes with the last array that shows it: a loop over a file of any size has no more in memory
than the tensors that it still refers to.
"""

import dataclasses
import math
import mmap
import os
import pathlib
import stat
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MAX_DIMS = 32
_MAX_BYTES = 2**63 - 1  # what NumPy counts with


class WeightsError(ValueError):
  """Weights that cannot be used; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """A tensor on disk.

  Attributes:
    shape: sizes.
    dtype: NumPy's, or ml_dtypes' for bfloat16.
    read: returns the values. The array may be read-only and may show the file itself: copy what has
      to outlive it, and do not change the file meanwhile.

  Raises:
    WeightsError: a shape that no array can have.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

  def __post_init__(self):
    if not is_shape(self.shape):
      raise WeightsError(f'a tensor whose shape is not at most {MAX_DIMS} integers >= 0; the file '
                         'is damaged.')
    # Sizes beside a zero count too: NumPy multiplies them all the same.
    if math.prod(max(size, 1) for size in self.shape) * self.dtype.itemsize > _MAX_BYTES:
      raise WeightsError(f'a tensor of shape {brief(self.shape)}, more than can be addressed; the '
                         'file is damaged.')

  @property
  def nbytes(self) -> int:
    """Size of the values."""
    return math.prod(self.shape) * self.dtype.itemsize


def is_count(value: object) -> bool:
  """Whether a value from a file is an integer >= 0 (True is not)."""
  return type(value) is int and value >= 0


def is_shape(value: object) -> bool:
  """Whether a value from a file is a tuple of few integers >= 0; many would take long to use."""
  return isinstance(value, tuple) and len(value) <= MAX_DIMS and all(map(is_count, value))


def shown_name(name: str) -> str:
  """A tensor's name as a file has it, without quotes where it is harmless."""
  return brief(name)[1:-1] if name.isprintable() and len(name) <= 64 else brief(name)


def brief(value: str | bytes | tuple[int, ...]) -> str:
  """A value from a file as short printable text, however long it is."""
  text = ascii(value[:64])
  return text if len(text) <= 80 and len(value) <= 64 else f'{text[:77]}...'


def reason(error: Exception) -> str:
  """What an error says, as one line of bounded length: it may quote the file."""
  return ascii(str(error)[:300])[1:-1]


class OpenedFile(NamedTuple):
  """A file as it was when its header was read.

  Attributes:
    path: where it lies.
    size: bytes.
    version: tells whether it is still the same file.
  """

  path: pathlib.Path
  size: int
  version: tuple[int, ...]

  @classmethod
  def of(cls, path: str | os.PathLike) -> 'OpenedFile':
    """Looks at a file.

    Raises:
      WeightsError: not a file that can be read, or empty.
    """
    path = pathlib.Path(path)
    try:
      status = path.stat()
      # Asked first: to open a pipe would wait for its other end.
      if not stat.S_ISREG(status.st_mode):
        raise WeightsError(f'{path} is not a file; give the checkpoint itself.')
      with open(path, 'rb'):
        pass
    except OSError as error:
      raise WeightsError(f'cannot read {path} ({error.strerror}); check the path.') from error
    if not status.st_size:
      raise WeightsError(f'{path} is empty; download it again.')
    return cls(path, status.st_size, _version(status))

  def check(self) -> None:
    """Raises if the file is not what it was.

    Raises:
      WeightsError: it was changed, replaced or removed.
    """
    try:
      version = _version(self.path.stat())
    except OSError:
      version = ()
    if version != self.version:
      raise WeightsError(f'{self.path} has changed since it was opened; start again.')

  def map(self, offset: int, count: int) -> np.ndarray:
    """Shows bytes [offset, offset + count) of the file; count > 0.

    Raises:
      WeightsError: see `check`.
    """
    self.check()
    with open(self.path, 'rb') as stream:
      return map_bytes(stream.fileno(), offset, count, mmap.ACCESS_READ)[1]


def map_bytes(descriptor: int, offset: int, count: int, access: int
              ) -> tuple[mmap.mmap, np.ndarray]:
  """Maps bytes [offset, offset + count) of an open file; the array keeps the mapping alive."""
  start = offset - offset % mmap.ALLOCATIONGRANULARITY
  mapping = mmap.mmap(descriptor, offset + count - start, offset=start, access=access)
  return mapping, np.frombuffer(mapping, np.uint8, count, offset - start)


def _version(status: os.stat_result) -> tuple[int, ...]:
  return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
