"""Tiny specs that tests, notebooks and smoke runs share."""

from pf_jax.testing.specs import tiny_model_spec

__all__ = ['tiny_model_spec']
