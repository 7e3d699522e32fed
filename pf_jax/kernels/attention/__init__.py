"""Attention of a block over segments of keys and values, and over blocks of a cache."""

from pf_jax.kernels.attention.api import attend, combine
from pf_jax.kernels.context import Blocks, Segment

__all__ = ['Blocks', 'Segment', 'attend', 'combine']
