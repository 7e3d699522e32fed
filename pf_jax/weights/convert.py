"""Released weights to files of our own, one layer of one parameter at a time.

  DIR/transformer.safetensors   our parameters under their dotted paths, layers stacked, in the
                                precision that was asked for; the header says sizes and source.
  DIR/transformer.orbax/        the same as an Orbax checkpoint of {dotted path: array}.

Values are written through a map of the finished file, so memory holds a released tensor or two
whatever the model's size, and an interrupted conversion goes on where it stopped.
"""

import contextlib
import dataclasses
import json
import mmap
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax import outputs
from pf_jax.weights import networks, sources
from pf_jax.weights.networks import Network, NetworkSpec
from pf_jax.weights.package import from_dict
from pf_jax.weights.rules import dotted
from pf_jax.weights.safetensors_file import SafetensorsWriter, read_safetensors
from pf_jax.weights.tensors import WeightsError, brief, map_bytes, reason

FORMAT, VERSION = 'pf_jax.network', '1'
Formats = Literal['safetensors', 'orbax', 'both']
FORMATS = ('safetensors', 'orbax', 'both')


def converted_path(directory: str | os.PathLike, kind: str) -> pathlib.Path:
  """Where a converted network lies."""
  return pathlib.Path(directory) / f'{kind}.safetensors'


def orbax_path(directory: str | os.PathLike, kind: str) -> pathlib.Path:
  """Where its Orbax form lies."""
  return pathlib.Path(directory).absolute() / f'{kind}.orbax'


def pieces_of(spec: NetworkSpec) -> int:
  """Number of released tensors of a network, for a progress bar."""
  return sum(1 for _ in networks.network(spec).pieces())


def convert(source: str | os.PathLike, spec: NetworkSpec, output: str | os.PathLike, *,
            entry: str | None = None, form: Formats = 'safetensors', overwrite: bool = False,
            progress: Callable[[int], None] | None = None,
            say: Callable[[str], None] = print) -> tuple[pathlib.Path, ...]:
  """Converts one network.

  Args:
    source: a file or directory, see `sources`.
    spec: sizes, which must be the source's, and the precision that is wanted.
    output: directory; created if needed.
    entry: of a training checkpoint, see `sources.open_source`.
    form: what to leave: 'safetensors', 'orbax' or 'both'.
    overwrite: replace a finished conversion.
    progress: told how many pieces were finished since the last call.
    say: receives notices.

  Returns:
    The finished files.

  Raises:
    WeightsError: the source cannot be used; nothing was written. Or an interrupted conversion of
      something else is in the way.
    OutputExists, NotWritable, DirectoryInUse: the output cannot be used.
    ValueError: an unknown form.
  """
  if form not in FORMATS:
    raise ValueError(f'{form=} is unknown; use one of {", ".join(FORMATS)}.')
  target = networks.network(spec)
  opened = sources.open_source(pathlib.Path(source), target, entry=entry)
  for note in opened.notes:
    say(note)
  sources.check(opened, target, pathlib.Path(source))
  with outputs.claim_directory(output, say=say) as root:
    mapped, orbax = converted_path(root, target.kind), orbax_path(root, target.kind)
    wanted = {'safetensors': (mapped,), 'orbax': (orbax,), 'both': (mapped, orbax)}[form]
    # The same conversion, of which only the Orbax form is missing, goes on from there.
    finished = mapped.exists() and is_converted(mapped) and (
        read_safetensors(mapped)[1] == metadata(target, opened))
    for path in wanted:
      goes_on = path == mapped and finished and orbax in wanted and not orbax.exists()
      if path.exists() and not overwrite and not goes_on:
        raise outputs.OutputExists(f'{path} exists already; pass --overwrite or choose another '
                                   'directory.')
    working = mapped if mapped in wanted or finished else root / f'{target.kind}.mapped.safetensors'
    if not finished:
      _write(opened, target, working, overwrite, progress, say)
    if orbax in wanted:
      from pf_jax.weights import orbax_file  # 2 s that mapped files do without

      orbax_file.save(orbax, map_tensors(working), overwrite=overwrite)
    if working != mapped:
      working.unlink()
    return wanted


def _write(opened: sources.Source, target: Network, path: pathlib.Path, restart: bool,
           progress: Callable[[int], None] | None, say: Callable[[str], None]) -> None:
  """Fills the mapped file, piece by piece."""
  leaves = target.leaves
  writer = SafetensorsWriter(
      path, {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()},
      metadata(target, opened), restart=restart)
  if writer.resumed:
    say(f'resuming: {writer.resumed} pieces are there already.')
  for piece in target.pieces():
    if not writer.is_done(piece.path, piece.layer):
      with writer.piece(piece.path, piece.layer) as array:
        array[...] = networks.read_piece(opened.tensors, piece)
    if progress:
      progress(1)
  writer.finish()


def metadata(target: Network, opened: sources.Source) -> dict[str, str]:
  """What the header says: enough to load the network, and what it was made of."""
  files = {path.name: outputs.file_digest(path) for path in opened.files}
  return {'format': FORMAT, 'version': VERSION, 'kind': target.kind,
          'spec': json.dumps(dataclasses.asdict(target.spec), sort_keys=True),
          'source': json.dumps(files, sort_keys=True),
          'choices': json.dumps(opened.notes)}  # which entry, for one


def is_converted(path: pathlib.Path) -> bool:
  """Whether a file is one of ours."""
  return path.suffix == '.safetensors' and path.is_file() and (
      read_safetensors(path)[1].get('format') == FORMAT)


def open_converted(path: pathlib.Path, spec: NetworkSpec) -> Callable[[], Any]:
  """Checks a converted network by its header; what is returned loads it.

  Args:
    path: `converted_path` or `orbax_path`.
    spec: sizes, which must be the file's; the precision may differ.

  Raises:
    WeightsError: another network, another version, damaged, or tensors that do not fit.
  """
  target = networks.network(spec)
  if path.is_dir():
    return _open_orbax(path, target)
  tensors, header = read_safetensors(path)
  if header.get('version') != VERSION or header.get('kind') != target.kind:
    kind, version = (brief(header.get(name, '')) for name in ('kind', 'version'))
    raise WeightsError(f'{path} holds {kind} in version {version}, wanted {target.kind!r} in '
                       f'version {VERSION!r}; convert it again.')
  _check_sizes(path, _sizes(path, header, type(spec)), spec)
  _check_leaves(path, {name: tensor.shape for name, tensor in tensors.items()}, target)
  # Cast on the host: JAX would compile a program for every shape.
  return lambda: jax.tree_util.tree_map_with_path(
      lambda p, leaf: jnp.asarray(tensors[dotted(p)].read().astype(leaf.dtype)), target.shapes)


def _sizes(path: pathlib.Path, header: Mapping[str, str], kind: type[NetworkSpec]) -> NetworkSpec:
  """What a header says about sizes, which may be anything."""
  try:
    return from_dict(kind, json.loads(header['spec']))
  except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
          ValueError) as error:
    raise WeightsError(f'{path} says no sizes of a {kind.__name__} ({type(error).__name__}: '
                       f'{reason(error)}); convert it again.') from error


def _check_sizes(path: pathlib.Path, own: NetworkSpec, spec: NetworkSpec) -> None:
  for field in dataclasses.fields(spec):
    got, wanted = getattr(own, field.name), getattr(spec, field.name)
    if field.name not in ('dtypes', 'remat', 'attention', 'convolution') and got != wanted:
      raise WeightsError(f'{path} was converted with {field.name}={ascii(got)[:80]}, the config '
                         f'says {wanted}; use the config of these weights.')


def _check_leaves(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], target: Network) -> None:
  wanted = {name: tuple(leaf.shape) for name, leaf in target.leaves.items()}
  if shapes != wanted:
    wrong = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
    raise WeightsError(f'{path} does not fit the {target.kind}: {len(wrong)} parameters differ, '
                       f'first {brief(wrong[0])}; convert it again.')


def _open_orbax(path: pathlib.Path, target: Network) -> Callable[[], Any]:
  from pf_jax.weights import orbax_file

  with _orbax_errors(path):
    shapes = orbax_file.shapes(path)
  _check_leaves(path, shapes, target)

  def load() -> Any:
    with _orbax_errors(path):
      values = orbax_file.load(path, target.leaves)
    return jax.tree_util.tree_map_with_path(lambda p, leaf: values[dotted(p)], target.shapes)

  return load


@contextlib.contextmanager
def _orbax_errors(path: pathlib.Path) -> Iterator[None]:
  """Orbax raises nearly anything at files that it dislikes, over many lines."""
  try:
    yield
  except Exception as error:
    raise WeightsError(f'{path} is not a whole Orbax checkpoint ({type(error).__name__}: '
                       f'{reason(error)}); convert it again.') from error


def map_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of a converted file as read-only views, each with a map of its own."""
  tensors, _ = read_safetensors(path)
  with open(path, 'rb') as stream:
    size = int.from_bytes(stream.read(8), 'little')
    header = json.loads(stream.read(size))
    views = {}
    for name, tensor in tensors.items():
      begin, end = header[name]['data_offsets']
      _, data = map_bytes(stream.fileno(), 8 + size + begin, end - begin, mmap.ACCESS_READ)
      views[name] = data.view(tensor.dtype).reshape(tensor.shape)
  return views

