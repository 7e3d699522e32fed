"""WanVae against diffusers' AutoencoderKLWan, every weight randomised, in one shot and streamed.

17 pixel frames of 40x56: five latent frames of an odd size, so the first, the second and the steady
latent frame all take part. Each plausible mistake is made on purpose and must fail the gate.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from pf_jax.models import vae as vae_lib
from pf_jax.types import DTypes
from pf_jax.weights.networks import from_released, to_released
from tests.parity import vae_oracle
from tests.parity.oracles import angular_error, relative_error

GATE = 1e-5  # max|d| / max|ref|, float32
BF16_GATE = 5e-4  # 1 - cos
BITES = 100 * GATE
SPEC = vae_lib.VaeSpec(base_width=8, latent_channels=4)


@functools.cache
def _case():
  model = vae_oracle.tiny_wan_vae(seed=0)
  # Quiet enough that clamping hides nothing.
  model.decoder.conv_out.weight.data *= 0.2
  rng = np.random.default_rng(1)
  pixels = rng.uniform(-1, 1, (2, 17, 40, 56, 3)).astype(np.float32)
  latents = rng.standard_normal((2, 5, 5, 7, 4)).astype(np.float32)
  decoded = vae_oracle.decode(model, latents)
  assert np.mean(np.abs(decoded) < 1) > 0.9
  return (model, from_released(vae_oracle.vae_tensors(model), SPEC), pixels, latents,
          vae_oracle.encode(model, pixels), decoded)


def _fresh(name):
  """A method compiled anew: mutations patch what tracing calls."""
  return jax.jit(lambda *args: getattr(vae_lib.WanVae, name)(*args))


_compiled = functools.cache(_fresh)


def test_moments_match_diffusers():
  _, vae, pixels, _, wanted, _ = _case()
  for ours, theirs in zip(_compiled('encode_moments')(vae, pixels), wanted, strict=True):
    assert relative_error(ours, theirs) <= GATE


def test_pixels_match_diffusers():
  _, vae, _, latents, _, wanted = _case()
  assert relative_error(_compiled('decode')(vae, latents), wanted) <= GATE


@functools.cache
def _small_case():
  """A small VAE with latent statistics: 49 pixel frames of 24x40, 13 latent frames of 3x5.

  Eight channels at least: over four, the norms of random networks come too close to zero.
  """
  spec = vae_lib.VaeSpec(base_width=8, latent_channels=2, width_multipliers=(1, 2, 2, 2),
                         num_res_blocks=1, latent_mean=(0.4, -0.7), latent_std=(1.6, 0.6))
  model = vae_oracle.tiny_wan_vae(2, base=8, channels=2, multipliers=(1, 2, 2, 2), res_blocks=1,
                                  mean=spec.latent_mean, std=spec.latent_std)
  model.decoder.conv_out.weight.data *= 0.2
  rng = np.random.default_rng(3)
  pixels = rng.uniform(-1, 1, (1, 49, 24, 40, 3)).astype(np.float32)
  latents = rng.standard_normal((1, 13, 3, 5, 2)).astype(np.float32)
  mean, std = np.float32(model.config.latents_mean), np.float32(model.config.latents_std)
  return (from_released(vae_oracle.vae_tensors(model), spec), pixels, latents,
          (vae_oracle.encode(model, pixels)[0] - mean) / std,
          vae_oracle.decode(model, latents * std + mean))


def _streamed(verb, vae, array, sizes, compiled=_compiled):
  """`encode` or `decode` in pieces of the given numbers of frames."""
  assert sum(sizes) == array.shape[1]
  first, *rest = np.split(array, np.cumsum(sizes)[:-1], axis=1)
  go_on = compiled(f'{verb}_next')
  out, state = compiled(f'{verb}_first')(vae, first)
  outs = [out]
  for piece in rest:
    out, state = go_on(vae, state, piece)
    outs.append(out)
  return np.concatenate(outs, axis=1)


@pytest.mark.parametrize('sizes', [
    (1, *12 * [4]), (1, *6 * [8]), (1, *3 * [16]), (5, 4, 16, 8, 4, 4, 8)], ids=str)
def test_means_do_not_depend_on_pixel_frames_per_call(sizes):
  vae, pixels, _, wanted, _ = _small_case()
  assert relative_error(_streamed('encode', vae, pixels, sizes), wanted) <= GATE


@pytest.mark.parametrize('sizes', [
    13 * (1,), (1, *6 * [2]), (1, *4 * [3]), (1, *3 * [4]), (1, 5, 5, 2), (2, 1, 4, 5, 1)], ids=str)
def test_pixels_do_not_depend_on_latent_frames_per_call(sizes):
  vae, _, latents, _, wanted = _small_case()
  assert relative_error(_streamed('decode', vae, latents, sizes), wanted) <= GATE


@pytest.mark.parametrize('wrong', [dict(latent_mean=()), dict(latent_std=())])
def test_gate_fails_missing_latent_statistics(wrong):
  vae, *case = _small_case()
  pixels, latents, means, frames = (array[:, :1] for array in case)
  other = from_released(to_released(vae), dataclasses.replace(vae.spec, **wrong))
  assert relative_error(_compiled('encode')(other, pixels), means) > BITES
  assert relative_error(_compiled('decode')(other, latents), frames) > BITES


def test_bfloat16_stays_close():
  model, _, pixels, latents, (mean, _), wanted = _case()
  vae = from_released(vae_oracle.vae_tensors(model), dataclasses.replace(
      SPEC, dtypes=DTypes('bfloat16', 'bfloat16')))
  assert vae.decoder.conv_in.kernel.dtype == jnp.bfloat16
  assert vae.init_decoder_state(1, 5, 7).slots[0].dtype == jnp.bfloat16
  assert angular_error(_compiled('encode_moments')(vae, pixels)[0], mean) <= BF16_GATE
  assert angular_error(_compiled('decode')(vae, latents), wanted) <= BF16_GATE


def test_library_reads_our_names_the_same_way():
  """diffusers' own converter maps the original names back onto the oracle's state."""
  model = _case()[0]
  tensors = {k: torch.tensor(v) for k, v in vae_oracle.vae_tensors(model).items()}
  converted = convert_wan_vae_to_diffusers(tensors)
  state = model.state_dict()
  assert set(converted) == set(state)
  for name, tensor in state.items():
    assert torch.equal(converted[name], tensor), name


def test_weights_round_trip_through_the_original_names():
  model, vae, *_ = _case()
  tensors, ours = vae_oracle.vae_tensors(model), to_released(vae)
  assert set(ours) == set(tensors)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def _first_frame_doubled(monkeypatch):
  """No first-frame rule: the first latent frame is doubled like the others."""
  def call(self, x, stream):
    if self.time_conv is not None:
      x = self._double_frames(x, stream)
      x = x[:, 1:] if stream.first else x  # keeps the number of frames right
    return self.conv.apply(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))
  monkeypatch.setattr(vae_lib.Upsample, '__call__', call)


def _first_frame_remembered(monkeypatch):
  """Frame 0 is skipped but left in the slot."""
  def call(self, x, stream):
    if self.time_conv is not None:
      doubled = self._double_frames(x, stream)
      x = jnp.concatenate([x[:, :1], doubled[:, 2:]], axis=1) if stream.first else doubled
    return self.conv.apply(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))
  monkeypatch.setattr(vae_lib.Upsample, '__call__', call)


def _one_key(monkeypatch):
  """Attention over a single key returns the value."""
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda q, k, v: v)


def _interleaved_channels(monkeypatch):
  """Output channel c * 2 + k in place of k * C + c."""
  right = vae_lib.Upsample._double_frames
  def wrong(self, x, stream):
    channels = x.shape[-1]
    order = jnp.arange(2 * channels).reshape(2, channels).T.reshape(-1)
    kernel, bias = self.time_conv.kernel[...], self.time_conv.bias[...]
    self.time_conv.kernel[...], self.time_conv.bias[...] = kernel[..., order], bias[order]
    y = right(self, x, stream)
    self.time_conv.kernel[...], self.time_conv.bias[...] = kernel, bias
    return y
  monkeypatch.setattr(vae_lib.Upsample, '_double_frames', wrong)


def _norm_without_root(monkeypatch):
  """RMS norm without the factor sqrt(C)."""
  right = vae_lib.RMSNorm.__call__
  monkeypatch.setattr(vae_lib.RMSNorm, '__call__',
                      lambda self, x: right(self, x) / math.sqrt(x.shape[-1]))


def _symmetric_padding(monkeypatch):
  """Strided convolutions padded on all sides in place of right and bottom."""
  right = vae_lib.Conv.apply
  def wrong(self, x, *, strides=(1, 1, 1), padding=None, **more):
    padding = ((1, 1), (1, 1)) if strides == (1, 2, 2) else padding
    return right(self, x, strides=strides, padding=padding, **more)
  monkeypatch.setattr(vae_lib.Conv, 'apply', wrong)


def _first_frame_convolved(monkeypatch):
  """No first-frame rule in the encoder: frame 0 is merged with zeros before it."""
  def call(self, x, stream):
    x = self.conv.apply(x, strides=(1, 2, 2), padding=((0, 1), (0, 1)))
    if self.time_conv is None:
      return x
    past = jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
    return self.time_conv.apply(jnp.concatenate([past, x], axis=1), strides=(2, 1, 1))
  monkeypatch.setattr(vae_lib.Downsample, '__call__', call)


def _history_forgotten(monkeypatch):
  """Every piece starts from zeros; invisible in one shot."""
  monkeypatch.setattr(vae_lib._Stream, 'keep',
                      lambda self, slot: self.kept.append(jnp.zeros_like(slot)))


@pytest.mark.parametrize('mutate', [_first_frame_doubled, _first_frame_remembered, _one_key,
                                    _interleaved_channels, _norm_without_root])
def test_gate_fails_mutated_decoder(mutate, monkeypatch):
  vae, _, latents, _, wanted = _small_case()
  mutate(monkeypatch)
  assert relative_error(_fresh('decode')(vae, latents[:, :5]), wanted[:, :17]) > BITES


@pytest.mark.parametrize('mutate', [_symmetric_padding, _first_frame_convolved, _one_key,
                                    _norm_without_root])
def test_gate_fails_mutated_encoder(mutate, monkeypatch):
  vae, pixels, _, wanted, _ = _small_case()
  mutate(monkeypatch)
  assert relative_error(_fresh('encode')(vae, pixels[:, :17]), wanted[:, :5]) > BITES


def test_gate_fails_forgotten_history(monkeypatch):
  vae, pixels, latents, means, frames = _small_case()
  _history_forgotten(monkeypatch)
  for ours, wanted in (
      (_streamed('encode', vae, pixels[:, :17], (1, 8, 8), _fresh), means[:, :5]),
      (_streamed('decode', vae, latents[:, :5], (1, 2, 2), _fresh), frames[:, :17])):
    assert relative_error(ours, wanted) > BITES
