"""Settings shared by all tests."""

import importlib.metadata
import importlib.util
import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Before JAX is imported: compiled programs are kept between runs, and nothing is downloaded.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
# Tests compile much and compute little. With a cold cache tests/rollout took 122 s, 65 s without
# LLVM's optimisation, and XLA's older code for fusions compiles in half the time that was left.
_XLA_FLAGS = ['--xla_backend_optimization_level=0']
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # others do not know it, and abort
  _XLA_FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(_XLA_FLAGS))
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ['PF_JAX_TUNING'] = str(ROOT / '.cache' / 'no-tuning.json')  # the user's own is no test's
os.environ.setdefault('MPLBACKEND', 'agg')
# Subprocesses of tests import the checkout, wherever they run.
os.environ['PYTHONPATH'] = os.pathsep.join(
    part for part in (str(ROOT), os.environ.get('PYTHONPATH')) if part)

# The oracles are installed by `make test-parity` only.
_ORACLES = ('torch', 'diffusers', 'transformers')
collect_ignore = [] if all(map(importlib.util.find_spec, _ORACLES)) else ['parity']
# XLA's CUDA compiler is installed by `make test-aot` only.
if importlib.util.find_spec('jax_cuda13_plugin') is None:
  collect_ignore += ['aot/test_compile.py', 'aot/test_kernels.py', 'aot/test_launch_aot.py',
                     'aot/test_training.py']


def pytest_addoption(parser):
  parser.addoption('--slow', action='store_true', help='also run tests marked slow')


def pytest_collection_modifyitems(config, items):
  skips = {}
  if not config.getoption('--slow'):
    skips['slow'] = pytest.mark.skip(reason='slow; give --slow to run it')
  if any('gpu' in item.keywords for item in items):
    import jax
    if jax.default_backend() != 'gpu':
      skips['gpu'] = pytest.mark.skip(reason='needs a GPU')
  for item in items:
    for marker, skip in skips.items():
      if marker in item.keywords:
        item.add_marker(skip)
