"""Trajectories by hand, and a student that learns where they end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax.pipeline import rollout_spec
from pf_jax.rollout.bidirectional import ClipSamplerSpec, sample_clip
from pf_jax.rollout.block import SamplerSpec
from pf_jax.train import ode, ode_stage
from pf_jax.train.clips import ClipPhase
from pf_jax.train.config import OptimizerConfig, TrainConfig
from pf_jax.train.flow_matching import (
    ClipBatch,
    FlowBatch,
    FlowMatchingSpec,
    flow_loss,
    from_trajectory,
)
from pf_jax.train.ode_stage import OdeStage
from pf_jax.train.teacher_forcing import CausalObjective, TeacherForcingSpec
from pf_jax.weights import package
from tests.evals import micro
from tests.train import learns

pytestmark = pytest.mark.timeout(400)
STUDENT = SamplerSpec('renoise', (1000.0, 750.0, 500.0, 250.0), 5.0)
TEACHER = ClipSamplerSpec(solver='euler', steps=8, shift=5.0, guidance=1.0)
STEPS = (0, 2, 4, 6)


def test_the_student_s_levels_are_among_the_teacher_s():
  assert ode.snapshot_steps(TEACHER, STUDENT) == STEPS
  many = dataclasses.replace(TEACHER, steps=48)
  assert ode.snapshot_steps(many, STUDENT) == (0, 12, 24, 36)
  np.testing.assert_allclose(1000 * many.levels.sigmas[[0, 12, 24, 36]],
                             [1000, 937.5, 2500 / 3, 625])
  for wrong in (dict(steps=50), dict(shift=8.0)):
    with pytest.raises(ValueError, match=r"are none of the teacher's .* such as 48"):
      ode.snapshot_steps(dataclasses.replace(TEACHER, **wrong), STUDENT)


@functools.cache
def models():
  return micro.models()


@functools.cache
def way():
  """Noise, text, and the way of two clips of four blocks."""
  rng = np.random.default_rng(0)
  spec = models().spec
  rows = jnp.asarray(rng.standard_normal((2, spec.text.max_tokens, spec.text.width)), jnp.float32)
  noise = jnp.asarray(rng.standard_normal((2, 16, *micro.VIDEO.block_latent_shape[1:])),
                      jnp.float32)
  text = micro.once(lambda m, r: m.transformer.text_keys_values(r), models(), rows)
  run = functools.partial(ode.trajectory, spec=TEACHER, steps=STEPS)
  kept, x0 = micro.once(lambda m, *given: run(m, *given, None), models().transformer, noise, text)
  return noise, text, kept, x0


def test_a_trajectory_is_the_sampler_s_way():
  noise, text, kept, x0 = way()
  sampled = micro.once(lambda m, *given: sample_clip(m, *given, spec=TEACHER),
                       models().transformer, noise, text)
  np.testing.assert_allclose(x0, sampled, atol=1e-5)
  np.testing.assert_array_equal(kept[:, 0], noise)
  # Euler from the first kept state: two steps later it is the next one.
  transformer, sigmas, x = models().transformer, TEACHER.levels.sigmas, noise
  forward = jax.jit(lambda x, t: transformer(x, t, text).flow)
  for index in range(2):
    flow = forward(x, jnp.full(x.shape[:2], 1000 * sigmas[index], jnp.float32))
    x = x + (sigmas[index + 1] - sigmas[index]) * flow
  np.testing.assert_allclose(kept[:, 1], x, atol=1e-4)


def test_targets_point_to_the_end():
  """x_t minus sigma times the target is x0, and the loss is the squared error of x0."""
  _, _, kept, x0 = way()
  sigmas = STUDENT.sigmas[:-1]
  noised = from_trajectory(x0[:, :4], kept[:, :, :4], sigmas)
  assert noised.x_t.shape[0] == 8
  np.testing.assert_allclose(noised.sigma, [*sigmas, *sigmas], rtol=1e-6)
  ends = noised.x_t - noised.sigma[:, None, None, None, None] * noised.target
  np.testing.assert_allclose(ends, jnp.repeat(x0[:, :4], 4, axis=0), atol=1e-5)
  off = noised.target + 0.5
  np.testing.assert_allclose(flow_loss(off, noised, FlowMatchingSpec(loss='x0')),
                             0.25 * noised.sigma**2, rtol=1e-5)


def test_the_student_learns_to_jump():
  """One clip of four blocks: most of the time is computing, not compiling."""
  kept, x0 = jax.tree.map(lambda x: x[:1], way()[2:])
  spec = models().spec
  ids = np.ones((1, spec.text.max_tokens), np.int32)
  low = jnp.zeros((1, 4, *models().compressor.spec.mid_grid(spec.video)[:1],
                   *(4 * n for n in models().compressor.spec.mid_grid(spec.video)[1:]), 4))
  batch = FlowBatch(ClipBatch(x0, low, ids, ids > 0, kept))
  cache = rollout_spec(spec, {'cache': micro.CHOICES['cache']}).cache
  objective = CausalObjective(models(), cache, TeacherForcingSpec(
      sink_blocks=(), context_noise=0.0, drop_sink=0.0, drop_mid=0.0),
      sigmas=STUDENT.sigmas[:-1].tolist())
  assert learns.fall(objective, batch, steps=15) < 0.6


def test_a_run_keeps_the_text_encoder_and_leaves_a_model(tmp_path):
  package.save_vae(tmp_path / 'vae', models().vae, models().spec.vae)
  package.save_model(tmp_path / 'start', models(), choices=micro.CHOICES)
  stage = OdeStage(
      model=micro.spec(), vae=str(tmp_path / 'vae'), store=str(tmp_path / 'store'), clips=3,
      clip_blocks=3, encode_batch=2, phases=(ClipPhase(1, clips=2),), world=micro.WORLD,
      start=str(tmp_path / 'start'), teacher=str(tmp_path / 'start'),
      cache=micro.CHOICES['cache'], sampler=SamplerSpec('renoise', (1000.0, 500.0)),
      trajectory=ClipSamplerSpec(solver='euler', steps=2, guidance=2.0), eval_blocks=1,
      teacher_forcing=TeacherForcingSpec(sink_blocks=()))
  config = TrainConfig(steps=1, log_every=1, save_every=1, eval_every=1, ema_decay=0.0, mfu=False,
                       optimizer=OptimizerConfig(warmup_steps=0, group_scale={'text': 0.0}))
  result = ode_stage.train_ode(stage, config, tmp_path / 'run')
  assert np.isfinite(result.metrics['loss'])
  loaded, _, about, _ = package.load_model(tmp_path / 'run' / 'model')
  assert about == {'stage': 'ode', 'step': 1}
  before = package.load_model(tmp_path / 'start').models
  jax.tree.map(np.testing.assert_array_equal, loaded.text, before.text)
  assert np.abs(loaded.transformer.head.kernel - before.transformer.head.kernel).max() > 0


def stage_of(teacher):
  return OdeStage(model=micro.spec(), vae='', store='', clip_blocks=3, world=micro.WORLD,
                  start='none', teacher=str(teacher), sampler=STUDENT, trajectory=TEACHER,
                  cache=micro.CHOICES['cache'])


@pytest.mark.parametrize('part', ['text', 'vae'])
def test_a_teacher_of_another_kind_is_refused(tmp_path, part):
  other = jax.tree.map(lambda x: x + 1, getattr(models(), part))
  package.save_model(tmp_path / 'student', models())
  student = package.load_model(tmp_path / 'student').models  # values as they are stored
  package.save_model(tmp_path / 'teacher', student.replaced(**{part: other}))
  with pytest.raises(package.PackageError, match=f"other weights of the part '{part}' than the st"):
    ode_stage.load_teacher(stage_of(tmp_path / 'teacher'), student)
  ode_stage.load_teacher(stage_of(tmp_path / 'student'), student)


def test_a_teacher_of_other_clips_is_refused(tmp_path):
  package.save_model(tmp_path / 'teacher', models(), about={'clip_blocks': 4})
  with pytest.raises(package.PackageError, match='trained on clips of 4 blocks and is shown 3'):
    ode_stage.load_teacher(stage_of(tmp_path / 'teacher'),
                           package.load_model(tmp_path / 'teacher').models)
