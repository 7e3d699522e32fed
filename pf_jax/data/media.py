"""Pictures and videos that users hand in, as the beginning of a generated video.

Whatever the file is, what comes out are frames uint8 [T, H, W, 3] of one size at one constant rate,
and notes that say in words what was done to get there.

  size    Scaled by Pillow's Lanczos filter until it covers height x width; the centre is kept, to
          a fraction of a source pixel, so nothing is ever stretched. Enlarging is allowed.
  rate    Tick k of the result lies start + k / fps seconds into the file and shows the last frame
          that began at or before it, by presentation timestamps in exact arithmetic.
  colour  FFmpeg's swscale, rounding exactly, converts video by the matrix and the range (limited or
          full) that the file names. A video that names none is BT.601 up to 1279x576 and BT.709
          above, as players assume. Pillow converts pictures; their colour profiles are ignored, as
          is usual for training data.
  alpha   Composited over black.

Files are opened here and handed to FFmpeg and Pillow as bytes: an ending does not matter, and a
playlist cannot make FFmpeg open other files or the network. Decoding streams: only scaled frames
are kept, and nothing is decoded beyond the last frame that is used.
"""

import itertools
import math
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
  from pf_jax.types import VideoSpec

Item = TypeVar('Item')
Shot = tuple[Fraction, Fraction, Item]  # begins at, lasts for (seconds), what is shown
Size = tuple[int, int]  # width, height, as Pillow has it

_IMAGE_FORMATS = ('PNG', 'JPEG', 'MPO', 'WEBP', 'AVIF', 'GIF', 'BMP', 'TIFF', 'PPM', 'JPEG2000')
# What a hostile file may make us allocate. 108-megapixel photos and 8K video pass; a video decoder
# may hold more than a dozen pictures.
_MAX_IMAGE_PIXELS = 120_000_000
_MAX_VIDEO_PIXELS = 36_000_000
_MIN_SIDE = 16
# Matroska and FLV keep times in whole milliseconds: half a millisecond late is on time.
_CLOCK = Fraction(1, 2000)
# How long before the wanted second decoding starts. Some formats find no keyframe at once, or one
# whose pictures begin too late.
_SEEK_MARGINS = (0, 2, 20)
_UNSPECIFIED_MATRIX = 2
# swscale's full chroma interpolation and input, accurate rounding, bit exactness: without them
# colours are off by up to two levels and differ between processors.
_EXACT_COLOURS = 0x2000 | 0x4000 | 0x40000 | 0x80000
_HDR = {16: 'PQ', 18: 'HLG'}
# By EXIF's orientation: the name of Pillow's transposition, and its words.
_ORIENTATIONS = {
    2: ('FLIP_LEFT_RIGHT', 'mirrored left to right'),
    3: ('ROTATE_180', 'rotated by 180 degrees'),
    4: ('FLIP_TOP_BOTTOM', 'mirrored top to bottom'),
    5: ('TRANSPOSE', 'rotated by 90 degrees anticlockwise and mirrored top to bottom'),
    6: ('ROTATE_270', 'rotated by 90 degrees clockwise'),
    7: ('TRANSVERSE', 'rotated by 90 degrees clockwise and mirrored top to bottom'),
    8: ('ROTATE_90', 'rotated by 90 degrees anticlockwise'),
}
_EXIF_ORIENTATION = 0x0112
_TRANSPARENT = 'transparent parts are black'
# Signs of a display matrix's (a, b, c, d), where x' = a x + c y and y' = b x + d y with y
# downwards, to EXIF's orientation.
_ORIENTATION_OF = {
    (1, 0, 0, 1): 1, (-1, 0, 0, 1): 2, (-1, 0, 0, -1): 3, (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5, (0, 1, -1, 0): 6, (0, -1, -1, 0): 7, (0, -1, 1, 0): 8,
}
# The same by the angle alone, in degrees anticlockwise.
_ORIENTATION_OF_ANGLE = {90: 8, 180: 3, -180: 3, -90: 6}
_SIDEWAYS = (5, 6, 7, 8)


class MediaError(ValueError):
  """A file, or what is wanted of it, that cannot become frames; one line a user can act on."""


class Media(NamedTuple):
  """Frames of a file.

  Attributes:
    frames: uint8 [T, H, W, 3].
    notes: what was done to the file's pictures, a line each.
    damage: the one of these lines that says where a file that is not whole ends; '' otherwise.
  """

  frames: np.ndarray
  notes: tuple[str, ...]
  damage: str = ''


def read_image(path: str | os.PathLike, height: int, width: int) -> Media:
  """Reads a picture as a video of one frame.

  Args:
    path: PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF, PPM or JPEG 2000, whatever its ending.
    height: wanted, pixels.
    width: wanted, pixels.

  Returns:
    One frame [1, height, width, 3].

  Raises:
    MediaError: no such file, not a picture, damaged, too small or too large, or an impossible size.
  """
  _check_size(height, width)
  with _open_file(path) as file:
    image, notes = _load_image(path, file)
  frame, fit_notes = _fit(image, (width, height))
  return Media(frame[None], (*notes, *fit_notes))


def read_video(path: str | os.PathLike, height: int, width: int, fps: float, *, max_frames: int,
               start_seconds: float = 0.0) -> Media:
  """Reads a piece of a video at a constant rate.

  A file that is cut off or damaged yields the frames before the damage, and a note.

  Args:
    path: any video FFmpeg decodes, whatever its ending.
    height: wanted, pixels.
    width: wanted, pixels.
    fps: wanted frames per second.
    max_frames: of the result; decoding ends there.
    start_seconds: where the piece starts, counted from the first frame.

  Returns:
    Frames [T, height, width, 3], 1 <= T <= max_frames.

  Raises:
    MediaError: no such file, not a video, no whole frame, a start beyond the end, pictures that are
      too small or too large, or impossible numbers.
  """
  _check_size(height, width)
  _check_times(fps, max_frames, start_seconds)
  with _open_file(path) as file, _Decoder(path, file) as decoder:
    start, shots = decoder.shots_from(start_seconds)
    screen = _Screen(path, decoder.stream, (width, height))
    ticks = resample(shots, fps, start)
    pictures = [screen.show(frame) for frame in itertools.islice(ticks, max_frames)]
    longer = next(ticks, None) is not None
    if not pictures:
      raise MediaError(f'{start_seconds=} lies beyond the end of {path}, which lasts '
                       f'{decoder.seconds:.2f} s.')
    notes = [*screen.notes, *decoder.rate_notes(fps)]
    if start_seconds:
      notes.append(f'starts {start_seconds:g} s into the file')
    damage = '' if longer else decoder.end_note()
    last = (f'only {len(pictures)} frames used ({len(pictures) / fps:.2f} s); the file goes on'
            if longer else damage)
    notes += [last] if last else []
  return Media(np.stack(pictures), tuple(notes), damage)


def whole_blocks(frames: np.ndarray, video: 'VideoSpec') -> Media:
  """Makes a beginning fill whole blocks, the unit in which a rollout takes over given frames.

  A block's latent frames are committed together, the first one of all from a single picture, so a
  beginning has `first_block_frames + n * block_frames` frames:

    a single picture   is held for the whole first block; the video starts with a still.
    too few frames     are extended to one block by holding the last one.
    more frames        lose their first ones: generation goes on from the last moment, so the end
                       stays.

  Args:
    frames: uint8 [T, H, W, 3], at least one.
    video: geometry of the generated video.

  Returns:
    The frames, and what was done.

  Raises:
    ValueError: no frames, or another shape.
  """
  count = len(frames)
  if not count or frames.shape[1:] != (video.height, video.width, 3):
    raise ValueError(f'frames have shape {frames.shape}; wanted [T, {video.height}, {video.width}, '
                     '3] with at least one frame.')
  first = video.first_block_frames
  if count < first:
    held = np.concatenate([frames, np.repeat(frames[-1:], first - count, axis=0)])
    what = ('the picture stands still for' if count == 1 else
            f'{count} frames are too few, the last one is held until they fill')
    return Media(held, (f'{what} one block of {first} frames ({first / video.fps:.2f} s)',))
  blocks = 1 + (count - first) // video.block_frames
  kept = video.pixel_frames(blocks)
  if kept == count:
    return Media(frames, ())
  note = (f'the first {count - kept} of {count} frames left out: the last {kept} fill whole blocks '
          f'({blocks})')
  return Media(frames[count - kept:], (note,))


def resample(shots: Iterable[Shot[Item]], fps: float, start: Fraction) -> Iterator[Item]:
  """Shows items at a constant rate: at each tick the last one that began at or before it.

  A tick before the first item shows the first one. The last item is shown for its duration, and at
  least once if a tick falls on it. Half a millisecond late counts as on time.

  Args:
    shots: (time, duration, item) in seconds, by time; consumed one item ahead of the tick.
    fps: ticks per second.
    start: time of the first tick.

  Yields:
    The item of each tick; the same object again while it lasts.
  """
  rate = Fraction(float(fps))
  ticks = (start + number / rate for number in itertools.count())
  tick = next(ticks)
  shown: list[Item] = []
  time = end = start
  for time, duration, item in shots:
    while shown and tick < time - _CLOCK:
      yield shown[0]
      tick = next(ticks)
    shown, end = [item], time + duration
  # Twice: the end is the sum of two rounded numbers.
  while shown and (tick <= time + _CLOCK or tick < end - 2 * _CLOCK):
    yield shown[0]
    tick = next(ticks)


def check_file(path: str | os.PathLike) -> None:
  """Refuses what cannot hold a picture or a video, without opening it: pipes would wait.

  Args:
    path: wanted: a regular file with something in it.

  Raises:
    MediaError: it is not, or there is nothing.
  """
  try:
    status = os.stat(path)
  except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
    raise _unreadable(path, error) from error
  if stat.S_ISREG(status.st_mode) and status.st_size:
    return
  kind = ('empty' if stat.S_ISREG(status.st_mode) else
          'a directory' if stat.S_ISDIR(status.st_mode) else 'a pipe or a device')
  raise MediaError(f'{path} is {kind}; wanted a file with a picture or a video in it.')


def _check_size(height: int, width: int) -> None:
  for name, size in (('height', height), ('width', width)):
    if size < 1:
      raise MediaError(f'{name}={size} must be at least 1.')
  if height * width > _MAX_VIDEO_PIXELS:
    raise MediaError(f'{width}x{height} is more than {_MAX_VIDEO_PIXELS:,} pixels a frame; ask for '
                     'less.')


def _check_times(fps: float, max_frames: int, start_seconds: float) -> None:
  if not 0 < fps <= 1000:
    raise MediaError(f'{fps=} must be positive and at most 1000.')
  if max_frames < 1:
    raise MediaError(f'{max_frames=} must be at least 1.')
  if not 0 <= start_seconds < math.inf:
    raise MediaError(f'{start_seconds=} must be a number of seconds from 0 on.')


class _Bytes:
  """The first `size` bytes of a file, without its name: FFmpeg would judge by the ending."""

  def __init__(self, file: BinaryIO, size: int):
    self._file, self._size = file, size
    file.seek(0)

  def read(self, count: int) -> bytes:
    return self._file.read(max(min(count, self._size - self._file.tell()), 0))

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    if whence == os.SEEK_END:
      offset, whence = self._size + offset, os.SEEK_SET
    return self._file.seek(offset, whence)

  def tell(self) -> int:
    return self._file.tell()


def _unreadable(path: str | os.PathLike, error: Exception) -> MediaError:
  return MediaError(f'cannot read {str(path)!r} ({getattr(error, "strerror", error)}).')


def _open_file(path: str | os.PathLike) -> BinaryIO:
  check_file(path)
  try:
    return open(path, 'rb')
  except OSError as error:
    raise _unreadable(path, error) from error


def _check_pixels(path: str | os.PathLike, size: Size, limit: int) -> None:
  width, height = size
  if width * height > limit:
    raise MediaError(f'{path} has pictures of {width}x{height}; more than {limit:,} pixels are not '
                     'decoded, scale it down first.')
  if min(size) < _MIN_SIDE:
    raise MediaError(f'{path} has pictures of {width}x{height}; wanted at least {_MIN_SIDE} pixels '
                     'on each side.')


def _load_image(path: str | os.PathLike, file: BinaryIO) -> tuple[Any, list[str]]:
  """A picture as Pillow's RGB, upright and opaque, and notes."""
  from PIL import Image, UnidentifiedImageError  # imported late, as all drawing packages

  Image.init()
  formats = [name for name in _IMAGE_FORMATS if name in Image.OPEN]  # builds of Pillow differ
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of odd metadata, and of sizes that are checked here
    try:
      image = Image.open(file, formats=formats)
      _check_pixels(path, image.size, _MAX_IMAGE_PIXELS)
      animated = image.format != 'MPO' and getattr(image, 'is_animated', False)
      image.load()
      upright, notes = _oriented(image, image.getexif().get(_EXIF_ORIENTATION, 1))
      notes += ['only the first picture of an animation used'] if animated else []
      rgb, more = _as_rgb(upright)
    except MediaError:
      raise
    except Image.DecompressionBombError as error:
      raise MediaError(f'{path} has far more than {_MAX_IMAGE_PIXELS:,} pixels, too many to '
                       'decode; scale it down first.') from error
    except UnidentifiedImageError as error:
      raise MediaError(f'{path} is not a picture that can be read; convert it to PNG or JPEG, or '
                       'hand in a video as video.') from error
    except Exception as error:  # Pillow's decoders raise nearly anything at bytes they dislike
      raise MediaError(f'{path} is damaged, cut off or of a rare kind ({error}); convert it to PNG.'
                       ) from error
  return rgb, notes + more


def _oriented(image: Any, orientation: int) -> tuple[Any, list[str]]:
  """A picture turned upright, by EXIF's number."""
  from PIL import Image

  if orientation not in _ORIENTATIONS:
    return image, []
  method, words = _ORIENTATIONS[orientation]
  return image.transpose(Image.Transpose[method]), [f'{words}, as the file says']


def _as_rgb(image: Any) -> tuple[Any, list[str]]:
  """Any of Pillow's modes as opaque 8-bit RGB."""
  from PIL import Image

  notes = []
  if image.mode == 'F':
    raise ValueError('its numbers have no known range')
  if image.mode.startswith('I'):
    # 'I' holds 32 bits, but stands for 16 in the formats that Pillow reads it from.
    wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    notes.append('16-bit reduced to 8')
  if 'A' in image.getbands() or 'transparency' in image.info:
    image, transparent = _over_black(image.convert('RGBA'))
    notes += [_TRANSPARENT] if transparent else []
  return image.convert('RGB'), notes


def _over_black(rgba: Any) -> tuple[Any, bool]:
  """A picture composited over black, and whether that changed it."""
  from PIL import Image

  alpha = rgba.getchannel('A')
  if alpha.getextrema()[0] == 255:
    return rgba.convert('RGB'), False
  black = Image.new('RGB', rgba.size)
  black.paste(rgba, mask=alpha)
  return black, True


def _fit(image: Any, target: Size, pixel: tuple[Fraction, Fraction] = (Fraction(1), Fraction(1))
         ) -> tuple[np.ndarray, list[str]]:
  """Scales a picture until it covers `target` and keeps the centre: uint8 [H, W, 3].

  Args:
    image: Pillow's RGB.
    target: width, height.
    pixel: width and height of the picture's pixels.
  """
  from PIL import Image

  width, height = image.size
  shown = width * pixel[0], height * pixel[1]
  scale = max(target[0] / shown[0], target[1] / shown[1])
  kept = target[0] / scale / pixel[0], target[1] / scale / pixel[1]
  left, top = (width - kept[0]) / 2, (height - kept[1]) / 2
  box = [float(edge) for edge in (left, top, left + kept[0], top + kept[1])]
  pixels = np.array(image.resize(target, Image.Resampling.LANCZOS, box=box))
  return pixels, _fit_notes(shown, target, scale)


def _fit_notes(shown: tuple[Fraction, Fraction], target: Size, scale: Fraction) -> list[str]:
  scaled = round(shown[0] * scale), round(shown[1] * scale)
  steps = []
  if scale != 1:
    steps.append(f'{"enlarged" if scale > 1 else "scaled"} to {scaled[0]}x{scaled[1]}')
  for name, size, wanted in zip(('column', 'row'), scaled, target, strict=True):
    lost = size - wanted
    if lost:
      steps.append(f'cropped to {target[0]}x{target[1]} ({lost} {name}{"s" if lost > 1 else ""} '
                   'lost, half on either side)')
  return [f'{round(shown[0])}x{round(shown[1])} {" and ".join(steps)}'] if steps else []


class _Decoder:
  """The frames of a file's first video stream and their times. A context manager.

  Attributes:
    stream: PyAV's stream.
  """

  def __init__(self, path: str | os.PathLike, file: BinaryIO):
    import av  # imported late: only readers and writers need it

    self._av: Any = av
    self._path, self._file = path, file
    # PyAV before 19 refuses files whose title is not UTF-8 unless it is told what to do.
    old = int(av.__version__.partition('.')[0]) < 19
    self._lenient = {'metadata_errors': 'replace'} if old else {}
    self._times: list[Fraction] = []
    self._open()

  def __enter__(self) -> '_Decoder':
    return self

  def __exit__(self, *unused: object) -> None:
    self._container.close()

  @property
  def seconds(self) -> float:
    """From the first frame of the file to the end of the last one decoded."""
    return float(self._end - self._origin)

  def shots_from(self, seconds: float) -> tuple[Fraction, Iterator[Shot[Any]]]:
    """The time `seconds` after the first frame, and what `resample` needs from there on.

    Raises:
      MediaError: no frame can be decoded.
    """
    shots = self._shots()
    first = next(shots, None)
    if first is None:
      raise MediaError(f'{self._path} holds no whole frame (of at most {_MAX_VIDEO_PIXELS:,} '
                       'pixels).')
    self._origin = first[0]
    start = self._origin + Fraction(seconds)
    return start, self._seek(start) if seconds else itertools.chain([first], shots)

  def rate_notes(self, fps: float) -> list[str]:
    """How the frames decoded so far relate to the wanted rate."""
    gaps = [late - early for early, late in itertools.pairwise(self._times)]
    if not gaps:
      return []
    rate = len(gaps) / float(sum(gaps) or self._step)
    if max(gaps) - min(gaps) > min(gaps) / 4 + 4 * _CLOCK:
      return [f'variable frame rate (about {rate:.4g} fps) resampled to {fps:g} fps']
    if abs(rate * self._step - 1) < 0.02:  # what the file says, free of rounded times
      rate = float(1 / self._step)
    return [] if abs(rate / fps - 1) < 5e-4 else [f'{rate:.4g} fps resampled to {fps:g} fps']

  def end_note(self) -> str:
    """Says so if the end, now reached, is not where the file says it is."""
    stream, container = self.stream, self._container
    promised = ((stream.start_time or 0) + (stream.duration or 0)) * stream.time_base
    if 'matroska' in container.format.name:  # has one length for all, and sound may go on
      alone = len(container.streams) == 1
      promised = Fraction(container.duration or 0, self._av.time_base) * alone
    if not self._damaged and promised - self._end < 2 * self._step:
      return ''
    return f'the file is damaged or cut off: what is whole ends after {self.seconds:.2f} s'

  def _open(self) -> None:
    size = os.fstat(self._file.fileno()).st_size
    whole = whole_fragments(self._file, size)
    self._torn = whole < size
    try:
      # The empty whitelist: no other file and no network address is opened on behalf of this one.
      self._container = self._av.open(_Bytes(self._file, whole), **self._lenient,
                                      container_options={'protocol_whitelist': ''})
    except self._av.FFmpegError as error:
      raise MediaError(f'{self._path} is not a video that can be read, or is cut off before its '
                       f'first frame ({error.strerror}).') from error
    try:
      self.stream = self._pick_stream()
    except MediaError:
      self._container.close()
      raise

  def _pick_stream(self) -> Any:
    cover = self._av.stream.Disposition.attached_pic  # the cover of a song
    videos = [s for s in self._container.streams.video if not s.disposition & cover]
    if not videos:
      raise MediaError(f'{self._path} holds no video'
                       f'{", only sound" if self._container.streams.audio else ""}.')
    codec = videos[0].codec_context
    if codec is None:
      raise MediaError(f'{self._path} is coded in a way that FFmpeg here cannot decode; convert it '
                       'to H.264.')
    if codec.width and codec.height:
      _check_pixels(self._path, (codec.width, codec.height), _MAX_VIDEO_PIXELS)
    codec.options = {'max_pixels': str(_MAX_VIDEO_PIXELS)}
    return videos[0]

  def _seek(self, start: Fraction) -> Iterator[Shot[Any]]:
    """Shots from the last one at or before `start` on, perhaps some earlier ones."""
    for margin in _SEEK_MARGINS:
      try:
        self._container.seek(math.floor((start - margin) / self.stream.time_base),
                             stream=self.stream)
      except self._av.FFmpegError:
        break
      shots = self._shots()
      found = next(shots, None)
      if found is not None and found[0] <= start + _CLOCK:
        return itertools.chain([found], shots)
    self._container.close()
    self._open()
    return self._shots()

  def _shots(self) -> Iterator[Shot[Any]]:
    """(time, duration, frame) in seconds, decoded from the current position on."""
    base = self.stream.time_base
    self._step = 1 / Fraction(self.stream.average_rate or self.stream.base_rate or 25)
    self._damaged, self._times, self._end = self._torn, [], Fraction(0)
    for frame in self._frames():
      time = self._end if frame.pts is None else frame.pts * base
      if self._times and time <= self._times[-1]:  # AVI knows the order of frames, not their times
        time = self._end
      duration = frame.duration * base or self._step
      self._times.append(time)
      self._end = time + duration
      yield time, duration, frame

  def _frames(self) -> Iterator[Any]:
    """Whole frames up to the first damage, for what follows builds on it.

    Damage before the first whole frame is skipped: a recording may start anywhere.
    """
    seen = False
    for packet in self._packets():
      frames = self._decode(packet)
      damaged = frames is None
      if damaged and seen:
        frames = self._decode(None)  # what the decoder holds back is older, and whole
      for frame in frames or []:
        damaged = damaged or frame.is_corrupt
        if frame.is_corrupt:
          break
        seen = True
        yield frame
      if damaged and seen:
        self._damaged = True
        return

  def _packets(self) -> Iterator[Any]:
    try:
      yield from self._container.demux(self.stream)
    except self._av.FFmpegError:
      self._damaged = True
      yield None

  def _decode(self, packet: Any) -> list[Any] | None:
    """Frames that a packet (None: the end) completes; None if it is damaged."""
    if packet is not None and packet.is_corrupt:
      return None
    try:
      return self.stream.decode(packet)
    except (self._av.FFmpegError, ValueError):  # ValueError: the codec has given up before
      return None


def whole_fragments(file: BinaryIO, size: int) -> int:
  """How much of a file of `size` bytes to read: all but the header of a fragment cut off in it.

  Such an MP4, as a killed `VideoWriter` leaves it, cannot be opened, though all fragments (`moof`)
  before are whole.
  """
  start = 0
  while start < size:
    file.seek(start)
    head = file.read(8)
    length, kind = int.from_bytes(head[:4], 'big'), head[4:]
    if start and (len(head) < 8 or (kind == b'moof' and start + length > size)):
      return start
    if length < 8 or (start == 0 and kind != b'ftyp'):  # not an MP4, or one box to the end
      return size
    start += length
  return size


class _Screen:
  """Turns decoded frames into pictures of one size.

  Attributes:
    notes: what was done, each once, in the order of its first time.
  """

  def __init__(self, path: str | os.PathLike, stream: Any, target: Size):
    from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

    self._path, self._target = path, target
    self._reformatter = VideoReformatter()  # one for all frames: its tables are made once
    self._exactly = int(Interpolation.BILINEAR) | _EXACT_COLOURS
    self._bt709 = int(Colorspace.ITU709)
    self._aspect = stream.sample_aspect_ratio or Fraction(1)
    self.notes: dict[str, None] = {}
    curve = _HDR.get(stream.codec_context.color_trc)
    if curve:
      self._note(f'high dynamic range ({curve}) shown as it is, which looks pale')
    self._shown: tuple[Any, np.ndarray] | None = None

  def show(self, frame: Any) -> np.ndarray:
    """A frame as uint8 [H, W, 3]; showing the same frame again costs nothing.

    Raises:
      MediaError: the frame is too small or too large.
    """
    if self._shown is None or self._shown[0] is not frame:
      self._shown = frame, self._convert(frame)
    return self._shown[1]

  def _convert(self, frame: Any) -> np.ndarray:
    _check_pixels(self._path, (frame.width, frame.height), _MAX_VIDEO_PIXELS)
    orientation = _matrix_orientation(frame)
    image, turn_notes = _oriented(self._rgb(frame), orientation)
    aspect, one = self._aspect, Fraction(1)
    if aspect != 1:
      self._note(f'pixels of {aspect.numerator}:{aspect.denominator} made square')
    pixel = (one, aspect) if orientation in _SIDEWAYS else (aspect, one)
    pixels, fit_notes = _fit(image, self._target, pixel)
    self._note(*turn_notes, *fit_notes)
    return pixels

  def _rgb(self, frame: Any) -> Any:
    from av.error import FFmpegError
    from PIL import Image

    bits = max(component.bits for component in frame.format.components)
    if bits > 8:
      self._note(f'{bits}-bit reduced to 8')
    if frame.interlaced_frame:
      self._note('interlaced lines left as they are')
    transparent = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
    large = frame.width >= 1280 or frame.height > 576
    untagged = large and frame.colorspace == _UNSPECIFIED_MATRIX
    try:
      converted = self._reformatter.reformat(
          frame, format='rgba' if transparent else 'rgb24', interpolation=self._exactly,
          src_colorspace=self._bt709 if untagged else None)
    except FFmpegError as error:
      raise MediaError(f'{self._path} has colours that FFmpeg cannot convert ({error.strerror}); '
                       'convert it to BT.709.') from error
    image = Image.fromarray(converted.to_ndarray())
    if transparent:
      image, changed = _over_black(image)
      if changed:
        self._note(_TRANSPARENT)
    return image

  def _note(self, *notes: str) -> None:
    self.notes.update(dict.fromkeys(notes))


def _matrix_orientation(frame: Any) -> int:
  """EXIF's number for a frame's display matrix; 1, upright, if it has none or an odd one."""
  try:
    matrix = frame.side_data.get('DISPLAYMATRIX')
  except ValueError:  # PyAV gives up on kinds of side data it does not know, EXIF among them
    return _ORIENTATION_OF_ANGLE.get(frame.rotation, 1)
  if matrix is None:
    return 1
  a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
  largest = max(map(abs, (a, b, c, d)))
  return _ORIENTATION_OF.get(tuple(round(value / largest) for value in (a, b, c, d)) if largest
                             else (), 1)
