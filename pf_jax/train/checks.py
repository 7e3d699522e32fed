"""What the stages refuse before any work."""

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
