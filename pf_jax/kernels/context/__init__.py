"""What a block attends, and assembling it from the partitions of a cache."""

from pf_jax.kernels.context.reference import assemble, ready_made, valid_first
from pf_jax.kernels.context.segments import Blocks, Segment

__all__ = ['Blocks', 'Segment', 'assemble', 'ready_made', 'valid_first']
