import functools

import jax
import jax.numpy as jnp
import pytest

from pf_jax.aot import host
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec, SamplerSpec
from pf_jax.testing import random_models, tiny_model_spec


def found(function, *inputs):
  return host.round_trips(jax.jit(function).lower(*inputs).compile().as_text())


def until(limit, x):
  return jax.lax.while_loop(lambda x: x < limit, lambda x: x * jnp.sin(x) + 2, x)


@pytest.mark.parametrize(('function', 'number'), [
    (lambda x: jax.lax.fori_loop(0, 7, lambda i, x: jnp.sin(x) + i, x), 0),
    (lambda x: jax.lax.scan(lambda x, y: (jnp.sin(x + y), x), x, jnp.arange(5.0))[0], 0),
    (functools.partial(until, 40.0), 1),
    (lambda x: jax.lax.cond(x > 0, jnp.sin, lambda x: jnp.cos(x) * x, x), 1),
    (lambda x: jax.pure_callback(lambda x: x, x, jnp.sin(x)) + 1, 1)])
def test_round_trips_are_found(function, number):
  assert len(found(function, jnp.float32(1))) == number


def test_a_block_never_waits_for_the_host():
  models = random_models(tiny_model_spec(), 1)
  spec = RolloutSpec(block_lib.cache_spec(models.spec, sink_blocks=1, top_k=1, mid_capacity=2),
                     SamplerSpec(steps=(1000.0, 500.0)))
  shapes = block_lib.input_shapes(models, 1, spec)
  block = functools.partial(block_lib.sample_block, first=False, spec=spec)
  assert found(block, models, shapes.state, shapes.text, shapes.keys) == []
