"""Attention over segments and over blocks of a cache: the public entry that picks a backend."""

from collections.abc import Sequence
from typing import Any

from pf_jax.kernels import partition
from pf_jax.kernels.attention import cudnn, pallas, reference
from pf_jax.kernels.context import Blocks, Segment, ready_made
from pf_jax.kernels.platform import target_platform
from pf_jax.types import Array

BACKENDS: dict[str, Any] = {'reference': reference, 'cudnn': cudnn, 'pallas': pallas}


def attend(q: Array, segments: Sequence[Segment | Blocks], *, implementation: str | None = None
           ) -> Array:
  """One softmax over the tokens of all segments and blocks.

  A segment's batch may be smaller than the query's by a whole factor g: queries
  g*b .. g*b + g - 1 then share segment row b (several noisy versions of a block share a history).
  Under a mesh of several devices (`jax.set_mesh`) each computes its own rows of the batch.

  Args:
    q: [B, T, N, H].
    segments: what is attended; order does not matter.
    implementation: 'reference' (XLA), 'cudnn' (NVIDIA cards, half precision), 'pallas' (Hopper
      cards, half precision; reads blocks where they lie), or None: cudnn where it fits, else
      reference. All but pallas are handed one assembled segment in place of all blocks.

  Returns:
    [B, T, N, H] in q's dtype. At least one token must be valid for every query.

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
  if implementation != 'pallas':
    segments = ready_made(segments)
  if implementation is None:
    # The fused kernel of our own is not chosen by itself before it was measured on a card.
    fits = target_platform() == 'cuda' and cudnn.supports(q, segments)
    implementation = 'cudnn' if fits else 'reference'
  backend = BACKENDS[implementation]
  if not backend.supports(q, segments):
    raise ValueError(f'{implementation} takes {backend.LIMITS}, got queries '
                     f"{q.dtype}{list(q.shape)}; use 'reference' or None.")
  return partition.over_batch(backend.attend, q, segments)


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
