"""The miniature's world: handwritten digits that drift over coloured backgrounds.

A clip is one white glyph on a plain background. The glyph moves horizontally by `speed` pixels a
frame and bounces at the borders; everything that can be judged later (class, instance, colour,
position) is known exactly. Clips are made on the fly from (seed, index): nothing is stored and
nothing is downloaded.

  position(t) = triangle wave of period 2 * (width - glyph_size), in pixels
  pixel       = background + coverage * (white - background), coverage in [0, 1]

The glyphs are scikit-learn's 1,797 handwritten 8x8 digits (UCI "Optical Recognition of
Handwritten Digits"), enlarged by cubic interpolation and a smoothstep that turns the blurred
slopes into crisp, anti-aliased edges. A fifth of the *images* of every class is held out: split
'test' shows only glyphs that no training clip contains. (Writers are not separated: scikit-learn
does not say who wrote what.)

Prompts follow one grammar: "a white seven drifts right on a teal background". The direction is the
one the clip starts with; it holds at least until the glyph has crossed half of its way, a whole
first block at the default size.
"""

import dataclasses
import functools
import re
from typing import NamedTuple

import numpy as np

DIGIT_NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
DIRECTIONS = ('left', 'right')
SPLITS = ('train', 'test')
HELD_OUT_FRACTION = 0.2
_SPLIT_SEED = 2026  # fixes which images are held out; changing it invalidates every published score
_EDGE = (0.30, 0.62)  # coverage of the enlarged ink at which a glyph's edge starts and ends


class Colour(NamedTuple):
  """A named background colour; `rgb` in 0..255."""

  name: str
  rgb: tuple[int, int, int]


COLOURS = (
    Colour('crimson', (190, 20, 50)),
    Colour('orange', (225, 120, 20)),
    Colour('olive', (115, 125, 20)),
    Colour('green', (20, 150, 50)),
    Colour('teal', (10, 130, 140)),
    Colour('azure', (50, 130, 225)),
    Colour('navy', (15, 25, 105)),
    Colour('purple', (115, 40, 160)),
    Colour('magenta', (215, 55, 165)),
    Colour('brown', (95, 50, 20)),
)


class PromptParts(NamedTuple):
  """What a prompt of the world asks for."""

  digit: int
  direction: str
  colour: str


@dataclasses.dataclass(frozen=True)
class ClipAttributes:
  """Everything about a clip except its pixels.

  Attributes:
    index: the clip's number.
    seed: the seed of the whole data set.
    split: 'train' or 'test'.
    digit: class, 0..9.
    image_id: index of the glyph among scikit-learn's digits: the *instance*.
    direction: 'left' or 'right', how the clip starts.
    colour: name of the background.
    rgb: the background as drawn, [0, 1] each (the named colour after brightness jitter).
    x: left border of the glyph in the first frame, pixels.
    y: top border of the glyph in all frames, pixels.
  """

  index: int
  seed: int
  split: str
  digit: int
  image_id: int
  direction: str
  colour: str
  rgb: tuple[float, float, float]
  x: int
  y: int

  @property
  def prompt(self) -> str:
    return make_prompt(self.digit, self.direction, self.colour)


@dataclasses.dataclass(frozen=True)
class Clip:
  """A clip with its ground truth.

  Attributes:
    pixels: uint8 [T, H, W, 3]; `to_float` brings it to [-1, 1].
    xs: int [T], left border of the glyph in each frame.
    attributes: class, instance, colour and the rest.
  """

  pixels: np.ndarray
  xs: np.ndarray
  attributes: ClipAttributes

  @property
  def prompt(self) -> str:
    return self.attributes.prompt


@dataclasses.dataclass(frozen=True)
class DigitsWorld:
  """Digits drifting over coloured backgrounds, deterministic by (seed, index, split).

  Attributes:
    height: pixels.
    width: pixels.
    fps: pixel frames per second (playback only; motion is per frame).
    glyph_size: side of the square glyph, pixels; a multiple of 8 looks best.
    speed: pixels per frame.
    row_step: glyphs stand in rows this many pixels apart, centred; one row where two do not fit.
      Prompts do not say the row, so with several of them a model has to invent it as well.
    column_step: glyphs start at multiples of this many pixels from the border they leave. With the
      VAE's spatial stride a glyph meets only a few phases of the latent grid, which makes motion
      much easier to learn.
    brightness_jitter: a clip's background is its colour times 1 +- this.
    colours: the named backgrounds.

  Raises:
    ValueError: the glyph does not fit, or a size is out of range.
  """

  height: int = 64
  width: int = 64
  fps: int = 16
  glyph_size: int = 32
  speed: int = 1
  row_step: int = 64
  column_step: int = 8
  brightness_jitter: float = 0.1
  colours: tuple[Colour, ...] = COLOURS

  def __post_init__(self):
    for name in ('height', 'width', 'fps', 'glyph_size', 'row_step', 'column_step'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.speed < 0 or self.speed != int(self.speed):
      raise ValueError(f'speed={self.speed} must be a whole number of pixels per frame, 0 or more.')
    for name in ('height', 'width'):
      if getattr(self, name) < self.glyph_size:
        raise ValueError(f'{name}={getattr(self, name)} is smaller than glyph_size='
                         f'{self.glyph_size}; use a larger picture or a smaller glyph.')
    if not 0 <= self.brightness_jitter < 1:
      raise ValueError(f'brightness_jitter={self.brightness_jitter} must be in [0, 1).')
    if not self.colours:
      raise ValueError('colours is empty; name at least one background.')

  @property
  def rows(self) -> tuple[int, ...]:
    """Possible vertical offsets of a glyph, pixels."""
    room = self.height - self.glyph_size
    return tuple(range(room % self.row_step // 2, room + 1, self.row_step))

  @property
  def travel(self) -> int:
    """Pixels between the leftmost and the rightmost position of a glyph."""
    return self.width - self.glyph_size

  @property
  def prompts(self) -> tuple[str, ...]:
    """Every prompt of this world: digits x directions x colours."""
    return tuple(make_prompt(digit, direction, colour.name) for digit in range(len(DIGIT_NAMES))
                 for direction in DIRECTIONS for colour in self.colours)

  def images(self, split: str, digit: int | None = None) -> np.ndarray:
    """Image ids of a split (optionally of one class), sorted, int [N]."""
    _check_choice('split', split, SPLITS)
    ids = split_ids()[split]
    return ids if digit is None else ids[digit_labels()[ids] == digit]

  def describe(self, index: int, seed: int = 0, split: str = 'train', *,
               digit: int | None = None, direction: str | None = None,
               colour: str | None = None) -> ClipAttributes:
    """Draws a clip's attributes.

    Args:
      index: number of the clip, 0 or more.
      seed: seed of the data set, 0 or more.
      split: 'train' or 'test'.
      digit: fixes the class (the rest is drawn as usual).
      direction: fixes the direction.
      colour: fixes the background, by name.

    Returns:
      The attributes; the same arguments always give the same ones.

    Raises:
      ValueError: an argument is out of range.
    """
    if index < 0 or seed < 0:
      raise ValueError(f'{index=} and {seed=} must not be negative.')
    _check_choice('split', split, SPLITS)
    rng = np.random.default_rng([seed, index, SPLITS.index(split)])
    # All draws are made in a fixed order, so that fixing one attribute leaves the others alone.
    drawn_digit, drawn_direction, drawn_colour = (
        int(rng.integers(10)), DIRECTIONS[rng.integers(2)], int(rng.integers(len(self.colours))))
    pick, start, jitter = rng.random(3)
    y = self.rows[rng.integers(len(self.rows))]
    digit = drawn_digit if digit is None else _check_choice('digit', digit, range(10))
    direction = (drawn_direction if direction is None else
                 _check_choice('direction', direction, DIRECTIONS))
    named = self.colours[drawn_colour] if colour is None else self.colour(colour)
    ids = self.images(split, digit)
    # The second half of the way lies ahead, at least.
    offset = self.column_step * int(start * (self.travel // 2 // self.column_step + 1))
    gain = 1 + self.brightness_jitter * (2 * jitter - 1)
    rgb = np.round(np.clip(np.array(named.rgb) * gain, 0, 255)) / 255
    return ClipAttributes(
        index=index, seed=seed, split=split, digit=digit, image_id=int(ids[int(pick * len(ids))]),
        direction=direction, colour=named.name, rgb=tuple(rgb.tolist()),
        x=offset if direction == 'right' else self.travel - offset, y=y)

  def clip(self, index: int, seed: int = 0, frames: int = 77, split: str = 'train',
           **fixed) -> Clip:
    """Draws and renders a clip; `**fixed` as in `describe`."""
    return self.render(self.describe(index, seed, split, **fixed), frames)

  def positions(self, attributes: ClipAttributes, frames: int) -> np.ndarray:
    """Left border of the glyph in each of `frames` frames, int [T]."""
    if self.travel == 0:
      return np.zeros(frames, int)
    start = attributes.x if attributes.direction == 'right' else 2 * self.travel - attributes.x
    phase = (start + int(self.speed) * np.arange(frames)) % (2 * self.travel)
    return np.minimum(phase, 2 * self.travel - phase)

  def render(self, attributes: ClipAttributes, frames: int) -> Clip:
    """Draws a clip's pixels.

    Args:
      attributes: from `describe`, or your own.
      frames: pixel frames.

    Returns:
      The clip; pixels uint8 [frames, height, width, 3].

    Raises:
      ValueError: `frames` is not positive.
    """
    if frames < 1:
      raise ValueError(f'{frames=} must be at least 1.')
    size, rgb = self.glyph_size, np.array(attributes.rgb)
    coverage = glyphs(size)[attributes.image_id][..., None]
    patch = np.round(255 * (rgb + coverage * (1 - rgb))).astype(np.uint8)
    background = np.full((self.height, self.width, 3), np.round(255 * rgb), np.uint8)
    pixels = np.repeat(background[None], frames, axis=0)
    xs, y = self.positions(attributes, frames), attributes.y
    for frame, x in zip(pixels, xs, strict=True):
      frame[y:y + size, x:x + size] = patch
    return Clip(pixels, xs, attributes)

  def colour(self, name: str) -> Colour:
    """Looks a background up by name.

    Raises:
      ValueError: no such colour; lists those there are.
    """
    for colour in self.colours:
      if colour.name == name:
        return colour
    raise ValueError(f'colour={name!r} is unknown; use one of '
                     f'{", ".join(c.name for c in self.colours)}.')


def make_prompt(digit: int, direction: str, colour: str) -> str:
  """The prompt that asks for a digit (0..9), a direction and a background."""
  _check_choice('digit', digit, range(10))
  _check_choice('direction', direction, DIRECTIONS)
  return f'a white {DIGIT_NAMES[digit]} drifts {direction} on a {colour} background'


_PROMPT = re.compile(rf'an? white ({"|".join(DIGIT_NAMES)}) drifts ({"|".join(DIRECTIONS)}) '
                     r'on an? (\w+) background\.?')


def parse_prompt(prompt: str, colours: tuple[Colour, ...] = COLOURS) -> PromptParts:
  """Reads a prompt of the world back; capitals, spacing, "an" and a final full stop are forgiven.

  Raises:
    ValueError: the prompt does not follow the grammar, or names an unknown colour.
  """
  match = _PROMPT.fullmatch(' '.join(prompt.lower().split()))
  if match is None:
    raise ValueError(f'{prompt=} does not read "a white <zero..nine> drifts <left|right> on a '
                     '<colour> background"; only such prompts can be judged.')
  digit, direction, colour = match.groups()
  if colour not in [c.name for c in colours]:
    raise ValueError(f'{prompt=} names the colour {colour!r}; use one of '
                     f'{", ".join(c.name for c in colours)}.')
  return PromptParts(DIGIT_NAMES.index(digit), direction, colour)


def to_float(pixels: np.ndarray) -> np.ndarray:
  """uint8 pixels to float32 in [-1, 1], the range of every model in the package."""
  return pixels.astype(np.float32) / 127.5 - 1


def to_uint8(pixels: np.ndarray) -> np.ndarray:
  """Float pixels in [-1, 1] to uint8, rounded and clamped."""
  return np.clip(np.round((np.asarray(pixels, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
  """Ink [1797, 8, 8] in [0, 1] and labels [1797]."""
  try:
    from sklearn import datasets
  except ImportError as error:
    raise ImportError('The digits world draws its glyphs from scikit-learn, which is not '
                      'installed; run `pip install pf_jax[train]`.') from error
  data = datasets.load_digits()
  ink, labels = data.images / 16.0, data.target.astype(int)
  for array in (ink, labels):
    array.flags.writeable = False
  return ink, labels


def digit_labels() -> np.ndarray:
  """Class of every image, int [1797]."""
  return _digits()[1]


@functools.lru_cache(maxsize=1)
def split_ids() -> dict[str, np.ndarray]:
  """Image ids of each split, sorted; a fifth of every class is held out."""
  held_out = []
  for digit in range(10):
    ids = np.flatnonzero(digit_labels() == digit)
    order = np.random.default_rng([_SPLIT_SEED, digit]).permutation(len(ids))
    held_out.append(ids[order[:round(HELD_OUT_FRACTION * len(ids))]])
  test = np.sort(np.concatenate(held_out))
  train = np.setdiff1d(np.arange(len(digit_labels())), test)
  for array in (test, train):
    array.flags.writeable = False
  return {'train': train, 'test': test}


@functools.lru_cache(maxsize=4)
def glyphs(size: int) -> np.ndarray:
  """Coverage of every glyph at a size, float32 [1797, size, size] in [0, 1], read-only.

  Coverage is rounded to 1/255 steps at no loss: pixels are bytes.
  """
  ink, _ = _digits()
  weights = _cubic_weights(ink.shape[1], size)
  enlarged = np.einsum('yi,nij,xj->nyx', weights, ink, weights, optimize=True)
  t = np.clip((enlarged - _EDGE[0]) / (_EDGE[1] - _EDGE[0]), 0, 1)
  coverage = (t * t * (3 - 2 * t)).astype(np.float32)
  coverage.flags.writeable = False
  return coverage


def _cubic_weights(source: int, target: int) -> np.ndarray:
  """Weights [target, source] of cubic convolution (Keys, a = -1/2); zero beyond the border."""
  centres = (np.arange(target) + 0.5) * source / target - 0.5
  d = np.abs(centres[:, None] - np.arange(source))
  near = 1.5 * d**3 - 2.5 * d**2 + 1
  far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
  return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _check_choice(name, value, choices):
  if value not in choices:
    raise ValueError(f'{name}={value!r} is not one of {", ".join(map(str, choices))}.')
  return value
