"""What a query attends: ready-made rows of keys/values, or blocks that lie in a cache."""

from typing import NamedTuple

import jax

from pf_jax.kernels.quantization import Quantized
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
    k: [B, n, T, N, H], all blocks of the partition; their rotation lacks `shift`. Perhaps in 8
      bits, likewise v.
    v: [B, n, T, N, H]; finite, also where nothing counts: its weight is zero, but a fused kernel
      multiplies by it all the same.
    shift: [b, s], where each attended block starts, in latent frames from the current one.
    valid: [b, s] bool, which of them count.
    chosen: [b, s] int32, which blocks are attended; None for all n of them in order.
    layer: int32 [], where k and v are those of all layers, [L, B, n, T, N, H]: which one is
      attended. A kernel reads it there; a slice would be a copy.
  """

  k: Array | Quantized
  v: Array | Quantized
  shift: Array
  valid: Array
  chosen: Array | None = None
  layer: Array | None = None

  @property
  def batch(self) -> int:
    """B, of one layer."""
    return self.k.shape[-5]

  def one_layer(self) -> 'Blocks':
    """The same without the other layers."""
    if self.layer is None:
      return self
    k, v = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False),
                        (self.k, self.v))
    return self._replace(k=k, v=v, layer=None)
