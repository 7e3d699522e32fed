"""Convolution over space and time, channels last: picks the form that suits the backend."""

import jax

from pf_jax.kernels.conv3d.reference import Padding, conv3d_reference, conv3d_taps
from pf_jax.kernels.platform import target_platform

Array = jax.Array

IMPLEMENTATIONS = {'reference': conv3d_reference, 'taps': conv3d_taps}


def conv3d(x: Array, kernel: Array, bias: Array, *, strides: tuple[int, int, int] = (1, 1, 1),
           padding: Padding | None = None, implementation: str | None = None) -> Array:
  """Convolves frames that already carry their past; time is not padded.

  Args:
    x: [B, T, H, W, C], of any float dtype; kernel and bias are cast to it.
    kernel: [kt, kh, kw, C, O].
    bias: [O].
    strides: along (time, height, width).
    padding: zeros (before, after) along height and width; None keeps the picture's size for odd
      kernels at stride 1.
    implementation: 'reference' (lax.conv), 'taps' (temporal taps as channels of a two-dimensional
      convolution), or None: taps on CPU, reference elsewhere.

  Returns:
    [B, (T - kt) // stride + 1, H', W', O] in x's dtype.

  Raises:
    ValueError: unknown implementation, or fewer frames than temporal taps.
  """
  if implementation is None:
    implementation = 'taps' if target_platform() == 'cpu' else 'reference'
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'{implementation=} is unknown; use one of {sorted(IMPLEMENTATIONS)} or None.')
  taps, kh, kw = kernel.shape[:3]
  if x.shape[1] < taps:
    raise ValueError(f'x has {x.shape[1]} frames, fewer than the {taps} temporal taps; put the '
                     'past frames (zeros at the start) in front of it.')
  if padding is None:
    padding = ((kh // 2, kh // 2), (kw // 2, kw // 2))
  return IMPLEMENTATIONS[implementation](x, kernel.astype(x.dtype), bias.astype(x.dtype),
                                         strides=strides, padding=padding)
