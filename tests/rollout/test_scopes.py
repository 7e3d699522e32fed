"""Names of a block's parts in the compiled program, as traces show them (`--profile`)."""

import contextlib
import functools
import re

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pf_jax.models import bundle
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec, SamplerSpec, cache_spec
from pf_jax.testing import tiny_model_spec

PASSES = ['denoise_0', 'denoise_1', 'denoise_2', 'denoise_3']
PARTS = [*PASSES, 'decode', 'compress', 'clean_pass', 'commit']


@contextlib.contextmanager
def no_compilation_cache():
  """It would give back a program under the names that it had when it was first compiled."""
  enabled = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def paths():
  """Paths of scopes of all instructions of a steady block, optimised, as lists of names."""
  model = tiny_model_spec()
  spec = RolloutSpec(cache_spec(model, sink_blocks=1, recent_blocks=1, top_k=1, mid_capacity=2),
                     SamplerSpec(steps=(1000.0, 750.0, 500.0, 250.0)))
  models = bundle.shapes(model).without_text()
  shapes = block_lib.input_shapes(models, 1, spec)
  block = functools.partial(block_lib.sample_block, first=False, spec=spec)
  with no_compilation_cache():
    text = jax.jit(block).lower(models, shapes.state, shapes.text, shapes.keys).compile().as_text()
  return [path.split('/') for path in re.findall(r'op_name="([^"]*)"', text)]


def test_products_of_each_part_bear_its_name(paths):
  """All products of the networks, and what writes the cache."""
  for part in PARTS:
    wanted = 'dynamic_update_slice' if part == 'commit' else 'conv_general_dilated' if (
        part in ('decode', 'compress')) else 'dot_general'
    assert any(part in path and path[-1] == wanted for path in paths), (part, wanted)
  nameless = [path for path in paths if path[-1] in ('dot_general', 'conv_general_dilated')
              and not set(path) & set(PARTS)]
  assert not nameless


def test_only_the_first_pass_selects(paths):
  selecting = [path for path in paths if 'select_blocks' in path]
  assert any('top_k' in path[-1] or 'sort' in path[-1] for path in selecting)
  assert {part for path in selecting for part in path if part in PARTS} == {'denoise_0'}
  assert not [path for path in paths if path[-1] == 'top_k' and 'select_blocks' not in path]
