"""What a query attends: ready-made rows of keys/values, or blocks that lie in a cache."""

from typing import NamedTuple

from pf_jax.types import Array


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


class Blocks(NamedTuple):
  """Blocks of one partition of a cache, each attended at a temporal position of its own.

  A backend either reads them where they lie or assembles them first (see `pf_jax.kernels.context`).
  A batch of 1 in `chosen`, `shift` or `valid` stands for all videos.

  Attributes:
    k: [B, n, T, N, H], all blocks of the partition; their rotation lacks `shift`.
    v: [B, n, T, N, H]; finite, also where nothing counts: its weight is zero, but a fused kernel
      multiplies by it all the same.
    shift: [b, s], where each attended block starts, in latent frames from the current one.
    valid: [b, s] bool, which of them count.
    chosen: [b, s] int32, which blocks are attended; None for all n of them in order.
  """

  k: Array
  v: Array
  shift: Array
  valid: Array
  chosen: Array | None = None
