"""What the stages refuse before any work."""

from collections.abc import Sequence

from pf_jax.data import digits
from pf_jax.models.bundle import ModelSpec


def check_frames(frames: int, stride: int) -> None:
  """Refuses clips whose end the VAE would not see.

  Raises:
    ValueError: not 1 + a multiple of the stride; names the nearest good lengths.
  """
  if frames < 1 or (frames - 1) % stride:
    below = max(frames - 1, 0) // stride * stride + 1
    raise ValueError(f'{frames=} is not 1 + a multiple of {stride}; use {below} or '
                     f'{below + stride}.')


def check_world(world: digits.DigitsWorld, model: ModelSpec) -> None:
  """Refuses a world whose pictures are not the model's.

  Raises:
    ValueError: got and wanted.
  """
  video = model.video
  if (world.height, world.width, world.fps) != (video.height, video.width, video.fps):
    raise ValueError(f'world is {world.height}x{world.width} at {world.fps} fps, model.video '
                     f'{video.height}x{video.width} at {video.fps}; set them to one value.')


def check_phases(ends: Sequence[int]) -> None:
  """Refuses phases that do not follow each other.

  Args:
    ends: the first step after each phase.

  Raises:
    ValueError: no phase, or ends that do not rise.
  """
  if not ends:
    raise ValueError('phases=() must name at least one phase.')
  if sorted(set(ends)) != list(ends):
    raise ValueError(f'phases end at {list(ends)}; these steps must rise.')
