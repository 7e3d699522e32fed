"""Video files: fragmented MP4 that stays playable when the writer is killed, and a reader.

A plain MP4 has its index at the end, so a killed writer leaves nothing. Here every group of
pictures (one second at most, by default one keyframe per `write` call) is a fragment of its own
that is flushed to disk as soon as the next one starts.
"""

import io
import os
import pathlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from pf_jax import outputs
from pf_jax.data import media

# empty_moov: the header comes first; frag_keyframe: a fragment per group of pictures.
_CONTAINER = {'movflags': 'frag_keyframe+empty_moov+default_base_moof', 'flush_packets': '1'}

# FFmpeg's numbers of SMPTE 170M, which is BT.601 at 525 lines, and of limited range.
_BT601, _LIMITED_RANGE = 6, 1


class VideoClip(NamedTuple):
  """Decoded video: pixels uint8 [T, H, W, 3] and frames per second."""

  pixels: np.ndarray
  fps: float


def to_uint8(pixels: Any) -> np.ndarray:
  """Pixels as uint8: floats are taken as [-1, 1] and clipped, uint8 passes through.

  Raises:
    ValueError: another dtype, or values that are not finite.
  """
  array = np.asarray(pixels)
  if array.dtype == np.uint8:
    return array
  if array.dtype.kind != 'f' and array.dtype.name != 'bfloat16':
    raise ValueError(f'pixels have dtype {array.dtype}; wanted uint8, or float in [-1, 1].')
  array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise ValueError('pixels hold NaN or infinity; the model or its input is broken.')
  return np.round((np.clip(array, -1, 1) + 1) * 127.5).astype(np.uint8)


def check_video_size(height: int, width: int, fps: float) -> None:
  """Refuses what the encoder cannot store, before anything is computed.

  Raises:
    ValueError: a side is odd or not positive, or the frame rate is not positive.
  """
  for name, size in (('height', height), ('width', width)):
    if size < 2 or size % 2:
      raise ValueError(f'{name}={size} cannot be stored in yuv420 video, which needs even sizes; '
                       f'use {max(size - size % 2, 2)} or {max(size, 0) // 2 * 2 + 2}.')
  if not 0 < fps <= 1000:
    raise ValueError(f'{fps=} must be positive and at most 1000.')


class VideoWriter:
  """Writes one H.264 MP4 while frames arrive. Use as a context manager.

  Memory does not grow with the length. If the process dies, all fragments flushed so far (all but
  the last `write` call or second) are a playable file.
  """

  def __init__(self, path: str | os.PathLike, height: int, width: int, fps: float, *,
               quality: int = 18, overwrite: bool = False):
    """Opens the file at once, so that an impossible output is known before any work.

    Args:
      path: ends in .mp4; its directory exists.
      height: pixels, even.
      width: pixels, even.
      fps: frames per second.
      quality: x264's constant rate factor, 0 (lossless but for 4:2:0) to 51.
      overwrite: replace an existing file.

    Raises:
      ValueError: odd size, bad rate, bad quality, wrong ending, or the file cannot be created.
      OutputExists: the file exists and `overwrite` is false.
    """
    check_video_size(height, width, fps)
    self.path = pathlib.Path(path)
    if self.path.suffix != '.mp4':
      raise ValueError(f'path={str(path)!r} must end in .mp4.')
    if not 0 <= quality <= 51:
      raise ValueError(f'{quality=} must be within 0..51; 18 is visually lossless.')
    outputs.output_path(self.path.parent, self.path.name, overwrite=overwrite)
    import av  # imported late: only writers and readers need it
    self._av = av
    self._shape = (height, width, 3)
    self.frames = 0
    try:
      self.path.touch()  # PyAV opens the file with the first frame, which would be late
      self._container: Any = av.open(str(self.path), 'w', format='mp4', options=_CONTAINER)
    except OSError as error:
      raise ValueError(f'cannot create {self.path} ({error.strerror}); choose another directory.'
                       ) from error
    rate = Fraction(fps).limit_denominator(1001)
    stream = self._container.add_stream('libx264', rate=rate)
    stream.height, stream.width, stream.pix_fmt = height, width, 'yuv420p'
    # zerolatency: without it the encoder holds back dozens of frames, lost if we are killed.
    stream.options = {'crf': str(quality), 'tune': 'zerolatency', 'bf': '0',
                      'g': str(max(round(fps), 1))}
    stream.codec_context.time_base = 1 / rate
    # What the conversion below does; untagged, players take it for BT.709 from 720 lines on.
    stream.codec_context.colorspace = stream.codec_context.color_primaries = _BT601
    stream.codec_context.color_trc, stream.codec_context.color_range = _BT601, _LIMITED_RANGE
    self._stream = stream

  def __enter__(self) -> 'VideoWriter':
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
    if kind is None or self.frames:
      self.close()
    else:
      self._discard()

  def write(self, pixels: Any) -> None:
    """Appends frames.

    Args:
      pixels: [T, H, W, 3], uint8 or float in [-1, 1].

    Raises:
      ValueError: another shape or dtype, or not finite.
    """
    array = to_uint8(pixels)
    if array.ndim != 4 or array.shape[1:] != self._shape:
      raise ValueError(f'pixels have shape {array.shape}; wanted [T, {self._shape[0]}, '
                       f'{self._shape[1]}, 3].')
    for index, picture in enumerate(np.ascontiguousarray(array)):
      frame = self._av.VideoFrame.from_ndarray(picture, format='rgb24')
      frame.pts = self.frames
      frame.time_base = self._stream.codec_context.time_base
      if index == 0:  # a new fragment starts here, which sends the one before to disk
        frame.pict_type = self._av.video.frame.PictureType.I
      self._container.mux(self._stream.encode(frame))
      self.frames += 1

  def close(self) -> None:
    """Finishes the file.

    Raises:
      ValueError: nothing was written; no file is left.
    """
    if self._container is None:
      return
    if self.frames == 0:
      self._discard()
      raise ValueError(f'no frames were written to {self.path}; a video needs at least one.')
    self._container.mux(self._stream.encode(None))
    self._container.close()
    self._container = None

  def _discard(self) -> None:
    self._container.close()
    self._container = None
    self.path.unlink(missing_ok=True)


class BatchVideoWriter:
  """One `VideoWriter` per video of a batch. Use as a context manager."""

  def __init__(self, paths: Sequence[str | os.PathLike], height: int, width: int, fps: float, *,
               quality: int = 18, overwrite: bool = False):
    """Opens all files, or none: see `VideoWriter`.

    Raises:
      ValueError: as `VideoWriter`, or two paths are the same, or there are none.
    """
    if not paths or len({str(path) for path in paths}) != len(paths):
      raise ValueError(f'paths={[str(path) for path in paths]} must be distinct and at least one.')
    self.writers: list[VideoWriter] = []
    try:
      for path in paths:
        self.writers.append(VideoWriter(path, height, width, fps, quality=quality,
                                        overwrite=overwrite))
    except Exception:
      for writer in self.writers:
        writer._discard()
      raise

  def __enter__(self) -> 'BatchVideoWriter':
    return self

  def __exit__(self, *details: Any) -> None:
    for writer in self.writers:
      writer.__exit__(*details)

  @property
  def frames(self) -> int:
    """Frames written so far to each file."""
    return self.writers[0].frames

  def write(self, pixels: Any) -> None:
    """Appends frames [B, T, H, W, 3], uint8 or float in [-1, 1], one video per file.

    Raises:
      ValueError: as `VideoWriter.write`, or B differs from the number of files.
    """
    if len(pixels) != len(self.writers):
      raise ValueError(f'pixels hold {len(pixels)} videos; wanted {len(self.writers)}.')
    for writer, video in zip(self.writers, pixels, strict=True):
      writer.write(video)

  def close(self) -> None:
    """Finishes all files."""
    for writer in self.writers:
      writer.close()


def _open_readable(path: str | os.PathLike) -> Any:
  """Opens a video; an MP4 cut off inside a fragment's header loses that header first."""
  import av

  try:
    return av.open(str(path))
  except av.error.InvalidDataError:
    data = pathlib.Path(path).read_bytes()
    whole = media.whole_fragments(io.BytesIO(data), len(data))
    if whole == len(data):
      raise
    return av.open(io.BytesIO(data[:whole]))


def iterate_video(path: str | os.PathLike) -> Iterator[np.ndarray]:
  """Yields the frames of a video, uint8 [H, W, 3], in constant memory.

  A file cut off in the middle yields the frames that are whole.

  Raises:
    ValueError: not a video, or one without a video stream.
  """
  import av

  try:
    container = _open_readable(path)
  except (OSError, av.FFmpegError) as error:
    raise ValueError(f'cannot read {path} as video ({error.strerror}).') from error
  with container:
    if not container.streams.video:
      raise ValueError(f'{path} has no video stream.')
    try:
      for frame in container.decode(video=0):
        yield frame.to_ndarray(format='rgb24')
    except av.FFmpegError:
      return


def read_video(path: str | os.PathLike, *, max_frames: int | None = None) -> VideoClip:
  """Reads a whole video into memory.

  Args:
    path: any format FFmpeg reads.
    max_frames: stop after this many.

  Raises:
    ValueError: not a video, or not a single whole frame in it.
  """

  frames: list[np.ndarray] = []
  for frame in iterate_video(path):
    frames.append(frame)
    if max_frames is not None and len(frames) >= max_frames:
      break
  if not frames:
    raise ValueError(f'{path} holds no whole frame.')
  with _open_readable(path) as container:
    rate = container.streams.video[0].average_rate or container.streams.video[0].base_rate
  return VideoClip(np.stack(frames), float(rate or 0))
