"""Causal convolution over space and time."""

from pf_jax.kernels.conv3d.api import IMPLEMENTATIONS, conv3d

__all__ = ['IMPLEMENTATIONS', 'conv3d']
