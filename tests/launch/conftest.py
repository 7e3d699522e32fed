"""What the tests of several launchers need."""

import os

import pytest


@pytest.fixture(scope='session')
def without_jax(tmp_path_factory):
  """A PYTHONPATH on which importing JAX ends the process with a telling message."""
  folder = tmp_path_factory.mktemp('stub')
  (folder / 'jax').mkdir()
  (folder / 'jax' / '__init__.py').write_text('raise SystemExit("JAX WAS IMPORTED")\n')
  return {'PYTHONPATH': os.pathsep.join([str(folder), os.environ['PYTHONPATH']])}
