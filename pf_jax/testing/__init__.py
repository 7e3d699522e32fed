"""Tiny models that tests, notebooks and smoke runs share."""

from pf_jax.testing.specs import random_models, tiny_model_spec

__all__ = ['random_models', 'tiny_model_spec']
