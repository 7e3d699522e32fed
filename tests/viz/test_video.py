"""Video files: round trip, kills, and refusals before any work."""

import os
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from pf_jax import outputs
from pf_jax.data import media
from pf_jax.viz import video


def moving_square(frames, height=32, width=48):
  pixels = np.full((frames, height, width, 3), (20, 120, 140), np.uint8)
  for t in range(frames):
    pixels[t, 8:24, t % (width - 16):t % (width - 16) + 16] = 240
  return pixels


def test_round_trip(tmp_path):
  pixels = moving_square(33)
  with video.VideoWriter(tmp_path / 'a.mp4', 32, 48, 16) as writer:
    writer.write(pixels[:13])
    writer.write(pixels[13:].astype(np.float32) / 127.5 - 1)
  clip = video.read_video(tmp_path / 'a.mp4')
  assert clip.fps == 16
  assert clip.pixels.shape == pixels.shape
  error = np.mean((clip.pixels / 255 - pixels / 255) ** 2)
  assert -10 * np.log10(error) > 28  # the limit of 4:2:0 at sharp coloured edges
  assert len(video.read_video(tmp_path / 'a.mp4', max_frames=5).pixels) == 5


def test_file_can_be_seeked(tmp_path):
  with video.VideoWriter(tmp_path / 'a.mp4', 32, 48, 16) as writer:
    for start in range(0, 64, 16):
      writer.write(moving_square(64)[start:start + 16])
  with av.open(str(tmp_path / 'a.mp4')) as container:
    stream = container.streams.video[0]
    keyframes = [p.pts * stream.time_base for p in container.demux(stream) if p.is_keyframe]
  assert [float(k) for k in keyframes] == [0, 1, 2, 3]


KILLED = """
import sys, time, numpy as np
from pf_jax.viz import video
writer = video.VideoWriter(sys.argv[1], 64, 64, 16)
for block in range(1000):
  writer.write(np.full((16, 64, 64, 3), block % 256, np.uint8))
  print(block + 1, flush=True)
  time.sleep(0.01)
"""


def test_sigkill_leaves_all_but_the_last_write_playable(tmp_path):
  path = tmp_path / 'a.mp4'
  with subprocess.Popen([sys.executable, '-c', KILLED, path], stdout=subprocess.PIPE,
                        text=True) as process:
    for line in process.stdout:
      if int(line) == 12:
        process.send_signal(signal.SIGKILL)
        break
    process.stdout.read()
  clip = video.read_video(path)
  assert len(clip.pixels) >= 11 * 16
  assert abs(int(clip.pixels[10 * 16, 32, 32, 0]) - 10) <= 2


def test_exception_keeps_what_was_written(tmp_path):
  with pytest.raises(KeyboardInterrupt), video.VideoWriter(tmp_path / 'a.mp4', 32, 48, 16) as w:
    w.write(moving_square(20))
    raise KeyboardInterrupt
  assert len(video.read_video(tmp_path / 'a.mp4').pixels) == 20


def test_no_frames_is_an_error_and_leaves_no_file(tmp_path):
  with pytest.raises(ValueError, match='no frames'):
    with video.VideoWriter(tmp_path / 'a.mp4', 32, 48, 16):
      pass
  with pytest.raises(RuntimeError, match='early'):
    with video.VideoWriter(tmp_path / 'a.mp4', 32, 48, 16):
      raise RuntimeError('early')
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('height', 'width', 'fps', 'message'), [
    (33, 48, 16, 'height=33.*use 32 or 34'), (32, 47, 16, 'width=47.*use 46 or 48'),
    (0, 48, 16, 'height=0'), (1, 48, 16, 'height=1.*use 2'), (-2, 48, 16, 'height=-2'),
    (32, 48, 0, 'fps=0'), (32, 48, float('nan'), 'fps=nan')])
def test_impossible_formats_are_refused_at_once(tmp_path, height, width, fps, message):
  with pytest.raises(ValueError, match=message):
    video.VideoWriter(tmp_path / 'a.mp4', height, width, fps)
  assert list(tmp_path.iterdir()) == []


def test_impossible_places_are_refused_at_once(tmp_path):
  (tmp_path / 'there.mp4').write_text('old')
  with pytest.raises(outputs.OutputExists, match='--overwrite'):
    video.VideoWriter(tmp_path / 'there.mp4', 32, 48, 16)
  for bad in (tmp_path / 'missing' / 'a.mp4', tmp_path / 'there.mp4' / 'a.mp4', '/proc/a.mp4'):
    with pytest.raises(ValueError, match='cannot create'):
      video.VideoWriter(bad, 32, 48, 16)
  with pytest.raises(ValueError, match=r'must end in .mp4'):
    video.VideoWriter(tmp_path / 'a.avi', 32, 48, 16)
  with pytest.raises(ValueError, match='quality=60'):
    video.VideoWriter(tmp_path / 'a.mp4', 32, 48, 16, quality=60)
  with video.VideoWriter(tmp_path / 'there.mp4', 32, 48, 16, overwrite=True) as writer:
    writer.write(moving_square(1))
  assert len(video.read_video(tmp_path / 'there.mp4').pixels) == 1


def test_wrong_pixels(tmp_path):
  with video.VideoWriter(tmp_path / 'a.mp4', 32, 48, 16) as writer:
    writer.write(moving_square(1))
    with pytest.raises(ValueError, match='wanted'):
      writer.write(moving_square(1)[0])
    with pytest.raises(ValueError, match='int64'):
      writer.write(moving_square(1).astype(np.int64))
    with pytest.raises(ValueError, match='NaN'):
      writer.write(np.full((1, 32, 48, 3), np.nan, np.float32))


def test_batch_writes_one_file_per_video(tmp_path):
  paths = [tmp_path / 'a.mp4', tmp_path / 'b.mp4']
  pixels = np.stack([moving_square(8), 255 - moving_square(8)])
  with video.BatchVideoWriter(paths, 32, 48, 16) as writer:
    writer.write(pixels[:, :3])
    writer.write(pixels[:, 3:])
    assert writer.frames == 8
    with pytest.raises(ValueError, match='wanted 2'):
      writer.write(pixels[:1])
  for path, wanted in zip(paths, pixels, strict=True):
    assert np.abs(video.read_video(path).pixels.astype(int) - wanted).mean() < 8
  with pytest.raises(ValueError, match='distinct'):
    video.BatchVideoWriter([paths[0], paths[0]], 32, 48, 16)


def test_batch_opens_all_or_none(tmp_path):
  (tmp_path / 'b.mp4').write_text('old')
  with pytest.raises(outputs.OutputExists):
    video.BatchVideoWriter([tmp_path / 'a.mp4', tmp_path / 'b.mp4'], 32, 48, 16)
  assert [p.name for p in tmp_path.iterdir()] == ['b.mp4']


def test_unreadable_input(tmp_path):
  (tmp_path / 'text.mp4').write_text('not a video')
  (tmp_path / 'empty.mp4').write_bytes(b'')
  for bad in ('text.mp4', 'empty.mp4', 'missing.mp4'):
    with pytest.raises(ValueError, match='cannot read'):
      video.read_video(tmp_path / bad)


def test_truncated_input_yields_whole_frames(tmp_path):
  path = tmp_path / 'a.mp4'
  with video.VideoWriter(path, 32, 48, 16) as writer:
    for _ in range(4):
      writer.write(moving_square(16))
  whole = path.read_bytes()
  third = [i for i in range(len(whole)) if whole[i:i + 4] == b'moof'][2]
  # Inside the third fragment's header, right before it, and inside its frames.
  for cut, least in ((third + 60, 32), (third, 31), (third + 300, 32)):
    path.write_bytes(whole[:cut])
    assert least <= len(video.read_video(path).pixels) < 48


def test_memory_does_not_grow(tmp_path):
  start = time.monotonic()
  block = moving_square(16)
  with video.VideoWriter(tmp_path / 'a.mp4', 32, 48, 16) as writer:
    sizes = []
    for _ in range(40):
      writer.write(block)
      sizes.append(os.path.getsize(tmp_path / 'a.mp4'))
  assert sizes[-1] > sizes[20] > sizes[2] > 0  # written while it runs
  assert time.monotonic() - start < 20


def test_colours_are_tagged_so_that_large_videos_keep_them(tmp_path):
  """At 1280x720 an untagged file would be taken for BT.709: reds and greens would move."""
  colours = np.array([[200, 40, 40], [40, 160, 60], [30, 60, 200]], np.uint8)
  frames = np.repeat(colours[:, None, None], 720, axis=1).repeat(1280, axis=2)
  with video.VideoWriter(tmp_path / 'a.mp4', 720, 1280, 16, quality=1) as writer:
    writer.write(frames)
  for read in (video.read_video(tmp_path / 'a.mp4').pixels,
               media.read_video(tmp_path / 'a.mp4', 720, 1280, 16, max_frames=3).frames):
    assert np.abs(read.astype(int) - frames).max() <= 4
