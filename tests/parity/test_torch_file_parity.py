"""What torch.save writes, in both formats, comes back bit for bit without torch."""

import collections

import ml_dtypes
import numpy as np
import pytest
import torch

from pf_jax.weights.tensors import LazyTensor, WeightsError
from pf_jax.weights.torch_file import read_torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int16,
          torch.int32, torch.int64, torch.uint8, torch.bool)
FORMATS = {'zip': {}, 'zip, protocol 4': {'pickle_protocol': 4},
           'legacy': {'_use_new_zipfile_serialization': False},
           'legacy, protocol 4': {'_use_new_zipfile_serialization': False, 'pickle_protocol': 4}}


@pytest.fixture(params=FORMATS)
def through_file(request, tmp_path):
  """Saves with torch, reads without."""
  def through(value):
    torch.save(value, tmp_path / 'file.pth', **FORMATS[request.param])
    return read_torch(tmp_path / 'file.pth')
  return through


def assert_same(lazy, tensor: torch.Tensor):
  tensor = tensor.detach()
  assert isinstance(lazy, LazyTensor)
  assert lazy.shape == tuple(tensor.shape)
  assert lazy.dtype == (ml_dtypes.bfloat16 if tensor.dtype == torch.bfloat16
                        else torch.empty(0, dtype=tensor.dtype).numpy().dtype)
  got = lazy.read()
  assert (got.shape, got.dtype) == (lazy.shape, lazy.dtype)
  wanted = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
  assert np.ascontiguousarray(got).tobytes() == wanted


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_views_of_every_dtype(through_file, dtype):
  base = torch.randint(-2**62, 2**62, (4, 6, 8), generator=torch.Generator().manual_seed(0))
  base = (base % 2).bool() if dtype == torch.bool else base.view(dtype)  # any bits, NaN too
  views = {'whole': base, 'transposed': base.transpose(0, 2), 'permuted': base.permute(1, 2, 0),
           'part': base[1:3, 2:, ::3], 'row': base[2, 3], 'scalar': base[3, 5, 7],
           'empty': base[:0], 'one': base[1:2, :, 1:2], 'clone': base.clone(),
           'nothing': torch.empty((0, 3), dtype=dtype), 'new': torch.ones((), dtype=dtype)}
  read = through_file(views)
  assert list(read) == list(views)
  for name, view in views.items():
    assert_same(read[name], view)


def test_state_dict_of_a_module(through_file):
  module = torch.nn.Sequential(torch.nn.Conv3d(2, 3, (1, 2, 2)), torch.nn.BatchNorm3d(3)).bfloat16()
  state = module.state_dict()
  assert state._metadata  # an attribute of the dict, which is left out
  read = through_file({'generator': state, 'generator_ema': dict(module.named_parameters())})
  assert type(read['generator']) is collections.OrderedDict
  assert list(read['generator']) == list(state)
  for name, tensor in state.items():
    assert_same(read['generator'][name], tensor)
  assert type(read['generator_ema']) is dict
  for name, tensor in module.named_parameters():
    assert_same(read['generator_ema'][name], tensor)


def test_training_checkpoint(through_file):
  weight = torch.nn.Parameter(torch.arange(6.).reshape(2, 3))
  optimizer = torch.optim.AdamW([weight], lr=1e-3)
  weight.grad = torch.ones_like(weight)
  optimizer.step()
  read = through_file({
      'step': 10**12, 'optimizer': optimizer.state_dict(), 'tied': [weight, weight],
      'size': weight.shape, 'dtype': torch.float16, 'note': 'é' * 300, 'loss': 0.1,
      'flags': (True, None)})
  assert (read['step'], read['size'], read['dtype'], read['note'], read['loss'], read['flags']) == (
      10**12, (2, 3), np.float16, 'é' * 300, 0.1, (True, None))
  for lazy in read['tied']:
    assert_same(lazy, weight)
  assert_same(read['optimizer']['state'][0]['exp_avg'], optimizer.state[weight]['exp_avg'])
  assert read['optimizer']['param_groups'][0]['betas'] == (0.9, 0.999)


@pytest.mark.parametrize(('value', 'message'), [
    (torch.zeros(4).to(torch.float8_e4m3fn), 'fp8 .* tensor.to.torch.bfloat16'),
    (torch.zeros(4, dtype=torch.complex64), "names 'torch.ComplexFloatStorage'"),
    (torch.zeros(1).expand(4), 'repeats elements'),
    (torch.nn.Linear(2, 2), "names 'torch.nn.modules.linear.Linear'"),
    (torch.zeros(2).untyped_storage(), 'fp8 or another dtype|bare storage'),
    (torch.zeros(2).to_sparse(), "names 'torch._utils._rebuild_sparse_tensor'"),
], ids=['fp8', 'complex', 'expanded', 'module', 'storage', 'sparse'])
def test_what_is_not_a_plain_tensor_is_refused(through_file, value, message):
  with pytest.raises(WeightsError, match=message):
    through_file({'a': value})
