import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from pf_jax.aot import compile as compile_lib
from pf_jax.aot.targets import TARGETS, GpuDeviceInfo, GpuTarget


def test_text_proto_by_hand():
  info = GpuDeviceInfo(core_count=2, clock_rate_ghz=1.5, memory_bandwidth=7, device_memory_size=99,
                       l2_cache_size=5)
  target = GpuTarget('Small Card', (8, 6), info, cudnn=(9, 1, 2), accelerated=False)
  lines = target.text_proto().splitlines()
  assert lines[:4] == ['gpu_device_info {', '  cuda_compute_capability { major: 8 minor: 6 }',
                       '  core_count: 2', '  clock_rate_ghz: 1.5']
  assert '  shared_memory_per_block_optin: 232448' in lines
  assert '  block_dim_limit_x: 2147483647' in lines
  assert '  thread_dim_limit_z: 64' in lines
  assert lines[-4:] == ['}', 'platform_name: "CUDA"',
                        'dnn_version_info { major: 9 minor: 1 patch: 2 }',
                        'device_description_str: "Small Card"']
  assert target.cudnn_version == 90102


def test_every_quantity_is_written_once():
  lines = TARGETS['h200'].text_proto().splitlines()
  for name, value in dataclasses.asdict(TARGETS['h200'].info).items():
    assert lines.count(f'  {name}: {value}') == 1


def test_hopper_cards_are_compiled_for_their_tensor_cores():
  for name in ('h200', 'h100'):
    assert ('cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }'
            in TARGETS[name].text_proto())
  assert TARGETS['h200'].info.device_memory_size == 141 * 1024**3
  assert TARGETS['h200'].cudnn_version == 91000


def test_refuses_a_quantity_that_is_not_positive():
  with pytest.raises(ValueError, match='l2_cache_size=0 must be positive'):
    dataclasses.replace(TARGETS['h200'].info, l2_cache_size=0)


def test_without_the_compiler_the_message_says_how_to_add_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  version = jax.__version__
  with pytest.raises(ModuleNotFoundError, match=f'NVIDIA H200 .* pip install --no-deps '
                     f'jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}'):
    compile_lib.compile_for(jnp.sin, (jnp.zeros(3),), TARGETS['h200'])
