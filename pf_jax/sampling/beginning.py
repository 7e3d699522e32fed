"""A picture or a video that a run begins with: as commands name it and its files remember it."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pf_jax import outputs
from pf_jax.data import media
from pf_jax.pipeline import Pipeline
from pf_jax.rollout.beginning import encode_blocks, encode_picture, given_selection
from pf_jax.types import VideoSpec


@dataclasses.dataclass(frozen=True)
class Beginning:
  """What a run begins with.

  Attributes:
    path: of the file.
    kind: 'image' or 'video'.
    start: where in a video the used piece starts, seconds.
    seconds: longest piece of a video that is used.

  Raises:
    ValueError: an unknown kind, or seconds that are none.
  """

  path: str
  kind: str
  start: float = 0.0
  seconds: float = 5.0

  def __post_init__(self):
    if self.kind not in ('image', 'video'):
      raise ValueError(f'kind={self.kind!r} is unknown; use image or video.')
    if not 0 < self.seconds < math.inf:
      raise ValueError(f'seconds={self.seconds} of a video cannot be used; wanted more than 0.')
    if not 0 <= self.start < math.inf:
      raise ValueError(f'start={self.start} must be 0 or more seconds into the video.')

  def read(self, video: VideoSpec, blocks: int, say: Callable[[str], None]) -> np.ndarray:
    """Reads the frames and says what was done to them.

    Args:
      video: geometry.
      blocks: length of the video that begins with them.
      say: receives the notes.

    Returns:
      uint8 [T, H, W, 3]: one picture, or frames that fill whole blocks, fewer than the video has.

    Raises:
      MediaError: a file that cannot become frames.
      ValueError: the video would be over before it begins.
    """
    name = pathlib.Path(self.path).name
    if self.kind == 'image':
      taken = media.read_image(self.path, video.height, video.width)
      for note in taken.notes:
        say(f'{name}: {note}.')
      say('the video begins with the picture; the rest of its first block is made around it.')
      return taken.frames
    frames = max(1, round(self.seconds * video.fps))
    taken = media.read_video(self.path, video.height, video.width, video.fps, max_frames=frames,
                             start_seconds=self.start)
    whole = media.whole_blocks(taken.frames, video)
    for note in (*taken.notes, *whole.notes):
      say(f'{name}: {note}.')
    given = blocks_of(whole.frames, video)
    seconds, counted = len(whole.frames) / video.fps, f'{given} block{"s" * (given > 1)}'
    if given >= blocks:
      raise ValueError(f'{self.path} fills {counted} and the video has {blocks}; ask for more than '
                       f'{seconds:g} seconds, or use less of it.')
    say(f'the video begins with {counted.replace(" ", " given ")}, {seconds:.2f} s.')
    return whole.frames

  def describe(self) -> dict[str, Any]:
    """What tells beginnings apart.

    Raises:
      MediaError: there is no such file.
    """
    media.check_file(self.path)
    chosen = {} if self.kind == 'image' else {'start': self.start, 'seconds': self.seconds}
    return {'file': pathlib.Path(self.path).name, 'kind': self.kind,
            'digest': outputs.file_digest(self.path), **chosen}


def blocks_of(frames: np.ndarray, video: VideoSpec) -> int:
  """Blocks that frames of `Beginning.read` decide: a picture is part of one."""
  if len(frames) == 1:
    return 1
  return 1 + (len(frames) - video.first_block_frames) // video.block_frames


def given_blocks(pipeline: Pipeline, frames: np.ndarray, texts: Sequence[str],
                 seeds: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """The blocks that a beginning shared by a batch of videos decides.

  Args:
    pipeline: the model.
    frames: from `Beginning.read`.
    texts: the first text of each video.
    seeds: of each video.

  Yields:
    Latents [B, F, h, w, C] and selection [L, B, K].
  """
  batch = len(texts)
  if len(frames) == 1:
    picture = encode_picture(pipeline.models.vae, frames[0])
    yield pipeline.picture_block(texts, seeds, picture)
    return
  for block, latents in enumerate(encode_blocks(pipeline.models.vae, frames, pipeline.video)):
    yield (np.broadcast_to(latents, (batch, *latents.shape)),
           given_selection(pipeline.spec.cache, block, batch))
