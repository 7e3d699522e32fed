"""Three-axis rotary position embedding, split so that time can be re-aligned later."""

from pf_jax.kernels.rope.api import IMPLEMENTATIONS, norm_and_rotate
from pf_jax.kernels.rope.reference import (
    MidOffsets,
    RopeTable,
    block_positions,
    compressed_positions,
    rope_pairs,
    rope_table,
    rotate,
    rotate_time,
    time_angles,
)

__all__ = ['IMPLEMENTATIONS', 'MidOffsets', 'RopeTable', 'block_positions', 'compressed_positions',
           'norm_and_rotate', 'rope_pairs', 'rope_table', 'rotate', 'rotate_time', 'time_angles']
