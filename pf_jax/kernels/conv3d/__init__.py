"""Causal convolution over space and time."""

from pf_jax.kernels.conv3d.api import IMPLEMENTATIONS, conv3d, supports
from pf_jax.kernels.conv3d.reference import Epilogue, operations, output_size, rms_norm

__all__ = ['IMPLEMENTATIONS', 'Epilogue', 'conv3d', 'operations', 'output_size', 'rms_norm',
           'supports']
