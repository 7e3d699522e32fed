"""Output directories: who may write there, under which names, and how a file appears whole.

Standard library only, so every layer may use it and nothing here costs import time.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import re
import socket
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from typing import IO, Any

LOCK_NAME = '.lock'
_SLUG_BYTES = 64
_HASH_DIGITS = 8
_SAMPLE_BYTES = 1 << 20
# Errors of a filesystem that has no flock at all (some network mounts).
_NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class DirectoryInUse(RuntimeError):
  """Another live process holds the directory's lock."""


class NotWritable(ValueError):
  """Nothing can be written into the directory."""


class OutputExists(FileExistsError):
  """A file of that name is there already and overwriting was not asked for."""


def slug(text: str) -> str:
  """A harmless ASCII file-name part of at most 64 bytes; '' when nothing usable is left."""
  plain = unicodedata.normalize('NFKD', text).encode('ascii', 'ignore').decode()
  words = re.sub(r'[^a-z0-9]+', '-', plain.lower())
  return words[:_SLUG_BYTES].strip('-')


def output_name(index: int, prompt: str, suffix: str = '') -> str:
  """The name of one output: index, a slug to read, and a hash that tells like slugs apart.

  Whatever the prompt holds (slashes, NUL, emoji, ten thousand characters, 'CON', '-rf'), the
  result is one short ASCII path component that starts with a digit.

  Args:
    index: position of the video in its batch, from 0.
    prompt: any text.
    suffix: ending with its dot, as in '.mp4'.

  Raises:
    ValueError: the index is negative, or the suffix is not a plain ending.
  """
  if index < 0:
    raise ValueError(f'{index=} is negative; count outputs from 0.')
  if not re.fullmatch(r'(\.[A-Za-z0-9_]+)*', suffix):
    raise ValueError(f'{suffix=} is not a file ending; use something like .mp4.')
  # surrogatepass: text read from a badly encoded file may hold lone surrogates.
  digest = hashlib.sha256(prompt.encode('utf-8', 'surrogatepass')).hexdigest()[:_HASH_DIGITS]
  return '-'.join(part for part in (f'{index:03d}', slug(prompt), digest) if part) + suffix


def output_path(directory: str | os.PathLike, name: str, *,
                overwrite: bool = False) -> pathlib.Path:
  """Joins a name to its output directory and checks that writing there is allowed.

  Raises:
    ValueError: the name would leave the directory.
    OutputExists: the file exists and `overwrite` is false.
  """
  root = pathlib.Path(directory)
  path = root / name
  if path.name != name or name in ('', '.', '..') or '\0' in name:
    raise ValueError(f'{name=} is not a plain file name; outputs stay inside {root}.')
  if (path.exists() or path.is_symlink()) and not overwrite:
    raise OutputExists(f'{path} exists already; pass --overwrite or choose another directory.')
  if path.is_dir() or path.is_symlink():
    raise ValueError(f'{path} is a directory or a link, not a file to replace; remove it first.')
  return path


def prepare_directory(directory: str | os.PathLike) -> pathlib.Path:
  """Creates a directory and proves that files can be written into it.

  Raises:
    NotWritable: it is a file, or it (or its parent) is not writable.
  """
  path = pathlib.Path(directory)
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    reason = 'is not a directory' if path.exists() and not path.is_dir() else error.strerror
    raise NotWritable(
        f'cannot write into {str(path)!r} ({reason}); choose a writable directory.') from error
  return path


def _alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True


def _owner(stream: IO[str]) -> dict[str, Any]:
  stream.seek(0)
  try:
    owner = json.loads(stream.read() or '{}')
  except ValueError:
    return {}
  return owner if isinstance(owner, dict) else {}


def _acquire(stream: IO[str]) -> bool:
  """Takes the kernel's lock; without one, trusts the pid written in the file."""
  try:
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno not in _NO_FLOCK:
      raise
    owner = _owner(stream)
    return owner.get('host') != socket.gethostname() or not _alive(int(owner.get('pid', 0)))


@contextlib.contextmanager
def claim_directory(directory: str | os.PathLike, *,
                    say: Callable[[str], None] = print) -> Iterator[pathlib.Path]:
  """Holds a directory for this process: creates it, checks it is writable, locks it.

  The kernel drops the lock when its holder dies, even by SIGKILL, so a lock left by a dead
  process never blocks: it is taken over, and said so.

  Args:
    directory: where the run will write.
    say: receives the one-line notice about a stale lock.

  Yields:
    The directory as a path.

  Raises:
    DirectoryInUse: a live process holds it.
    NotWritable: it cannot be created or written.
  """
  path = prepare_directory(directory)
  # Not unlinked at the end: a waiting process could then lock a file nobody else sees.
  with open(path / LOCK_NAME, 'a+', encoding='utf-8') as stream:
    owner = _owner(stream)
    if not _acquire(stream):
      raise DirectoryInUse(
          f'{path} is in use by process {owner.get("pid", "?")} on {owner.get("host", "?")}; '
          'wait for it to end or choose another directory.')
    if owner:
      say(f'{path}: taking over the lock of process {owner.get("pid", "?")}, which is gone.')
    stream.truncate(0)
    stream.write(json.dumps({'pid': os.getpid(), 'host': socket.gethostname()}))
    stream.flush()
    try:
      yield path
    finally:
      stream.truncate(0)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary path beside `path`, moved onto it only if the body succeeds.

  The temporary name keeps the suffix, because image and array writers choose by it.
  """
  target = pathlib.Path(path)
  temporary = target.with_name(f'.{target.stem}.{os.getpid()}.tmp{target.suffix}')
  try:
    yield temporary
    with open(temporary, 'rb') as stream:
      os.fsync(stream.fileno())
    os.replace(temporary, target)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a whole text file or none of it."""
  with atomic_path(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
  """Writes a whole file or none of it."""
  with atomic_path(path) as temporary:
    temporary.write_bytes(data)


def json_text(value: Any) -> str:
  """Indented JSON; NaN becomes null, as strict readers require.

  Raises:
    TypeError: a value that JSON has no form for.
  """
  return json.dumps(_finite(value), indent=2, allow_nan=False) + '\n'


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes `json_text` of a value atomically."""
  write_text(path, json_text(value))


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {str(key): _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  if isinstance(value, float):
    return value if abs(value) != float('inf') and value == value else None
  # Scalars and arrays of NumPy and JAX.
  return _finite(value.tolist()) if hasattr(value, 'tolist') else value


def file_digest(path: str | os.PathLike) -> str:
  """The first half of a SHA-256: of a whole small file, of a large one's size, start and end.

  Weights of many gigabytes would take longer to hash than to load; other weights differ in their
  first megabyte.
  """
  if os.path.isdir(path):  # an Orbax checkpoint
    root = pathlib.Path(path)
    inside = sorted(f'{p.relative_to(root)} {p.stat().st_size}' for p in root.rglob('*'))
    return hashlib.sha256('\n'.join(inside).encode()).hexdigest()[:32]
  size = os.path.getsize(path)
  with open(path, 'rb') as stream:
    if size <= 64 * _SAMPLE_BYTES:
      return hashlib.file_digest(stream, 'sha256').hexdigest()[:32]
    digest = hashlib.sha256(str(size).encode())
    digest.update(stream.read(_SAMPLE_BYTES))
    stream.seek(-_SAMPLE_BYTES, os.SEEK_END)
    digest.update(stream.read())
    return digest.hexdigest()[:32]
