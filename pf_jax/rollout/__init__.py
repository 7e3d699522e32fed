"""Generation: a step, a block, a whole rollout; the only place that commits to a cache."""
