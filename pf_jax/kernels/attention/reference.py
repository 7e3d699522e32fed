"""Attention over segments in plain XLA; softmax in float32.

Logits are computed segment by segment, so keys and values are never copied; only the logits are
laid side by side. (One softmax over concatenated logits: its gradient costs 0.45x of an explicit
running maximum over segments on a CPU.)

Where the logits of all queries would take more than `LOGITS_BYTES`, as those of a 1.3B layer would
(12.5 GB), queries are computed some at a time, and again in the backward pass.
"""

import functools
from collections.abc import Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp

from pf_jax.types import Array

# Finite, so that a row without any valid key stays free of NaN in its gradient as well.
MASKED = -1e30
LOGITS_BYTES = 2**28


def _logits(q: Array, segment) -> Array:
  """[B, N, T, S] float32 scores, masked where the segment is invalid."""
  batch = segment.k.shape[0]
  grouped = einops.rearrange(q, '(b g) t n h -> b n (g t) h', b=batch)
  logits = jnp.einsum('bnth,bsnh->bnts', grouped, segment.k, preferred_element_type=jnp.float32)
  if segment.valid is not None:
    logits = jnp.where(segment.valid[:, None, None], logits, MASKED)
  return einops.rearrange(logits, 'b n (g t) s -> (b g) n t s', t=q.shape[1])


def _weighted_values(weights: Array, segment) -> Array:
  """Sum of a segment's values, [B, T, N, H] float32."""
  grouped = einops.rearrange(weights, '(b g) n t s -> b n (g t) s', b=segment.v.shape[0])
  v = segment.v
  if segment.valid is not None:
    # An invalid slot may hold anything, even NaN, and 0 * NaN is NaN.
    v = jnp.where(segment.valid[:, :, None, None], v, 0)
  out = jnp.einsum('bnts,bsnh->bnth', grouped.astype(v.dtype), v,
                   preferred_element_type=jnp.float32)
  return einops.rearrange(out, 'b n (g t) h -> (b g) t n h', t=weights.shape[2])


LIMITS = 'anything'


def supports(q: Array, segments: Sequence) -> bool:
  """Any."""
  del q, segments
  return True


def attend(q: Array, segments: Sequence, *, return_lse: bool = False) -> Any:
  """See `pf_jax.kernels.attention.api.attend`."""
  batch, tokens, heads, _ = q.shape
  keys = sum(segment.k.shape[1] for segment in segments)
  at_once = max(LOGITS_BYTES // (4 * batch * heads * keys), 1)
  if tokens <= at_once:
    return _attend(q, segments, return_lse)
  turns = -(-tokens // at_once)
  at_once = -(-tokens // turns)  # as even as can be
  padded = jnp.pad(q, ((0, 0), (0, turns * at_once - tokens), (0, 0), (0, 0)))
  parts = einops.rearrange(padded, 'b (c t) n h -> c b t n h', c=turns)
  # Gradients of keys and values are sums over the parts: not in half precision.
  wide = [segment._replace(k=segment.k.astype(jnp.float32), v=segment.v.astype(jnp.float32))
          for segment in segments]

  @jax.checkpoint
  def some(part: Array) -> Any:
    narrow = [x._replace(k=x.k.astype(segment.k.dtype), v=x.v.astype(segment.v.dtype))
              for x, segment in zip(wide, segments, strict=True)]
    return _attend(part, narrow, return_lse)

  return jax.tree.map(lambda x: einops.rearrange(x, 'c b t n ... -> b (c t) n ...')[:, :tokens],
                      jax.lax.map(some, parts))


def _attend(q: Array, segments: Sequence, return_lse: bool) -> Any:
  scaled = q * q.shape[-1] ** -0.5
  logits = jnp.concatenate([_logits(scaled, segment) for segment in segments], axis=-1)
  weights = jax.nn.softmax(logits, axis=-1)
  ends, parts = 0, []
  for segment in segments:
    begin, ends = ends, ends + segment.k.shape[1]
    parts.append(_weighted_values(weights[..., begin:ends], segment))
  out = functools.reduce(jnp.add, parts).astype(q.dtype)
  if not return_lse:
    return out
  return out, einops.rearrange(jax.nn.logsumexp(logits, axis=-1), 'b n t -> b t n')
