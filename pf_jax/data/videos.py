"""A directory of videos with captions: which clips it holds, and which files cannot be used.

  videos/street.mp4        any of ENDINGS, in capitals too; directories inside are searched
  videos/street.txt        its caption: UTF-8 text, lines are joined by spaces

A video gives clips that follow each other from its first frame on; what is left at its end is not
used. Clips are in the order of their files' paths, by code points, whatever reads them.

Every file is decoded twice. The first time finds out what the store must know before it is begun:
how many clips there are, and that each of them is whole. A file that is broken anywhere in them is
known by name before the first one is encoded, and encoding never meets it: no hole can arise in the
store, and no run of hours ends at its last file. Threads share that work, and pictures of hardly
any pixels are made of it: 82 frames of 1280x720 take a core 3 s, and 5 s at 832x480.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pf_jax import outputs
from pf_jax.data import latents, media
from pf_jax.models.tokenizer import clean_prompt
from pf_jax.request import read_prompts

ENDINGS = ('.avi', '.m2ts', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.mts', '.ogv', '.ts',
           '.webm', '.wmv')
CAPTION_ENDING = '.txt'
# Threads that decode, and clips they are ahead: one of 81 frames of 832x480 takes 100 MB.
_THREADS = min(os.cpu_count() or 1, 8)
_LOOK_SIDE = 16  # whether frames are whole does not depend on the size that is made of them

In = TypeVar('In')
Out = TypeVar('Out')


class VideosError(ValueError):
  """A directory that no clip can be made of; one line a user can act on."""


class ClipShape(NamedTuple):
  """Pixel frames of a clip, their size, and how many make a second."""

  frames: int
  height: int
  width: int
  fps: float


class Clip(NamedTuple):
  """Where a clip is found: path below the directory, which of its clips from 0, its caption."""

  name: str
  number: int
  caption: str


@dataclasses.dataclass(frozen=True)
class Videos:
  """What a directory holds, from `scan`.

  Attributes:
    root: the directory.
    shape: of every clip.
    clips: in the order of the store.
    skipped: name -> why nothing of this file is used.
    cut: name -> why only its first clips are used.
    sha256: of the content of all files that are used, their names and captions.
  """

  root: pathlib.Path
  shape: ClipShape
  clips: tuple[Clip, ...]
  skipped: Mapping[str, str]
  cut: Mapping[str, str]
  sha256: str

  @property
  def files(self) -> int:
    """How many of them are used."""
    return len({clip.name for clip in self.clips})

  def report(self) -> list[str]:
    """A line for every file that is not used as a whole, and one that counts."""
    total = (f'{_shown(self.root)}: {len(self.clips)} clips of {self.files} videos; '
             f'{len(self.skipped)} files skipped, {len(self.cut)} cut short.')
    return [*(f'skipped: {name}: {reason}' for name, reason in self.skipped.items()),
            *(f'cut short: {name}: {reason}' for name, reason in self.cut.items()), total]

  def read(self, indices: Sequence[int]) -> Iterator[latents.CaptionedClip]:
    """Decodes clips, some of them ahead; for `latents.ClipEncoder`.

    Raises:
      VideosError: a file is not what it was when it was looked at.
    """
    size = max(len(clip.caption.encode()) for clip in self.clips)

    def read(index: int) -> latents.CaptionedClip:
      clip = self.clips[index]
      text = latents.text_bytes(clip.caption, size)
      return latents.CaptionedClip(self._pixels(clip), clip.caption, {'text': text})

    return _in_order(read, indices)

  def _pixels(self, clip: Clip) -> np.ndarray:
    """uint8 [T, H, W, 3]."""
    try:
      frames = _decode(self.root / clip.name, clip.number, self.shape).frames
    except media.MediaError as error:
      raise VideosError(f'{error} It was whole before; start again.') from error
    if len(frames) < self.shape.frames:
      raise VideosError(f'{self.root / clip.name} has become shorter while clips were encoded; '
                        'start again.')
    return frames[:self.shape.frames]


def scan(root: str | os.PathLike, shape: ClipShape, *, clips_per_video: int = 1,
         progress: bool = True) -> Videos:
  """Looks for clips and decodes each of them once; see the module's docstring.

  Args:
    root: the directory.
    shape: of a clip.
    clips_per_video: most clips of one video.
    progress: shows a progress bar.

  Returns:
    What there is; perhaps no clip at all.

  Raises:
    VideosError: there is no such directory.
    ValueError: `clips_per_video` is not positive.
  """
  import tqdm

  if clips_per_video < 1:
    raise ValueError(f'{clips_per_video=} must be at least 1.')
  root = pathlib.Path(root)
  skipped: dict[str, str] = {}
  names = _find(root, skipped)
  clips: list[Clip] = []
  cut: dict[str, str] = {}
  digest = hashlib.sha256()
  looks = _in_order(lambda name: _look(root, name, shape, clips_per_video), names)
  for name, look in zip(names, tqdm.tqdm(looks, total=len(names), unit='video', desc='look',
                                         disable=None if progress else True), strict=True):
    if look.clips:
      digest.update(json.dumps([name, look.digest, look.clips, look.caption]).encode())
      clips += [Clip(name, number, look.caption) for number in range(look.clips)]
    if look.problem:
      (cut if look.clips else skipped)[_shown(name)] = look.problem
  return Videos(root, shape, tuple(clips), skipped, cut, digest.hexdigest()[:32])


def read_caption(path: str | os.PathLike) -> str:
  """The caption beside a video.

  Raises:
    VideosError: there is none, or nothing in it.
    RequestError: it cannot be read; see `read_prompts`.
  """
  file = pathlib.Path(path).with_suffix(CAPTION_ENDING)
  if not file.exists():
    raise VideosError(f'there is no caption; wanted {_shown(file.name)} beside it')
  if not file.read_bytes().strip():
    raise VideosError(f'the caption in {_shown(file.name)} is empty')
  caption = ' '.join(read_prompts(file))
  if not clean_prompt(caption):
    raise VideosError(f'the caption in {_shown(file.name)} holds no text')
  return caption


class _Look(NamedTuple):
  """What looking at one file found: its whole clips, and what is wrong with the rest."""

  clips: int
  problem: str
  caption: str
  digest: str


def _look(root: pathlib.Path, name: str, shape: ClipShape, most: int) -> _Look:
  path = root / name
  try:
    caption = read_caption(path)
    clips, problem = _count(path, shape._replace(height=_LOOK_SIDE, width=_LOOK_SIDE), most)
    return _Look(clips, problem, caption, outputs.file_digest(path) if clips else '')
  except Exception as error:  # one odd file among many thousands ends nothing
    return _Look(0, _reason(error, path), '', '')


def _count(path: pathlib.Path, shape: ClipShape, most: int) -> tuple[int, str]:
  """Whole clips of a video, and why it ends with them if it should not."""
  for count in range(most):
    try:
      read = _decode(path, count, shape)
    except media.MediaError as error:
      return count, _reason(error, path)
    if len(read.frames) < shape.frames:
      short = (f'{len(read.frames)} frames at {shape.fps:g} fps, a clip has {shape.frames}'
               if count == 0 else '')
      return count, '; '.join(filter(None, (short, read.damage)))
    if len(read.frames) == shape.frames:  # ends here
      return count + 1, read.damage
  return most, ''


def _decode(path: pathlib.Path, number: int, shape: ClipShape) -> media.Media:
  """The frames of a clip, and one more if the file goes on."""
  return media.read_video(path, shape.height, shape.width, shape.fps, max_frames=shape.frames + 1,
                          start_seconds=number * shape.frames / shape.fps)


def _find(root: pathlib.Path, skipped: dict[str, str]) -> list[str]:
  """Paths of all videos below a directory, sorted; adds directories that cannot be read."""
  if not root.is_dir():
    raise VideosError(f'there is no directory {_shown(root)}; give one of videos with captions.')

  def name_of(path: str | os.PathLike) -> str:
    return pathlib.Path(path).relative_to(root).as_posix()

  def unreadable(error: OSError) -> None:
    skipped[_shown(name_of(error.filename))] = f'cannot be read ({error.strerror})'

  return sorted(name_of(pathlib.Path(folder, file))
                for folder, _, files in os.walk(root, onerror=unreadable) for file in files
                if file.lower().endswith(ENDINGS))


def _in_order(function: Callable[[In], Out], items: Sequence[In]) -> Iterator[Out]:
  """Results in the order of the items, computed a little ahead by threads."""
  import grain

  results: Any = grain.MapDataset.range(len(items)).map(lambda index: function(items[index]))
  options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
  return iter(results.to_iter_dataset(options))


def _reason(error: Exception, path: pathlib.Path) -> str:
  """An error's words, in one line; the file is named beside them."""
  return _shown(' '.join(str(error).removeprefix(f'{path} ').split())) or type(error).__name__


def _shown(name: str | os.PathLike) -> str:
  """A path that can be printed: names need not be UTF-8."""
  return os.fspath(name).encode('utf-8', 'backslashreplace').decode()
