"""Bytes that each kernel of an optimised program reads and writes, counted from its text.

A kernel reads each of its operands once and writes each result once: what caches save or lose in
between is not known. Of an operand that a fusion slices or gathers from first, what is left counts;
kernels of other libraries, and our own, count whole operands.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from pf_jax.aot.hlo import shape_bytes, shape_end

_FREE = ('parameter', 'constant', 'bitcast', 'get-tuple-element', 'tuple')
_CONTROL = ('while', 'conditional', 'call')
_NARROWING = ('slice', 'dynamic-slice', 'gather')

_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = ')
_OPERAND = re.compile(r'%([\w.\-]+)')
_FUSED = re.compile(r'calls=%?([\w.\-]+)')


class Kernel(NamedTuple):
  """What one kernel of a program moves.

  Attributes:
    name: its instruction's.
    operation: 'fusion', 'custom-call', 'copy', ...
    read: bytes.
    written: bytes.
  """

  name: str
  operation: str
  read: int
  written: int

  @property
  def moved(self) -> int:
    """Bytes of both."""
    return self.read + self.written


class _Instruction(NamedTuple):
  shape: str
  operation: str
  operands: list[str]
  rest: str


def kernels(text: str) -> list[Kernel]:
  """Kernels of `compiled.as_text()` in the order in which they run.

  Args:
    text: an optimised module without loops, branches or calls.

  Raises:
    ValueError: no entry computation, or one with loops, branches or calls.
  """
  computations, entry = _read(text)
  if entry is None:
    raise ValueError('no ENTRY computation found; wanted the text of an optimised HLO module.')
  found = []
  for name, (shape, operation, operands, rest) in computations[entry].items():
    if operation in _CONTROL:
      raise ValueError(f'the program has a {operation}; wanted one without control flow.')
    if operation in _FREE:
      continue
    sizes = [shape_bytes(computations[entry][operand].shape) for operand in operands]
    if fused := _FUSED.search(rest):
      sizes = [min(size, used) for size, used in zip(
          sizes, _used(computations[fused[1]]), strict=True)]
    found.append(Kernel(name, operation, sum(sizes), shape_bytes(shape)))
  return found


def _used(fusion: Mapping[str, _Instruction]) -> list[int]:
  """Bytes of each parameter that a fusion reads."""
  users: dict[str, list[str]] = {}
  for name, instruction in fusion.items():
    for operand in instruction.operands:
      users.setdefault(operand, []).append(name)

  def used(name: str) -> int:
    whole, left = shape_bytes(fusion[name].shape), 0
    for user in users.get(name, []):
      shape, operation, operands, _ = fusion[user]
      if operation == 'bitcast':
        left += used(user)
      elif operation in _NARROWING and operands.index(name) == 0:
        left += min(used(user), shape_bytes(shape))
      else:
        return whole
    return min(whole, left) if name in users else whole

  parameters = {int(instruction.rest.partition(')')[0]): name
                for name, instruction in fusion.items() if instruction.operation == 'parameter'}
  return [used(parameters[number]) for number in sorted(parameters)]


def _read(text: str) -> tuple[dict[str, dict[str, _Instruction]], str | None]:
  computations: dict[str, dict[str, _Instruction]] = {}
  current, entry = {}, None
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif found := _INSTRUCTION.match(line):
      line = line[found.end():]
      end = shape_end(line)
      operation, _, rest = line[end:].lstrip().partition('(')
      operands = _OPERAND.findall(rest[:_closing(rest)])
      current[found[1]] = _Instruction(line[:end], operation, operands, rest)
  return computations, entry


def _closing(rest: str) -> int:
  """Where the bracket that is open at the beginning is closed."""
  depth = 1
  for position, character in enumerate(rest):
    depth += (character == '(') - (character == ')')
    if not depth:
      return position
  return len(rest)
