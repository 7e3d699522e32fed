"""A store of encoded clips: what training reads when the VAE is frozen.

One directory holds a `spec.json` and one zarr3 array per field, clips along the leading axis:

  latents   [N, F, h, w, C]   float16, normalised VAE latents
  low_res   [N, ...]          float16, what the compressor's low-resolution branch sees
  ids, mask [N, ...]          the tokenized prompt
  digit, image_id, colour, rgb, direction, x, y, index: see `source.attribute_arrays`
  text      [N, bytes]        of other videos: the caption, see `text_bytes`

(the fields are those the encoder returns; the store itself knows no model). Every clip is its own
zarr3 inner chunk with a crc32c, many clips share a shard file: random reads are small, files few,
and a flipped bit or a lost file is an error rather than a silent zero.

A store appears under its name only when it is complete: it is written to `<name>.partial`, shard
by shard, and renamed at the end. `encode_clips` continues a partial one after a kill.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pf_jax.data import digits
from pf_jax.data import source as source_lib

SPEC_FILE = 'spec.json'
PROGRESS_FILE = 'progress.json'
FORMAT_VERSION = 1

MakeFn = Callable[[Sequence[int]], Mapping[str, np.ndarray]]
EncodeFn = Callable[[np.ndarray, Sequence[str]], Mapping[str, np.ndarray]]


class StoreError(ValueError):
  """A store is missing, incomplete, damaged or not the one that was asked for."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
  """Shape of one clip's entry (no leading N) and its numpy dtype name."""

  shape: tuple[int, ...]
  dtype: str


@dataclasses.dataclass(frozen=True)
class StoreSpec:
  """What a store holds.

  Attributes:
    count: number of clips.
    clips_per_shard: clips per file.
    arrays: name -> ArraySpec.
    about: JSON-serialisable facts about the data (world, seed, frames, encoder); two stores with
      different facts never mix.
  """

  count: int
  clips_per_shard: int
  arrays: Mapping[str, ArraySpec]
  about: Mapping[str, Any]

  @property
  def shards(self) -> int:
    return math.ceil(self.count / self.clips_per_shard)

  def to_json(self) -> dict:
    """A plain dict that `from_json` reads back."""
    return {
        'version': FORMAT_VERSION,
        'count': self.count,
        'clips_per_shard': self.clips_per_shard,
        'arrays': {name: {'shape': list(a.shape), 'dtype': a.dtype}
                   for name, a in sorted(self.arrays.items())},
        'about': dict(self.about),
    }

  @classmethod
  def from_json(cls, data: Mapping) -> 'StoreSpec':
    """Reads `to_json`'s dict.

    Raises:
      StoreError: another version of the format.
    """
    if data.get('version') != FORMAT_VERSION:
      raise StoreError(f'The store has format version {data.get("version")}, wanted '
                       f'{FORMAT_VERSION}; encode it again.')
    arrays = {name: ArraySpec(tuple(a['shape']), a['dtype'])
              for name, a in data['arrays'].items()}
    return cls(data['count'], data['clips_per_shard'], arrays, data['about'])


class CaptionedClip(NamedTuple):
  """A clip to encode: pixels uint8 [T, H, W, 3], its prompt, and arrays to store beside."""

  pixels: np.ndarray
  prompt: str
  fields: Mapping[str, np.ndarray]


class LatentStore:
  """Read-only access to a complete store; a `source.Source` for `source.batches`."""

  def __init__(self, path: str | os.PathLike, expect: Mapping[str, tuple[int, ...]] | None = None,
               about: Mapping[str, Any] | None = None):
    """Opens a store and checks that it is complete and what the caller relies on.

    Args:
      path: the store's directory.
      expect: name -> shape of one clip's entry.
      about: facts of `StoreSpec.about`.

    Raises:
      StoreError: no such store, unfinished, damaged, or of other shapes or facts.
    """
    self.path = pathlib.Path(path)
    if not self.path.is_dir():
      partial = _partial(self.path)
      hint = (f'{partial} is unfinished; run the encoding again to complete it.'
              if partial.is_dir() else 'make it with launch.prepare, or `encode_clips`.')
      raise StoreError(f'There is no latent store at {self.path}; {hint}')
    self.spec = StoreSpec.from_json(_read_checked_json(self.path / SPEC_FILE))
    _check_expected(self.path, self.spec, expect or {}, about or {})
    self._arrays = {name: _open_array(self.path, name, self.spec) for name in self.spec.arrays}

  @property
  def crc32(self) -> int:
    """Of the spec, which says what the content was made from."""
    return zlib.crc32(json.dumps(self.spec.to_json(), sort_keys=True).encode())

  def __len__(self) -> int:
    return self.spec.count

  def __getitem__(self, index: int) -> source_lib.Record:
    if not 0 <= index < len(self):
      raise IndexError(f'{index=} is outside 0..{len(self) - 1}.')
    return {name: value[0] for name, value in self.read(slice(index, index + 1)).items()}

  def read(self, clips: slice | Sequence[int]) -> source_lib.Record:
    """Reads clips, all fields, each with a leading clip axis.

    Raises:
      StoreError: stored data is damaged or missing.
    """
    selection = clips if isinstance(clips, slice) else np.asarray(clips, int)
    futures = {name: array[selection].read() for name, array in self._arrays.items()}
    try:
      return {name: future.result() for name, future in futures.items()}
    except (ValueError, OSError) as error:
      raise StoreError(f'The latent store {self.path} is damaged: {error}; delete it and encode '
                       'it again.') from error

  def prompt(self, index: int) -> str:
    """The prompt of a clip: as it is stored, or rebuilt from stored attributes."""
    if 'text' in self._arrays:
      return self._arrays['text'][index].read().result().tobytes().rstrip(b'\0').decode()
    futures = [self._arrays[name][index].read() for name in ('digit', 'direction', 'colour')]
    digit, direction, colour = (int(future.result()) for future in futures)
    return digits.make_prompt(digit, digits.DIRECTIONS[direction],
                              self.spec.about['colours'][colour])

  def verify(self) -> None:
    """Reads everything once.

    Raises:
      StoreError: some stored data is damaged or missing.
    """
    step = self.spec.clips_per_shard
    for start in range(0, len(self), step):
      self.read(slice(start, min(start + step, len(self))))


def encode_clips(encode_fn: EncodeFn, world: digits.DigitsWorld, indices: Sequence[int],
                 path: str | os.PathLike, *, frames: int, seed: int = 0, split: str = 'train',
                 about: Mapping[str, Any] | None = None, batch_size: int = 16,
                 clips_per_shard: int = 64, overwrite: bool = False,
                 progress: bool = True) -> LatentStore:
  """Encodes clips of the world into a store, continuing an earlier attempt.

  A complete store with the same content description is returned as it is.

  Args:
    encode_fn: (pixels float32 [B, T, H, W, 3] in [-1, 1], prompts) -> name -> array [B, ...].
      Floating point outputs are stored as float16. Always called with `batch_size` clips.
    world: what clips look like.
    indices: which clips.
    path: directory of the store.
    frames: pixel frames per clip.
    seed: seed of the data set.
    split: 'train' or 'test'.
    about: further facts that identify the content, e.g. the VAE's fingerprint.
    batch_size: clips per call of `encode_fn`.
    clips_per_shard: clips per file, also the unit of progress.
    overwrite: replaces an existing store or partial store.
    progress: shows a progress bar.

  Returns:
    The opened store.

  Raises:
    StoreError: a store or partial store of other content is in the way.
    ValueError: sizes are not positive, or `encode_fn` returns something unusable.
  """
  if batch_size < 1:
    raise ValueError(f'{batch_size=} must be at least 1.')
  if len(indices) < 1:
    raise ValueError(f'{len(indices)=} must be at least 1.')

  def render(indices: Sequence[int]) -> Iterator[CaptionedClip]:
    for clip in (world.clip(int(i), seed, frames, split) for i in indices):
      yield CaptionedClip(clip.pixels, clip.prompt,
                          source_lib.attribute_arrays(clip.attributes, world))

  return write_store(ClipEncoder(encode_fn, render, batch_size), indices, path,
                     facts=_facts(world, indices, frames, seed, split, about or {}),
                     clips_per_shard=clips_per_shard, overwrite=overwrite, progress=progress)


def write_store(make: MakeFn, indices: Sequence[int], path: str | os.PathLike, *,
                facts: Mapping[str, Any], clips_per_shard: int = 64, overwrite: bool = False,
                progress: bool = True) -> LatentStore:
  """Fills a store, continuing an earlier attempt; see `encode_clips`.

  Args:
    make: (indices) -> name -> array with a leading axis over them, in the dtypes to store.
    indices: of all clips.
    path: directory of the store.
    facts: what identifies the content, as it reads back from JSON.
    clips_per_shard: clips per file, also the unit of progress.
    overwrite: replaces an existing store or partial store.
    progress: shows a progress bar.

  Raises:
    StoreError: a store or partial store of other content is in the way.
    ValueError: sizes are not positive, or `make` changed its output.
  """
  if len(indices) < 1 or clips_per_shard < 1:
    raise ValueError(f'{len(indices)=} and {clips_per_shard=} must be at least 1.')
  path = pathlib.Path(path)
  if overwrite:
    for old in (path, _partial(path)):
      shutil.rmtree(old, ignore_errors=True)
  if path.exists():
    store = LatentStore(path)
    _check_same(path, store.spec.about, facts)
    return store
  partial = _partial(path)
  spec, done = _start_or_resume(partial, make, indices, clips_per_shard, facts)
  _write_shards(partial, spec, done, make, indices, progress)
  _finish(partial, path)
  return LatentStore(path)


@dataclasses.dataclass(frozen=True)
class ClipEncoder:
  """Reads and encodes a run of clips, in batches of one fixed size; for `write_store`.

  Attributes:
    encode_fn: see `encode_clips`.
    read: indices -> their clips, in this order.
    batch_size: clips per call of `encode_fn`.
  """

  encode_fn: EncodeFn
  read: Callable[[Sequence[int]], Iterable[CaptionedClip]]
  batch_size: int

  def __call__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
    clips, parts = iter(self.read(indices)), []
    while batch := list(itertools.islice(clips, self.batch_size)):
      parts.append(self._batch(batch))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  def _batch(self, clips: list[CaptionedClip]) -> dict[str, np.ndarray]:
    # A short last batch repeats its last clip: a jitted encoder sees one shape only.
    filled = clips + [clips[-1]] * (self.batch_size - len(clips))
    pixels = digits.to_float(np.stack([clip.pixels for clip in filled]))
    encoded = self.encode_fn(pixels, [clip.prompt for clip in filled])
    beside = {name: np.stack([clip.fields[name] for clip in filled]) for name in clips[0].fields}
    fields = dict(beside)
    for name, value in encoded.items():
      value = np.asarray(value)
      if name in fields or value.shape[:1] != (self.batch_size,):
        raise ValueError(f'encode_fn returned {name!r} of shape {value.shape}; wanted a leading '
                         f'axis of {self.batch_size} clips and a name other than '
                         f'{", ".join(beside)}.')
      fields[name] = storable(name, value)
    return {name: value[:len(clips)] for name, value in fields.items()}


def text_bytes(text: str, size: int) -> np.ndarray:
  """A text as `LatentStore.prompt` reads it: UTF-8, zeros up to `size` bytes."""
  return np.frombuffer(text.encode().ljust(size, b'\0'), np.uint8)


def storable(name: str, value: np.ndarray) -> np.ndarray:
  """Floats as float16, refusing what does not survive; other numbers unchanged."""
  if value.dtype.kind in 'iub':
    return value
  with np.errstate(over='ignore'):  # reported below, with the name
    half = np.asarray(value, np.float32).astype(np.float16)
  if not np.isfinite(half).all():
    raise ValueError(f'encode_fn returned {name!r} with values that are not finite in float16 '
                     f'(largest: {np.abs(value).max()}); check the encoder and its normalisation.')
  return half


def _start_or_resume(partial: pathlib.Path, encode: MakeFn, indices: Sequence[int],
                     clips_per_shard: int, facts: Mapping) -> tuple[StoreSpec, int]:
  """Opens a partial store, or creates one; returns its spec and the finished shards."""
  if (partial / SPEC_FILE).exists():
    spec = StoreSpec.from_json(_read_checked_json(partial / SPEC_FILE))
    _check_same(partial, spec.about, facts)
    progress = partial / PROGRESS_FILE
    return spec, _read_checked_json(progress)['shards'] if progress.exists() else 0
  first = encode(indices[:1])
  arrays = {name: ArraySpec(value.shape[1:], value.dtype.name) for name, value in first.items()}
  spec = StoreSpec(len(indices), clips_per_shard, arrays, facts)
  shutil.rmtree(partial, ignore_errors=True)  # without a spec there is nothing worth keeping
  partial.mkdir(parents=True)
  for name in arrays:
    _create_array(partial, name, spec)
  _write_checked_json(partial / SPEC_FILE, spec.to_json())
  return spec, 0


def _write_shards(partial: pathlib.Path, spec: StoreSpec, done: int, encode: MakeFn,
                  indices: Sequence[int], progress: bool) -> None:
  import tqdm

  arrays = {name: _open_array(partial, name, spec, write=True) for name in spec.arrays}
  with tqdm.tqdm(total=spec.count, initial=min(done * spec.clips_per_shard, spec.count),
                 unit='clip', desc='encode', disable=None if progress else True) as bar:
    for shard in range(done, spec.shards):
      start = shard * spec.clips_per_shard
      stop = min(start + spec.clips_per_shard, spec.count)
      fields = encode(indices[start:stop])
      _check_fields(fields, spec)
      for future in [arrays[name][start:stop].write(value) for name, value in fields.items()]:
        future.result()
      _write_checked_json(partial / PROGRESS_FILE, {'shards': shard + 1})
      bar.update(stop - start)


def _finish(partial: pathlib.Path, path: pathlib.Path) -> None:
  (partial / PROGRESS_FILE).unlink()
  for lock in partial.rglob('*.__lock'):  # left by a killed writer
    lock.unlink()
  os.replace(partial, path)


def _check_fields(fields: Mapping[str, np.ndarray], spec: StoreSpec) -> None:
  got = {name: ArraySpec(value.shape[1:], value.dtype.name) for name, value in fields.items()}
  if got != dict(spec.arrays):
    raise ValueError(f'encode_fn changed its output: {_differences(got, spec.arrays)}; it must '
                     'return the same fields and shapes for every batch.')


def _facts(world, indices, frames, seed, split, about) -> dict:
  """What identifies the content, as it reads back from JSON."""
  facts = {
      'world': dataclasses.asdict(world),
      'colours': [colour.name for colour in world.colours],
      'frames': frames,
      'seed': seed,
      'split': split,
      'indices': {'first': int(indices[0]), 'count': len(indices),
                  'crc32': zlib.crc32(np.asarray(indices, '<i8').tobytes())},
      'encoder': dict(about),
  }
  return json.loads(json.dumps(facts))


def _check_same(path: pathlib.Path, got: Mapping, wanted: Mapping) -> None:
  if dict(got) != dict(wanted):
    raise StoreError(f'{path} holds other data: {_differences(got, wanted)}; choose another '
                     'directory or pass overwrite=True to replace it.')


def _check_expected(path: pathlib.Path, spec: StoreSpec, expect: Mapping[str, tuple[int, ...]],
                    about: Mapping[str, Any]) -> None:
  wanted = {**{name: tuple(shape) for name, shape in expect.items()}, **about}
  got = {name: spec.arrays[name].shape for name in expect if name in spec.arrays}
  got |= {name: spec.about[name] for name in about if name in spec.about}
  if got != wanted:
    raise StoreError(f'The latent store {path} does not fit: {_differences(got, wanted)}; encode '
                     'it again with this model, or use the model it was made with.')


def _differences(got: Mapping, wanted: Mapping) -> str:
  keys = sorted(k for k in {*got, *wanted} if got.get(k) != wanted.get(k))
  return '; '.join(f'{key}: got {got.get(key)}, wanted {wanted.get(key)}' for key in keys)


def _partial(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(path.name + '.partial')


def _create_array(root: pathlib.Path, name: str, spec: StoreSpec) -> None:
  """Creates an empty zarr3 array: a checksummed inner chunk per clip, shards of many clips."""
  import tensorstore

  array = spec.arrays[name]
  checked = [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}]
  sharding = {'chunk_shape': [1, *array.shape], 'codecs': checked, 'index_codecs': checked,
              'index_location': 'end'}
  tensorstore.open({
      **_kvstore(root, name),
      'metadata': {
          'shape': [spec.count, *array.shape],
          'data_type': array.dtype,
          'chunk_grid': {'name': 'regular',
                         'configuration': {'chunk_shape': [spec.clips_per_shard, *array.shape]}},
          'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
      },
  }, create=True).result()


def _open_array(root: pathlib.Path, name: str, spec: StoreSpec, write: bool = False) -> Any:
  """Opens one array and compares it with the spec; see `LatentStore` for errors."""
  import tensorstore

  try:
    array = tensorstore.open(_kvstore(root, name), read=True, write=write).result()
  except (ValueError, OSError) as error:
    raise StoreError(f'{root / name} cannot be opened: {error}; delete the store and encode it '
                     'again.') from error
  wanted = (spec.count, *spec.arrays[name].shape), spec.arrays[name].dtype
  got = tuple(array.shape), array.dtype.name
  if got != wanted:
    raise StoreError(f'{root / name} is damaged: got {got}, wanted {wanted}; delete the store and '
                     'encode it again.')
  return array


def _kvstore(root: pathlib.Path, name: str) -> dict:
  # Zeros are stored like any other value, so that a chunk that is missing is always an error.
  return {'driver': 'zarr3', 'kvstore': {'driver': 'file', 'path': f'{root / name}/'},
          'fill_missing_data_reads': False, 'store_data_equal_to_fill_value': True}


def _write_checked_json(path: pathlib.Path, data: Mapping) -> None:
  """Writes JSON with a checksum of its content, atomically."""
  body = json.dumps(data, indent=1, sort_keys=True)
  text = json.dumps({'crc32': zlib.crc32(body.encode()), 'data': data}, indent=1, sort_keys=True)
  temporary = path.with_suffix('.tmp')
  temporary.write_text(text)
  os.replace(temporary, path)


def _read_checked_json(path: pathlib.Path) -> Any:
  try:
    content = json.loads(path.read_text())
    body = json.dumps(content['data'], indent=1, sort_keys=True)
    if zlib.crc32(body.encode()) != content['crc32']:
      raise ValueError('the checksum differs')
    return content['data']
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise StoreError(f'{path} is unreadable ({error!r}); delete the store and encode it '
                     'again.') from error
