"""Causal convolution over space and time."""

from pf_jax.kernels.conv3d.api import IMPLEMENTATIONS, conv3d, supports
from pf_jax.kernels.conv3d.reference import Epilogue, rms_norm

__all__ = ['IMPLEMENTATIONS', 'Epilogue', 'conv3d', 'rms_norm', 'supports']
