"""What a rollout leaves behind block by block, enough to replay it bit for bit.

A directory with two zarr3 arrays, one chunk (file) per block, each with a crc32c:

  latents   [n, B, F, h, w, C]  the blocks' clean latents
  selected  [n, L, B, K]        the archived blocks each layer attended

A chunk appears by an atomic rename after it has been synced, so a kill at any moment leaves a
whole number of finished blocks: those before the first one that lacks a readable chunk.
"""

import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LATENTS, SELECTED = 'latents', 'selected'


class RecordError(OSError):
  """A record that cannot be read or written."""


class Record(Sequence):
  """The finished blocks on disk; a sequence of (latents, selected) for `stream(replay=...)`."""

  def __init__(self, path: str | os.PathLike, blocks: int,
               shapes: Mapping[str, tuple[tuple[int, ...], str]], *, create: bool = True):
    """Opens a record, or creates an empty one, and finds the blocks that are whole.

    Args:
      path: its directory.
      blocks: of the video.
      shapes: name -> (shape of one block, dtype name) of both arrays.
      create: whether it may be created and written.

    Raises:
      RecordError: it holds arrays of other shapes, or the directory cannot be used.
    """
    self.path = pathlib.Path(path)
    self._arrays = {name: self._open(name, (blocks, *shape), dtype, create)
                    for name, (shape, dtype) in shapes.items()}
    self._blocks, self._done = blocks, 0
    while self._done < blocks and self._read(self._done) is not None:
      self._done += 1

  def _open(self, name: str, shape: tuple[int, ...], dtype: str, create: bool) -> Any:
    import tensorstore

    checked = [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}]
    spec = {
        # Zeros are stored like any other value, so that a chunk that is missing is always an error.
        'driver': 'zarr3', 'fill_missing_data_reads': False, 'store_data_equal_to_fill_value': True,
        'kvstore': {'driver': 'file', 'path': f'{self.path / name}/'},
        'metadata': {
            'shape': shape, 'data_type': dtype, 'codecs': checked,
            'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': (1, *shape[1:])}},
            # One flat folder: chunk 12 of `latents` is the file latents/12.0.0.0.0.0.
            'chunk_key_encoding': {'name': 'v2', 'configuration': {'separator': '.'}}}}
    try:
      return tensorstore.open(spec, open=True, create=create, read=True, write=create).result()
    except (ValueError, OSError) as error:
      raise RecordError(f'{self.path / name} cannot be used ({_first_line(error)}); sample again.'
                        ) from error

  def _read(self, block: int) -> tuple[np.ndarray, np.ndarray] | None:
    """One block, or None where it is missing or damaged."""
    try:
      futures = [self._arrays[name][block].read() for name in (LATENTS, SELECTED)]
      latents, selected = (future.result() for future in futures)
    except (ValueError, OSError):
      return None
    return latents, selected

  def __len__(self) -> int:
    return self._done

  def __getitem__(self, block: Any) -> Any:
    if not isinstance(block, int):
      raise TypeError(f'{block=} must be one block number.')
    if not 0 <= block < self._done:
      raise IndexError(f'{block=} is outside the {self._done} finished blocks.')
    pair = self._read(block)
    if pair is None:
      raise RecordError(f'block {block} of {self.path} became unreadable.')
    return pair

  def damaged(self) -> bool:
    """Whether later blocks exist although the first unfinished one does not."""
    numbers = [int(p.name.split('.')[0]) for p in (self.path / LATENTS).glob('[0-9]*.0.*')
               if not p.name.endswith('__lock')]
    return max(numbers, default=-1) > self._done

  def append(self, latents: np.ndarray, selected: np.ndarray) -> None:
    """Stores the next block; when this returns, it survives a kill.

    Raises:
      RecordError: it could not be written.
    """
    values = {LATENTS: latents, SELECTED: selected}
    try:
      for future in [self._arrays[name][self._done].write(value)
                     for name, value in values.items()]:
        future.result()
    except (ValueError, OSError) as error:
      raise RecordError(f'cannot store block {self._done} in {self.path} '
                        f'({_first_line(error)}).') from error
    self._done += 1


def find(folder: str | os.PathLike) -> list[pathlib.Path]:
  """The records in a folder; whatever else lies there is somebody else's."""
  return sorted(path for path in pathlib.Path(folder).glob('[0-9]*') if path.is_dir()
                and {entry.name for entry in path.iterdir()} <= {LATENTS, SELECTED})


def remove(path: str | os.PathLike) -> None:
  """Deletes a record, if there is one."""
  if pathlib.Path(path).exists():
    shutil.rmtree(path)


def _first_line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), repr(error))[:200]
