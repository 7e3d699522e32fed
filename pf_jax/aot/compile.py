"""Compiles a function for a GPU that is not there and says how much of its memory it would take.

XLA's CUDA compiler needs a description of the card, not the card. It assigns every buffer, so the
bytes are those of a run, with one exception: what cuDNN and cuBLAS choose for themselves when they
are tuned on the card (their workspaces) is not known before. Arguments are shapes; nothing is
allocated, and the executable cannot be run here.

The compiler comes in two wheels of jax's own version; CUDA itself is not needed:

  pip install --no-deps jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    SingleDeviceSharding,
    use_abstract_mesh,
)

from pf_jax.aot.targets import GpuTarget
from pf_jax.types import PyTree

PLUGIN = 'jax_cuda13_plugin'


@dataclasses.dataclass(frozen=True)
class Report:
  """What the compiler found out.

  Attributes:
    target: the machine.
    argument_bytes: of the arguments that the program uses.
    output_bytes: of the results, those that take over a donated argument's memory included.
    alias_bytes: of the results that do so.
    scratch_bytes: most memory in between, workspaces of cuDNN and cuBLAS excepted.
    trace_seconds: wall time from Python to XLA's input.
    compile_seconds: wall time from there to machine code.
    executable: `as_text()` shows the optimised program; it cannot be called.
  """

  target: GpuTarget
  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  scratch_bytes: int
  trace_seconds: float
  compile_seconds: float
  executable: jax.stages.Compiled

  @property
  def total_bytes(self) -> int:
    """Memory of one call: arguments, results that are not aliased, scratch."""
    return self.argument_bytes + self.output_bytes - self.alias_bytes + self.scratch_bytes


def compile_for(function: Callable, arguments: Sequence[PyTree], target: GpuTarget, *,
                donate: Sequence[int] = ()) -> Report:
  """Compiles `function(*arguments)` for one card.

  Args:
    function: anything that `jax.jit` takes.
    arguments: pytrees of arrays or of `jax.ShapeDtypeStruct`, e.g. from `jax.eval_shape`.
    target: the card.
    donate: positions of arguments whose memory the results may take over.

  Returns:
    `Report`.

  Raises:
    ModuleNotFoundError: the compiler is not installed; says how to add it.
  """
  sharding = SingleDeviceSharding(_device(target))
  abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      tuple(arguments))
  start = time.perf_counter()
  with _as_if_on(target):
    lowered = jax.jit(function, donate_argnums=tuple(donate)).lower(*abstract)
  traced = time.perf_counter()
  with _no_compilation_cache():
    executable = lowered.compile()
  plan: Any = executable.memory_analysis()
  return Report(target=target, argument_bytes=plan.argument_size_in_bytes,
                output_bytes=plan.output_size_in_bytes, alias_bytes=plan.alias_size_in_bytes,
                scratch_bytes=plan.temp_size_in_bytes, trace_seconds=traced - start,
                compile_seconds=time.perf_counter() - traced, executable=executable)


def _device(target: GpuTarget) -> jax.Device:
  """A device that programs can be compiled for and nothing else."""
  if importlib.util.find_spec(PLUGIN) is None:
    raise ModuleNotFoundError(
        f'compiling for {target.name} needs the CUDA compiler of jax {jax.__version__}; add it '
        f'with: pip install --no-deps jax-cuda13-plugin=={jax.__version__} '
        f'jax-cuda13-pjrt=={jax.__version__}', name=PLUGIN)
  topology = topologies.get_topology_desc(
      platform='cuda', topology_name=target.name, target_config=target.text_proto(),
      topology='1x1x1')
  return topology.devices[0]


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
  """What cannot be loaded here cannot be read back: JAX would store it and fail the next time."""
  settings: Any = jax.config
  enabled = settings.jax_enable_compilation_cache
  settings.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    settings.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def _as_if_on(target: GpuTarget) -> Iterator[None]:
  """Kernels that are traced here choose what suits the target (see `pf_jax.kernels.platform`)."""
  device = AbstractDevice(device_kind=target.name, num_cores=target.info.core_count,
                          platform='cuda')
  mesh = AbstractMesh((1,), ('device',), (AxisType.Auto,), abstract_device=device)
  # JAX asks the installed cuDNN for its version before it traces a call of it; there is none here.
  versions: Any = importlib.import_module(f'{PLUGIN}._versions')
  installed = versions.cudnn_get_version
  versions.cudnn_get_version = lambda: target.cudnn_version
  try:
    with use_abstract_mesh(mesh):
      yield
  finally:
    versions.cudnn_get_version = installed
