"""One network from disk, ready to run: from released files, or from what `convert` made of them."""

import pathlib
from collections.abc import Callable
from typing import Any

from pf_jax.weights import convert, networks, sources
from pf_jax.weights.networks import NetworkSpec


def network_files(path: pathlib.Path, spec: NetworkSpec) -> tuple[pathlib.Path, ...]:
  """The files a network would be read from.

  Raises:
    WeightsError: there are none.
  """
  kind = networks.network(spec).kind
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


def load_network(path: pathlib.Path, spec: NetworkSpec, *, entry: str | None = None,
                 say: Callable[[str], None] = print) -> Any:
  """Loads a network in the precision of its spec.

  Args:
    path: a directory or file, see `sources`.
    spec: sizes and precision.
    entry: of a training checkpoint, see `sources.open_source`.
    say: receives what was chosen on the way.

  Returns:
    The module.

  Raises:
    WeightsError: missing, damaged, or of another model.
  """
  target = networks.network(spec)
  if (own := find_converted(path, target.kind)) is not None:
    return convert.load_converted(own, spec)
  source = sources.open_source(path, target, entry=entry)
  for note in source.notes:
    say(note)
  sources.check(source, target, path)
  return networks.from_released(source.tensors, spec)
