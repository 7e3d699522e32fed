"""Attention over a list of key/value segments: the public entry that picks a backend."""

from collections.abc import Sequence
from typing import NamedTuple

from pf_jax.kernels.attention import cudnn, partition, reference
from pf_jax.kernels.platform import target_platform
from pf_jax.types import Array

IMPLEMENTATIONS = {'reference': reference.attend, 'cudnn': cudnn.attend}


class Segment(NamedTuple):
  """Keys and values that one query attends, e.g. the packed history or the block itself.

  Attributes:
    k: [B, S, N, H].
    v: [B, S, N, H].
    valid: [B, S] bool, False where a slot is empty; None where every token counts.
    order: [B, S] int32, the tokens in an order that begins with the valid ones. Backends that read
      a prefix sort for themselves where it is None.
  """

  k: Array
  v: Array
  valid: Array | None = None
  order: Array | None = None


def attend(q: Array, segments: Sequence[Segment], *, implementation: str | None = None) -> Array:
  """One softmax over the tokens of all segments.

  A segment's batch may be smaller than the query's by a whole factor g: queries
  g*b .. g*b + g - 1 then share segment row b (several noisy versions of a block share a history).
  Under a mesh of several devices (`jax.set_mesh`) each computes its own rows of the batch.

  Args:
    q: [B, T, N, H].
    segments: what is attended; order does not matter.
    implementation: 'reference' (XLA), 'cudnn' (NVIDIA cards, half precision), or None: cudnn where
      it fits, else reference.

  Returns:
    [B, T, N, H] in q's dtype. At least one token must be valid for every query.

  Raises:
    ValueError: an implementation that is unknown or does not fit, or a segment whose shape does not
      fit the query.
  """
  for index, segment in enumerate(segments):
    batch, _, *heads = segment.k.shape
    if segment.k.shape != segment.v.shape or heads != list(q.shape[2:]) or q.shape[0] % batch:
      raise ValueError(
          f'segment {index} has keys {segment.k.shape} and values {segment.v.shape}, wanted '
          f'[b, S, {q.shape[2]}, {q.shape[3]}] with b dividing the batch {q.shape[0]}.')
  if implementation is None:
    fits = target_platform() == 'cuda' and cudnn.supports(q, segments)
    implementation = 'cudnn' if fits else 'reference'
  if implementation == 'cudnn' and not cudnn.supports(q, segments):
    raise ValueError(f'cudnn takes {cudnn.LIMITS}, got queries {q.dtype}{list(q.shape)}; use '
                     f"'reference' or None.")
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'{implementation=} is unknown; use one of {sorted(IMPLEMENTATIONS)} or None.')
  return partition.over_batch(IMPLEMENTATIONS[implementation], q, segments)
