"""DMD: the direction between known scores, whose gradient goes where, and who moves when."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax.pipeline import rollout_spec
from pf_jax.train import dmd, state, step
from pf_jax.train.config import OptimizerConfig
from pf_jax.train.dmd import (
  CRITIC,
  GENERATOR,
  DmdBatch,
  DmdObjective,
  DmdSpec,
  Frozen,
  direction,
  generator_loss,
)
from pf_jax.train.self_forcing import SelfForcingSpec
from tests.evals import micro

pytestmark = pytest.mark.timeout(400)


# --- the direction -------------------------------------------------------------------------------


def test_direction_by_hand():
  """mean |x - real| is 2 in the first video and 0.5 in the second."""
  x = jnp.array([[1.0, 3.0], [0.0, 0.0]])
  real = jnp.array([[0.0, 0.0], [0.5, -0.5]])
  fake = jnp.array([[4.0, -2.0], [0.5, 0.0]])
  np.testing.assert_allclose(direction(x, fake, real), [[2.0, -1.0], [0.0, 1.0]])


def test_a_video_that_is_the_teacher_s_own_stays():
  x = jnp.ones((1, 4))
  np.testing.assert_array_equal(direction(x, x, x), jnp.zeros((1, 4)))  # 0 / 0


def test_the_loss_s_gradient_is_the_direction_over_own_frames():
  rng = np.random.default_rng(0)
  x, fake, real = (jnp.asarray(rng.standard_normal((2, 3, 1, 2, 2)), jnp.float32)
                   for _ in range(3))
  own = jnp.ones((2, 3, 1, 1, 1)).at[:, 0].set(0)
  gradient = jax.grad(generator_loss)(x, own, fake, real)
  np.testing.assert_array_equal(gradient[:, 0], 0)
  wanted = direction(x, fake, real)[:, 1:] / (2 * 2 * 4)
  np.testing.assert_allclose(gradient[:, 1:], wanted, rtol=1e-5)


def posterior_mean(x_t, sigma, mean):
  """E[x0 | x_t] for x0 ~ N(mean, 1), in closed form."""
  gain = (1 - sigma) / ((1 - sigma)**2 + sigma**2)
  return mean + gain * (x_t - (1 - sigma) * mean)


@pytest.mark.parametrize('sign', [1, -1])
def test_a_gaussian_walks_to_another(sign):
  """The student draws from N(m, 1), its exact critic knows m; the teacher's mean is 3. Walking
  along the loss's gradient brings m there; walking the other way, a swapped sign, does not."""
  spec = DmdSpec()

  @jax.jit
  def walk(mean, key):
    def loss(mean):
      x = mean + jax.random.normal(jax.random.fold_in(key, 0), (64, 1, 1, 1, 8))
      sigma = dmd.draw_levels(jax.random.fold_in(key, 1), 64, spec)
      fixed = jax.lax.stop_gradient(x)
      x_t = (1 - sigma) * fixed + sigma * jax.random.normal(jax.random.fold_in(key, 2), x.shape)
      fake = posterior_mean(x_t, sigma, jax.lax.stop_gradient(mean))
      return generator_loss(x, jnp.ones_like(x[..., :1]), fake, posterior_mean(x_t, sigma, 3.0))
    return mean - sign * 0.2 * jax.grad(loss)(mean)

  mean = jnp.float32(-1.0)
  for i in range(200):
    mean = walk(mean, jax.random.key(i))
  assert (abs(float(mean) - 3) < 0.1) == (sign == 1)


def test_levels_are_shifted_and_clamped():
  levels = 1000 * np.asarray(dmd.draw_levels(jax.random.key(0), 4000, DmdSpec()))
  assert (levels.min(), levels.max()) == (pytest.approx(20), pytest.approx(980))
  # Shift 5 maps 1/2 to 5/6.
  assert np.median(levels) == pytest.approx(1000 * 5 / 6, abs=15)
  with pytest.raises(ValueError, match=r'lowest=980\.0 and highest=20\.0 must rise'):
    DmdSpec(lowest=980.0, highest=20.0)


# --- the objective -------------------------------------------------------------------------------

MODELS = micro.models().without_text()
ROLLOUT = rollout_spec(MODELS.spec, {'cache': micro.CHOICES['cache'], 'sampler': {
    'solver': 'renoise', 'steps': (1000.0, 500.0)}})
FORCING = SelfForcingSpec(window_blocks=4, warmup_blocks=1)
BOTH, CRITIC_ONLY = frozenset({GENERATOR, CRITIC}), frozenset({CRITIC})


@functools.cache
def objective(**choices):
  teacher = jax.tree.map(lambda x: x * 1.1, MODELS.transformer)
  text = MODELS.spec.text
  empty = jnp.zeros((1, text.max_tokens, text.width))
  return DmdObjective(
      MODELS.spec, MODELS.vae, lambda: (MODELS.transformer, MODELS.compressor, teacher),
      Frozen(teacher, empty), ROLLOUT, FORCING, DmdSpec(**choices), seed=5)


@functools.cache
def batch():
  text = MODELS.spec.text
  rows = np.random.default_rng(0).standard_normal((2, text.max_tokens, text.width))
  made = objective()
  with_warmup = next(step for step in range(9) if made.plan(step)[0] == 1)
  keys = jax.random.split(jax.random.key(3), 2)
  return made.generate(made.init(0), DmdBatch(jnp.asarray(rows, jnp.float32), keys), with_warmup)


def norm(tree) -> float:
  return float(jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))))


@functools.cache
def gradients(moving, **choices):
  made = objective(**choices)
  loss = jax.jit(jax.grad(made.loss, has_aux=True), static_argnames='moving')
  return loss(made.init(0), batch(), jax.random.key(1), moving=moving)


def test_each_loss_has_a_gradient_in_its_own_part_only():
  """The critic's gradient is the same whether the generator moves or not, to the last bits."""
  both, about = gradients(BOTH)
  alone, about_critic = gradients(CRITIC_ONLY)
  assert norm(alone[GENERATOR]) == 0
  assert min(norm(both[GENERATOR]['transformer']), norm(both[GENERATOR]['compressor'])) > 1e-6
  assert norm(alone[CRITIC]) > 1e-3
  for a, b in zip(jax.tree.leaves(both[CRITIC]), jax.tree.leaves(alone[CRITIC]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max() + 1))
  assert set(about) - set(about_critic) == {'fake_minus_real', 'student_minus_real'}


def test_a_critic_that_agrees_with_the_teacher_moves_nothing():
  gradient, _ = gradients(BOTH, guidance=0.0)
  assert norm(gradient[GENERATOR]) < 1e-4 * norm(gradients(BOTH)[0][GENERATOR])


def test_several_levels_are_several_judgements_of_the_same_rollouts():
  """With one level drawn for all (the clamp leaves no other) more of them differ in noise alone."""
  one, many = (objective(levels=n, lowest=499.0, highest=499.1) for n in (1, 16))
  losses = [[float(jax.jit(made.loss, static_argnames='moving')(
      made.init(0), batch(), jax.random.key(i), moving=CRITIC_ONLY)[0]) for i in range(4)]
      for made in (one, many)]
  assert np.mean(losses[1]) == pytest.approx(np.mean(losses[0]), rel=0.05)
  assert np.std(losses[1]) < 0.7 * np.std(losses[0])


def test_rollouts_are_functions_of_the_step():
  made = objective()
  plans = [made.plan(i) for i in range(200)]
  assert plans == [made.plan(i) for i in range(200)]
  assert set(plans) == {(warmup, exit_step) for warmup in (0, 1) for exit_step in (0, 1)}


def test_operations_of_a_rollout_by_formula():
  """Blocks of the warm-up take both passes, those of the window as many as it exits after."""
  made, rows = objective(), MODELS.spec.text.max_tokens
  params, given = made.init(0), DmdBatch(jnp.zeros((2, rows, MODELS.spec.text.width)), None)
  counts = {made.plan(step): made.generation_flops(params, given, step) for step in range(40)}
  early, whole = counts[0, 0] // 4, counts[0, 1] // 4
  assert counts == {(0, 0): 4 * early, (0, 1): 4 * whole, (1, 0): whole + 4 * early,
                    (1, 1): 5 * whole}
  # A pass over two blocks of 64 tokens, whose history are two more and a compressed one of 8. The
  # q, k, v, o of the tokens; q and o towards the text; the feed-forward; attention. Then patches in
  # and out, 64 numbers each, and the time of four frames. Blocks are selected in another pass.
  width, ffn, tokens = 24, 32, 2 * 64
  layer = 2 * tokens * (6 * width**2 + 2 * width * ffn)
  layer += 4 * tokens * (64 + 2 * 64 + 8 + rows) * width
  time = 2 * 2 * 4 * (16 * width + width**2 + width * 6 * width)
  assert whole - early == 2 * layer + 2 * tokens * 64 * width * 2 + time


def test_a_share_of_the_rollouts_begins_with_the_video():
  def lengths(share):
    spec = SelfForcingSpec(window_blocks=4, warmup_blocks=9, beginnings=share)
    made = DmdObjective(MODELS.spec, MODELS.vae, lambda: (), Frozen(None, None), ROLLOUT, spec,
                        DmdSpec(), seed=5)
    return np.bincount([made.plan(step)[0] for step in range(3000)], minlength=10) / 3000

  np.testing.assert_allclose(lengths(0.0), 0.1, atol=0.03)
  np.testing.assert_allclose(lengths(0.5), [0.55] + 9 * [0.05], atol=0.03)
  with pytest.raises(ValueError, match=r'beginnings=1\.5 is a share'):
    SelfForcingSpec(beginnings=1.5)


def test_the_critic_learns_what_the_student_makes():
  made, config = objective(), OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
  start = made.init(0)
  groups = made.param_groups(start)
  optimizer = state.take_turns({
      name: state.make_optimizer(config, 99, start[name], groups[name]) for name in made.players})
  advance = step.TrainStep(made, optimizer, groups, 0.9)
  run = state.init_state(start, optimizer, 0, ema=True, averaged=made.averaged)
  assert set(run.ema) == {GENERATOR}
  losses = []
  for _ in range(25):
    run, metrics = advance(run, batch(), moving=CRITIC_ONLY)
    losses.append(float(metrics['critic']))
  assert np.mean(losses[-5:]) < 0.75 * losses[0], losses
  assert np.isnan(metrics['grad_norm/generator'])
  assert np.isnan(metrics['grad_norm/compressor'])
  assert metrics['grad_norm/critic'] > 0
  for a, b in zip(jax.tree.leaves(run.params[GENERATOR]),
                  jax.tree.leaves(start[GENERATOR]), strict=True):
    np.testing.assert_array_equal(a, b)
