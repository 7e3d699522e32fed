"""Output directories: who may write there, under which names, and how files appear whole.

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
import shutil
import socket
import stat
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
    # Its last holder may have removed it since it was opened: others would lock another file.
    return os.path.samestat(os.fstat(stream.fileno()), os.stat(stream.name))
  except (BlockingIOError, FileNotFoundError):
    return False
  except OSError as error:
    if error.errno not in _NO_FLOCK:
      raise
    owner = _owner(stream)
    return owner.get('host') != socket.gethostname() or not _alive(int(owner.get('pid', 0)))


@contextlib.contextmanager
def _locked(lock: pathlib.Path, place: pathlib.Path, say: Callable[[str], None], *,
            remove: bool = False) -> Iterator[None]:
  """Holds a lock file for this process and writes into it whose it is; see `claim_directory`."""
  with open(lock, 'a+', encoding='utf-8') as stream:
    owner = _owner(stream)
    if not _acquire(stream):
      raise DirectoryInUse(
          f'{place} is in use by process {owner.get("pid", "?")} on {owner.get("host", "?")}; '
          'wait for it to end or choose another directory.')
    if owner:
      say(f'{place}: taking over the lock of process {owner.get("pid", "?")}, which is gone.')
    stream.truncate(0)
    stream.write(json.dumps({'pid': os.getpid(), 'host': socket.gethostname()}))
    stream.flush()
    try:
      yield
    finally:
      if remove:  # while it is held: nobody else's can be hit
        lock.unlink(missing_ok=True)
      stream.truncate(0)


@contextlib.contextmanager
def claim_directory(directory: str | os.PathLike, *,
                    say: Callable[[str], None] = print) -> Iterator[pathlib.Path]:
  """Holds a directory for this process: creates it, checks it is writable, locks it.

  The kernel drops the lock when its holder dies, even by SIGKILL, so a lock left by a dead
  process never blocks: it is taken over, and said so; files that such a process left half-written
  are deleted. If the body fails, a directory that was created here and holds nothing is removed
  again.

  Args:
    directory: where the run will write.
    say: receives the one-line notice about a stale lock.

  Yields:
    The directory as a path.

  Raises:
    DirectoryInUse: a live process holds it.
    NotWritable: it cannot be created or written.
  """
  created = [path for path in (pathlib.Path(directory), *pathlib.Path(directory).parents)
             if not path.exists()]
  path = prepare_directory(directory)
  with _locked(path / LOCK_NAME, path, say):
    _delete_torn_files(path)
    try:
      yield path
    except BaseException:
      if created and os.listdir(path) == [LOCK_NAME]:
        (path / LOCK_NAME).unlink()  # while it is held: nobody else's can be hit
        with contextlib.suppress(OSError):  # somebody else has put something there by now
          for folder in created:
            folder.rmdir()
      raise


# --- directories that appear whole ----------------------------------------------------------------
# Hidden siblings of a directory NAME, all under its lock:
#   .NAME.lock       who is writing
#   .NAME.PID.tmp    being written (or, as .NAME.PID.old.tmp, being deleted): nobody needs it
#   .NAME.PID.old    whole; if NAME is missing, the only one there is


@contextlib.contextmanager
def atomic_directory(directory: str | os.PathLike, check: Callable[[pathlib.Path], None], *,
                     say: Callable[[str], None] = print) -> Iterator[pathlib.Path]:
  """Yields a temporary directory that takes the place of `directory` if the body succeeds.

  It lies beside it, as `.NAME.PID.tmp`. No portable system call exchanges two directories, so that
  one with something in it is replaced in three steps, each of them atomic:

    1. the old directory becomes `.NAME.PID.old`;
    2. the new one becomes NAME;
    3. the old one becomes `.NAME.PID.old.tmp`, and is deleted.

  A kill before 1 leaves the old directory, a kill after 2 the new one. A kill between them leaves
  nothing under the name and the old one whole under its hidden name; the next call moves it back,
  before anything else. It also deletes all that killed processes left. An exception, Ctrl-C among
  them, leaves the old directory and nothing beside it.

  Args:
    directory: created with its parents; a link is followed.
    check: is given the directory if it holds something, first and again before 1; raises if it must
      not be replaced.
    say: receives notices.

  Yields:
    The temporary directory, empty.

  Raises:
    DirectoryInUse: a live process is writing the same directory.
    NotWritable: it is a file or a mount point, or its parent cannot be written.
    KeyboardInterrupt: with a message if it came too late, after 2.
  """
  target = _replaceable(pathlib.Path(directory).resolve())
  with _locked(_sibling(target, 'lock'), target, say, remove=True):
    if _move_back(target):
      say(f'{target}: moved back what an interrupted run had set aside.')
    if _holds_something(target):
      check(target)
    _delete_left_over(target)
    new = _sibling(target, f'{os.getpid()}.tmp')
    new.mkdir()
    try:
      yield new
      _sync_tree(new)
      _put_in_place(new, target, check)
      _delete_left_over(target)
    except BaseException as error:
      placed = not new.exists()
      try:
        _delete_left_over(target)
      finally:  # said even if Ctrl-C is pressed again
        if placed and isinstance(error, KeyboardInterrupt):
          raise KeyboardInterrupt(f'{target} is complete') from error
      raise


def _replaceable(target: pathlib.Path) -> pathlib.Path:
  """Refuses what a rename cannot replace."""
  if target.exists() and not target.is_dir():
    raise NotWritable(f'cannot write into {str(target)!r} (is not a directory); choose another '
                      'name.')
  if os.path.ismount(target):
    raise NotWritable(f'{target} is a mount point, which cannot be replaced as a whole; choose a '
                      'new directory in it.')
  prepare_directory(target.parent)
  return target


def _sibling(target: pathlib.Path, ending: str) -> pathlib.Path:
  return target.with_name(f'.{target.name}.{ending}')


def _left_over(target: pathlib.Path) -> list[pathlib.Path]:
  """Siblings of all processes; whoever holds the lock knows that the others are dead."""
  name = re.compile(re.escape(f'.{target.name}.') + r'[0-9]+(\.old|\.tmp|\.old\.tmp)')
  return [path for path in target.parent.iterdir() if name.fullmatch(path.name)]


def _holds_something(directory: pathlib.Path) -> bool:
  return directory.exists() and any(directory.iterdir())


def _move_back(target: pathlib.Path) -> bool:
  """Undoes step 1 where step 2 did not follow; whether there was something to undo."""
  for path in _left_over(target):
    if path.suffix == '.old' and not _holds_something(target):
      os.replace(path, target)
      return True
  return False


def _put_in_place(new: pathlib.Path, target: pathlib.Path,
                  check: Callable[[pathlib.Path], None]) -> None:
  """Steps 1 and 2, or neither."""
  try:
    if _holds_something(target):
      check(target)  # again: others may have put something there meanwhile
      os.replace(target, _sibling(target, f'{os.getpid()}.old'))
    os.replace(new, target)
    _sync(target.parent)
  except BaseException:
    _move_back(target)
    raise


def _delete_left_over(target: pathlib.Path) -> None:
  """Step 3, and the same for what others left; what may be the only one there is stays."""
  # Longer names first: the one that .old gets must be free.
  for path in sorted(_left_over(target), reverse=True):
    if path.suffix == '.old':
      if not _holds_something(target):
        continue
      path = path.rename(f'{path}.tmp')  # from here on it is not whole
    shutil.rmtree(path, ignore_errors=True)


def _sync_tree(root: pathlib.Path) -> None:
  for folder, _, names in os.walk(root):
    for name in (*names, '.'):
      _sync(os.path.join(folder, name))


def _sync(path: str | os.PathLike) -> None:
  """Puts a file, or a directory's names, on disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


# --- files that appear whole ----------------------------------------------------------------------


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


def _delete_torn_files(directory: pathlib.Path) -> None:
  """Deletes what killed processes were writing by `atomic_path`."""
  for path in directory.iterdir():
    torn = re.fullmatch(r'\..+\.([0-9]{1,9})\.tmp(\.[^.]+)?', path.name)
    if torn and path.is_file() and not _alive(int(torn[1])):
      path.unlink(missing_ok=True)


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

  Raises:
    OSError: there is nothing, or a pipe or a device, which may never end.
  """
  if os.path.isdir(path):  # an Orbax checkpoint
    root = pathlib.Path(path)
    inside = sorted(f'{p.relative_to(root)} {p.stat().st_size}' for p in root.rglob('*'))
    return hashlib.sha256('\n'.join(inside).encode()).hexdigest()[:32]
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise OSError(errno.EINVAL, 'is a pipe or a device', os.fspath(path))
  size = os.path.getsize(path)
  with open(path, 'rb') as stream:
    if size <= 64 * _SAMPLE_BYTES:
      return hashlib.file_digest(stream, 'sha256').hexdigest()[:32]
    digest = hashlib.sha256(str(size).encode())
    digest.update(stream.read(_SAMPLE_BYTES))
    stream.seek(-_SAMPLE_BYTES, os.SEEK_END)
    digest.update(stream.read())
    return digest.hexdigest()[:32]
