"""Teacher forcing through the cache: layouts by hand, gradients where they must and must not go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax import cache as cache_lib
from pf_jax.rollout import block as block_lib
from pf_jax.rollout import step
from pf_jax.testing import random_models, tiny_model_spec
from pf_jax.train.flow_matching import (
    ClipBatch,
    FirstBlocks,
    FlowBatch,
    add_levels,
    draw_sigmas,
    first_loss,
    flow_loss,
)
from pf_jax.train.teacher_forcing import (
    CausalObjective,
    Drops,
    TeacherForcingSpec,
    draw_drops,
    plan_mid,
    training_layout,
)

pytestmark = pytest.mark.timeout(300)


def drops(**values) -> Drops:
  base = dict(sink=[False], mid=[False], scatter=[False], order=[[0.9, 0.1, 0.5, 0.3]],
              between=[0.0], crowd=[False])
  return Drops(**{name: jnp.asarray(v) for name, v in (base | values).items()})


def layout_of(drawn, cache):
  """After four clean blocks."""
  return training_layout(jnp.int32(4), drawn, plan_mid(jnp.int32(4), drawn, cache), cache)


@pytest.fixture(scope='module')
def cache_spec():
  return block_lib.cache_spec(tiny_model_spec(), sink_blocks=1, top_k=4, mid_capacity=4)


def test_layout_without_drops_is_the_samplers(cache_spec):
  layout = layout_of(drops(), cache_spec)
  assert layout.mid[0, :2].tolist() == [4, 8]
  assert layout.recent.tolist() == [[12]]
  assert layout.current.tolist() == [16]
  assert layout.mid_valid.tolist() == [[True, True, False, False]]


def test_scattered_mid_blocks_take_the_smallest_draws_in_order(cache_spec):
  """All four slots are open; draws .1 and .3 win, slots 1 and 3, positions 4 + 4 * slot."""
  layout = layout_of(drops(scatter=[True], between=[0.99]), cache_spec)
  assert layout.mid[0, :2].tolist() == [8, 16]
  assert layout.recent.tolist() == [[20]]
  assert layout.current.tolist() == [24]


def test_a_crowd_fills_the_slots_between_with_copies_in_order(cache_spec):
  """Two archived blocks, 1 and 2, for four slots: the sorted draws choose 1, 1, 2, 2."""
  plan = plan_mid(jnp.int32(4), drops(scatter=[True], between=[0.99], crowd=[True]), cache_spec)
  assert plan.selected.tolist() == [[1, 1, 2, 2]]
  assert plan.slots.tolist() == [[0, 1, 2, 3]]
  assert plan.room.tolist() == [4]


def test_dropped_partitions_are_hidden(cache_spec):
  layout = layout_of(drops(sink=[True], mid=[True]), cache_spec)
  assert not layout.sink_valid.any()
  assert not layout.mid_valid.any()
  assert layout.current.tolist() == [8]  # no gap is left where mid would be


def test_levels_lean_towards_noise():
  sigma = draw_sigmas(jax.random.key(0), (20_000,), TeacherForcingSpec(uniform_share=0.0))
  # The median of a logit-normal is 1/2, which shift 5 moves to 5/6.
  assert float(jnp.median(sigma)) == pytest.approx(5 / 6, abs=0.01)


@pytest.fixture(scope='module')
def gradients():
  """Gradients of a batch whose noisy blocks see (or do not see) their compressed past."""
  models, rng = random_models(tiny_model_spec()), np.random.default_rng(0)
  video, rows = models.spec.video, models.spec.text.max_tokens
  frames, low = video.frames_per_block, models.spec.mid_grid
  batch = ClipBatch(
      latents=jnp.asarray(rng.standard_normal((2, 5 * frames, *video.block_latent_shape[1:])),
                          jnp.float32),
      lr_latents=jnp.asarray(rng.standard_normal(
          (2, 5, low[0], 2 * low[1], 2 * low[2], video.latent_channels)), jnp.float32),
      ids=jnp.full((2, rows), 3), mask=jnp.arange(rows)[None] < jnp.array([[3], [5]]))
  cache = block_lib.cache_spec(models.spec, sink_blocks=1, top_k=4, mid_capacity=4)
  # One clip, so that a key decides for the whole batch; one compilation serves both cases.
  batch = jax.tree.map(lambda x: x[:1], batch)
  spec = TeacherForcingSpec(noise_levels=2, sink_blocks=(1,), drop_sink=0.0, drop_mid=0.5)
  objective = CausalObjective(models, cache, spec)
  run = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
  found = {}
  for seed in range(20):
    key = jax.random.key(seed)
    drop_key = jax.random.split(jax.random.split(key)[1], 3)[0]
    dropped = bool(draw_drops(drop_key, 1, cache, spec).mid[0])
    if dropped not in found:
      found[dropped] = run(objective.init(0), FlowBatch(clips=batch), key)
  return found


def norm(tree) -> float:
  return float(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)) ** 0.5)


def test_gradient_reaches_both_branches_through_mid(gradients):
  _, gradient = gradients[False]
  assert norm(gradient['compressor'].hr.convs) > 1e-7
  assert norm(gradient['compressor'].hr.out) > 1e-7
  assert norm(gradient['transformer'].patch_embedding) > 1e-4
  assert norm(gradient['text']) > 1e-7


def test_no_gradient_without_mid(gradients):
  """The compressor is reached through mid keys/values and by no other way."""
  _, gradient = gradients[True]
  assert norm(gradient['compressor']) == 0
  assert norm(gradient['transformer'].patch_embedding) > 1e-4


def test_loss_is_reported_per_block(gradients):
  (loss, metrics), _ = gradients[False]
  assert np.isfinite(loss)
  assert set(metrics) == {f'high_noise/block_{i}' for i in range(5)}


def test_first_blocks_are_trained_as_the_sampler_runs_them():
  """No history, as `first_loss` has it, and an empty cache, as sampling has it, are the same."""
  models = random_models(tiny_model_spec())
  cache = block_lib.cache_spec(models.spec, sink_blocks=1, top_k=2, mid_capacity=2)
  video, rows = models.spec.video, models.spec.text.max_tokens
  rng = np.random.default_rng(0)
  spec = TeacherForcingSpec(first_levels=2)
  first = FirstBlocks(jnp.asarray(rng.standard_normal((1, *video.block_latent_shape)), jnp.float32),
                      jnp.full((1, rows), 3), jnp.arange(rows)[None] < 4)
  empty = cache_lib.init(cache, 1)

  def through_cache(models, first, key):
    noised = add_levels(first.latents, key, spec.first_levels, spec)
    layout = cache_lib.layout(empty.blocks, cache)
    out = models.transformer(
        noised.x_t, noised.timesteps, models.text_keys_values(first.ids, first.mask),
        slices=empty.layers, context_fn=step.select_history(empty.blocks, layout, cache))
    return jnp.mean(flow_loss(out.flow, noised, spec))

  key = jax.random.key(1)
  alone = jax.jit(lambda models, first, key: first_loss(models, first, key, spec))
  expected = jax.jit(through_cache)(models, first, key)
  np.testing.assert_allclose(alone(models, first, key), expected, rtol=1e-5)
  assert float(expected) > 0
