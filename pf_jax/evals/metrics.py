"""Metrics of the digits world, in plain NumPy: every one can be checked by hand on a small array.

Frames are float [T, H, W, 3] in [0, 1] (`to_unit` converts). A picture of this world is

  pixel = background + coverage * (white - background)

so once the background is known, *coverage* (how much of a pixel is glyph, [0, 1]) follows by
projection, and everything else is measured on coverage: it does not depend on the colour behind.

  background    median of the pixels outside the glyph's window
  window        the square of the glyph's size that collects most coverage, weighted towards its
                centre so that the best place is unique
  position      centre of mass of the coverage inside the window, sub-pixel
"""

import numpy as np

from pf_jax.data import digits

_MIN_CONTRAST = 0.02  # squared distance white - background below which coverage is not amplified
_STILL = 1e-4  # frame difference ([0, 1], mean over pixels) that counts as standing still


def to_unit(frames: np.ndarray) -> np.ndarray:
  """Frames as float32 in [0, 1], from uint8 or from the models' [-1, 1]."""
  frames = np.asarray(frames)
  if frames.dtype == np.uint8:
    return frames.astype(np.float32) / 255
  return np.clip((frames.astype(np.float32) + 1) / 2, 0, 1)


def coverage(frames: np.ndarray, background: np.ndarray) -> np.ndarray:
  """How much of each pixel is white glyph.

  Args:
    frames: [T, H, W, 3] in [0, 1].
    background: [T, 3] or [3], in [0, 1].

  Returns:
    [T, H, W] in [0, 1]: the pixel's place on the line from its background to white.
  """
  background = np.broadcast_to(np.asarray(background, np.float32), (len(frames), 3))
  to_white = 1 - background
  length = np.maximum((to_white**2).sum(-1), _MIN_CONTRAST)
  along = np.einsum('thwc,tc->thw', frames, to_white) - (background * to_white).sum(-1)[:, None,
                                                                                       None]
  return np.clip(along / length[:, None, None], 0, 1)


def locate(cover: np.ndarray, size: int) -> np.ndarray:
  """Finds the glyph: the window that collects most coverage.

  A plain box would not care where inside it a narrow glyph stands, so coverage counts less
  towards the window's borders: 1 in the centre, 1/2 at the rim, parabolic. The window may stick
  out of the picture by a quarter of its size, so that a glyph at the border is centred like any
  other.

  Args:
    cover: [T, H, W] coverage.
    size: side of the window, pixels.

  Returns:
    int [T, 2]: top and left border of the best window; may be negative.

  Raises:
    ValueError: the window is larger than the picture.
  """
  height, width = cover.shape[1:]
  if size > height or size > width:
    raise ValueError(f'{size=} of the window exceeds the picture {height}x{width}; use a smaller '
                     'window.')
  score = _window_bank(height, size) @ cover @ _window_bank(width, size).T
  best = score.reshape(len(cover), -1).argmax(-1)
  return np.stack(np.unravel_index(best, score.shape[1:]), -1) - _margin(size)


def crop(images: np.ndarray, corners: np.ndarray, size: int) -> np.ndarray:
  """Cuts one square window out of each image; zero where it sticks out.

  Args:
    images: [T, H, W].
    corners: int [T, 2], top and left, from `locate`.
    size: side of the window.

  Returns:
    [T, size, size].
  """
  margin = _margin(size)
  padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
  rows = corners[:, 0, None] + margin + np.arange(size)
  columns = corners[:, 1, None] + margin + np.arange(size)
  return padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def centred(glyphs: np.ndarray) -> np.ndarray:
  """Moves glyphs [N, S, S] to where `locate` would have them in its window."""
  return crop(glyphs, locate(glyphs, glyphs.shape[-1]), glyphs.shape[-1])


def background_colour(frames: np.ndarray, corners: np.ndarray | None = None,
                      size: int = 0) -> np.ndarray:
  """Median colour of each frame, without the glyph's window when that is known.

  Args:
    frames: [T, H, W, 3] in [0, 1].
    corners: int [T, 2], the window's top and left; None takes whole frames.
    size: side of the window.

  Returns:
    [T, 3] in [0, 1]. Where the window covers the picture, the whole frame's median.
  """
  if corners is None:
    return np.median(frames.reshape(len(frames), -1, 3), axis=1)
  colours = []
  for frame, (top, left) in zip(frames, corners, strict=True):
    keep = np.ones(frame.shape[:2], bool)
    keep[max(top, 0):top + size, max(left, 0):left + size] = False
    colours.append(np.median(frame[keep] if keep.any() else frame.reshape(-1, 3), axis=0))
  return np.stack(colours)


def analyse(frames: np.ndarray, size: int) -> dict[str, np.ndarray]:
  """Finds background and glyph of every frame.

  Args:
    frames: [T, H, W, 3] in [0, 1].
    size: side of the glyph's window, pixels.

  Returns:
    `background` [T, 3], `corners` int [T, 2], `glyphs` coverage [T, size, size], `centres`
    [T, 2] (y, x) of mass in pixels.
  """
  rough = coverage(frames, background_colour(frames))
  corners = locate(rough, size)
  background = background_colour(frames, corners, size)
  glyphs = crop(coverage(frames, background), corners, size)
  return {'background': background, 'corners': corners, 'glyphs': glyphs,
          'centres': corners + centre_of_mass(glyphs)}


def centre_of_mass(images: np.ndarray) -> np.ndarray:
  """Centre of mass [T, 2] (y, x) of [T, H, W]; the middle where there is no mass."""
  mass = images.sum((1, 2))
  y = (images.sum(2) @ np.arange(images.shape[1])) / np.maximum(mass, 1e-9)
  x = (images.sum(1) @ np.arange(images.shape[2])) / np.maximum(mass, 1e-9)
  middle = (np.array(images.shape[1:]) - 1) / 2
  return np.where(mass[:, None] > 1e-6, np.stack([y, x], -1), middle)


def colour_distance(background: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """Root mean square over the channels of the difference of two colours in [0, 1], [...]."""
  return np.sqrt(((np.asarray(background) - np.asarray(reference))**2).mean(-1))


def nearest_colour(background: np.ndarray, world: digits.DigitsWorld) -> np.ndarray:
  """Names a background: index into `world.colours` of the nearest one, int [...].

  Every named colour stands for all its brightnesses within the world's jitter.
  """
  named = np.array([colour.rgb for colour in world.colours], np.float64) / 255
  background = np.asarray(background, np.float64)[..., None, :]
  gain = (background * named).sum(-1) / np.maximum((named**2).sum(-1), 1e-9)
  gain = np.clip(gain, 1 - world.brightness_jitter, 1 + world.brightness_jitter)
  shade = np.clip(gain[..., None] * named, 0, 1)
  return colour_distance(background, shade).argmin(-1)


def dynamic_degree(centres: np.ndarray, speed: float, lag: int = 4) -> float:
  """Speed of the glyph relative to the true speed; 1 is right, 0 stands still.

  The median over the block of the displacement across `lag` frames: a bounce touches less than
  half of the displacements, and trembling on the spot does not count as motion.

  Args:
    centres: [T, 2] positions (y, x), pixels.
    speed: true speed, pixels per frame; must be positive.
    lag: frames between the two positions.

  Raises:
    ValueError: fewer than lag + 1 frames, or no true motion to compare with.
  """
  if len(centres) <= lag or speed <= 0:
    raise ValueError(f'{len(centres)=} frames and {speed=}: wanted more than {lag=} frames and a '
                     'positive speed.')
  moved = np.linalg.norm(centres[lag:] - centres[:-lag], axis=-1)
  return float(np.median(moved) / (lag * speed))


def direction(centres: np.ndarray) -> str:
  """'left' or 'right': where most steps of [T, 2] positions lead."""
  steps = np.sign(np.diff(centres[:, 1]))
  return 'right' if steps.sum() > 0 else 'left'


def sharpness(images: np.ndarray) -> np.ndarray:
  """How steep edges are: the mean gradient of coverage, weighted by itself.

  A one-pixel edge of full contrast scores 1, one that takes four pixels 0.25, whatever the
  number of edges. An empty picture scores 0. Noise counts as edges: compare like with like.

  Args:
    images: [T, H, W] coverage.

  Returns:
    [T].
  """
  down = np.abs(np.diff(images, axis=1))
  across = np.abs(np.diff(images, axis=2))
  total = down.sum((1, 2)) + across.sum((1, 2))
  squares = (down**2).sum((1, 2)) + (across**2).sum((1, 2))
  return np.where(total > 1e-6, squares / np.maximum(total, 1e-6), 0.0)


def seam(frames: np.ndarray) -> float:
  """How visible the border between two blocks is; 1 is invisible.

  The difference of the first two frames over the median difference of the rest.

  Args:
    frames: [1 + T, H, W, 3] in [0, 1]: the previous block's last frame, then the block.

  Raises:
    ValueError: fewer than 3 frames.
  """
  if len(frames) < 3:
    raise ValueError(f'{len(frames)=} frames; a seam needs the frame before a block and at least '
                     'two of the block.')
  change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
  return float((change[0] + _STILL) / (np.median(change[1:]) + _STILL))


def similarity(queries: np.ndarray, candidates: np.ndarray, shift: int = 2) -> np.ndarray:
  """Correlation of glyphs, at the best of some small shifts.

  Args:
    queries: coverage [Q, S, S].
    candidates: coverage [N, S, S].
    shift: largest displacement tried along each axis, pixels.

  Returns:
    [Q, N] in [-1, 1]: the normalised cross-correlation, maximised over shifts of the candidate.
  """
  size = queries.shape[-1]
  wanted = _unit_vectors(queries)
  padded = np.pad(candidates, ((0, 0), (shift, shift), (shift, shift)))
  best = np.full((len(queries), len(candidates)), -1.0, np.float32)
  for dy in range(2 * shift + 1):
    for dx in range(2 * shift + 1):
      moved = padded[:, dy:dy + size, dx:dx + size]
      np.maximum(best, wanted @ _unit_vectors(moved).T, out=best)
  return best


def _unit_vectors(images: np.ndarray) -> np.ndarray:
  """Images [N, S, S] as zero-mean rows of length 1 (or 0, where constant)."""
  rows = images.reshape(len(images), -1)
  rows = rows - rows.mean(1, keepdims=True)
  return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _margin(size: int) -> int:
  """How far a window may stick out of the picture, pixels."""
  return size // 4


def _window_bank(length: int, size: int) -> np.ndarray:
  """Weights [positions, length] of every window position along one axis."""
  offset = (np.arange(size) - (size - 1) / 2) / (size / 2)
  margin = _margin(size)
  bank = np.zeros((length + 2 * margin - size + 1, length + 2 * margin), np.float32)
  for start, row in enumerate(bank):
    row[start:start + size] = 1 - 0.5 * offset**2
  return bank[:, margin:margin + length]


def bootstrap(values: np.ndarray, *, resamples: int = 2000, confidence: float = 0.95,
              seed: int = 0) -> tuple[float, float, float]:
  """Mean of per-video values with a percentile bootstrap interval over videos.

  Args:
    values: [B]; NaN marks a video without a value.
    resamples: bootstrap samples.
    confidence: probability mass of the interval.
    seed: of the resampling.

  Returns:
    (mean, low, high); all NaN when no video has a value.

  Raises:
    ValueError: a parameter is out of range.
  """
  if resamples < 1 or not 0 < confidence < 1:
    raise ValueError(f'{resamples=} must be at least 1 and {confidence=} inside (0, 1).')
  values = np.asarray(values, np.float64)
  values = values[~np.isnan(values)]
  if not len(values):
    return (float('nan'),) * 3
  picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
  tail = (1 - confidence) / 2
  low, high = np.quantile(values[picks].mean(1), [tail, 1 - tail])
  return float(values.mean()), float(low), float(high)
