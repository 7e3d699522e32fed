"""Data: the miniature's world, Grain sources, the store of encoded clips."""
