"""RMS norm and rotation of a block's queries or keys: the public entry that picks a backend."""

from pf_jax.kernels.rope import pallas, reference
from pf_jax.kernels.rope.reference import RopeTable
from pf_jax.types import Array

IMPLEMENTATIONS = ('reference', 'pallas')


def norm_and_rotate(x: Array, scale: Array, table: RopeTable, *, bias: Array | None = None,
                    first: int = 0, eps: float = 1e-6, implementation: str | None = None) -> Array:
  """Divides tokens by their root mean square over all heads, scales them and rotates their heads.

  Args:
    x: [B, T, C], a linear layer's result, or that of several layers side by side.
    scale: [D] float32, of the norm. D is N times the table's H.
    table: rotations of the T tokens.
    bias: [D] in x's dtype, of the layer, where it was not added yet.
    first: where in C the D columns begin.
    eps: added to the mean of squares.
    implementation: 'reference' (XLA), 'pallas' (Hopper cards, bfloat16; one pass over the bytes),
      or None: reference. The kernel pays off where it reads what the product wrote, bias and
      neighbouring columns included: XLA would copy them out for it (BENCHMARKS.md).

  Returns:
    [B, T, N, H] in x's dtype; computed in float32.

  Raises:
    ValueError: an implementation that is unknown or does not fit, or columns that x does not have.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f'{implementation=} is unknown; use one of {list(IMPLEMENTATIONS)} or None.')
  width, head_dim = scale.shape[0], 2 * table.cos.shape[-1]
  if width % head_dim or not 0 <= first <= x.shape[-1] - width:
    raise ValueError(f'x of {list(x.shape)} has no columns {first} to {first + width} of whole '
                     f'heads of {head_dim}; check scale, first and the table.')
  if implementation != 'pallas':
    return reference.norm_and_rotate(x, scale, table, bias, first=first, eps=eps)
  if not pallas.supports(x, table, bias, first=first):
    raise ValueError(f'pallas takes {pallas.LIMITS}, got {x.dtype}{list(x.shape)} from column '
                     f"{first} on, heads of {head_dim}; use 'reference' or None.")
  return pallas.norm_and_rotate(x, scale, table, bias, first=first, eps=eps)
