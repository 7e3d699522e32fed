"""Bytes that each kernel of an optimised program reads and writes, counted from its text.

A kernel reads each of its operands once and writes each result once: what caches save or lose in
between is not known. Of an operand that a fusion slices or gathers from, first or after work number
by number, what is left counts; kernels of other libraries, and our own, count whole operands.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pf_jax.aot import hlo
from pf_jax.aot.hlo import Instruction, shape_bytes, shape_numbers

_FREE = ('parameter', 'constant', 'bitcast', 'get-tuple-element', 'tuple')
_CONTROL = ('while', 'conditional', 'call')
_NARROWING = ('slice', 'dynamic-slice', 'gather')
# Results of the same size as an operand, but not number by number.
_MIXING = ('scatter', 'reduce-window', 'sort', 'dot', 'convolution', 'concatenate',
           'dynamic-update-slice')


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


def kernels(text: str) -> list[Kernel]:
  """Kernels of `compiled.as_text()` in the order in which they run.

  Args:
    text: an optimised module without loops, branches or calls.

  Raises:
    ValueError: no entry computation, or one with loops, branches or calls.
  """
  module, found = hlo.read(text), []
  shapes: dict[str, str] = {}
  for each in module.computations[module.entry]:
    shapes[each.name] = each.shape
    if each.operation in _CONTROL:
      raise ValueError(f'the program has a {each.operation}; wanted one without control flow.')
    if each.operation in _FREE:
      continue
    if each.operation == 'fusion':
      read = _read_by(module.computations[dict(each.called)['calls']])
    else:
      read = sum(shape_bytes(shapes[operand]) for operand in each.operands)
    found.append(Kernel(each.name, each.operation, read, shape_bytes(each.shape)))
  return found


def moved(text: str) -> int:
  """Bytes that all kernels of a program move; see `kernels`."""
  return sum(kernel.moved for kernel in kernels(text))


def _read_by(fusion: Sequence[Instruction]) -> int:
  """Bytes that a fusion reads of its parameters.

  Numbers are asked for from the result backwards: what narrows asks for its own only, what works
  number by number passes that on, and all else asks for everything.
  """
  sizes = {each.name: shape_numbers(each.shape) for each in fusion}
  asked = dict.fromkeys(sizes, 0) | {fusion[-1].name: sizes[fusion[-1].name]}
  read = 0
  for each in reversed(fusion):
    if each.operation == 'parameter':
      read += shape_bytes(each.shape) * asked[each.name] // max(sizes[each.name], 1)
      continue
    for operand in set(each.operands):
      narrowed = each.operation in _NARROWING and operand == each.operands[0]
      alike = sizes[operand] == sizes[each.name] and each.operation not in _MIXING + _NARROWING
      more = asked[each.name] if narrowed or alike else sizes[operand] if asked[each.name] else 0
      asked[operand] = min(asked[operand] + more, sizes[operand])
  return read
