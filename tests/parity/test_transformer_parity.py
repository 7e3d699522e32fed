"""The transformer against diffusers: bidirectional, and block by block through our cache.

Each gate is shown to bite: plausible mistakes are made on purpose and must fail it clearly.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from pf_jax.cache import update
from pf_jax.kernels import rope
from pf_jax.models import transformer as transformer_lib
from pf_jax.types import DTypes
from pf_jax.weights.networks import from_released
from tests.models.cached import GATE, SPEC, cache_spec, cached_flows
from tests.parity import oracles

BF16_GATE = 2e-4  # 1 - cos
BITES = 10 * GATE


@functools.cache
def _oracle():
  return oracles.tiny_wan_transformer(seed=11)


def _model(tensors=None):
  return from_released(tensors or oracles.wan_tensors(_oracle()), SPEC)


@functools.cache
def _case():
  rng = np.random.default_rng(12)
  text = rng.standard_normal((2, 12, 20)).astype(np.float32)
  text[:, 7:] = 0
  return {'latents': rng.standard_normal((2, 3, 6, 10, 4)).astype(np.float32), 'text': text,
          'timesteps': np.array([[0, 0, 937.5], [625, 833.3333, 1000]], np.float32)}


@functools.cache
def _wanted():
  return oracles.wan_oracle(_oracle(), **_case())


def _flow(model, latents, timesteps, text):
  # A new function each time: mutations patch what tracing calls.
  return np.asarray(jax.jit(lambda *args: model(*args).flow)(
      latents, timesteps, model.text_keys_values(text)))


def test_bidirectional_pass_matches_diffusers():
  assert oracles.relative_error(_flow(_model(), **_case()), _wanted()) <= GATE


def test_bfloat16_stays_close():
  spec = dataclasses.replace(SPEC, dtypes=DTypes('bfloat16', 'bfloat16', 'bfloat16'))
  model = from_released(oracles.wan_tensors(_oracle()), spec)
  assert model.layers.self_attn.q.kernel.dtype == jnp.bfloat16
  assert oracles.angular_error(_flow(model, **_case()), _wanted()) <= BF16_GATE


@functools.cache
def _timestep_case(per_frame):
  """Six samples, one timestep each, or all of them in turn, frame by frame; and their flows."""
  rng = np.random.default_rng(16)
  scalar = np.array(oracles.TIMESTEPS, np.float32)
  timesteps = np.stack([np.roll(scalar, shift if per_frame else 0) for shift in (0, 1, 3)], axis=1)
  case = {'latents': rng.standard_normal((6, 3, 6, 10, 4)).astype(np.float32),
          'text': np.tile(_case()['text'], (3, 1, 1))}
  wanted = oracles.wan_oracle(_oracle(), **case, timesteps=timesteps if per_frame else scalar)
  return case | {'timesteps': timesteps}, wanted


def _timestep_errors(case, wanted):
  return np.array([oracles.relative_error(*pair)
                   for pair in zip(_flow(_model(), **case), wanted, strict=True)])


@pytest.mark.parametrize('per_frame', [False, True])
def test_every_timestep_matches_diffusers(per_frame):
  assert _timestep_errors(*_timestep_case(per_frame)).max() <= GATE


@pytest.mark.parametrize('per_frame', [False, True])
def test_gate_fails_truncated_timesteps(per_frame):
  """At every timestep that is not a whole number, and at no other."""
  case, wanted = _timestep_case(per_frame)
  timesteps = case['timesteps']
  errors = _timestep_errors(case | {'timesteps': np.trunc(timesteps)}, wanted)
  np.testing.assert_array_equal(errors > BITES, (timesteps % 1 > 0).any(axis=1))


def test_library_reads_our_names_the_same_way():
  """diffusers' own converter maps the original names back onto the oracle's state."""
  tensors = {k: torch.tensor(v) for k, v in oracles.wan_tensors(_oracle()).items()}
  converted = convert_wan_transformer_to_diffusers(tensors)
  state = _oracle().state_dict()
  assert set(converted) == set(state)
  for name, tensor in state.items():
    assert torch.equal(converted[name], tensor), name


@functools.cache
def _causal_case():
  """Six clean and noisy blocks; flows of every block with one sink and two recent blocks."""
  rng = np.random.default_rng(13)
  case = _case() | {'latents': rng.standard_normal((2, 12, 6, 10, 4)).astype(np.float32),
                    'timestep': np.float32(937.5)}
  blocks, flows = np.split(case['latents'], 6, axis=1), []
  for count in range(1, 7):
    timesteps = np.zeros((2, 2 * count), np.float32)
    timesteps[:, -2:] = 937.5
    visible, positions = oracles.window(count, sink=1, recent=2, frames=2)
    flows.append(oracles.masked_causal_oracle(_oracle(), blocks[:count], timesteps, case['text'],
                                              visible=visible, positions=positions))
  return case, np.stack(flows)


def _windowed(**choices):
  return cache_spec(**dict(sink_blocks=1, recent_blocks=2, top_k=0, mid_capacity=0) | choices)


def test_cached_blocks_match_masked_diffusers():
  case, wanted = _causal_case()
  assert oracles.relative_error(cached_flows(_model(), case, _windowed())[0], wanted) <= GATE


@pytest.mark.parametrize('wrong', [
    dict(recent_blocks=5), dict(recent_blocks=1), dict(sink_blocks=0), dict(sink_blocks=2),
    dict(positions='absolute')])
def test_gate_fails_a_wrong_window(wrong):
  case, wanted = _causal_case()
  flows, _ = cached_flows(_model(), case, _windowed(**wrong))
  assert oracles.relative_error(flows, wanted) > BITES


def test_gate_fails_history_moved_by_one_frame(monkeypatch):
  case, wanted = _causal_case()
  right = rope.rotate_time
  monkeypatch.setattr(rope, 'rotate_time', lambda x, start: right(x, start - 1))
  assert oracles.relative_error(cached_flows(_model(), case, _windowed())[0], wanted) > BITES


def test_gate_fails_swapped_norms(monkeypatch):
  """The affine norm before the feed-forward and the plain one before the cross-attention."""
  plain, affine, skipped = (transformer_lib.layer_norm, transformer_lib.AffineLayerNorm.__call__,
                            [])

  def norm3(self, x):
    skipped.append(self)
    return plain(x)

  monkeypatch.setattr(transformer_lib.AffineLayerNorm, '__call__', norm3)
  # The next plain norm of the same layer is the feed-forward's.
  monkeypatch.setattr(transformer_lib, 'layer_norm',
                      lambda x: affine(skipped.pop(), x) if skipped else plain(x))
  assert oracles.relative_error(_flow(_model(), **_case()), _wanted()) > BITES
  assert not skipped


def _affine_norm_left_out(tensors):
  for layer in range(SPEC.num_layers):
    tensors[f'blocks.{layer}.norm3.weight'] = np.ones(SPEC.width, np.float32)
    tensors[f'blocks.{layer}.norm3.bias'] = np.zeros(SPEC.width, np.float32)


def _swapped_sine_and_cosine(tensors):
  tensors['time_embedding.0.weight'] = np.roll(tensors['time_embedding.0.weight'],
                                               SPEC.time_width // 2, axis=1)


def _channel_first_head(tensors):
  for part in ('weight', 'bias'):
    head = tensors[f'head.head.{part}']
    by_channel = head.reshape(SPEC.patch_volume, SPEC.out_channels, *head.shape[1:])
    tensors[f'head.head.{part}'] = by_channel.swapaxes(0, 1).reshape(head.shape)


def _shift_and_scale_exchanged(tensors):
  for layer in range(SPEC.num_layers):
    tensors[f'blocks.{layer}.modulation'] = tensors[f'blocks.{layer}.modulation'][
        :, [1, 0, 2, 3, 4, 5]]


@pytest.mark.parametrize('mutate', [_affine_norm_left_out, _swapped_sine_and_cosine,
                                    _channel_first_head, _shift_and_scale_exchanged])
def test_gate_fails_mutated_weights(mutate):
  tensors = dict(oracles.wan_tensors(_oracle()))
  mutate(tensors)
  assert oracles.relative_error(_flow(_model(tensors), **_case()), _wanted()) > BITES


def test_gate_fails_half_split_rope(monkeypatch):
  """Pairs (i, i + H/2) instead of neighbours, as in other language models."""
  right, half = rope.rotate, SPEC.head_dim // 2
  neighbours = np.arange(SPEC.head_dim).reshape(2, half).T.reshape(-1)

  def rotate(x, table):
    return right(x[..., neighbours], table)[..., np.argsort(neighbours)]

  monkeypatch.setattr(rope.reference, 'rotate', rotate)
  assert oracles.relative_error(_flow(_model(), **_case()), _wanted()) > BITES


def test_gate_fails_text_without_its_zero_rows():
  case = _case() | {'text': _case()['text'][:, :7]}
  assert oracles.relative_error(_flow(_model(), **case), _wanted()) > BITES


def test_gate_fails_one_timestep_for_all_frames():
  case = _case() | {'timesteps': np.repeat(_case()['timesteps'][:, -1:], 3, axis=1)}
  assert oracles.relative_error(_flow(_model(), **case), _wanted()) > BITES


def _normed_per_head(x, scale):
  heads = x.reshape(*x.shape[:-1], SPEC.num_heads, SPEC.head_dim)
  rms = jax.lax.rsqrt(jnp.mean(heads ** 2, axis=-1, keepdims=True) + 1e-6)
  return (heads * rms).reshape(x.shape) * scale


def test_gate_fails_queries_of_text_normed_per_head(monkeypatch):
  monkeypatch.setattr(transformer_lib.RmsNorm, '__call__',
                      lambda self, x: _normed_per_head(x, self.scale[...]))
  assert oracles.relative_error(_flow(_model(), **_case()), _wanted()) > BITES


def test_gate_fails_queries_and_keys_normed_per_head(monkeypatch):
  def per_head(x, scale, table, *, eps):
    heads = _normed_per_head(x, scale).reshape(*x.shape[:-1], SPEC.num_heads, SPEC.head_dim)
    return rope.rotate(heads, table)

  monkeypatch.setattr(rope, 'norm_and_rotate', per_head)
  assert oracles.relative_error(_flow(_model(), **_case()), _wanted()) > BITES


@pytest.mark.parametrize(('float64_sinusoid', 'gate'), [(False, GATE), (True, 5e-6)])
def test_three_layers_and_both_sinusoids(float64_sinusoid, gate):
  """diffusers' float32 sinusoid, and the float64 one that Wan2.1 has: the tighter gate."""
  oracle = oracles.tiny_wan_transformer(seed=14, num_layers=3, float64_sinusoid=float64_sinusoid)
  model = from_released(oracles.wan_tensors(oracle), dataclasses.replace(SPEC, num_layers=3))
  wanted = oracles.wan_oracle(oracle, **_case())
  assert oracles.relative_error(_flow(model, **_case()), wanted) <= gate


def _pack_case():
  rng = np.random.default_rng(15)
  return _case() | {'latents': rng.standard_normal((2, 16, 6, 10, 4)).astype(np.float32),
                    'compressed': rng.standard_normal((7, 2, 2, 48)).astype(np.float32),
                    'offsets': np.array([[0.5, 1.0, 0.5], [0.5, 1.0, 2.5]]),
                    'timestep': np.float32(937.5)}


@pytest.mark.parametrize(('choices', 'oracle_choices'), [
    (dict(), {}), (dict(mid_position_stride=1), {'mid_stride': 1}),
    (dict(positions='absolute'), {'packed': False})])
def test_selected_blocks_through_the_cache_match_diffusers(choices, oracle_choices):
  """Top-k of the cache's own choosing, per layer and sample; the oracle attends the same blocks."""
  case = _pack_case()
  spec = cache_spec(sink_blocks=1, recent_blocks=1, top_k=2, mid_capacity=8, **choices)
  flows, selected = cached_flows(_model(), case, spec)
  newest = np.array([4, 5])
  assert (selected[7] != newest).any(), 'the case must select more than the newest blocks'
  blocks = np.split(case['latents'], 8, axis=1)
  wanted = oracles.pack_oracle(
      _oracle(), blocks, case['compressed'], case['offsets'], case['timestep'], case['text'],
      sink_blocks=1, recent_blocks=1, selected=selected, **oracle_choices)
  assert oracles.relative_error(flows[-1], wanted) <= GATE
  other = np.where(selected >= 0, np.maximum(selected - 1, 1), -1)
  elsewhere = oracles.pack_oracle(
      _oracle(), blocks, case['compressed'], case['offsets'], case['timestep'], case['text'],
      sink_blocks=1, recent_blocks=1, selected=other, **oracle_choices)
  assert oracles.relative_error(flows[-1], elsewhere) > BITES


@functools.cache
def _evicting_case():
  """Three archived blocks are kept of the five that leave the recent one; K = 2."""
  case = _pack_case()
  spec = cache_spec(sink_blocks=1, recent_blocks=1, top_k=2, mid_capacity=3)
  flows, selected = cached_flows(_model(), case, spec)
  blocks = np.split(case['latents'], 8, axis=1)
  wanted = np.stack([oracles.pack_oracle(
      _oracle(), blocks[:count], case['compressed'][:count - 1], case['offsets'], case['timestep'],
      case['text'], sink_blocks=1, recent_blocks=1, selected=selected)
      for count in range(1, 9)])
  return case, spec, flows, selected, wanted


def test_blocks_that_left_a_full_archive_match_diffusers():
  case, spec, flows, selected, wanted = _evicting_case()
  assert oracles.relative_error(flows, wanted) <= GATE
  assert selected[6].min() >= 2, 'block 1 has been evicted'
  assert selected[7].min() >= 3, 'blocks 1 and 2 have been evicted'
  roomy, earlier = cached_flows(_model(), case, dataclasses.replace(spec, mid_capacity=8))
  assert earlier[7].min() < 3, 'a larger archive would still have been asked for them'
  assert oracles.relative_error(roomy[7], wanted[7]) > BITES


def test_gate_fails_an_archive_that_keeps_its_oldest(monkeypatch):
  """Full, it drops what comes instead of what it has had longest."""
  case, spec, _, selected, wanted = _evicting_case()
  right = update._age

  def age(layers, block, spec):
    full = block - spec.recent_blocks - spec.sink_blocks >= spec.mid_capacity
    return jax.tree.map(lambda old, new: jnp.where(full, old, new), layers,
                        right(layers, block, spec))

  monkeypatch.setattr(update, '_age', age)
  flows, _ = cached_flows(_model(), case, spec, selected)
  assert oracles.relative_error(flows[:6], wanted[:6]) <= GATE, 'nothing is evicted yet'
  assert oracles.relative_error(flows[6:], wanted[6:]) > BITES
