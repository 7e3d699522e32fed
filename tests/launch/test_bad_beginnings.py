"""Pictures and videos on the command line that no video can begin with: one line, nothing left.

`--init_image` and `--init_video` of launch.sample, with the packaged model. Reading is tested in
tests/data/test_media.py; here it is what a user sees, and what is in the output directory after it.
"""

import functools
import io
import os
import pathlib
import re
import struct
import wave
import zlib
from collections.abc import Callable
from typing import NamedTuple

import av
import numpy as np
import pytest
from PIL import Image

from pf_jax.viz.video import VideoWriter
from tests.weights import hostile
from tests.weights.hostile import Launched

pytestmark = pytest.mark.timeout(400)
MEGABYTES = 60
HANGS_SECONDS = 10  # nothing here takes a fraction of it


def pixels(count: int) -> np.ndarray:
  """Noise, so that half a file is half a picture."""
  return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8)


def write_picture(path: pathlib.Path) -> None:
  Image.fromarray(pixels(1)[0]).save(path, 'png')


@functools.cache
def clip() -> bytes:
  """An MP4 whose table of contents comes last, 40 frames at 16 fps."""
  data = io.BytesIO()
  with av.open(data, 'w', format='mp4') as out:
    stream = out.add_stream('libx264', rate=16)
    stream.width = stream.height = 64
    for frame in pixels(40):
      out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
    out.mux(stream.encode(None))
  return data.getvalue()


def write_clip(path: pathlib.Path) -> None:
  path.write_bytes(clip())


def write_fragments(path: pathlib.Path) -> None:
  """The same as a video that launch.sample writes, with a table of contents every second."""
  with VideoWriter(path, 64, 64, 16, quality=1) as writer:
    for part in np.split(pixels(40), 5):
      writer.write(part)


def write_sound(path: pathlib.Path) -> None:
  with wave.open(str(path), 'wb') as sound:
    sound.setparams((1, 2, 8000, 0, 'NONE', ''))
    sound.writeframes(bytes(16000))


def write_bomb(path: pathlib.Path) -> None:
  """A PNG of 10 kB whose header promises 10 gigabytes of pixels."""
  def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  header = struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0)
  path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
                   + chunk(b'IDAT', zlib.compress(bytes(10 << 20))) + chunk(b'IEND', b''))


def cut(write: Callable[[pathlib.Path], None], share: float) -> Callable[[pathlib.Path], None]:
  """The beginning of what a function writes."""
  def first_part(path: pathlib.Path) -> None:
    write(path)
    os.truncate(path, int(path.stat().st_size * share))
  return first_part


# --- refused files --------------------------------------------------------------------------------

PICTURE, VIDEO = 'init_image', 'init_video'
NO_PICTURE, NO_VIDEO = 'is not a picture that can be read', 'is not a video that can be read'


class Bad(NamedTuple):
  """A file in the place of a picture or a video."""

  flag: str
  write: Callable[[pathlib.Path], object]
  message: str  # pattern
  more: tuple[str, ...] = ()


TEXT = 'hello\n' * 100
PLAYLIST = "ffconcat version 1.0\nfile '/etc/passwd'\n"
BAD = {
    'cut.png': Bad(PICTURE, cut(write_picture, 0.5), 'is damaged, cut off or of a rare kind'),
    'cut early.png': Bad(PICTURE, cut(write_picture, 0.001), NO_PICTURE),
    'text.png': Bad(PICTURE, lambda path: path.write_text(TEXT), NO_PICTURE),
    'drawing.svg': Bad(PICTURE, lambda path: path.write_text('<svg><image href="/x"/></svg>'),
                       NO_PICTURE),
    'bomb.png': Bad(PICTURE, write_bomb, 'pixels.* scale it down first'),
    'clip.mp4': Bad(PICTURE, write_clip, f'{NO_PICTURE}; .* hand in a video as video'),
    'empty.png': Bad(PICTURE, pathlib.Path.touch, 'is empty; wanted a file with a picture'),
    'nowhere.png': Bad(PICTURE, lambda path: None, r'cannot read .* \(No such file or directory\)'),
    'loop.png': Bad(PICTURE, lambda path: path.symlink_to(path), r'cannot read .* \(Too many'),
    'sound.mp4': Bad(VIDEO, write_sound, 'holds no video, only sound'),
    'text.mp4': Bad(VIDEO, lambda path: path.write_text(TEXT), NO_VIDEO),
    'playlist.mp4': Bad(VIDEO, lambda path: path.write_text(PLAYLIST), NO_VIDEO),
    'cut.mp4': Bad(VIDEO, cut(write_clip, 0.5), NO_VIDEO),
    'cut early.mp4': Bad(VIDEO, cut(write_fragments, 0.02), f'{NO_VIDEO}|holds no whole frame'),
    'empty.mp4': Bad(VIDEO, pathlib.Path.touch, 'is empty; wanted a file with a picture'),
    'nowhere.mp4': Bad(VIDEO, lambda path: None, r'cannot read .* \(No such file or directory\)'),
    'late.mp4': Bad(VIDEO, write_clip, r'start_seconds=60\.0 lies beyond the end of .* lasts 2\.50',
                    ('--init_start=60',)),
    'long.mp4': Bad(VIDEO, write_clip, r'fills 2 blocks and the video has 1; ask for more than',
                    ('--seconds=0.5',)),
    'picture.png': Bad(VIDEO, write_picture, r'fills 1 block and the video has 1; ask for more',
                       ('--seconds=0.5',)),
    'directory': Bad(PICTURE, pathlib.Path.mkdir, 'is a directory; wanted a file with a picture'),
    'directory.mp4': Bad(VIDEO, pathlib.Path.mkdir, 'is a directory; wanted a file with a picture'),
}
# Files without an end.
ENDLESS = {
    'pipe.png': Bad(PICTURE, os.mkfifo, 'is a pipe or a device; wanted a file'),
    'pipe.mp4': Bad(VIDEO, os.mkfifo, 'is a pipe or a device; wanted a file'),
    'zero.png': Bad(PICTURE, lambda path: path.symlink_to('/dev/zero'), 'is a pipe or a device'),
}
# Flags that contradict each other or mean nothing; exit status 2.
USAGE = {
    ('--init_start=1',): '--init_start chooses a piece of --init_video, which is missing.',
    ('--init_image=a.png', '--init_seconds=1'):
        '--init_seconds chooses a piece of --init_video, which is missing.',
    ('--init_image=a.png', '--init_video=b.mp4'): 'give one of them.',
    ('--init_video=b.mp4', '--init_start=-1'): '--init_video: start=-1.0 must be 0 or more seconds',
    ('--init_video=b.mp4', '--init_start=nan'): '--init_video: start=nan must be 0 or more',
    ('--init_video=b.mp4', '--init_seconds=0'): '--init_video: seconds=0.0 of a video cannot',
    ('--init_video=b.mp4', '--init_start=soon'): 'flag --init_start=soon',
}
# Taken, and said what was made of them.
TAKEN = {
    'cut late.mp4': (cut(write_fragments, 0.7), 'the file is damaged or cut off: what is whole'),
    'still.png': (write_picture, 'the picture stands still for one block of'),
}


def sample(output: pathlib.Path, *more: str) -> list[str]:
  return ['--config=configs/digits/sample.py', '--prompt=a white seven', '--seconds=5',
          f'--output={output}', *more]


class Outcome(NamedTuple):
  """What comes of the commands, by the names of their files or flags, and where."""

  launched: dict[object, Launched]
  files: pathlib.Path
  out: pathlib.Path


@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
  files, out = tmp_path_factory.mktemp('files'), tmp_path_factory.mktemp('out')
  commands: dict[object, list[str]] = {}
  for name, bad in (BAD | ENDLESS).items():
    bad.write(files / name)
    commands[name] = [f'--{bad.flag}={files / name}', *bad.more]
  for name, (write, _) in TAKEN.items():
    write(files / name)
    commands[name] = [f'--init_video={files / name}', '--dry_run']
  commands |= {arguments: list(arguments) for arguments in USAGE}
  _, *done = hostile.launch('sample', [
      sample(out / 'first', '--init_image=nowhere.png'),
      *(sample(out / str(number), *more) for number, more in enumerate(commands.values()))],
      seconds=HANGS_SECONDS)
  return Outcome(dict(zip(commands, done, strict=True)), files, out)


def check_refused(done: Launched, name: str, bad: Bad) -> None:
  assert done.code == 1, done.err
  assert re.search(bad.message, done.err), done.err
  assert done.err.startswith('error: ')
  assert done.err.count('\n') == 1, done.err
  assert name in done.err
  assert len(done.err) < 600
  assert done.megabytes < MEGABYTES


@pytest.mark.parametrize('name', BAD)
def test_bad_file_is_refused(outcome, name):
  check_refused(outcome.launched[name], name, BAD[name])


@pytest.mark.parametrize('name', ENDLESS)
def test_file_without_an_end_is_refused(outcome, name):
  check_refused(outcome.launched[name], name, ENDLESS[name])


@pytest.mark.parametrize('arguments', USAGE, ids=' '.join)
def test_impossible_flags_are_refused(outcome, arguments):
  done = outcome.launched[arguments]
  assert done.code == 2
  assert done.err.startswith('error: ')
  assert done.err.count('\n') == 1
  assert USAGE[arguments] in done.err


@pytest.mark.parametrize('name', TAKEN)
def test_what_can_be_used_is_used_and_said(outcome, name):
  done = outcome.launched[name]
  assert (done.code, done.err) == (0, '')
  assert f'{name}: {TAKEN[name][1]}' in done.out


def test_no_directory_is_left(outcome):
  assert not os.listdir(outcome.out)
