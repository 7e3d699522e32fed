"""Attention of a block over segments of keys and values that are never concatenated."""

from pf_jax.kernels.attention.api import Segment, attend

__all__ = ['Segment', 'attend']
