"""What programs would take on a machine, and how fast they could be at best: as JSON and as tables.

Roofline: a program can be no faster than its matrix products at the card's peak rate, nor than its
bytes at the memory's; the longer of the two bounds it. FLOPs and bytes are counted from the trace,
on all cards together (see `pf_jax.train.flops`), and are taken to be shared out evenly. Exchanges
between cards are listed, not timed.

Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from pf_jax.aot.hlo import Collectives
from pf_jax.aot.ptxas import Kernel
from pf_jax.aot.targets import Machine

_PREFIXES = ('', 'k', 'M', 'G', 'T', 'P', 'E')


class Roofline(NamedTuple):
  """Shortest times.

  Attributes:
    product_seconds: of the matrix products.
    memory_seconds: of the bytes.
  """

  product_seconds: float
  memory_seconds: float

  @property
  def seconds(self) -> float:
    """Of the program."""
    return max(self)

  @property
  def bound(self) -> str:
    """What takes them: 'products' or 'memory'."""
    return 'products' if self.product_seconds >= self.memory_seconds else 'memory'


def roofline(flops: int, moved_bytes: int, machine: Machine) -> Roofline | None:
  """Shortest times on a machine; None if its peak is unknown.

  Args:
    flops: operations on all cards.
    moved_bytes: read and written on all cards.
    machine: the cards.
  """
  target = machine.target
  if target.peak_flops is None:
    return None
  return Roofline(flops / (machine.devices * target.peak_flops),
                  moved_bytes / (machine.devices * target.info.memory_bandwidth))


@dataclasses.dataclass(frozen=True)
class ProgramReport:
  """One program. Bytes are those of each card unless said otherwise.

  Attributes:
    name: to choose it by.
    title: for people.
    argument_bytes: see `pf_jax.aot.compile.Report`, likewise the next five.
    output_bytes: of results.
    alias_bytes: of them in the arguments' memory.
    scratch_bytes: in between.
    trace_seconds: wall time.
    compile_seconds: wall time.
    flops: of the products, on all cards; None if they could not be counted.
    moved_bytes: that the products read and write, on all cards; of a program without products
      arguments and results.
    uncounted: why `flops` is None.
    kernels: of Pallas.
    collectives: exchanges between cards.
    refused: see `pf_jax.aot.compile.Report`.
  """

  name: str
  title: str
  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  scratch_bytes: int
  trace_seconds: float
  compile_seconds: float
  flops: int | None = None
  moved_bytes: int | None = None
  uncounted: str | None = None
  kernels: tuple[Kernel, ...] = ()
  collectives: Collectives = Collectives({}, True)
  refused: str | None = None

  @property
  def total_bytes(self) -> int:
    """Memory of one call."""
    return self.argument_bytes + self.output_bytes - self.alias_bytes + self.scratch_bytes

  def fits(self, machine: Machine) -> bool:
    """Whether a card has memory for one call."""
    return self.refused is None and self.total_bytes <= machine.target.info.device_memory_size

  def roofline(self, machine: Machine) -> Roofline | None:
    """None if something is unknown."""
    if self.flops is None or self.moved_bytes is None:
      return None
    return roofline(self.flops, self.moved_bytes, machine)


def to_json(reports: Sequence[ProgramReport], machine: Machine) -> dict[str, Any]:
  """What `aot.json` says of the machine and its programs; more may be added."""
  target = machine.target
  return {
      'machine': {
          'name': machine.name, 'card': target.name, 'cards': machine.devices,
          'memory_bytes': target.info.device_memory_size, 'peak_flops': target.peak_flops,
          'memory_bandwidth': target.info.memory_bandwidth},
      'programs': {report.name: _program_json(report, machine) for report in reports}}


def _program_json(report: ProgramReport, machine: Machine) -> dict[str, Any]:
  times = report.roofline(machine)
  own = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)
         if field.name != 'name'}
  return {
      **own, 'total_bytes': report.total_bytes,
      'memory_share': report.total_bytes / machine.target.info.device_memory_size,
      'fits': report.fits(machine),
      'roofline': None if times is None else {
          **times._asdict(), 'seconds': times.seconds, 'bound': times.bound},
      'kernels': [dataclasses.asdict(kernel) for kernel in report.kernels],
      'collectives': {kind: found._asdict() for kind, found in report.collectives.kinds.items()},
      'collectives_complete': report.collectives.complete}


def amount(value: float | None, unit: str) -> str:
  """Four digits with a decimal prefix: '12.84 GB'; '-' for None."""
  if value is None:
    return '-'
  scaled = float(value)
  for prefix in _PREFIXES:
    if abs(scaled) < 999.95 or prefix == _PREFIXES[-1]:
      break
    scaled /= 1000
  return f'{scaled:.4g} {prefix}{unit}'


def _duration(seconds: float | None) -> str:
  """'1.234 ms' or '12.3 s'."""
  if seconds is None:
    return '-'
  for factor, unit in ((1e6, 'us'), (1e3, 'ms')):
    if seconds * factor < 999.95:
      return f'{seconds * factor:.4g} {unit}'
  return f'{seconds:.4g} s'


def markdown(reports: Sequence[ProgramReport], machine: Machine) -> str:
  """Tables to paste: memory, work, and kernels and collectives where there are any."""
  sections = [_memory(reports, machine), _work(reports, machine), _kernels(reports),
              _collectives(reports)]
  return '\n'.join(section for section in sections if section)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _memory(reports: Sequence[ProgramReport], machine: Machine) -> str:
  size = machine.target.info.device_memory_size
  cards = f'{machine.devices} x {machine.target.name}'
  rows = []
  for report in reports:
    results = (None, None) if report.refused else (report.output_bytes, report.alias_bytes)
    sizes = report.argument_bytes, *results, report.scratch_bytes, report.total_bytes
    rows.append([report.title, *(amount(value, 'B') for value in sizes),
                 f'{100 * report.total_bytes / size:.3g}%', f'{report.trace_seconds:.1f} s',
                 f'{report.compile_seconds:.1f} s'])
  notes = [f'{report.title}: does not fit; results are in the scratch. The compiler says: '
           f'{report.refused}\n' for report in reports if report.refused]
  return f'Memory of each card, {cards} of {amount(size, "B")}:\n\n' + _table(
      ['program', 'arguments', 'output', 'of it in place', 'scratch', 'total', 'of the card',
       'traced in', 'compiled in'], rows) + ''.join(['\n', *notes] if notes else [])


def _work(reports: Sequence[ProgramReport], machine: Machine) -> str:
  target, rows = machine.target, []
  for report in reports:
    times = report.roofline(machine)
    each = [None, None, None] if times is None else [*times, times.seconds]
    rows.append([report.title, amount(report.flops, 'FLOP'), amount(report.moved_bytes, 'B'),
                 *map(_duration, each), '-' if times is None else times.bound])
  notes = [f'{report.title}: not counted: {report.uncounted}\n' for report in reports
           if report.uncounted]
  rates = f'{amount(target.peak_flops, "FLOP/s")} and {amount(target.info.memory_bandwidth, "B/s")}'
  return f'Work of all cards, and the time it takes at least, at {rates} a card:\n\n' + _table(
      ['program', 'products', 'bytes they move', 'products take', 'bytes take', 'at least',
       'bound by'], rows) + ''.join(['\n', *notes] if notes else [])


def _kernels(reports: Sequence[ProgramReport]) -> str:
  rows = [[report.title, kernel.name, str(kernel.registers), str(kernel.stack_bytes),
           str(kernel.spill_store_bytes), str(kernel.spill_load_bytes)]
          for report in reports for kernel in report.kernels]
  return '' if not rows else 'Kernels of Pallas, by thread:\n\n' + _table(
      ['program', 'kernel', 'registers', 'stack, bytes', 'spill stores, bytes',
       'spill loads, bytes'], rows)


def _collectives(reports: Sequence[ProgramReport]) -> str:
  rows = [[report.title, kind, f'{"" if report.collectives.complete else ">= "}{found.number}',
           amount(found.bytes, 'B')]
          for report in reports for kind, found in report.collectives.kinds.items()]
  return '' if not rows else 'Exchanges between cards, results on each card for a call:\n\n' + (
      _table(['program', 'exchange', 'how many', 'bytes'], rows))
