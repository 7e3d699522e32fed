"""Attention over segments and over blocks of a cache: the public entry that picks a backend."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax.numpy as jnp

from pf_jax.kernels import partition
from pf_jax.kernels.attention import cudnn, pallas, pallas_float8, reference
from pf_jax.kernels.context import Blocks, Segment, ready_made
from pf_jax.kernels.platform import target_platform
from pf_jax.types import Array

BACKENDS: dict[str, Any] = {'reference': reference, 'cudnn': cudnn, 'pallas': pallas,
                            'pallas_float8': pallas_float8}
READ_BLOCKS = ('pallas', 'pallas_float8')  # where they lie; the rest is handed assembled rows


@overload
def attend(q: Array, segments: Sequence[Segment | Blocks], *, implementation: str | None = ...,
           return_lse: Literal[False] = ...) -> Array: ...


@overload
def attend(q: Array, segments: Sequence[Segment | Blocks], *, implementation: str | None = ...,
           return_lse: Literal[True]) -> tuple[Array, Array]: ...


def attend(q: Array, segments: Sequence[Segment | Blocks], *, implementation: str | None = None,
           return_lse: bool = False) -> Array | tuple[Array, Array]:
  """One softmax over the tokens of all segments and blocks.

  A segment's batch may be smaller than the query's by a whole factor g: queries
  g*b .. g*b + g - 1 then share segment row b (several noisy versions of a block share a history).
  Under a mesh of several devices (`jax.set_mesh`) each computes its own rows of the batch.

  Args:
    q: [B, T, N, H].
    segments: what is attended; order does not matter.
    implementation: 'reference' (XLA), 'cudnn' (NVIDIA cards, half precision), 'pallas' (Hopper
      cards, half precision; reads blocks where they lie), 'pallas_float8' (the same for blocks in
      float8, multiplies queries and keys in it), or None: cudnn where it fits, else reference.
      Others than pallas are handed one assembled segment in place of all blocks.
    return_lse: also return the logarithm of the sum of exponentials of the scaled logits, by which
      attentions over separate parts are combined (`combine`). cuDNN's is rounded to half precision
      by JAX, too coarse to combine much by; so None is the reference here.

  Returns:
    [B, T, N, H] in q's dtype; with `return_lse` also [B, T, N] float32, base e. At least one token
    must be valid for every query; with `return_lse` and any backend but cudnn a query without one
    is 0, and its sum next to none: some -1e30.

  Raises:
    ValueError: an implementation that is unknown or does not fit, a segment whose shape does not
      fit the query, or nothing to attend.
  """
  for index, segment in enumerate(segments):
    _check(index, segment, q)
  segments = [segment for segment in segments if _rows(segment)]
  if not segments:
    raise ValueError('there is nothing to attend; wanted at least one segment with tokens.')
  if implementation not in (None, *BACKENDS):
    raise ValueError(f'{implementation=} is unknown; use one of {sorted(BACKENDS)} or None.')
  if implementation not in READ_BLOCKS:
    segments = ready_made(segments, q.dtype)
  elif partition.cards() > 1:  # of a whole cache each card would be handed other layers
    segments = [x.one_layer() if isinstance(x, Blocks) else x for x in segments]
  if implementation is None:
    # The fused kernel of our own is not chosen by itself before it was measured on a card.
    fits = target_platform() == 'cuda' and cudnn.supports(q, segments) and not return_lse
    implementation = 'cudnn' if fits else 'reference'
  backend = BACKENDS[implementation]
  if not backend.supports(q, segments):
    raise ValueError(f'{implementation} takes {backend.LIMITS}, got queries '
                     f"{q.dtype}{list(q.shape)}; use 'reference' or None.")
  function = functools.partial(backend.attend, return_lse=True) if return_lse else backend.attend
  return partition.over_batch(function, q, segments)


def combine(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
  """Attention over all of several parts, from what `attend` returned for each of them.

  Args:
    parts: (out [B, T, N, H], lse [B, T, N]) of the same queries.

  Returns:
    The same of one attention over all parts' tokens.
  """
  outs, sums = zip(*parts, strict=True)
  lse = functools.reduce(jnp.logaddexp, sums)
  weighted = [out.astype(jnp.float32) * jnp.exp(part - lse)[..., None]
              for out, part in zip(outs, sums, strict=True)]
  return functools.reduce(jnp.add, weighted).astype(outs[0].dtype), lse


def _rows(segment: Segment | Blocks) -> int:
  """Rows that may be attended."""
  if isinstance(segment, Segment):
    return segment.k.shape[1]
  return segment.valid.shape[1] * segment.k.shape[-3]


def _check(index: int, segment: Segment | Blocks, q: Array) -> None:
  wanted = ['b', 'S'] if isinstance(segment, Segment) else ['b', 'n', 'T']
  if isinstance(segment, Blocks) and segment.layer is not None:
    wanted = ['L', *wanted]
  rank = len(wanted) + 2
  batch, *heads = segment.k.shape[wanted.index('b')], *segment.k.shape[-2:]
  if (segment.k.shape != segment.v.shape or heads != list(q.shape[2:]) or q.shape[0] % batch
      or segment.k.ndim != rank):
    raise ValueError(
        f'segment {index} has keys {segment.k.shape} and values {segment.v.shape}, wanted '
        f'[{", ".join(wanted)}, {q.shape[2]}, {q.shape[3]}] with b dividing the batch '
        f'{q.shape[0]}.')
  if isinstance(segment, Segment):
    return
  attended = segment.valid.shape[-1]
  for name in ('shift', 'valid', 'chosen'):
    value = getattr(segment, name)
    if value is not None and value.shape not in ((1, attended), (batch, attended)):
      raise ValueError(f'segment {index} has {name} of shape {list(value.shape)}, wanted [1 or '
                       f'{batch}, {attended}] like valid.')
  if segment.chosen is None and attended != segment.k.shape[-4]:
    raise ValueError(f'segment {index} attends {attended} blocks of {segment.k.shape[-4]} without '
                     'saying which; give chosen.')
