"""The PackForcing cache as pure functions over an immutable pytree of fixed shapes.

spec       CacheSpec: every size and choice, validated.
state      PackCache, init, and which block sits in which slot.
update     commit: append a block, age the oldest recent one into the archive, evict.
select     dynamic context selection, exact through key-sums.
positions  re-aligned ("packed") temporal positions.
context    the packed history that one block attends.
replay     what later blocks saw, from one cache and the blocks since.
inspect    which block is where, for people to look at.
"""

from pf_jax.cache.context import context
from pf_jax.cache.positions import Layout, layout
from pf_jax.cache.replay import newest_block, with_later_blocks
from pf_jax.cache.select import key_sum, scores, select
from pf_jax.cache.spec import CacheSpec
from pf_jax.cache.state import (
                                LayerCache,
                                LayerView,
                                PackCache,
                                archive_ids,
                                archived_blocks,
                                init,
                                recent_ids,
                                sink_ids,
)
from pf_jax.cache.update import commit, replace_recent

__all__ = ['CacheSpec', 'LayerCache', 'LayerView', 'Layout', 'PackCache', 'archive_ids',
           'archived_blocks', 'commit', 'context', 'init', 'key_sum', 'layout', 'newest_block',
           'recent_ids', 'replace_recent', 'scores', 'select', 'sink_ids', 'with_later_blocks']
