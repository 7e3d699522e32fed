"""Noise levels, solvers and the whole clip sampler against diffusers.

diffusers' own lists for UniPC and DPM++ are not Wan2.1's. Given Wan2.1's levels it takes the very
steps of Wan2.1, so the levels are put into its schedulers here. In float64 ours and theirs then
agree to rounding; float32 adds that of every step.
"""

import dataclasses
import functools
import warnings

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)

from pf_jax.diffusion import schedule
from pf_jax.diffusion.multistep import SOLVERS
from pf_jax.diffusion.schedule import Levels
from pf_jax.rollout.bidirectional import ClipSamplerSpec, sample_clip
from pf_jax.weights.networks import from_released
from tests.diffusion import gaussian
from tests.parity import oracles
from tests.rollout.test_bidirectional import CLIP, GATE, SPEC

SCHEDULER_GATE = 2e-7  # float64
FLOAT32_GATE = 2e-6
NAMES = ('unipc', 'dpm++')
COUNTS = (1, 2, 3, 5, 50)
SHIFT = 5.0


class _Float64(torch.Tensor):
  """Latents that stay float64: diffusers' DPM++ would round them to float32 at every step."""

  def to(self, *args, **kwargs):
    return self


def _scheduler(name: str, levels: Levels, dtype: torch.dtype):
  """diffusers' scheduler at Wan2.1's levels."""
  choices = dict(prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=1.0)
  if name == 'unipc':
    scheduler = UniPCMultistepScheduler(**choices)
    scheduler.set_timesteps(sigmas=levels.sigmas[:-1].copy())
  else:
    scheduler = DPMSolverMultistepScheduler(**choices)
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # NumPy's, about how diffusers reads a tensor
      scheduler.set_timesteps(len(levels.timesteps))
    scheduler.timesteps = torch.tensor(1000 * levels.sigmas[:-1]).to(torch.int64)
  scheduler.sigmas = torch.tensor(levels.sigmas, dtype=dtype)
  scheduler.set_begin_index(0)
  return scheduler


def _sample(scheduler, flow, x: torch.Tensor) -> torch.Tensor:
  for timestep in scheduler.timesteps:
    x = scheduler.step(flow(x, timestep), timestep, x, return_dict=False)[0]
  return x


def solver_oracle(name: str, count: int, noise: np.ndarray) -> np.ndarray:
  """The Gaussian's flow solved by diffusers in the noise's precision."""
  x = torch.tensor(noise)
  scheduler = _scheduler(name, SOLVERS[name].levels(count, SHIFT), x.dtype)
  if x.dtype == torch.float64:
    x = x.as_subclass(_Float64)
  x = _sample(scheduler, lambda x, timestep: gaussian.flow(x, float(timestep)), x)
  return x.as_subclass(torch.Tensor).numpy()


def clip_model() -> WanTransformer3DModel:
  """A transformer of 20,000 random weights that predicts the flow of its own input."""
  return oracles.randomise(WanTransformer3DModel(
      patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
      out_channels=4, text_dim=12, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True,
      qk_norm='rms_norm_across_heads', eps=1e-6, rope_max_seq_len=1024), 21)


def clip_inputs() -> dict[str, np.ndarray]:
  """Noise [2, 3, 4, 6, 4], a prompt a sample (one of them ends early), one negative prompt."""
  rng = np.random.default_rng(22)
  text, negative = (rng.standard_normal((batch, 6, 12)).astype(np.float32) for batch in (2, 1))
  text[0, 4:] = negative[0, 3:] = 0
  return {'clip_noise': rng.standard_normal((2, 3, 4, 6, 4)).astype(np.float32),
          'clip_text': text, 'clip_negative_text': negative}


def clip_oracle(model: WanTransformer3DModel, inputs: dict, spec: ClipSamplerSpec) -> np.ndarray:
  """Latents [B, F, h, w, C] from diffusers' transformer and scheduler under guidance."""
  text = inputs['clip_text']
  negative = np.repeat(inputs['clip_negative_text'], len(text), axis=0)

  def flow(x, timestep):
    timesteps = np.full(len(text), float(timestep))
    with_text, without = (torch.tensor(oracles.wan_oracle(model, x.numpy(), timesteps, rows))
                          for rows in (text, negative))
    return without + spec.guidance * (with_text - without)

  scheduler = _scheduler(spec.solver, spec.levels, torch.float32)
  return _sample(scheduler, flow, torch.tensor(inputs['clip_noise'])).numpy()


def scheduler_case() -> dict[str, np.ndarray]:
  """The golden case: the Gaussian solved in 1 to 50 steps (float64), and two guided clips."""
  noise = np.random.default_rng(23).standard_normal((2, 3, 4)).astype(np.float32)
  model, inputs = clip_model(), clip_inputs()
  solved = {f'{name}_{count}_output': solver_oracle(name, count, noise.astype(np.float64))
            for name in NAMES for count in COUNTS}
  clips = {f'clip_{name}_output': clip_oracle(model, inputs, dataclasses.replace(CLIP, solver=name))
           for name in NAMES}
  weights = {f'weights/{name}': array for name, array in oracles.wan_tensors(model).items()}
  return weights | {'noise': noise} | inputs | solved | clips


@pytest.mark.parametrize('shift', [3.0, 5.0, 8.0])
def test_training_table_matches_diffusers(shift):
  theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
  ours = schedule.flow_match_sigmas(shift)
  np.testing.assert_allclose(ours, theirs.sigmas.numpy(), atol=SCHEDULER_GATE)
  np.testing.assert_allclose(1000 * ours, theirs.timesteps.numpy(), rtol=SCHEDULER_GATE)
  twice = schedule.shift_sigma(ours, shift)
  assert np.abs(twice - theirs.sigmas.numpy()).max() > 10 * SCHEDULER_GATE


@pytest.mark.parametrize('count', [*COUNTS, 20, 30, 40, 100])
@pytest.mark.parametrize('shift', [1.0, 3.0, 5.0, 8.0, 12.0])
def test_unipc_timesteps_match_diffusers(count, shift):
  """diffusers shifts Wan2.1's unshifted list by itself here, and truncates."""
  scheduler = UniPCMultistepScheduler(prediction_type='flow_prediction', use_flow_sigmas=True,
                                      flow_shift=shift)
  scheduler.set_timesteps(sigmas=np.linspace(schedule.UNIPC_START, 0, count + 1)[:-1])
  ours = schedule.unipc_levels(count, shift)
  np.testing.assert_array_equal(ours.timesteps, scheduler.timesteps.numpy())
  np.testing.assert_array_equal(ours.sigmas.astype(np.float32), scheduler.sigmas.numpy())


@functools.cache
def _noise():
  return np.random.default_rng(24).standard_normal((2, 3, 4, 5))


@functools.cache
def _solved(name, count):
  return solver_oracle(name, count, _noise())


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('count', COUNTS)
def test_solvers_match_diffusers(name, count):
  levels = SOLVERS[name].levels(count, SHIFT)
  ours = gaussian.sample(SOLVERS[name], levels, _noise())
  assert oracles.relative_error(ours, _solved(name, count)) <= SCHEDULER_GATE
  noise = _noise().astype(np.float32)
  ours, theirs = gaussian.sample(SOLVERS[name], levels, noise), solver_oracle(name, count, noise)
  assert ours.dtype == theirs.dtype == np.float32
  assert oracles.relative_error(ours, theirs) <= FLOAT32_GATE


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('count', [5, 50])
@pytest.mark.parametrize('mistake', ['timesteps', 'order', 'corrector', 'shift'])
def test_gate_fails_a_wrong_solver(name, count, mistake):
  solver = SOLVERS[name]
  sigmas, timesteps = levels = solver.levels(count, SHIFT)
  wrong_solver, wrong_levels = {
      'timesteps': (solver, levels._replace(timesteps=1000 * sigmas[:-1])),
      'order': (dataclasses.replace(solver, order=1), levels),
      'corrector': (dataclasses.replace(solver, corrector=not solver.corrector), levels),
      'shift': (solver, Levels(schedule.shift_sigma(sigmas, SHIFT), timesteps)),
  }[mistake]
  ours = gaussian.sample(wrong_solver, wrong_levels, _noise())
  assert oracles.relative_error(ours, _solved(name, count)) > 10 * FLOAT32_GATE


@functools.cache
def _clip_model():
  return clip_model()


@functools.cache
def _clip(solver):
  return clip_oracle(_clip_model(), clip_inputs(), dataclasses.replace(CLIP, solver=solver))


def _our_clip(spec, prompts=('clip_text', 'clip_negative_text')):
  model = from_released(oracles.wan_tensors(_clip_model()), SPEC)
  inputs = clip_inputs()
  text = [np.broadcast_to(inputs[name], inputs['clip_text'].shape) for name in prompts]
  return np.asarray(jax.jit(functools.partial(sample_clip, spec=spec))(
      model, inputs['clip_noise'], *map(model.text_keys_values, text)))


@pytest.mark.parametrize(('solver', 'batched'), [('unipc', False), ('unipc', True),
                                                 ('dpm++', False)])
def test_guided_clip_matches_diffusers(solver, batched):
  spec = dataclasses.replace(CLIP, solver=solver, batched=batched)
  assert oracles.relative_error(_our_clip(spec), _clip(solver)) <= GATE


@pytest.mark.parametrize('mistake', ['prompts', 'guidance', 'shift', 'solver', 'steps'])
def test_gate_fails_a_wrong_clip(mistake):
  spec, prompts = CLIP, ('clip_text', 'clip_negative_text')
  if mistake == 'prompts':
    prompts = prompts[::-1]
  else:
    wrong = {'guidance': 5.1, 'shift': 4.9, 'solver': 'dpm++', 'steps': 5}
    spec = dataclasses.replace(spec, **{mistake: wrong[mistake]})
  assert oracles.relative_error(_our_clip(spec, prompts), _clip('unipc')) > 10 * GATE


def test_gate_fails_a_clip_whose_timesteps_are_not_truncated(monkeypatch):
  solver = dataclasses.replace(SOLVERS['unipc'], levels=lambda count, shift: Levels(
      (sigmas := schedule.unipc_levels(count, shift).sigmas), 1000 * sigmas[:-1]))
  monkeypatch.setitem(SOLVERS, 'unipc', solver)
  assert oracles.relative_error(_our_clip(CLIP), _clip('unipc')) > 10 * GATE
