"""RMS norm and rotation by the Mosaic GPU kernel of `pallas_gpu`: its arguments, and its gradient.

All that is made here are scales apart for the two numbers of a pair; pairs as words of 32 bits are
the same bytes.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pf_jax.kernels import partition
from pf_jax.kernels.rope import reference
from pf_jax.kernels.rope.reference import RopeTable
from pf_jax.types import Array, PyTree

HEADS = (64, 128)  # whose pairs 32 lanes share out
LIMITS = f'bfloat16, and heads of {HEADS[0]} or {HEADS[1]} that begin at multiples of their size'


def supports(x: Array, table: RopeTable, bias: Array | None, *, first: int) -> bool:
  """Whether the kernel computes this on a Hopper card: see `LIMITS`."""
  head_dim = 2 * table.cos.shape[-1]
  dtypes = {x.dtype} if bias is None else {x.dtype, bias.dtype}
  return (dtypes == {jnp.dtype('bfloat16')} and head_dim in HEADS
          and x.shape[-1] % head_dim == first % head_dim == 0)


def norm_and_rotate(x: Array, scale: Array, table: RopeTable, bias: Array | None, *, first: int,
                    eps: float, spec: Any = None, interpret: Any = None) -> Array:
  """See `pf_jax.kernels.rope.api.norm_and_rotate`.

  Args:
    x: [B, T, C].
    scale: [D].
    table: rotations.
    bias: [D].
    first: column.
    eps: added to the mean of squares.
    spec: `pallas_gpu.RowSpec`; None for the default.
    interpret: parameters of Pallas' interpreter, on machines without the card.
  """
  bias = jnp.zeros(scale.shape, x.dtype) if bias is None else bias

  def on_a_card(x: Array, shared: Sequence[Array]) -> Array:
    scale, cos, sin, bias = (rows[0] for rows in shared)
    return _rotated(x, scale, RopeTable(cos, sin), bias, first, eps, spec, interpret)

  return partition.over_batch(on_a_card, x, [a[None] for a in (scale, *table, bias)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _rotated(x: Array, scale: Array, table: RopeTable, bias: Array, first: int, eps: float,
             spec: Any, interpret: Any) -> Array:
  from pf_jax.kernels.rope import pallas_gpu  # imports much that only cards need

  half = table.cos.shape[-1]
  heads = scale.shape[0] // (2 * half)
  out = pallas_gpu.norm_and_rotate(
      _words(x, half), _words(bias, half), jnp.moveaxis(scale.reshape(heads, half, 2), -1, 0),
      *table, first=first // (2 * half), eps=eps,
      spec=spec or pallas_gpu.RowSpec.fitting(heads, 2 * half), interpret=interpret)
  numbers = jax.lax.bitcast_convert_type(out, x.dtype)
  return numbers.reshape(*out.shape[:-1], 2 * half)


def _words(x: Array, half: int) -> Array:
  """[..., C] of two-byte numbers -> pairs [..., M, H/2] uint32, the first one in the lower half."""
  return jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, half, 2), jnp.uint32)


def _forward(x: Array, scale: Array, table: RopeTable, bias: Array, first: int, eps: float,
             spec: Any, interpret: Any) -> tuple[Array, PyTree]:
  saved = x, scale, table, bias
  return _rotated(*saved, first, eps, spec, interpret), saved


def _backward(first: int, eps: float, spec: Any, interpret: Any, saved: PyTree, gradient: Array
              ) -> PyTree:
  del spec, interpret
  plain = functools.partial(reference.norm_and_rotate, first=first, eps=eps)
  return jax.vjp(plain, *saved)[1](gradient)


_rotated.defvjp(_forward, _backward)
