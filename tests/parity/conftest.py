"""The oracles must be there: a parity run without them has to fail, not to skip."""

import os
import warnings

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

try:
  with warnings.catch_warnings():
    # Their import-time deprecations are not ours to fix.
    warnings.simplefilter('ignore')
    import diffusers  # noqa: F401
    import torch
    import transformers  # noqa: F401
except ImportError as error:
  raise pytest.UsageError(
      f'tests/parity compares with torch, diffusers and transformers: {error}. '
      f'Run `make test-parity`, which installs them.') from error

# Tensors are tiny: a second thread costs twenty times what it saves on a busy machine.
torch.set_num_threads(1)
torch.set_grad_enabled(False)
