"""Two ways to write a convolution over space and time in plain XLA; both give the same numbers.

  y[b, t, i, j, o] = bias[o] + sum_{k, p, q, c} x[b, s_t t + k, s_h i + p, s_w j + q, c]
                                                 kernel[k, p, q, c, o]

Time is never padded here: whoever calls has the past frames, in front of `x` or beside it, which is
what makes the convolution causal. Space is padded as the caller says.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Padding = tuple[tuple[int, int], tuple[int, int]]
Strides = tuple[int, int, int]

NORM_FLOOR = 1e-12


class Epilogue(NamedTuple):
  """What follows a convolution, in this order.

  Attributes:
    gain: [O] of an RMS norm over channels, or None.
    silu: whether x * sigmoid(x) follows.
    residual: [B, T', H', W', O] that is added, or None.
  """

  gain: Array | None = None
  silu: bool = False
  residual: Array | None = None


def rms_norm(x: Array, gain: Array) -> Array:
  """x / ||x|| * sqrt(C) * gain over channels, in float32; [..., C] -> [..., C] in x's dtype."""
  wide = x.astype(jnp.float32)
  square = jnp.sum(wide * wide, axis=-1, keepdims=True)
  # The floor is on the square, so that the gradient of an all-zero vector is not 0/0.
  wide = wide * lax.rsqrt(jnp.maximum(square, NORM_FLOOR**2))
  return (wide * math.sqrt(x.shape[-1]) * gain.astype(jnp.float32)).astype(x.dtype)


def finished(y: Array, epilogue: Epilogue) -> Array:
  """What follows a convolution, step by step in y's dtype."""
  if epilogue.gain is not None:
    y = rms_norm(y, epilogue.gain)
  if epilogue.silu:
    y = jax.nn.silu(y)
  return y if epilogue.residual is None else y + epilogue.residual


def output_size(size: Sequence[int], taps: Sequence[int], strides: Sequence[int],
                padding: Sequence[tuple[int, int]]) -> tuple[int, ...]:
  """Of the output along the axes that are given."""
  return tuple((n + sum(pads) - k) // s + 1
               for n, k, s, pads in zip(size, taps, strides, padding, strict=True))


def operations(x: Sequence[int], kernel: Sequence[int], strides: Sequence[int],
               padding: Sequence[tuple[int, int]]) -> int:
  """Of a convolution, 2 for each multiply-add.

  Args:
    x: [B, T, H, W, C].
    kernel: [kt, kh, kw, C, O].
    strides: along time, height, width.
    padding: zeros (before, after) along them; taps that meet them do nothing.
  """
  def meetings(size: int, taps: int, stride: int, pads: tuple[int, int]) -> int:
    """Pairs of an output and a tap that meets data, along one axis."""
    [out] = output_size([size], [taps], [stride], [pads])
    starts = [position * stride - pads[0] for position in range(out)]
    return sum(max(min(start + taps, size) - max(start, 0), 0) for start in starts)

  axes = zip(x[1:4], kernel[:3], strides, padding, strict=True)
  return 2 * x[0] * math.prod(meetings(*axis) for axis in axes) * kernel[3] * kernel[4]


def conv3d(x: Array, kernel: Array, bias: Array, *, strides: Strides, padding: Padding,
           past: Array | None = None, epilogue: Epilogue = Epilogue()) -> Array:
  """One three-dimensional convolution: the definition, and the right choice on accelerators.

  Args:
    x: [B, T, H, W, C], past frames included unless they are given.
    kernel: [kt, kh, kw, C, O].
    bias: [O].
    strides: along (time, height, width).
    padding: zeros (before, after) along height and width.
    past: [B, P, H, W, C], the frames before x, or None.
    epilogue: what follows.

  Returns:
    [B, T', H', W', O].
  """
  y = lax.conv_general_dilated(_joined(past, x), kernel, strides, ((0, 0), *padding),
                               dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'))
  return finished(y + bias, epilogue)


def conv3d_taps(x: Array, kernel: Array, bias: Array, *, strides: Strides, padding: Padding,
                past: Array | None = None, epilogue: Epilogue = Epilogue()) -> Array:
  """The same as a two-dimensional convolution with the temporal taps laid out as channels.

  XLA's CPU backend has a fast path for two-dimensional convolutions only. Putting the kt shifted
  copies of `x` side by side costs kt times the input's memory and is 5-9 times faster there
  (measured at 16x64x64 with 4 to 12 channels, float32, two cores).

  Args and returns: as `conv3d`.
  """
  taps, kh, kw, channels, out = kernel.shape
  x = _joined(past, x)
  frames = (x.shape[1] - taps) // strides[0] + 1
  last = (frames - 1) * strides[0] + 1
  columns = jnp.concatenate([x[:, k:k + last:strides[0]] for k in range(taps)], axis=-1)
  kernel = jnp.moveaxis(kernel, 0, 2).reshape(kh, kw, taps * channels, out)
  flat = columns.reshape(-1, *columns.shape[2:])
  if kh == kw == 1 and strides[1:] == (1, 1) and padding == ((0, 0), (0, 0)):
    y = flat @ kernel[0, 0]
  else:
    y = lax.conv_general_dilated(flat, kernel, strides[1:], padding,
                                 dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  return finished(y.reshape(x.shape[0], frames, *y.shape[1:]) + bias, epilogue)


def _joined(past: Array | None, x: Array) -> Array:
  return x if past is None else jnp.concatenate([past, x], axis=1)
