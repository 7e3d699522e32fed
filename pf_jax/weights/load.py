"""One network from disk, ready to run: from released files, or from what `convert` made of them.

`open_network` reads headers only and refuses whatever does not fit, so that a run can check all of
its networks before it loads the first of them.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from pf_jax.weights import convert, networks, sources
from pf_jax.weights.networks import NetworkSpec
from pf_jax.weights.tensors import WeightsError


class StoredNetwork(NamedTuple):
  """A network on disk whose names, shapes and types fit.

  Attributes:
    files: it is read from.
    load: reads it, in the precision of its spec; raises `WeightsError` if values are damaged.
  """

  files: tuple[pathlib.Path, ...]
  load: Callable[[], Any]


def network_files(path: pathlib.Path, spec: NetworkSpec) -> tuple[pathlib.Path, ...]:
  """The files a network would be read from.

  Raises:
    WeightsError: there are none.
  """
  kind = networks.kind_of(spec)
  own = find_converted(path, kind)
  return (own,) if own is not None else sources.find_files(path, kind)


def find_converted(path: pathlib.Path, kind: str) -> pathlib.Path | None:
  """A converted network in a directory, or the file itself; None if there is none."""
  for candidate in (convert.converted_path(path, kind), path):
    if convert.is_converted(candidate):
      return candidate
  for candidate in (convert.orbax_path(path, kind), path):
    if candidate.is_dir() and candidate.suffix == '.orbax':
      return candidate
  return None


def open_network(path: pathlib.Path, spec: NetworkSpec, *, entry: str | None = None,
                 say: Callable[[str], None] = print) -> StoredNetwork:
  """Finds a network and compares it with its spec, without reading values.

  Args:
    path: a directory or file, see `sources`.
    spec: sizes and precision.
    entry: of a training checkpoint, see `sources.open_source`.
    say: receives what was chosen on the way.

  Raises:
    WeightsError: missing, damaged, or of another model.
  """
  own = find_converted(path, networks.kind_of(spec))
  if own is not None:
    if entry is not None:
      raise WeightsError(f'{own} is converted and has no entries; leave out {entry=}.')
    return StoredNetwork((own,), convert.open_converted(own, spec))
  target = networks.network(spec)
  source = sources.open_source(path, target, entry=entry)
  for note in source.notes:
    say(note)
  sources.check(source, target, path)
  return StoredNetwork(source.files, lambda: networks.fill(source.tensors, target))


def load_network(path: pathlib.Path, spec: NetworkSpec, *, entry: str | None = None,
                 say: Callable[[str], None] = print) -> Any:
  """Loads a network in the precision of its spec; arguments and errors as `open_network`."""
  return open_network(path, spec, entry=entry, say=say).load()
