"""The few-step sampler over seven blocks against a stored rollout of diffusers' networks.

`tests/parity/sampler_oracle.py` made it, VAE, compressor and selected history included; the noise
is not stored: the same keys have to give the same videos.
"""

import numpy as np
import pytest

from tests.models.cached import load, relative_error
from tests.rollout import few_step


def _part(case, name):
  prefix = f'{name}/'
  return {key.removeprefix(prefix): array for key, array in case.items() if key.startswith(prefix)}


@pytest.mark.timeout(400)
def test_seven_blocks_through_all_partitions():
  case = load('sampler')
  models = few_step.video_models(_part(case, 'transformer'), _part(case, 'vae'))
  latents, selected = few_step.sample(models, case['text'], few_step.PACKED)
  np.testing.assert_array_equal(selected, case['selected'])
  assert len(latents) == few_step.BLOCKS
  for ours, theirs in zip(latents, case['latents_output'], strict=True):
    assert relative_error(ours, theirs) <= few_step.GATE
