"""Machines to compile for: what XLA has to know about a GPU or a TPU that is not there.

Of a TPU the compiler knows everything by the name of a topology. Of a GPU XLA reads a protocol
buffer in text form (`GpuTargetConfigProto`), one field a line. By its numbers, which a card's
driver would report, the compiler chooses tiles and fusions and refuses kernels that exceed them.

Source of the numbers: OpenXLA's own descriptions of these cards; peaks are those of NVIDIA's data
sheets (SXM; half of what they give "with sparsity"). TPU v5e: cloud.google.com/tpu/docs/v5e.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class GpuDeviceInfo:
  """Quantities of a card, named as XLA names them; defaults are Hopper's. A core is an SM.

  Attributes:
    core_count: streaming multiprocessors.
    clock_rate_ghz: boost clock.
    memory_bandwidth: bytes/s.
    device_memory_size: bytes.
    l2_cache_size: bytes.
    threads_per_warp: lanes.
    threads_per_block_limit: threads of a block at most.
    threads_per_core_limit: threads that a core holds at once.
    shared_memory_per_block: bytes that a block has without asking.
    shared_memory_per_block_optin: bytes that it may ask for.
    shared_memory_per_core: bytes.
    registers_per_block_limit: 32-bit registers.
    registers_per_core_limit: 32-bit registers.
    fpus_per_core: float32 lanes.
    block_dim_limit_x: blocks of a grid at most, along x; likewise y and z.
    thread_dim_limit_x: threads of a block at most, along x; likewise y and z.

  Raises:
    ValueError: a quantity is not positive.
  """

  core_count: int
  clock_rate_ghz: float
  memory_bandwidth: int
  device_memory_size: int
  l2_cache_size: int
  threads_per_warp: int = 32
  threads_per_block_limit: int = 1024
  threads_per_core_limit: int = 2048
  shared_memory_per_block: int = 48 * 1024
  shared_memory_per_block_optin: int = 227 * 1024
  shared_memory_per_core: int = 228 * 1024
  registers_per_block_limit: int = 65_536
  registers_per_core_limit: int = 65_536
  fpus_per_core: int = 128
  block_dim_limit_x: int = 2**31 - 1
  block_dim_limit_y: int = 65_535
  block_dim_limit_z: int = 65_535
  thread_dim_limit_x: int = 1024
  thread_dim_limit_y: int = 1024
  thread_dim_limit_z: int = 64

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value <= 0:
        raise ValueError(f'{name}={value} must be positive.')


@dataclasses.dataclass(frozen=True)
class GpuTarget:
  """One CUDA card and the cuDNN on it.

  Attributes:
    name: what the driver calls the card.
    compute_capability: (major, minor).
    info: its quantities.
    cudnn: version (major, minor, patch) that programs may rely on.
    accelerated: use the features of this very architecture, which Hopper's tensor cores need
      ('sm_90a' rather than 'sm_90').
    peak_flops: bfloat16 matrix products without sparsity, FLOP/s, by the data sheet; None: unknown.
  """

  name: str
  compute_capability: tuple[int, int]
  info: GpuDeviceInfo
  cudnn: tuple[int, int, int] = (9, 10, 0)
  accelerated: bool = True
  peak_flops: float | None = None

  @property
  def cudnn_version(self) -> int:
    """cuDNN's version as the library itself numbers it: 9.10.0 is 91000."""
    major, minor, patch = self.cudnn
    return 10_000 * major + 100 * minor + patch

  def text_proto(self) -> str:
    """The target as XLA reads it."""
    major, minor = self.compute_capability
    features = ' feature_extension: ACCELERATED_FEATURES' if self.accelerated else ''
    quantities = [f'  {name}: {value}' for name, value in dataclasses.asdict(self.info).items()]
    cudnn = 'major: {} minor: {} patch: {}'.format(*self.cudnn)
    return '\n'.join([
        'gpu_device_info {',
        f'  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}',
        *quantities,
        '}',
        'platform_name: "CUDA"',
        f'dnn_version_info {{ {cudnn} }}',
        f'device_description_str: "{self.name}"', ''])


TARGETS: Mapping[str, GpuTarget] = types.MappingProxyType({
    'h200': GpuTarget('NVIDIA H200', (9, 0), GpuDeviceInfo(
        core_count=132, clock_rate_ghz=1.98, memory_bandwidth=4_800_000_000_000,
        device_memory_size=151_397_597_184, l2_cache_size=50 * 1024**2),
        peak_flops=989.4e12),
    'h100': GpuTarget('NVIDIA H100 80GB HBM3', (9, 0), GpuDeviceInfo(
        core_count=132, clock_rate_ghz=1.98, memory_bandwidth=3_352_320_000_000,
        device_memory_size=84_942_979_072, l2_cache_size=50 * 1024**2),
        peak_flops=989.4e12),
})


class TpuDeviceInfo(NamedTuple):
  """Quantities of a TPU chip that the compiler does not have to be told.

  Attributes:
    memory_bandwidth: bytes/s.
    device_memory_size: bytes that programs may use.
  """

  memory_bandwidth: int
  device_memory_size: int


@dataclasses.dataclass(frozen=True)
class TpuTarget:
  """One TPU chip.

  Attributes:
    name: for people.
    topology: of a host, as XLA names it; it has at least as many chips as are compiled for.
    accelerator_type: the same, as Cloud TPU names it.
    info: quantities of a chip.
    peak_flops: bfloat16 matrix products, FLOP/s.
  """

  name: str
  topology: str
  accelerator_type: str
  info: TpuDeviceInfo
  peak_flops: float | None = None


Target = GpuTarget | TpuTarget

# Of a chip's 16 GB the compiler leaves 15.75 GiB to programs.
V5E = TpuTarget('TPU v5e', 'v5e:2x2', 'v5litepod-4', TpuDeviceInfo(
    memory_bandwidth=819_000_000_000, device_memory_size=63 * 1024**3 // 4), peak_flops=197e12)


class Machine(NamedTuple):
  """Some equal cards of one host.

  Attributes:
    name: for command lines.
    target: the card, or chip.
    devices: how many of them.
  """

  name: str
  target: Target
  devices: int


MACHINES: Mapping[str, Machine] = types.MappingProxyType({
    name: Machine(name, target, devices)
    for name, target, devices in (('h200', TARGETS['h200'], 1), ('h100', TARGETS['h100'], 1),
                                  ('h200x8', TARGETS['h200'], 8), ('v5e', V5E, 1))})
