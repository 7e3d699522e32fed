"""The fused kernel of `pallas` with its products in float8, at twice the rate.

For caches that are stored in float8 (`CacheSpec.storage`): their keys are multiplied as they are,
their values after they were laid out anew. Rounded here are the queries, each time they are turned
to a block, the weights, and the block's own keys and values. What that costs was measured on the
miniature's activations: EVIDENCE.md, "Storage".
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp

from pf_jax.kernels.attention import pallas
from pf_jax.kernels.context import Blocks, Segment
from pf_jax.types import Array

LIMITS = f'{pallas.LIMITS}; all blocks in {pallas.FLOAT8}'


def supports(q: Array, segments: Sequence[Segment | Blocks]) -> bool:
  """Whether the kernel computes this on a Hopper card: see `LIMITS`."""
  stored = (x.dtype for segment in segments if isinstance(segment, Blocks)
            for x in (segment.k, segment.v))
  return pallas.supports(q, segments) and all(dtype == jnp.dtype(pallas.FLOAT8) for dtype in stored)


attend = functools.partial(pallas.attend, float8=True)
