"""Attention over segments by cuDNN's fused kernel: no logits in memory.

The kernel reads one row of keys of which a prefix counts. So the segments are laid side by side,
and the one with empty slots comes last, its valid tokens in front. XLA writes that row in one go,
out of whatever the segments were computed from.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pf_jax.kernels.attention import reference
from pf_jax.types import Array, PyTree

LIMITS = ('bfloat16 or float16, heads of up to 128 in multiples of 8, and one segment with empty '
          'slots at most')


def supports(q: Array, segments: Sequence) -> bool:
  """Whether cuDNN computes this on a card with tensor cores: see `LIMITS`."""
  dtypes = {q.dtype, *(x.dtype for segment in segments for x in (segment.k, segment.v))}
  partly_empty = sum(segment.valid is not None for segment in segments)
  return (dtypes in ({jnp.dtype('bfloat16')}, {jnp.dtype('float16')})
          and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and partly_empty <= 1)


def attend(q: Array, segments: Sequence, *, return_lse: bool = False) -> Any:
  """See `pf_jax.kernels.attention.api.attend`.

  What an empty slot holds must be finite: its weight is zero, but it is multiplied all the same.
  """
  return _attend_with_lse(q, list(segments)) if return_lse else _attend(q, segments)


@jax.custom_vjp
def _attend_with_lse(q: Array, segments: list) -> tuple[Array, Array]:
  """The gradient is the reference's: JAX's own takes the sum for a constant."""
  out, lse = _attend(q, segments, return_residual=True)
  return out, lse.astype(jnp.float32)


def _forward(q: Array, segments: list) -> tuple[tuple[Array, Array], PyTree]:
  return _attend_with_lse(q, segments), (q, segments)


def _backward(saved: PyTree, gradients: tuple[Array, Array]) -> PyTree:
  return jax.vjp(functools.partial(reference.attend, return_lse=True), *saved)[1](gradients)


_attend_with_lse.defvjp(_forward, _backward)


def _attend(q: Array, segments: Sequence, **options: Any) -> Any:
  *full, last = sorted(segments, key=lambda segment: segment.valid is not None)
  lengths = None
  if last.valid is not None:
    count = sum(segment.k.shape[1] for segment in full)
    lengths = _share(q, count + jnp.sum(last.valid, axis=1, dtype=jnp.int32))
    last = _valid_first(last)
  k, v = (jnp.concatenate([_share(q, part) for part in parts], axis=1)
          for parts in zip(*((segment.k, segment.v) for segment in (*full, last)), strict=True))
  return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths,
                                      implementation='cudnn', **options)


def _share(q: Array, x: Array) -> Array:
  """Repeats a segment's rows for the queries that share them."""
  return jnp.repeat(x, q.shape[0] // x.shape[0], axis=0)


def _valid_first(segment):
  """The segment with its valid tokens in front."""
  order = segment.order
  if order is None:
    order = jnp.argsort(~segment.valid, axis=1, stable=True)
  # Worked out once per token; fused into the copy it would be once per number.
  order = jax.lax.optimization_barrier(order)
  k, v = (jnp.take_along_axis(x, order[:, :, None, None], axis=1, mode='clip')
          for x in (segment.k, segment.v))
  return segment._replace(k=k, v=v)
