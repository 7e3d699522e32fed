"""Convolution by the Mosaic GPU kernel of `pallas_gpu`: prepares its arguments, and its gradient.

The kernel strides by 1. A stride is read as channels: s neighbours along an axis become s times as
many channels of one place, and k taps become ceil(k / s), the last ones padded with zeros. That is
a copy of the input, with its padding in space; at stride 1 the input is read where it lies.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pf_jax.kernels import tuning
from pf_jax.kernels.conv3d import reference
from pf_jax.kernels.conv3d.reference import Epilogue, Padding, Strides
from pf_jax.types import Array, PyTree

CHANNELS = 32  # the fewest that a product of the kernel contracts or gives
LIMITS = (f'bfloat16 or float16, more than one tap, and multiples of {CHANNELS} of input channels '
          '(times strides) and of output channels')


def supports(x: Array, kernel: Array, strides: Strides) -> bool:
  """Whether the kernel computes this on a Hopper card: see `LIMITS`."""
  *taps, channels_in, channels = kernel.shape
  return (x.dtype in (jnp.dtype('bfloat16'), jnp.dtype('float16')) and math.prod(taps) > 1
          and channels_in * math.prod(strides) % CHANNELS == 0 and channels % CHANNELS == 0)


def conv3d(x: Array, kernel: Array, bias: Array, *, strides: Strides, padding: Padding,
           past: Array | None, epilogue: Epilogue, tiles: Any = None, interpret: Any = None
           ) -> Array:
  """See `pf_jax.kernels.conv3d.api.conv3d`.

  Args:
    x: [B, T, H, W, C].
    kernel: [kt, kh, kw, C, O].
    bias: [O].
    strides: along (time, height, width).
    padding: zeros (before, after) along height and width.
    past: [B, P, H, W, C], or None.
    epilogue: what follows.
    tiles: `pallas_gpu.TileSpec`; None for the tuned ones, else the default.
    interpret: parameters of Pallas' interpreter, on machines without the card.
  """
  return _conv3d((x, kernel, bias, past, epilogue.gain, epilogue.residual), strides, padding,
                 epilogue.silu, tiles, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def _conv3d(arrays: PyTree, strides: Strides, padding: Padding, silu: bool, tiles: Any,
            interpret: Any) -> Array:
  from pf_jax.kernels.conv3d import pallas_gpu  # imports much that only cards need

  x, kernel, bias, past, gain, residual = arrays
  tiles = tiles or tuned(x, kernel, past, strides)
  pieces = [x] if past is None or not past.shape[1] else [past, x]
  height, width = reference.output_size(x.shape[2:4], kernel.shape[1:3], strides[1:], padding)
  frames = sum(piece.shape[1] for piece in pieces)
  operations = reference.operations(
      (x.shape[0], frames, *x.shape[2:]), kernel.shape, strides, ((0, 0), *padding))
  low = padding[0][0], padding[1][0]
  if strides != (1, 1, 1):
    pieces, kernel = [fold(jnp.concatenate(pieces, axis=1), kernel.shape[:3], strides, padding)
                      ], fold_kernel(kernel, strides)
    low = 0, 0
  channels = kernel.shape[4]
  # The norm needs all channels of a pixel, and a tile may have some of them only.
  inside = gain is None or channels == tiles.channels
  finish = pallas_gpu.Finish(norm=gain is not None and inside, silu=silu and inside,
                             residual=residual is not None and inside)
  vectors = jnp.stack([bias, bias if gain is None else gain], dtype=jnp.float32)
  out = pallas_gpu.convolve(
      pieces, kernel, vectors, residual if finish.residual else None, low=low,
      size=(height, width), finish=finish, operations=operations, tiles=tiles, interpret=interpret)
  if inside:
    return out
  wide = None if residual is None else residual.astype(jnp.float32)
  return reference.finished(out.astype(jnp.float32), Epilogue(gain, silu, wide)).astype(out.dtype)


def shape_of(x: Array, kernel: Array, past: Array | None, strides: Strides) -> str:
  """What tiles are tuned for: all frames, the kernel, and strides if there are any.

  Such as 'bfloat16 1x18x480x832x96 by 3x3x3x96'; what follows the convolution is not told apart.
  """
  batch, frames, *size = x.shape
  frames += 0 if past is None else past.shape[1]
  numbers = (batch, frames, *size), (*kernel.shape[:3], kernel.shape[4]), strides
  whole, taps, steps = ('x'.join(map(str, each)) for each in numbers)
  return f'{x.dtype} {whole} by {taps}' + f' every {steps}' * (strides != (1, 1, 1))


def tuned(x: Array, kernel: Array, past: Array | None, strides: Strides) -> Any:
  """`pallas_gpu.TileSpec` that was fastest for these shapes on this device, else the default."""
  from pf_jax.kernels.conv3d import pallas_gpu

  default = pallas_gpu.default_tiles(kernel.shape[4])
  found = tuning.sizes(tuning.Problem.here('conv3d', shape_of(x, kernel, past, strides)), default)
  return found if found.fits(folded_shape(kernel, strides)) else default


def folded_shape(kernel: Array, strides: Strides) -> tuple[int, ...]:
  """Shape of a kernel as the card is given it, see `fold_kernel`."""
  return jax.eval_shape(lambda kernel: fold_kernel(kernel, strides), kernel).shape


def fold(x: Array, taps: tuple[int, ...], strides: Strides, padding: Padding) -> Array:
  """[B, T, H, W, C] with neighbours as channels, and all zeros around that a kernel meets.

  Args:
    x: [B, T, H, W, C].
    taps: of the kernel, (kt, kh, kw).
    strides: along (time, height, width).
    padding: zeros (before, after) along height and width.

  Returns:
    [B, T' + kt' - 1, H' + kh' - 1, W' + kw' - 1, s C] for an output of (T', H', W'), k' = ceil of
    taps over stride, and s the product of strides.
  """
  for axis, (k, s, pads) in enumerate(zip(taps, strides, ((0, 0), *padding), strict=True), 1):
    out = (x.shape[axis] + sum(pads) - k) // s + 1
    wanted = (out - 1 + -(-k // s)) * s
    # What no tap reaches may be anything, and taps that are added meet it.
    reached = x[(slice(None),) * axis + (slice((out - 1) * s + k - pads[0]),)]
    pad = [(0, 0)] * 5
    pad[axis] = pads[0], wanted - pads[0] - reached.shape[axis]
    x = jnp.pad(reached, pad)
  batch, *sizes, channels = x.shape
  split = [part for n, s in zip(sizes, strides, strict=True) for part in (n // s, s)]
  x = x.reshape(batch, *split, channels).transpose(0, 1, 3, 5, 2, 4, 6, 7)
  return x.reshape(*x.shape[:4], -1)


def fold_kernel(kernel: Array, strides: Strides) -> Array:
  """[kt, kh, kw, C, O] as it is applied to what `fold` returns: [kt', kh', kw', s C, O]."""
  *taps, _, channels = kernel.shape
  pad = [(0, -k % s) for k, s in zip(taps, strides, strict=True)]
  kernel = jnp.pad(kernel, (*pad, (0, 0), (0, 0)))
  split = [part for n, s in zip(kernel.shape[:3], strides, strict=True) for part in (n // s, s)]
  kernel = kernel.reshape(*split, *kernel.shape[3:]).transpose(0, 2, 4, 1, 3, 5, 6, 7)
  return kernel.reshape(*kernel.shape[:3], -1, channels)


def _library(arrays: PyTree, strides: Strides, padding: Padding, silu: bool) -> Array:
  """The same by a library that has a gradient."""
  x, kernel, bias, past, gain, residual = arrays
  return reference.conv3d(x, kernel, bias, strides=strides, padding=padding, past=past,
                          epilogue=Epilogue(gain, silu, residual))


def _forward(arrays: PyTree, strides: Strides, padding: Padding, silu: bool, tiles: Any,
             interpret: Any) -> tuple[Array, PyTree]:
  return _conv3d(arrays, strides, padding, silu, tiles, interpret), arrays


def _backward(strides: Strides, padding: Padding, silu: bool, tiles: Any, interpret: Any,
              saved: PyTree, gradient: Array) -> PyTree:
  del tiles, interpret
  return jax.vjp(lambda arrays: _library(arrays, strides, padding, silu), saved)[1](gradient)


_conv3d.defvjp(_forward, _backward)
