"""XLA's TPU compiler, without a TPU: how it is found and kept quiet, and what it says.

It comes in one wheel, libtpu, of the version that jax asks for.
"""

import functools
import importlib.metadata
import importlib.util
import os
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from pf_jax.aot.targets import TpuTarget

_WHEEL = 'libtpu'
_REFUSAL = re.compile(r'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
                      r'for HLO temporaries \((\d+(?:\.\d+)?)([KMG])\)')
_UNITS = {'K': 1024, 'M': 1024**2, 'G': 1024**3}


def requirement() -> str:
  """What to install, such as 'libtpu==0.0.42.*': what the installed jax names for its TPUs."""
  for line in importlib.metadata.requires('jax') or ():
    wanted, _, condition = line.partition(';')
    if wanted.startswith(_WHEEL) and 'tpu' in condition:
      return wanted.strip()
  return _WHEEL


def device_mesh(target: TpuTarget, devices: int) -> Mesh:
  """Chips that programs can be compiled for and nothing else, along one axis, 'data'.

  Raises:
    ModuleNotFoundError: the compiler is not installed; says how to add it.
  """
  if importlib.util.find_spec(_WHEEL) is None:
    raise ModuleNotFoundError(
        f'compiling for {target.name} needs the TPU compiler that jax {jax.__version__} asks for; '
        f"add it with: pip install --no-deps '{requirement()}'", name=_WHEEL)
  return _mesh(target, devices)


@functools.cache
def _mesh(target: TpuTarget, devices: int) -> Mesh:
  """Made once: devices of another description of the same machine are others."""
  for name, value in _environment(target).items():
    os.environ.setdefault(name, value)
  topology = topologies.get_topology_desc(target.topology, platform='tpu')
  return Mesh(np.asarray(topology.devices[:devices]), ('data',))


def _environment(target: TpuTarget) -> dict[str, str]:
  """What libtpu reads when it is loaded: to look for no TPU and to write no logs into /tmp."""
  return {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': target.accelerator_type,
          'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_LOG_DIR': 'disabled',
          # It would let one process at a time have the TPU, which none has here.
          'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}


def needed_bytes(message: str) -> int | None:
  """Memory that a program would take on a chip, by the message that refuses it; None: another one.

  What libtpu calls temporaries there are arguments and results as well: a sum of 20 GB is refused
  with 18.63 G.
  """
  found = _REFUSAL.search(message)
  return None if found is None else round(float(found[1]) * _UNITS[found[2]])
