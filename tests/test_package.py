"""The package's front door."""

import subprocess
import sys

import pytest

import pf_jax


def test_import_is_light():
  code = ("import sys, pf_jax; heavy = {'jax', 'flax', 'orbax', 'grain', 'av', 'matplotlib'};"
          "print(sorted(heavy & set(sys.modules)))")
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'


def test_unknown_name_is_named():
  with pytest.raises(AttributeError, match='laod'):
    pf_jax.laod  # noqa: B018


def test_version_is_three_numbers():
  assert len(pf_jax.__version__.split('.')) == 3
