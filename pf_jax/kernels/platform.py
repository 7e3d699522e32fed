"""For which kind of machine a program is being traced; kernels choose their backend by it."""

from typing import Any

import jax


def target_platform() -> str:
  """'cpu', 'cuda', 'tpu', ...: the abstract mesh's device if there is one, else the default one.

  A program that is compiled ahead of time for a machine that is not there is traced under an
  abstract mesh (see `pf_jax.aot`), and must not be built from this machine's kernels.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  platform = jax.default_backend() if device is None else device.platform
  return 'cuda' if platform == 'gpu' else platform


def target_device_kind() -> str:
  """What the device that is traced for is called by its driver, such as 'NVIDIA H200'."""
  device: Any = jax.sharding.get_abstract_mesh().abstract_device
  return (jax.devices()[0] if device is None else device).device_kind
