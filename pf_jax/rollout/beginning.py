"""Videos that begin with given frames: image to video, and continuation.

Frames of a video become the first blocks. The VAE encodes them, and `stream` commits them through
the very program that commits sampled blocks (decode, compress, clean pass), only without denoising:
`replay`. From then on nothing tells them from blocks that the model made.

A picture is one frame, and the first latent frame holds just one. It is given, at timestep 0, while
the rest of its block is denoised around it. Two alternatives were measured on the digits model (16
held-out pictures; class accuracy at blocks 5 and 30, the picture's very instance found among ten at
blocks 2 and 5, drift at block 30):

  given at timestep 0 (here)         .94 .88    .48 .36    .016
  a still: one block of the picture  .86 .88    .73 .32    .023, and motion must first begin
  noised like the other frames       1.00 1.00  .11 .17    .014, the picture is soon forgotten
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.cache import CacheSpec
from pf_jax.models.vae import EncoderState, WanVae
from pf_jax.types import Array, VideoSpec


def given_selection(spec: CacheSpec, block: int, batch: int) -> np.ndarray:
  """What a given block attends, int32 [L, B, K]: all that is archived, or the newest K of it.

  As long as no more than K blocks are archived this is what the sampler would have selected.
  """
  archived = range(spec.sink_blocks, max(block - spec.recent_blocks, spec.sink_blocks))
  chosen = list(archived)[-spec.top_k:] if spec.top_k else []
  row = np.array([*chosen, *[-1] * (spec.top_k - len(chosen))], np.int32)
  return np.broadcast_to(row, (spec.num_layers, batch, spec.top_k))


def _to_pixels(frames: Array) -> Array:
  return frames.astype(jnp.float32)[None] / 127.5 - 1


def encode_picture(vae: WanVae, frame: np.ndarray) -> np.ndarray:
  """A picture uint8 [H, W, 3] as the latent [h, w, C] that a video begins with."""
  return np.asarray(_encode_first(vae, frame[None])[0][0, 0])


@jax.jit
def _encode_first(vae: WanVae, frames: Array) -> tuple[Array, EncoderState]:
  return vae.encode_first(_to_pixels(frames))


@functools.partial(jax.jit, donate_argnums=1)
def _encode_next(vae: WanVae, state: EncoderState, frames: Array) -> tuple[Array, EncoderState]:
  return vae.encode_next(state, _to_pixels(frames))


def encode_blocks(vae: WanVae, frames: np.ndarray, video: VideoSpec) -> Iterator[np.ndarray]:
  """Encodes whole blocks one by one, in memory that does not grow with their number.

  Args:
    vae: the encoder.
    frames: uint8 [T, H, W, 3]; T fills whole blocks.
    video: geometry.

  Yields:
    float32 [F, h, w, C], a block each.

  Raises:
    ValueError: the frames do not fill whole blocks.
  """
  blocks = 1 + (len(frames) - video.first_block_frames) // video.block_frames
  if blocks < 1 or len(frames) != video.pixel_frames(blocks):
    raise ValueError(f'{len(frames)} frames do not fill whole blocks; wanted '
                     f'{video.first_block_frames} + n * {video.block_frames}.')
  latents, state = _encode_first(vae, frames[:video.first_block_frames])
  yield np.asarray(latents[0])
  for block in range(1, blocks):
    piece = frames[video.pixel_frames(block):video.pixel_frames(block + 1)]
    latents, state = _encode_next(vae, state, piece)
    yield np.asarray(latents[0])
