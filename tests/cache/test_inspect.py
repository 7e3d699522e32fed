"""Where blocks are, as literal rows."""

import pytest

from pf_jax import cache
from pf_jax.cache.inspect import Partition, block_states

SPEC = cache.CacheSpec(num_layers=1, num_heads=1, head_dim=6, grid=(2, 2, 2), mid_grid=(1, 1, 1),
                       sink_blocks=1, recent_blocks=1, top_k=1, mid_capacity=2)
LETTERS = {Partition.ABSENT: '.', Partition.SINK: 'S', Partition.SELECTED: 'M',
           Partition.ARCHIVED: 'm', Partition.RECENT: 'R', Partition.GENERATED: 'G',
           Partition.EVICTED: 'x'}


def row(block: int, selected=()) -> str:
  return ''.join(LETTERS[Partition(s)] for s in block_states(block, 8, SPEC, selected))


def test_life_of_blocks():
  assert row(0) == 'G.......'
  assert row(1) == 'SG......'
  assert row(2) == 'SRG.....'
  assert row(3, [1, -1]) == 'SMRG....'
  assert row(4, [1]) == 'SMmRG...'
  assert row(7, [4]) == 'SxxxMmRG'


def test_impossible_questions():
  with pytest.raises(ValueError, match=r'block=8 is not within 0\.\.7'):
    block_states(8, 8, SPEC)
  with pytest.raises(ValueError, match=r'selected blocks \[2\] are not in the archive'):
    block_states(7, 8, SPEC, [2])
