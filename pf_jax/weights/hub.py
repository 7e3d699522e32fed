"""Downloads of released weights: a pinned revision, and only files that weights are made of.

  hub:owner/name@revision        the whole snapshot, or what a network needs of it
  hub:owner/name@revision/path   one folder or file of it

A revision is a commit's full hash. Branches and tags can move, so that the same command would give
other weights tomorrow; they are refused. A directory on disk needs none of this.
"""

import fnmatch
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from pf_jax.weights.tensors import WeightsError

PREFIX = 'hub:'
# Weights, sizes and tokenizers; never code.
ALLOWED = ('*.safetensors', '*.json', '*.pth', '*.pt', '*spiece.model')
_ADDRESS = re.compile(
    r'hub:(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w.-]+)(?:/(?P<folder>[\w./-]+))?')
_COMMIT = re.compile(r'[0-9a-f]{40}')


class NotDownloaded(WeightsError):
  """Weights that are on the hub and not on this machine."""


class Address(NamedTuple):
  """What to download.

  Attributes:
    repository: 'owner/name'.
    revision: a commit's hash, 40 hexadecimal digits.
    folder: inside of it; '' for all.
  """

  repository: str
  revision: str
  folder: str

  @classmethod
  def parse(cls, text: str) -> 'Address':
    """Reads 'hub:owner/name@revision[/folder]'.

    Raises:
      WeightsError: another form, or a revision that can move.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or '..' in text:
      raise WeightsError(f'{text!r} is not an address of the hub; wanted hub:owner/name@revision '
                         'or hub:owner/name@revision/folder.')
    if not _COMMIT.fullmatch(match['revision']):
      raise WeightsError(f'{text!r}: revision {match["revision"]!r} can move; wanted the full hash '
                         'of a commit (40 digits), as the hub\'s list of commits shows it.')
    return cls(match['repository'], match['revision'], (match['folder'] or '').strip('/'))

  def patterns(self, wanted: Sequence[str]) -> tuple[str, ...]:
    """The files to download: those wanted of a whole snapshot, all weights of a named folder."""
    if not self.folder:
      return tuple(wanted)
    if any(fnmatch.fnmatch(self.folder, pattern) for pattern in ALLOWED):
      return (self.folder,)
    return tuple(f'{self.folder}/{pattern}' for pattern in ALLOWED)


def local(source: str, *, wanted: Sequence[str] = ALLOWED, download: bool = True) -> pathlib.Path:
  """A directory or file on disk: the source itself, or the download that its address names.

  Args:
    source: a path, or 'hub:...'.
    wanted: patterns of files, for an address without a path; all must be among `ALLOWED`.
    download: whether what is not on disk may be fetched.

  Raises:
    NotDownloaded: it is not on disk and must not be fetched.
    WeightsError: not an address, no `huggingface_hub`, or a download that failed.
  """
  if not source.startswith(PREFIX):
    return pathlib.Path(source)
  address = Address.parse(source)
  path = pathlib.Path(_snapshot(source, address, tuple(wanted), download), address.folder)
  if not path.exists():
    error = WeightsError if download else NotDownloaded
    raise error(f'{source}: there is no {address.folder!r} with weights '
                f'{"in that revision" if download else "on this machine yet"}.')
  return path


@functools.cache  # the library asks the hub each time
def _snapshot(source: str, address: Address, wanted: tuple[str, ...], download: bool) -> str:
  try:
    import huggingface_hub
  except ImportError as error:
    raise WeightsError(f'{source} needs the package huggingface_hub; install it with '
                       '`pip install "pf-jax[hub]"`, or download the weights yourself.') from error
  try:
    return huggingface_hub.snapshot_download(
        address.repository, revision=address.revision, local_files_only=not download,
        allow_patterns=list(address.patterns(wanted)))
  except Exception as error:  # the library has a dozen of its own, of several ancestries
    if not download:
      raise NotDownloaded(f'{source} is not on this machine yet.') from error
    raise WeightsError(f'{source} could not be downloaded ({type(error).__name__}: '
                       f'{str(error).splitlines()[0] if str(error) else "no reason given"}); check '
                       'the address and the connection, or give a directory.') from error
