"""Sizes of kernels that were timed on a card, kept as JSON and looked up while a program is traced.

A table says which sizes were fastest for a kernel, a kind of device, a version of jax and a shape.
Two are read: the packaged one (`tuned.json` beside this module) and the user's, which wins: the
file that PF_JAX_TUNING names, else pf_jax/tuning.json in $XDG_CACHE_HOME or ~/.cache. `launch.bench
--tune` fills the user's. What no table says has the kernel's default; a table that cannot be read
is warned of, once a process, and says nothing. Programs that were traced before keep their sizes.

  {"format": "pf_jax tuning", "version": 1,
   "sizes": {KERNEL: {DEVICE KIND: {JAX VERSION: {SHAPE: {"sizes": {...}, "seconds": 0.001}}}}}}
"""

import dataclasses
import functools
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from pf_jax import outputs
from pf_jax.kernels.platform import target_device_kind

VARIABLE = 'PF_JAX_TUNING'
PACKAGED = pathlib.Path(__file__).with_name('tuned.json')
FORMAT, VERSION = 'pf_jax tuning', 1

# A frozen dataclass of whole numbers, such as `TileSpec`.
Sizes = TypeVar('Sizes')


class Problem(NamedTuple):
  """What sizes are chosen for.

  Attributes:
    kernel: its name.
    shape: of its arguments with their dtypes, in words of the kernel's own.
    device_kind: as the driver calls the device.
    jax_version: whose compiler made the program.
  """

  kernel: str
  shape: str
  device_kind: str
  jax_version: str

  @classmethod
  def here(cls, kernel: str, shape: str) -> 'Problem':
    """On the device that is traced for."""
    return cls(kernel, shape, target_device_kind(), jax.__version__)

  @property
  def path(self) -> tuple[str, ...]:
    """Keys of a table, from the outermost one."""
    return self.kernel, self.device_kind, self.jax_version, self.shape


class BadTable(ValueError):
  """A file that is not a table of tuned sizes."""


class NothingFits(ValueError):
  """No candidate runs on this device."""


def user_path() -> pathlib.Path:
  """The user's table, whether or not it is there."""
  if given := os.environ.get(VARIABLE):
    return pathlib.Path(given)
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return pathlib.Path(cache, 'pf_jax', 'tuning.json')


def read(path: str | os.PathLike) -> dict[str, Any]:
  """A table's nested sizes; a file that is not there is an empty one.

  Raises:
    BadTable: the file cannot be read, or is something else.
  """
  try:
    with open(path, encoding='utf-8') as file:
      data = json.load(file)
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise BadTable(_bad(path, f'cannot be read ({error})')) from error
  if not (isinstance(data, dict) and data.get('format') == FORMAT
          and _nested(data.get('sizes'), len(Problem._fields))):
    raise BadTable(_bad(path, f'is not a table of tuned sizes ("format": "{FORMAT}")'))
  if data.get('version') != VERSION:
    raise BadTable(_bad(path, f'has version {data.get("version")}, wanted {VERSION}'))
  return data['sizes']


def _nested(value: Any, depth: int) -> bool:
  """Whether these are dicts down to a depth."""
  return isinstance(value, dict) and (
      depth == 1 or all(_nested(inner, depth - 1) for inner in value.values()))


def _bad(path: str | os.PathLike, reason: str) -> str:
  return (f'{os.fspath(path)} {reason}; move it away, or name another file by {VARIABLE}, and fill '
          'it with launch.bench --tune.')


@functools.cache
def _known(path: pathlib.Path) -> dict[str, Any]:
  """A table as it was when it was first asked for; warned of if it cannot be read."""
  try:
    return read(path)
  except BadTable as error:
    warnings.warn(f'{error} Until then kernels have their default sizes.', stacklevel=2)
    return {}


def sizes(problem: Problem, default: Sizes) -> Sizes:
  """The tuned sizes for a problem, else the default; reads files only, and each of them once."""
  for path in (user_path(), PACKAGED):
    entry: Any = _known(path)
    for key in problem.path:
      entry = entry.get(key) if isinstance(entry, dict) else None
    if entry is not None:
      try:
        return _checked(entry, default)
      except (AttributeError, KeyError, TypeError, ValueError) as error:
        warnings.warn(f'{path} has an entry for {problem.kernel}, {problem.shape}, that is no use '
                      f'({error}); tune it again or take it out.', stacklevel=2)
  return default


def _checked(entry: Any, default: Any) -> Any:
  """An entry as sizes; TypeError, KeyError or ValueError if it cannot be."""
  found = entry['sizes']
  if any(type(value) is not int for value in found.values()):
    raise TypeError(f'wanted whole numbers, got {found}')
  return dataclasses.replace(default, **found)


def record(problem: Problem, chosen: Any, seconds: float, path: str | os.PathLike | None = None
           ) -> None:
  """Adds an entry to a table and puts the whole file in place at once.

  Args:
    problem: what was tuned; an older entry of it is replaced.
    chosen: dataclass of sizes.
    seconds: that it took.
    path: of the table; None: the user's.

  Raises:
    BadTable: there is a file already that is no table.
    NotWritable: its directory cannot be written.
  """
  target = pathlib.Path(path or user_path())
  table = read(target)
  *outer, last = problem.path
  place = table
  for key in outer:
    place = place.setdefault(key, {})
  place[last] = {'sizes': dataclasses.asdict(chosen), 'seconds': seconds}
  outputs.prepare_directory(target.parent)
  outputs.write_json(target, {'format': FORMAT, 'version': VERSION, 'sizes': table})
  _known.cache_clear()


def tune(problem: Problem, candidates: Sequence[Sizes],
         prepare: Callable[[Sizes], Callable[[], Any]],
         time: Callable[[Mapping[Sizes, Callable[[], Any]]], Mapping[Sizes, float]], *,
         say: Callable[[str], None] = print, path: str | os.PathLike | None = None) -> Sizes:
  """Times candidates and records the fastest one.

  Args:
    problem: what is tuned.
    candidates: sizes, all different.
    prepare: compiles a candidate; raises if it is no use, and says why.
    time: seconds of what `prepare` made.
    say: receives a line for each candidate.
    path: of the table; None: the user's.

  Returns:
    The fastest.

  Raises:
    NothingFits: there is no use in any of them.
    BadTable, NotWritable: the table cannot be written; said before anything is compiled.
  """
  read(target := pathlib.Path(path or user_path()))
  outputs.prepare_directory(target.parent)
  ready: dict[Sizes, Callable[[], Any]] = {}
  for candidate in candidates:
    try:
      ready[candidate] = prepare(candidate)
    except Exception as error:  # compilers raise anything
      reason = (str(error).splitlines() or [''])[0] or type(error).__name__
      say(f'  {candidate}: skipped: {reason}')
  if not ready:
    raise NothingFits(f'none of {len(candidates)} candidates for {problem.kernel}, '
                      f'{problem.shape}, runs on {problem.device_kind}; the lines above say why.')
  seconds = time(ready)
  for candidate, taken in seconds.items():
    say(f'  {candidate}: {taken:.3e} s')
  best = min(seconds, key=lambda candidate: seconds[candidate])
  record(problem, best, seconds[best], target)
  say(f'{problem.kernel}, {problem.shape}: {best}, now in {target}')
  return best
