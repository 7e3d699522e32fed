"""Compiles a function for cards that are not there and says how much of their memory it would take.

XLA's CUDA compiler needs a description of the card, not the card. It assigns every buffer, so the
bytes are those of a run, with one exception: what cuDNN and cuBLAS choose for themselves when they
are tuned on the card (their workspaces) is not known before. Arguments are shapes; nothing is
allocated, and the executable cannot be run here. Several cards of one host make a mesh: arguments
say by their shardings how they are split over it, and bytes are those of one card.

The compiler comes in two wheels of jax's own version; CUDA itself is not needed:

  pip install --no-deps jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION

That of TPUs is the wheel libtpu, see `pf_jax.aot.tpu`. It refuses programs that do not fit into the
memory of a chip; then the report says how much they would take.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.interpreters import partial_eval
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from pf_jax.aot import tpu
from pf_jax.aot.targets import GpuTarget, Target, TpuTarget
from pf_jax.types import PyTree

PLUGIN = 'jax_cuda13_plugin'


class Program(NamedTuple):
  """What `compile_for` is to compile.

  Attributes:
    name: short, to choose it by.
    title: for people.
    function: see `compile_for`, likewise the rest.
    arguments: shapes.
    donate: positions of arguments.
    options: of XLA.
    trips: turns, at most, of a loop whose length is known only when it runs.
  """

  name: str
  title: str
  function: Callable
  arguments: tuple[PyTree, ...]
  donate: tuple[int, ...] = ()
  options: Mapping[str, Any] | None = None
  trips: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
  """What the compiler found out. Bytes are those of each card.

  Attributes:
    target: the card.
    devices: how many of them.
    argument_bytes: of the arguments that the program uses.
    output_bytes: of the results, those that take over a donated argument's memory included.
    alias_bytes: of the results that do so.
    scratch_bytes: most memory in between, workspaces of cuDNN and cuBLAS excepted.
    trace_seconds: wall time from Python to XLA's input.
    compile_seconds: wall time from there to machine code.
    jaxpr: the program as it was traced for the card, to count operations of.
    executable: `as_text()` shows the optimised program; it cannot be called. None if refused.
    refused: why the compiler made no program: it does not fit. Results are then in the scratch.
  """

  target: Target
  devices: int
  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  scratch_bytes: int
  trace_seconds: float
  compile_seconds: float
  jaxpr: Any
  executable: jax.stages.Compiled | None
  refused: str | None = None

  @property
  def total_bytes(self) -> int:
    """Memory of one call on each card: arguments, results that are not aliased, scratch."""
    return self.argument_bytes + self.output_bytes - self.alias_bytes + self.scratch_bytes


def device_mesh(target: Target, devices: int) -> Mesh:
  """Cards that programs can be compiled for and nothing else, along one axis, 'data'.

  Args:
    target: the card.
    devices: how many of them, in one host.

  Raises:
    ModuleNotFoundError: the compiler is not installed; says how to add it.
  """
  if isinstance(target, TpuTarget):
    return tpu.device_mesh(target, devices)
  if importlib.util.find_spec(PLUGIN) is None:
    raise ModuleNotFoundError(
        f'compiling for {target.name} needs the CUDA compiler of jax {jax.__version__}; add it '
        f'with: pip install --no-deps jax-cuda13-plugin=={jax.__version__} '
        f'jax-cuda13-pjrt=={jax.__version__}', name=PLUGIN)
  return _mesh(target, devices)


@functools.cache
def _mesh(target: GpuTarget, devices: int) -> Mesh:
  """Made once: devices of another description of the same machine are others."""
  topology = topologies.get_topology_desc(
      platform='cuda', topology_name=target.name, target_config=target.text_proto(),
      topology=f'1x1x{devices}')
  return Mesh(np.asarray(topology.devices), ('data',))


def compile_for(function: Callable, arguments: Sequence[PyTree], target: Target, *,
                devices: int = 1, donate: Sequence[int] = (),
                options: Mapping[str, Any] | None = None) -> Report:
  """Compiles `function(*arguments)` for one card, or for several of one host.

  Args:
    function: anything that `jax.jit` takes; one that is jitted already may say how its results are
      split.
    arguments: pytrees of arrays or of `jax.ShapeDtypeStruct`, e.g. from `jax.eval_shape`. A
      `ShapeDtypeStruct` may have a sharding over `device_mesh(target, devices)`; whatever has none
      lies on every card.
    target: the card.
    devices: how many of them.
    donate: positions of arguments whose memory the results may take over.
    options: of XLA, by name.

  Returns:
    `Report`.

  Raises:
    ModuleNotFoundError: the compiler is not installed; says how to add it.
    ValueError: an argument is split over another mesh.
  """
  mesh = device_mesh(target, devices)
  abstract = jax.tree.map(functools.partial(_on_mesh, mesh), tuple(arguments))
  start = time.perf_counter()
  with _as_if_on(target, mesh):
    trace = jax.jit(function, donate_argnums=tuple(donate)).trace(*abstract)
    lowered = trace.lower()
  traced = time.perf_counter()
  try:
    with no_compilation_cache():
      executable = lowered.compile(dict(options) if options else None)
  except jax.errors.JaxRuntimeError as error:
    if not isinstance(target, TpuTarget) or (total := tpu.needed_bytes(str(error))) is None:
      raise
    given = _argument_bytes(trace.jaxpr, abstract)
    return Report(target=target, devices=devices, argument_bytes=given, output_bytes=0,
                  alias_bytes=0, scratch_bytes=max(total - given, 0), trace_seconds=traced - start,
                  compile_seconds=time.perf_counter() - traced, jaxpr=trace.jaxpr, executable=None,
                  refused=str(error).splitlines()[0])
  plan: Any = executable.memory_analysis()
  return Report(target=target, devices=devices, argument_bytes=plan.argument_size_in_bytes,
                output_bytes=plan.output_size_in_bytes, alias_bytes=plan.alias_size_in_bytes,
                scratch_bytes=plan.temp_size_in_bytes, trace_seconds=traced - start,
                compile_seconds=time.perf_counter() - traced, jaxpr=trace.jaxpr,
                executable=executable)


def _argument_bytes(jaxpr: Any, abstract: PyTree) -> int:
  """Bytes of the arguments that a program uses, on each device, without the compiler's padding."""
  _, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for leaf, reads in zip(jax.tree.leaves(abstract), used, strict=True) if reads)


def _on_mesh(mesh: Mesh, leaf: Any) -> jax.ShapeDtypeStruct:
  """The shape of an argument and where it lies; arrays of this machine lie on every card."""
  sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
  if sharding is None:
    sharding = NamedSharding(mesh, PartitionSpec())
  elif not isinstance(sharding, NamedSharding) or sharding.mesh != mesh:
    raise ValueError(f'an argument of shape {list(leaf.shape)} has sharding {sharding}, wanted one '
                     f'over device_mesh(target, {mesh.size}), or None.')
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
  """What cannot be loaded here cannot be read back: JAX would store it and fail the next time.

  Nor does the assembler say anything of a kernel that is read back.
  """
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
def _as_if_on(target: Target, mesh: Mesh) -> Iterator[None]:
  """Kernels that are traced here choose what suits the target (see `pf_jax.kernels.platform`)."""
  if isinstance(target, TpuTarget):
    with use_abstract_mesh(mesh.abstract_mesh):
      yield
    return
  # JAX asks the installed cuDNN for its version before it traces a call of it; there is none here.
  versions: Any = importlib.import_module(f'{PLUGIN}._versions')
  installed = versions.cudnn_get_version
  versions.cudnn_get_version = lambda: target.cudnn_version
  try:
    with use_abstract_mesh(mesh.abstract_mesh):
      yield
  finally:
    versions.cudnn_get_version = installed
