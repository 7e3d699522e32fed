"""Convolution over space and time, channels last: picks the form that suits the backend."""

import math
from collections.abc import Callable

import jax

from pf_jax.kernels.conv3d import pallas
from pf_jax.kernels.conv3d import reference as plain
from pf_jax.kernels.conv3d.reference import Epilogue, Padding, Strides
from pf_jax.kernels.platform import target_platform

Array = jax.Array

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    'reference': plain.conv3d, 'taps': plain.conv3d_taps, 'pallas': pallas.conv3d}


def supports(implementation: str | None, x: Array, kernel: Array, strides: Strides = (1, 1, 1)
             ) -> bool:
  """Whether an implementation takes arrays like these; all but 'pallas' take any."""
  return implementation != 'pallas' or pallas.supports(x, kernel, strides)


def conv3d(x: Array, kernel: Array, bias: Array, *, strides: Strides = (1, 1, 1),
           padding: Padding | None = None, past: Array | None = None,
           epilogue: Epilogue = Epilogue(), implementation: str | None = None) -> Array:
  """Convolves frames that have their past, in front of them or beside them; time is not padded.

  Args:
    x: [B, T, H, W, C], of any float dtype; kernel and bias are cast to it.
    kernel: [kt, kh, kw, C, O].
    bias: [O].
    strides: along (time, height, width).
    padding: zeros (before, after) along height and width; None keeps the picture's size for odd
      kernels at stride 1.
    past: [B, P, H, W, C], frames before x; None: x begins with them.
    epilogue: what follows the convolution: RMS norm, SiLU, a residual.
    implementation: 'reference' (lax.conv), 'taps' (temporal taps as channels of a two-dimensional
      convolution), 'pallas' (one fused kernel for Hopper cards, half precision), or None: taps on
      CPU, reference elsewhere.

  Returns:
    [B, (P + T - kt) // stride + 1, H', W', O] in x's dtype.

  Raises:
    ValueError: an implementation that is unknown or does not fit, fewer frames than temporal taps,
      or a past or epilogue whose shapes do not fit.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f'{implementation=} is unknown; use one of {sorted(IMPLEMENTATIONS)} or None.')
  if implementation is None:
    # The kernel of our own is not chosen by itself before it was measured on a card.
    implementation = 'taps' if target_platform() == 'cpu' else 'reference'
  _, kh, kw = kernel.shape[:3]
  if padding is None:
    padding = ((kh // 2, kh // 2), (kw // 2, kw // 2))
  _check(x, kernel, past, epilogue, strides, padding)
  if implementation == 'pallas':
    _check_pallas(x, kernel, strides)
  past, residual = (None if z is None else z.astype(x.dtype) for z in (past, epilogue.residual))
  return IMPLEMENTATIONS[implementation](
      x, kernel.astype(x.dtype), bias.astype(x.dtype), strides=strides, padding=padding, past=past,
      epilogue=epilogue._replace(residual=residual))


def _check(x: Array, kernel: Array, past: Array | None, epilogue: Epilogue, strides: Strides,
           padding: Padding) -> None:
  frames, taps, channels = x.shape[1], kernel.shape[0], kernel.shape[4]
  if past is not None:
    if (past.shape[0], *past.shape[2:]) != (x.shape[0], *x.shape[2:]):
      raise ValueError(f'past frames have shape {list(past.shape)}, wanted that of x, '
                       f'{list(x.shape)}, in all but the number of frames.')
    frames += past.shape[1]
  if frames < taps:
    raise ValueError(f'x has {frames} frames, fewer than the {taps} temporal taps; put the '
                     'past frames (zeros at the start) in front of it.')
  if epilogue.gain is not None and epilogue.gain.shape != (channels,):
    raise ValueError(f'the gain has shape {list(epilogue.gain.shape)}, wanted [{channels}].')
  wanted = (x.shape[0], (frames - taps) // strides[0] + 1,
            *plain.output_size(x.shape[2:4], kernel.shape[1:3], strides[1:], padding), channels)
  if epilogue.residual is not None and epilogue.residual.shape != wanted:
    raise ValueError(f'the residual has shape {list(epilogue.residual.shape)}, wanted that of the '
                     f'output, {list(wanted)}.')


def _check_pallas(x: Array, kernel: Array, strides: Strides) -> None:
  if not pallas.supports(x, kernel, strides):
    raise ValueError(f'pallas takes {pallas.LIMITS}, got x {x.dtype}{list(x.shape)} and a kernel '
                     f"{list(kernel.shape)}; use 'reference' or None.")
  cards = math.prod(jax.sharding.get_abstract_mesh().axis_sizes)
  if cards > 1:
    raise ValueError(f"pallas convolves on one card, the mesh has {cards}; use 'reference' or "
                     'None.')
