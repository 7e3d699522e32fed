"""The transformer, alone and through the cache, against stored cases of the diffusers oracle.

`tests/parity/write_goldens.py` made the files and says what each case shows.
"""

import functools

import jax
import numpy as np
import pytest

from pf_jax.weights.networks import from_released, to_released
from tests.models.cached import GATE, SPEC, cache_spec, cached_flows, load, relative_error


@functools.cache
def transformer():
  prefix = 'weights/'
  return from_released({key.removeprefix(prefix): array for key, array in load('dit').items()
                       if key.startswith(prefix)}, SPEC)


@pytest.mark.parametrize('per_frame', [False, True])
def test_bidirectional_at_every_timestep(per_frame):
  case = load('dit')
  timesteps = np.repeat(case['timesteps'][:, None], 3, axis=1)
  if per_frame:
    timesteps = case['frame_timesteps']
  model = transformer()
  run = jax.jit(lambda *args: model(*args).flow)
  text = model.text_keys_values(case['text'])
  wanted = case['frame_flow' if per_frame else 'flow']
  assert len(timesteps) == len(wanted) == 6
  for row, flow in zip(timesteps, wanted, strict=True):
    assert relative_error(run(case['latents'], np.stack([row, row]), text), flow) <= GATE


@pytest.mark.parametrize(('flow', 'choices'), [
    ('full_flow', dict(sink_blocks=6, recent_blocks=1)),
    ('full_flow', dict(sink_blocks=0, recent_blocks=6, positions='absolute')),
    ('window_flow', dict(sink_blocks=1, recent_blocks=2, positions='absolute')),
    ('packed_flow', dict(sink_blocks=1, recent_blocks=2, positions='packed')),
])
def test_causal_through_the_cache(flow, choices):
  case = load('dit_causal')
  spec = cache_spec(top_k=0, mid_capacity=0, **choices)
  flows, _ = cached_flows(transformer(), case, spec)
  assert relative_error(flows, case[flow]) <= GATE


@pytest.mark.parametrize('chosen', ['selected', 'fifo'])
def test_sink_mid_and_recent_through_the_cache(chosen):
  case = load('dit_pack')
  spec = cache_spec(sink_blocks=1, recent_blocks=1, top_k=2, mid_capacity=8, selection='fifo')
  flows, attended = cached_flows(transformer(), case, spec,
                                 case['selected'] if chosen == 'selected' else None)
  np.testing.assert_array_equal(attended, case[chosen])
  assert relative_error(flows, case[f'{chosen}_flow']) <= GATE


def test_weights_round_trip_through_the_original_names():
  tensors = {key: array for key, array in load('dit').items() if key.startswith('weights/')}
  again = to_released(transformer())
  assert {f'weights/{name}' for name in again} == set(tensors)
  for name, array in again.items():
    np.testing.assert_array_equal(array, tensors[f'weights/{name}'], err_msg=name)
