"""The clip sampler: stored clips of diffusers, guidance both ways, step by step, specs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pf_jax.diffusion import multistep
from pf_jax.models.transformer import CausalTransformer, TransformerSpec
from pf_jax.rollout.bidirectional import (
  DECODE,
  DENOISE,
  ClipPrograms,
  ClipSamplerSpec,
  clip_shapes,
  denoise_step,
  pieces,
  sample_clip,
  step_rows,
)
from pf_jax.rollout.rollout import to_frames
from pf_jax.testing import random_models, tiny_model_spec
from pf_jax.weights.networks import from_released
from tests.models.cached import load, relative_error

GATE = 2e-5
SPEC = TransformerSpec(width=24, ffn_width=32, num_heads=2, num_layers=2, in_channels=4,
                       out_channels=4, time_width=16, text_width=12)
CLIP = ClipSamplerSpec(steps=4)


@functools.cache
def golden():
  return load('schedulers')


@functools.cache
def transformer():
  prefix = 'weights/'
  return from_released({key.removeprefix(prefix): array for key, array in golden().items()
                        if key.startswith(prefix)}, SPEC)


@functools.cache
def prompts():
  return tuple(transformer().text_keys_values(golden()[name])
               for name in ('clip_text', 'clip_negative_text'))


def clip(spec, *texts):
  """A freshly traced program: some tests change what tracing calls."""
  return np.asarray(jax.jit(lambda *args: sample_clip(*args, spec=spec))(
      transformer(), golden()['clip_noise'], *texts))


@pytest.mark.parametrize(('solver', 'batched'), [('unipc', False), ('unipc', True),
                                                 ('dpm++', False)])
def test_stored_clips_of_diffusers(solver, batched):
  ours = clip(dataclasses.replace(CLIP, solver=solver, batched=batched), *prompts())
  assert relative_error(ours, golden()[f'clip_{solver}_output']) <= GATE
  assert ours.dtype == np.float32


def test_stored_clips_tell_swapped_prompts():
  text, negative = prompts()
  swapped = jax.tree.map(lambda n, p: jnp.broadcast_to(n, p.shape), negative, text), text
  assert relative_error(clip(CLIP, *swapped), golden()['clip_unipc_output']) > 10 * GATE


def test_scan_equals_plain_steps_of_euler():
  """x + (sigma' - sigma) flow with the guided flow spelled out, no solver involved."""
  spec = ClipSamplerSpec(solver='euler', steps=3, shift=3.0, guidance=2.5)
  model, (text, negative) = transformer(), prompts()
  flow = jax.jit(lambda *args: model(*args).flow)
  sigmas, x = np.array([1, 6 / 7, 0.6, 0]), golden()['clip_noise']
  for sigma, lower in zip(sigmas[:-1], sigmas[1:], strict=True):
    timesteps = np.full((2, 3), 1000 * sigma, np.float32)
    guided = -1.5 * flow(x, timesteps, negative) + 2.5 * flow(x, timesteps, text)
    x = x + np.float32(lower - sigma) * guided
  assert relative_error(clip(spec, *prompts()), np.asarray(x)) <= GATE


@pytest.mark.parametrize('solver', ['unipc', 'dpm++', 'euler'])
def test_steps_from_python_equal_the_scan(solver):
  """All that a step hands on is in its state; compiled alone or in a scan, it is the same step."""
  spec = dataclasses.replace(CLIP, solver=solver)
  step = jax.jit(functools.partial(denoise_step, spec=spec))
  rows, state = step_rows(spec), multistep.init(jnp.asarray(golden()['clip_noise']))
  for index in range(spec.steps):
    row = jax.tree.map(lambda column, index=index: column[index], rows)
    state = step(transformer(), state, row, *prompts())
  assert relative_error(np.asarray(state.x), clip(spec, *prompts())) <= 1e-6


@pytest.mark.parametrize(('frames', 'longest', 'wanted'), [
    (21, 4, (1, 4, 4, 4, 4, 4)), (21, 3, (3, 3, 3, 3, 3, 3, 3)), (6, 4, (2, 4)), (4, 4, (4,)),
    (3, 4, (3,)), (1, 4, (1,))])
def test_pieces_are_alike_but_for_the_first(frames, longest, wanted):
  assert pieces(frames, longest) == wanted


def test_compiled_programs_make_the_clip_of_the_scan_and_the_frames_of_the_whole():
  """Latents of 3 frames, decoded as 1 and 2: 1 and 8 pixel frames."""
  model = tiny_model_spec(frames_per_block=2)
  models, spec = random_models(model, 1), ClipSamplerSpec(steps=3)
  programs = ClipPrograms(model, spec, 3)
  assert list(programs.compile_seconds) == ['text', 'start', 'step', 'first', 'next']
  assert min(programs.compile_seconds.values()) > 0
  assert min(programs.scratch_bytes[DENOISE], programs.scratch_bytes[DECODE]) > 0
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((2, 1, 6, 12)).astype(np.float32)
  texts = [programs.text_keys_values(models.transformer, prompt) for prompt in rows]
  noise = jax.random.normal(jax.random.key(5), (1, 3, 4, 6, 4))
  state = programs.start(5)
  assert jnp.array_equal(state.x, noise)  # a NumPy view of it would keep it from being consumed
  for index in range(spec.steps):
    before = state
    state = programs.step(index, models.transformer, state, *texts)
    assert before.x.is_deleted()  # in place
  scanned = jax.jit(functools.partial(sample_clip, spec=spec))(models.transformer, noise, *texts)
  assert relative_error(np.asarray(state.x), np.asarray(scanned)) <= 1e-6
  latents = np.asarray(state.x)
  first, decoder = programs.decode(models.vae, None, latents[:, :1])
  rest, _ = programs.decode(models.vae, decoder, latents[:, 1:])
  assert all(slot.is_deleted() for slot in jax.tree.leaves(decoder))
  whole = to_frames(jax.jit(lambda vae, z: vae.decode(z))(models.vae, latents))
  difference = np.concatenate([first, rest], axis=1).astype(int) - np.asarray(whole)
  assert np.abs(difference).max() <= 1  # rounding of a last bit
  assert np.asarray(whole).std() > 5


def test_shapes_without_guidance_or_with_a_single_piece():
  model = tiny_model_spec()
  shapes = clip_shapes(model, ClipSamplerSpec(guidance=1.0), 3)
  assert len(shapes.texts) == 1
  assert [piece.shape for piece in shapes.pieces] == [(1, 3, 4, 6, 4)]
  assert (shapes.frames.shape, shapes.frames.dtype) == ((1, 9, 32, 48, 3), np.uint8)


@pytest.mark.parametrize(('choices', 'batches'), [
    (dict(guidance=1.0), [2]), (dict(guidance=1.0, batched=True), [2]),
    (dict(guidance=5.0), [2, 2]), (dict(guidance=5.0, batched=True), [4])])
def test_passes_of_the_network(monkeypatch, choices, batches):
  """The scan's body is traced once: what one step runs. No guidance runs no negative prompt."""
  seen, call = [], CausalTransformer.__call__

  def counted(self, latents, *args, **kwargs):
    seen.append(latents.shape[0])
    return call(self, latents, *args, **kwargs)

  monkeypatch.setattr(CausalTransformer, '__call__', counted)
  spec = dataclasses.replace(CLIP, **choices)
  texts = prompts()[:1] if spec.guidance == 1 else prompts()
  jax.eval_shape(functools.partial(sample_clip, spec=spec), transformer(),
                 golden()['clip_noise'], *texts)
  assert seen == batches


def test_guidance_of_one_is_the_prompt_alone():
  ours = clip(dataclasses.replace(CLIP, guidance=1.0), *prompts())
  nearly = clip(dataclasses.replace(CLIP, guidance=1 + 1e-6), *prompts())
  assert relative_error(ours, nearly) <= GATE


def test_memory_does_not_hold_the_layers_keys():
  """The transformer returns every layer's keys and values; nobody wants them here."""
  sizes = []
  for layers in (2, 6):
    spec = dataclasses.replace(SPEC, num_layers=layers)
    model = jax.eval_shape(lambda spec=spec: CausalTransformer(spec, rngs=nnx.Rngs(0)))
    text = jax.eval_shape(lambda m: m.text_keys_values(jnp.zeros((1, 6, 12))), model)
    noise = jax.ShapeDtypeStruct((1, 4, 8, 8, 4), jnp.float32)
    program = jax.jit(functools.partial(sample_clip, spec=CLIP)).lower(model, noise, text, text)
    sizes.append(program.compile().memory_analysis().temp_size_in_bytes)
  keys_values = 4 * 2 * 4 * 4 * 4 * 24 * 4  # of the other layers
  assert sizes[1] - sizes[0] < keys_values / 4


def test_defaults_and_presets_are_wans():
  assert ClipSamplerSpec() == ClipSamplerSpec('unipc', 50, 5.0, 5.0, False)
  assert ClipSamplerSpec.wan_1_3b() == ClipSamplerSpec('unipc', 50, 8.0, 6.0, False)
  assert ClipSamplerSpec.wan_1_3b(steps=20, shift=12.0) == ClipSamplerSpec('unipc', 20, 12.0, 6.0)
  np.testing.assert_array_equal(ClipSamplerSpec().levels.timesteps[:3], [999, 995, 991])
  np.testing.assert_array_equal(ClipSamplerSpec('dpm++').levels.timesteps[:3], [1000, 995, 991])


@pytest.mark.parametrize(('choices', 'message'), [
    ({'solver': 'heun'}, "solver='heun' is unknown; use one of euler, dpm\\+\\+, unipc"),
    ({'steps': 0}, 'steps=0 cannot denoise; Wan2.1 uses 50'),
    ({'shift': 0.0}, 'shift=0.0 must be positive'),
    ({'shift': float('inf')}, 'shift=inf must be positive'),
    ({'guidance': -1.0}, 'guidance=-1.0 must not be negative; use 1 for none'),
    ({'guidance': float('nan')}, 'guidance=nan must not be negative')])
def test_specs_that_cannot_work_are_refused(choices, message):
  with pytest.raises(ValueError, match=message):
    ClipSamplerSpec(**choices)


def _fewer_rows(prompt):
  return jax.tree.map(lambda x: x[:, :, :4], prompt)


@pytest.mark.parametrize(('noise', 'negative', 'message'), [
    ((2, 3, 4, 6, 5), lambda prompt: prompt, r'noise has shape .*, wanted \[b f h w c=4\]'),
    ((2, 3, 4, 6, 4), lambda prompt: None, 'guidance needs a negative prompt, got none'),
    ((2, 3, 4, 6, 4), _fewer_rows, (r'negative_text has keys \(2, 1, 4, 2, 12\), wanted '
                                    r'\(2, 2, 6, 2, 12\) or a batch of 1'))])
def test_inputs_that_do_not_fit_are_refused(noise, negative, message):
  with pytest.raises(ValueError, match=message):
    sample_clip(transformer(), jnp.zeros(noise), prompts()[0], negative(prompts()[1]), spec=CLIP)


def test_a_transformer_that_predicts_other_channels_is_refused():
  spec = dataclasses.replace(SPEC, out_channels=6)
  model = jax.eval_shape(lambda: CausalTransformer(spec, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match='from 4 to 6 channels cannot sample'):
    sample_clip(model, jnp.zeros((2, 3, 4, 6, 4)), *prompts(), spec=CLIP)
