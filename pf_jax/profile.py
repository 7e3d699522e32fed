"""Traces of what runs on the devices, for XProf or Perfetto.

A trace grows with every operation that runs, so that one of a few blocks shows all there is to see.
Its operations bear the names of the `jax.named_scope`s they were traced under: denoise_0 .. 3,
select_blocks, decode, compress, clean_pass, commit.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from pf_jax import outputs

_PERFETTO = '*.trace.json.gz'


def new_directory(directory: str | os.PathLike) -> pathlib.Path:
  """Creates a directory for traces, which must hold nothing: others could not be told apart.

  Raises:
    OutputExists: it holds something.
    NotWritable: it is a file or cannot be written.
  """
  path = pathlib.Path(directory)
  if path.is_dir() and any(path.iterdir()):
    raise outputs.OutputExists(f'{path} holds something already; traces need a new directory.')
  return outputs.prepare_directory(path)


@contextlib.contextmanager
def own_names() -> Iterator[None]:
  """Programs compiled meanwhile bear the names of this code's scopes.

  The cache of compiled programs is looked up without names: it may hold the same program under
  those of an earlier version.
  """
  settings: Any = jax.config
  name = 'jax_compilation_cache_include_metadata_in_key'
  before = getattr(settings, name)
  settings.update(name, True)
  try:
    yield
  finally:
    settings.update(name, before)


@contextlib.contextmanager
def trace(directory: str | os.PathLike) -> Iterator[None]:
  """Traces the devices and JAX meanwhile; Python's calls, most of a trace otherwise, are left out.

  What runs at the end may be cut off: wait for results inside.

  Args:
    directory: a folder of this trace's own is made in it.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with jax.profiler.trace(os.fspath(directory), profiler_options=options):
    yield


def where_to_look(directory: str | os.PathLike) -> str:
  """How the traces of a directory are opened."""
  found = ', '.join(str(path) for path in sorted(pathlib.Path(directory).rglob(_PERFETTO)))
  return f'xprof --logdir={directory}, or open {found} in https://ui.perfetto.dev'
