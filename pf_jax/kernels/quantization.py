"""Keys and values in 8 bits: half of what bfloat16 takes.

  x = values * scale,  scale = max |x| / (largest number of the dtype),

one scale for every head of every block, so that a kernel multiplies by it once a tile. What that
costs was measured on the miniature's activations, beside finer scales: EVIDENCE.md, "Storage".

Int8 rounds to equal steps of the largest number, float8 to steps in proportion to each number: of
normally distributed keys int8 keeps more, and tensor cores multiply float8 without undoing it.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pf_jax.types import Array

DTYPES = ('int8', 'float8_e4m3fn')
SMALLEST = 1e-20  # numbers of a block that has none larger become 0; a scale of them might be 0


class Quantized(NamedTuple):
  """Numbers of 8 bits and what they are multiplied by.

  Both have the same axes, so that whatever picks blocks picks them in both. Shape, axes and dtype
  are those of the values.

  Attributes:
    values: [..., T, N, H].
    scale: [..., 1, N, 1] float32, positive.
  """

  values: Array
  scale: Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def ndim(self) -> int:
    return self.values.ndim

  @property
  def dtype(self) -> np.dtype:
    return self.values.dtype


def _is_integer(dtype: str) -> bool:
  return jnp.issubdtype(jnp.dtype(dtype), jnp.integer)


def largest(dtype: str) -> float:
  """The largest number of a dtype that is used; int8's is that of its negative numbers, too."""
  return float((jnp.iinfo if _is_integer(dtype) else jnp.finfo)(dtype).max)


def quantize(x: Array, dtype: str) -> Quantized:
  """Rounds blocks [..., T, N, H] to the nearest numbers that 8 bits hold.

  Args:
    x: finite.
    dtype: one of `DTYPES`.
  """
  x = x.astype(jnp.float32)
  limit = largest(dtype)
  highest = jnp.max(jnp.abs(x), axis=(-3, -1), keepdims=True)
  scale = jnp.where(highest > SMALLEST, highest / limit, 1)
  # Division may end a little above the limit, where float8 has only NaN.
  values = jnp.clip(x / scale, -limit, limit)
  if _is_integer(dtype):
    values = jnp.round(values)
  return Quantized(values.astype(dtype), scale)


def dequantize(x: Array | Quantized, dtype) -> Array:
  """What was quantized, in `dtype`; other arrays as they are."""
  if not isinstance(x, Quantized):
    return x
  return (x.values.astype(jnp.float32) * x.scale).astype(dtype)
