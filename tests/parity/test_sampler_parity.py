"""The few-step sampler over seven blocks against the same loop in diffusers' networks.

Both are handed the same noise; each goes on from its own latents. Each plausible mistake is made on
purpose and must fail the gate.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax.diffusion import schedule
from pf_jax.rollout import block as block_lib
from pf_jax.rollout import step
from tests.parity import sampler_oracle
from tests.parity.oracles import relative_error
from tests.rollout.few_step import BLOCKS, GATE, SAMPLER, WINDOWED, sample

BITES = 100 * GATE


def _sample(spec, blocks=BLOCKS):
  """Latents of a rollout without an archive."""
  case = sampler_oracle.case()
  return sample(case.our_models(vae=False), case.text, spec, blocks)[0]


@functools.cache
def _windowed():
  case = sampler_oracle.case()
  return sampler_oracle.windowed_latents(case.model, case.text, case.noise)


def _errors(ours, theirs):
  """Block by block."""
  return [relative_error(*pair) for pair in zip(ours, theirs, strict=True)]


def test_sink_and_recent_blocks_match_diffusers():
  """From block 4 on, blocks have left the window."""
  assert max(_errors(_sample(WINDOWED), _windowed())) <= GATE


def test_all_partitions_match_diffusers():
  """From block 6 on, blocks have left the archive; layers and videos choose for themselves."""
  ours, selected, theirs = sampler_oracle.packed_rollouts()
  assert max(_errors(ours, theirs)) <= GATE
  assert (selected[:3] == -1).all()
  assert len({tuple(chosen) for chosen in selected[-1].reshape(-1, 2)}) > 1
  assert (selected[-2:] != [[[[3, 4]]], [[[4, 5]]]]).any(), 'the newest are not the only choice'


@pytest.mark.parametrize('branch', ['_hr_tokens', '_lr_tokens'])
def test_gate_sees_both_branches_of_the_compressor(branch, monkeypatch):
  ours, selected, _ = sampler_oracle.packed_rollouts()
  case = sampler_oracle.case()
  monkeypatch.setattr(sampler_oracle, branch, lambda *_: np.float32(0))
  theirs = sampler_oracle.packed_latents(*case._replace(noise=case.noise[:4]), selected)
  errors = _errors(ours[:4], theirs)
  assert max(errors[:3]) <= GATE, 'nothing is archived yet'
  assert errors[3] > BITES


def _noise_reused(monkeypatch):
  """Between all passes the same; the start has its own."""
  right = block_lib.block_noise
  monkeypatch.setattr(block_lib, 'block_noise', lambda keys, block, number, shape: right(
      keys, block, min(number, 1), shape))


def _noise_of_the_next_block(monkeypatch):
  right = block_lib.block_noise
  monkeypatch.setattr(block_lib, 'block_noise', lambda keys, block, number, shape: right(
      keys, block + 1, number, shape))


def _timesteps_truncated(monkeypatch):
  right = schedule.timestep
  monkeypatch.setattr(schedule, 'timestep', lambda sigma: jnp.trunc(right(sigma)))


@pytest.mark.parametrize('mutate', [_noise_reused, _noise_of_the_next_block,
                                    _timesteps_truncated])
def test_gate_fails_mutated_sampler(mutate, monkeypatch):
  mutate(monkeypatch)
  assert relative_error(_sample(WINDOWED, 1)[0], _windowed()[0]) > BITES


@pytest.mark.parametrize('wrong', [dict(shift=1.0), dict(solver='euler')])
def test_gate_fails_a_wrong_sampler(wrong):
  spec = dataclasses.replace(WINDOWED, sampler=dataclasses.replace(SAMPLER, **wrong))
  assert relative_error(_sample(spec, 1)[0], _windowed()[0]) > BITES


def test_gate_fails_a_history_that_is_not_taken_for_clean(monkeypatch):
  clean_pass = step.clean_pass
  monkeypatch.setattr(step, 'clean_pass', lambda *given, sigma, **named: clean_pass(
      *given, sigma=SAMPLER.sigmas[-2], **named))
  first, second = _errors(_sample(WINDOWED, 2), _windowed()[:2])
  assert first <= GATE
  assert second > BITES
