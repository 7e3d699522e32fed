"""Contact sheets: many moments of several videos on one picture.

Rows are videos, columns are times. Frames are picked while a video is being made, so a sheet of a
two-minute video costs the memory of its tiles only.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pf_jax import outputs
from pf_jax.viz.video import to_uint8

_BACKGROUND = (250, 250, 250)
_INK = (25, 25, 25)
_FAINT = (110, 110, 110)
_GAP = 6
_FONT = 15
_LINE = 20
_LABEL_WIDTH = 230


def spread(total_frames: int, columns: int) -> tuple[int, ...]:
  """Frame numbers of `columns` moments from the first frame to the last, evenly spaced.

  Raises:
    ValueError: a count below 1.
  """
  if total_frames < 1 or columns < 1:
    raise ValueError(f'{total_frames=} and {columns=} must be at least 1.')
  columns = min(columns, total_frames)
  return tuple(int(i) for i in np.round(np.linspace(0, total_frames - 1, columns)))


class ContactSheet:
  """Collects the frames of a sheet from videos that arrive in pieces."""

  def __init__(self, frame_numbers: Sequence[int], *, fps: float, labels: Sequence[str],
               block_of: Callable[[int], int] | None = None, title: str = '',
               tile_height: int = 128):
    """Describes the sheet.

    Args:
      frame_numbers: which frames become columns, increasing; see `spread`.
      fps: frames per second, for the column labels.
      labels: one per video.
      block_of: frame number -> block, adds 'block n' to the column labels.
      title: a line above everything.
      tile_height: height of a tile in the sheet, in pixels; frames are enlarged to it in whole
        steps, or shrunk.

    Raises:
      ValueError: no frames or no videos, or frame numbers that do not increase.
    """
    if not frame_numbers or not labels:
      raise ValueError('a contact sheet needs at least one frame number and one video.')
    if list(frame_numbers) != sorted(set(frame_numbers)) or frame_numbers[0] < 0:
      raise ValueError(f'frame_numbers={list(frame_numbers)} must increase from 0 or more.')
    self._numbers = tuple(frame_numbers)
    self._fps, self._labels, self._block_of = fps, tuple(labels), block_of
    self._title, self._tile_height = title, tile_height
    self._seen = 0
    self._tiles: dict[int, np.ndarray] = {}

  def add(self, pixels: Any) -> None:
    """Takes the next frames of all videos, [B, T, H, W, 3] uint8 or float in [-1, 1].

    Raises:
      ValueError: B differs from the number of labels.
    """
    if len(pixels) != len(self._labels):
      raise ValueError(f'pixels hold {len(pixels)} videos; wanted {len(self._labels)}.')
    start, count = self._seen, pixels.shape[1]
    for number in self._numbers:
      if start <= number < start + count:
        self._tiles[number] = to_uint8(pixels[:, number - start])
    self._seen += count

  def render(self) -> np.ndarray:
    """Draws what has arrived so far: uint8 [height, width, 3].

    Raises:
      ValueError: no frame has arrived.
    """
    from PIL import Image, ImageDraw, ImageFont  # imported late, as all drawing packages

    numbers = [number for number in self._numbers if number in self._tiles]
    if not numbers:
      raise ValueError('no frame of the contact sheet has arrived yet.')
    height, width = _tile_size(self._tiles[numbers[0]].shape[1:3], self._tile_height)
    top = _GAP + (_LINE if self._title else 0) + _LINE * (2 if self._block_of else 1)
    size = (_LABEL_WIDTH + len(numbers) * (width + _GAP) + _GAP,
            top + len(self._labels) * (height + _GAP) + _GAP)
    sheet = Image.new('RGB', size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT)
    if self._title:
      draw.text((_GAP, _GAP // 2), self._title, _INK, font=font)
    for column, number in enumerate(numbers):
      left = _LABEL_WIDTH + column * (width + _GAP)
      self._draw_time(draw, font, number, left + width // 2, top)
      for row in range(len(self._labels)):
        tile = Image.fromarray(self._tiles[number][row])
        enlarge = height >= tile.height
        tile = tile.resize((width, height), Image.Resampling.NEAREST if enlarge
                           else Image.Resampling.BOX)
        sheet.paste(tile, (left, top + row * (height + _GAP)))
    for row, label in enumerate(self._labels):
      _draw_wrapped(draw, font, label, _GAP, top + row * (height + _GAP), height)
    return np.asarray(sheet)

  def _draw_time(self, draw: Any, font: Any, number: int, centre: int, top: int) -> None:
    lines = [f'{number / self._fps:.1f} s']
    if self._block_of:
      lines.append(f'block {self._block_of(number)}')
    for line, text in enumerate(lines):
      y = top - _LINE * (len(lines) - line) + 1
      draw.text((centre, y), text, _FAINT if line else _INK, font=font, anchor='ma')

  def save(self, path: str | os.PathLike) -> None:
    """Writes the sheet as PNG, whole or not at all."""
    write_png(path, self.render())


def _tile_size(frame: tuple[int, ...], target: int) -> tuple[int, int]:
  height, width = frame
  if height <= target:
    factor = max(target // height, 1)
    return height * factor, width * factor
  return target, max(round(width * target / height), 1)


def _draw_wrapped(draw: Any, font: Any, text: str, left: int, top: int, height: int) -> None:
  """Draws a label in the margin, wrapped; what does not fit ends in an ellipsis."""
  printable = ''.join(c if c.isprintable() else ' ' for c in text)
  limit = _LABEL_WIDTH - 3 * _GAP
  lines: list[str] = ['']
  for word in printable.split():
    trial = f'{lines[-1]} {word}'.strip()
    if not lines[-1] or draw.textlength(trial, font=font) <= limit:
      lines[-1] = trial
    else:
      lines.append(word)
  room = max(height // _LINE, 1)
  if len(lines) > room:
    lines = [*lines[:room - 1], lines[room - 1] + ' ...']
  for row, line in enumerate(lines):
    while line and draw.textlength(line, font=font) > limit:
      line = line[:-4].rstrip() + '...' if len(line) > 6 else ''
    draw.text((left, top + row * _LINE), line, _INK, font=font)


def write_png(path: str | os.PathLike, pixels: np.ndarray) -> None:
  """Writes uint8 [H, W, 3] as PNG, whole or not at all."""
  from PIL import Image

  with outputs.atomic_path(path) as temporary:
    Image.fromarray(pixels).save(temporary, format='PNG', optimize=True)


def contact_sheet(videos: Sequence[np.ndarray], *, fps: float, labels: Sequence[str],
                  columns: int = 8, block_of: Callable[[int], int] | None = None,
                  title: str = '', tile_height: int = 128) -> np.ndarray:
  """A sheet of finished videos.

  Args:
    videos: each [T, H, W, 3], of equal shape.
    fps: frames per second.
    labels: one per video.
    columns: number of moments.
    block_of: frame number -> block, for the labels.
    title: a line above everything.
    tile_height: pixels.

  Returns:
    uint8 [height, width, 3].

  Raises:
    ValueError: no videos, or videos of different shapes.
  """
  if not len(videos) or len({np.shape(video) for video in videos}) != 1:
    raise ValueError(f'videos have shapes {[np.shape(v) for v in videos]}; '
                     'wanted at least one, all alike.')
  sheet = ContactSheet(spread(len(videos[0]), columns), fps=fps, labels=labels,
                       block_of=block_of, title=title, tile_height=tile_height)
  sheet.add(np.stack([np.asarray(video) for video in videos]))
  return sheet.render()
