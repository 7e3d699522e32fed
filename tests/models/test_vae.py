"""The VAE: values against stored oracle cases, and one shot against every way of streaming."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pf_jax.kernels.conv3d import conv3d
from pf_jax.models.vae import VaeSpec, WanVae
from pf_jax.types import tree_bytes
from pf_jax.weights.networks import from_released, to_released
from pf_jax.weights.vae import rule_of

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / 'goldens' / 'vae.npz'
GATE = 1e-5
SPEC = VaeSpec(base_width=4, latent_channels=2, width_multipliers=(1, 1, 2, 2), num_res_blocks=1)


@functools.cache
def golden():
  with np.load(GOLDEN) as stored:
    return {key: stored[key] for key in stored.files}


def weights():
  return {key.removeprefix('weights/'): array for key, array in golden().items()
          if key.startswith('weights/')}


@functools.cache
def vae():
  return from_released(weights(), SPEC)


@functools.cache
def compiled(name):
  return jax.jit(lambda network, *args: getattr(network, name)(*args))


@functools.cache
def clip():
  """13 pixel frames of 24x40 and their latents, one shot."""
  pixels = np.random.default_rng(0).uniform(-1, 1, (1, 13, 24, 40, 3)).astype(np.float32)
  return pixels, compiled('encode')(vae(), pixels)


@functools.cache
def video():
  """Five latent frames of 3x5 and their pixels, one shot."""
  latents = np.random.default_rng(1).standard_normal((1, 5, 3, 5, 2)).astype(np.float32)
  return latents, compiled('decode')(vae(), latents)


def assert_gate(ours, wanted):
  assert ours.shape == wanted.shape
  assert np.abs(np.asarray(ours) - wanted).max() <= GATE * np.abs(wanted).max()


def test_moments_equal_the_oracle():
  mean, logvar = compiled('encode_moments')(vae(), golden()['pixels'])
  assert_gate(mean, golden()['mean_output'])
  assert_gate(logvar, golden()['logvar_output'])


def test_pixels_equal_the_oracle():
  assert_gate(compiled('decode')(vae(), golden()['latents']), golden()['pixels_output'])


@pytest.mark.parametrize('chunks', [(1, 1, 1, 1, 1), (1, 4), (2, 3), (3, 1, 1)])
def test_decoding_in_chunks_equals_one_shot(chunks):
  latents, wanted = video()
  pieces = np.split(latents, np.cumsum(chunks)[:-1], axis=1)
  pixels, state = compiled('decode_first')(vae(), pieces[0])
  shown = [pixels]
  for piece in pieces[1:]:
    pixels, state = compiled('decode_next')(vae(), state, piece)
    assert pixels.shape[1] == 4 * piece.shape[1]
    shown.append(pixels)
  assert_gate(jnp.concatenate(shown, axis=1), wanted)


@pytest.mark.parametrize('chunks', [(1, 4, 4, 4), (1, 12), (5, 8), (9, 4)])
def test_encoding_in_chunks_equals_one_shot(chunks):
  pixels, wanted = clip()
  pieces = np.split(pixels, np.cumsum(chunks)[:-1], axis=1)
  latents, state = compiled('encode_first')(vae(), pieces[0])
  parts = [latents]
  for piece in pieces[1:]:
    latents, state = compiled('encode_next')(vae(), state, piece)
    parts.append(latents)
  assert_gate(jnp.concatenate(parts, axis=1), wanted)


def test_decoding_inside_scan_equals_one_shot():
  latents, wanted = video()

  def run(network, latents):
    first, state = network.decode_first(latents[:, :1])

    def body(state, frame):
      pixels, state = network.decode_next(state, frame)
      return state, pixels

    _, rest = jax.lax.scan(body, state, jnp.moveaxis(latents[:, 1:, None], 1, 0))
    return first, rest

  first, rest = jax.jit(run)(vae(), latents)
  rest = jnp.moveaxis(rest, 0, 1).reshape(1, -1, *rest.shape[3:])
  assert_gate(jnp.concatenate([first, rest], axis=1), wanted)


def test_first_latent_frame_is_one_picture_and_leaves_no_trace_in_time_convolutions():
  latents, _ = video()
  pixels, state = compiled('decode_first')(vae(), latents[:, :1])
  assert pixels.shape == (1, 1, 24, 40, 3)
  # Slots in order: conv_in, two blocks of the middle, two of the first stage; then its time_conv.
  time_slot = state.slots[1 + 4 + 4]
  assert time_slot.shape == (1, 2, 3, 5, 8)
  assert not np.any(time_slot)
  _, state = compiled('decode_next')(vae(), state, latents[:, 1:2])
  assert not np.any(state.slots[9][:, 0])
  assert np.all(np.any(state.slots[9][:, 1], axis=-1))


def test_the_future_does_not_change_the_past():
  latents, wanted = video()
  changed = np.array(latents)
  changed[:, 3:] += 1
  pixels = compiled('decode')(vae(), changed)
  np.testing.assert_array_equal(pixels[:, :9], wanted[:, :9])
  assert np.abs(pixels[:, 9:] - wanted[:, 9:]).max() > 1e-2


def test_states_have_the_shapes_and_bytes_that_streaming_needs():
  latents, _ = video()
  _, state = compiled('decode_next')(vae(), vae().init_decoder_state(1, 3, 5), latents[:, :2])
  empty = vae().init_decoder_state(1, 3, 5)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty)
  # Positions times channels: conv_in 2 and ten times 8 at 3x5; 8, 4, 4, 4 and 4 at 6x10; one less
  # doubling at 12x20; 4 x 5 at 24x40. Two float32 frames each.
  coarse = (2 + 4 * 8 + 4 * 8 + 8) * 15
  second = (4 + 3 * 8 + 8) * 60
  third = (4 + 3 * 4) * 240
  fine = (2 + 3 * 4 + 4) * 960
  assert tree_bytes(empty) == 2 * 4 * (coarse + second + third + fine)


def test_normalisation_is_undone_by_decoding():
  pixels, plain = clip()
  spec = VaeSpec(4, 2, (1, 1, 2, 2), 1, latent_mean=(0.5, -1.0), latent_std=(2.0, 0.25))
  scaled = from_released(weights(), spec)
  latents = compiled('encode')(scaled, pixels)
  assert_gate(latents, (np.asarray(plain) - [0.5, -1.0]) / [2.0, 0.25])
  assert_gate(compiled('decode')(scaled, latents), compiled('decode')(vae(), plain))


def test_frames_that_would_be_lost_are_refused():
  with pytest.raises(ValueError, match=r'frames=16: .* use 13 or 17'):
    vae().encode(jnp.zeros((1, 16, 24, 40, 3)))
  with pytest.raises(ValueError, match=r'frames=6: a continuation .* use 4 or 8'):
    vae().encode_next(vae().init_encoder_state(1, 24, 40), jnp.zeros((1, 6, 24, 40, 3)))
  with pytest.raises(ValueError, match=r'h=20, .* use 16 or 24'):
    vae().encode(jnp.zeros((1, 5, 20, 40, 3)))


def test_the_released_size_has_the_released_tensors():
  shapes = jax.eval_shape(lambda: WanVae(VaeSpec.wan21(), rngs=nnx.Rngs(0)))
  assert len(jax.tree.leaves(shapes)) == 194
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 126_892_531


def test_released_names():
  names = {'encoder.conv_in.kernel': 'encoder.conv1.weight',
           'encoder.down.2.conv.bias': 'encoder.downsamples.2.resample.1.bias',
           'encoder.down.3.shortcut.kernel': 'encoder.downsamples.3.shortcut.weight',
           'encoder.down.5.time_conv.bias': 'encoder.downsamples.5.time_conv.bias',
           'decoder.middle.attention.to_qkv.kernel': 'decoder.middle.1.to_qkv.weight',
           'decoder.middle.res2.norm2.gamma': 'decoder.middle.2.residual.3.gamma',
           'decoder.up.14.conv2.kernel': 'decoder.upsamples.14.residual.6.weight',
           'decoder.norm_out.gamma': 'decoder.head.0.gamma', 'quant_conv.bias': 'conv1.bias',
           'post_quant_conv.kernel': 'conv2.weight'}
  assert {path: rule_of(path).name for path in names} == names


def test_weights_round_trip():
  tensors = weights()
  ours = to_released(vae())
  assert set(ours) == set(tensors)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


@pytest.mark.parametrize(('kernel', 'strides', 'padding'), [
    ((3, 3, 3), (1, 1, 1), None), ((3, 1, 1), (2, 1, 1), None), ((1, 1, 1), (1, 1, 1), None),
    ((1, 3, 3), (1, 2, 2), ((0, 1), (0, 1)))])
def test_taps_equal_reference(kernel, strides, padding):
  rng = np.random.default_rng(2)
  x = rng.standard_normal((2, 7, 6, 10, 3)).astype(np.float32)
  weight = rng.standard_normal((*kernel, 3, 5)).astype(np.float32)
  bias = rng.standard_normal(5).astype(np.float32)
  taps, reference = (conv3d(x, weight, bias, strides=strides, padding=padding, implementation=name)
                     for name in ('taps', 'reference'))
  np.testing.assert_allclose(taps, reference, atol=2e-5)


def test_conv3d_refuses_what_it_cannot_do():
  x, weight, bias = jnp.zeros((1, 2, 4, 4, 1)), jnp.zeros((3, 3, 3, 1, 1)), jnp.zeros(1)
  with pytest.raises(ValueError, match='past frames'):
    conv3d(x, weight, bias)
  with pytest.raises(ValueError, match='unknown'):
    conv3d(x, weight, bias, implementation='fast')
