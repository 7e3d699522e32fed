"""A small model, and its weights as Wan2.1 publishes its own."""

import pytest

from pf_jax.testing import random_models, tiny_model_spec
from tests.weights import checkpoints


@pytest.fixture(scope='session')
def models():
  return random_models(tiny_model_spec(), 1)


@pytest.fixture(scope='session')
def wan(models, tmp_path_factory):
  """Not to be written into."""
  return checkpoints.write_wan(tmp_path_factory.mktemp('weights') / 'Wan2.1', models)
