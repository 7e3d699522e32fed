"""Later blocks' full resolution, read from beside an earlier cache, against the cache itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax import cache as cache_lib
from pf_jax.cache import CacheSpec
from pf_jax.types import KeyValues

BASE = CacheSpec(num_layers=2, num_heads=1, head_dim=6, grid=(4, 1, 1), mid_grid=(2, 1, 1),
                 sink_blocks=1, recent_blocks=1, top_k=1, mid_capacity=2)


def block(number: int, tokens: int) -> KeyValues:
  """Keys of block n are n + 1 everywhere, values its negative."""
  x = jnp.full((BASE.num_layers, 1, tokens, BASE.num_heads, BASE.head_dim), number + 1.0)
  return KeyValues(x, -x)


@pytest.mark.parametrize('recent', [1, 2])
@pytest.mark.parametrize('sink', [0, 1, 2])
def test_sink_and_recent_are_those_of_the_later_cache(sink, recent):
  spec = dataclasses.replace(BASE, sink_blocks=sink, recent_blocks=recent)
  caches = [cache_lib.init(spec, 1)]
  for number in range(7):
    caches.append(cache_lib.commit(caches[-1], block(number, 4), block(number, 2), spec=spec))
    np.testing.assert_array_equal(cache_lib.newest_block(caches[-1], spec).k, number + 1)
    np.testing.assert_array_equal(cache_lib.newest_block(caches[-1], spec).v, -number - 1)
  for first, blocks in ((0, 0), (0, 3), (1, 2), (2, 6), (3, 3), (3, 7), (5, 6)):
    kept = [block(number, 4) for number in range(first, first + 4)]
    window = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *(
        jax.tree.map(lambda x: x[0], one) for one in kept))
    layer = jax.tree.map(lambda x: x[0], caches[first].layers)
    got = cache_lib.with_later_blocks(layer, window, jnp.int32(first), jnp.int32(blocks), spec)
    wanted = jax.tree.map(lambda x: x[0], caches[blocks].layers)
    jax.tree.map(np.testing.assert_array_equal, (got.sink, got.recent),
                 (wanted.sink, wanted.recent))
