"""Collectives of an optimised program and the memory traffic of its kernels, read from its text.

Bytes are those of the results on each card, for one call of the program: a loop counts its body as
often as it runs. XLA writes a collective in one of three ways: as itself; as a pair NAME-start and
NAME-done, of which the start counts; or as async-start of a computation that holds it.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')
# Starts whose result is (operands, results, ...); that of an all-reduce is the results alone.
_PAIRED = ('all-gather', 'collective-permute', 'reduce-scatter', 'all-to-all')

_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?[\w.\-]+ = ')
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\]')
_CALLED = re.compile(
    r'(body|calls|to_apply|branch_computations|true_computation|false_computation)='
    r'(\{[^}]*\}|%?[\w.\-]+)')
_NAME = re.compile(r'%([\w.\-]+)')
_FUSED = re.compile(r'calls=%?([\w.\-]+)')
_NO_KERNEL = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast'}
# Results of the same size as an operand, but not number by number.
_MIXING = {'scatter', 'gather', 'reduce-window', 'sort', 'dot', 'concatenate',
           'dynamic-update-slice'}
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
  """All collectives of a kind.

  Attributes:
    number: how many run.
    bytes: of their results on each card.
  """

  number: int
  bytes: int


class Collectives(NamedTuple):
  """Collectives of a program.

  Attributes:
    kinds: by kind; those that do not occur are left out.
    complete: False if some are in loops of unknown length, which count as one turn.
  """

  kinds: dict[str, Collective]
  complete: bool


class _Computation(NamedTuple):
  """One function of the text: its collectives, and (name, turns or None) of what it calls."""

  own: list[tuple[str, int]]
  called: list[tuple[str, int | None]]


def collectives(text: str) -> Collectives:
  """Counts the collectives of `compiled.as_text()`.

  Args:
    text: an optimised module. Of conditions all branches count.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry = _read(text)
  if entry is None:
    raise ValueError('no ENTRY computation found; wanted the text of an optimised HLO module.')
  kinds: dict[str, Collective] = {}
  complete = True
  for kind, size, turns, known in _walk(computations, entry):
    before = kinds.get(kind, Collective(0, 0))
    kinds[kind] = Collective(before.number + turns, before.bytes + turns * size)
    complete = complete and known
  return Collectives(kinds, complete)


def traffic(text: str) -> int:
  """Bytes that the kernels of `compiled.as_text()` move, if each of them reads all it is given.

  A kernel is an instruction of the entry computation: its operands and its result count, each once,
  and of an operand that a fusion slices, the slices. Loops and conditions count as one kernel: a
  program that spends its time there is not to be judged by this.

  Args:
    text: an optimised module.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry = _instructions(text)
  if entry is None:
    raise ValueError('no ENTRY computation found; wanted the text of an optimised HLO module.')
  moved, shapes = 0, {}
  for each in computations[entry]:
    shapes[each.name] = each.shape
    if each.operation in _NO_KERNEL:
      continue
    read = [shape_bytes(shapes[operand]) for operand in each.operands]
    if each.operation == 'fusion' and (fused := _FUSED.search(each.rest)):
      by_number = _read_by(computations[fused[1]])
      read = [by_number.get(number, size) for number, size in enumerate(read)]
    moved += shape_bytes(each.shape) + sum(read)
  return moved


class _Instruction(NamedTuple):
  """NAME = SHAPE OPERATION(OPERANDS)REST; a parameter's operand is its number."""

  name: str
  shape: str
  operation: str
  operands: list[str]
  rest: str


def _instructions(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
  """Instructions of every computation, and the entry's name."""
  computations: dict[str, list[_Instruction]] = {}
  current, entry = '', None
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = head[2]
      computations[current] = []
      entry = current if head[1] else entry
    elif (found := _INSTRUCTION.match(line)) and current:
      name = found[0].removesuffix(' = ').split()[-1].lstrip('%')
      line = line[found.end():]
      end = shape_end(line)
      operation, _, rest = line[end:].lstrip().partition('(')
      arguments, _, rest = rest.partition(')')
      operands = [arguments] if operation == 'parameter' else _NAME.findall(arguments)
      computations[current].append(_Instruction(name, line[:end], operation, operands, rest))
  return computations, entry


def _read_by(fused: list[_Instruction]) -> dict[int, int]:
  """Bytes that a fusion reads of each of its parameters.

  Numbers are asked for from the result backwards: a slice asks for its own only, what works number
  by number passes that on, and all else asks for everything.
  """
  sizes = {each.name: _count(each.shape) for each in fused}
  asked = {fused[-1].name: sizes[fused[-1].name]}
  for each in reversed(fused):
    own = asked.get(each.name, 0)
    for operand in each.operands if each.operation != 'parameter' else ():
      sliced = each.operation in ('slice', 'dynamic-slice') and operand == each.operands[0]
      alike = sizes.get(operand) == sizes[each.name] and each.operation not in _MIXING
      more = own if sliced or alike else sizes.get(operand, 0)
      asked[operand] = min(asked.get(operand, 0) + more, sizes.get(operand, 0))
  return {int(each.operands[0]): shape_bytes(each.shape) * asked.get(each.name, 0)
                                 // sizes[each.name]
          for each in fused if each.operation == 'parameter' and sizes[each.name]}


def _count(shape: str) -> int:
  """Numbers of an array, or of all arrays of a tuple."""
  return sum(math.prod(int(size) for size in sizes.split(',') if size)
             for _, sizes in _ARRAY.findall(shape))


def _walk(computations: Mapping[str, _Computation], name: str, turns: int = 1, known: bool = True
          ) -> Iterator[tuple[str, int, int, bool]]:
  """(kind, bytes, how often it runs, whether that is known) of all collectives under `name`."""
  for kind, size in computations[name].own:
    yield kind, size, turns, known
  for other, trips in computations[name].called:
    if other in computations:
      yield from _walk(computations, other, turns * (1 if trips is None else trips),
                       known and trips is not None)


def _read(text: str) -> tuple[dict[str, _Computation], str | None]:
  computations: dict[str, _Computation] = {}
  current, entry = _Computation([], []), None
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = computations[head[2]] = _Computation([], [])
      entry = head[2] if head[1] else entry
    elif found := _INSTRUCTION.match(line):
      _instruction(line[found.end():], current)
  return computations, entry


def _instruction(line: str, computation: _Computation) -> None:
  """Notes what follows the ' = ' of an instruction: SHAPE OPERATION(OPERANDS), ATTRIBUTES."""
  end = shape_end(line)
  shape, (operation, _, rest) = line[:end], line[end:].lstrip().partition('(')
  kind = operation.removesuffix('-start')
  if kind in KINDS:
    paired = kind != operation and kind in _PAIRED and shape.startswith('(')
    computation.own.append((kind, shape_bytes(_elements(shape)[1] if paired else shape)))
  known = _TRIPS.search(rest)
  for attribute, names in _CALLED.findall(rest):
    trips = 1 if attribute != 'body' else int(known[1]) if known else None
    computation.called.extend((name.strip(' {}%'), trips) for name in names.split(','))


def shape_end(line: str) -> int:
  """Where the shape at the beginning ends; tuples hold blanks, layouts hold parentheses."""
  depth = 0
  for position, character in enumerate(line):
    depth += (character in '({') - (character in ')}')
    if character == ' ' and not depth:
      return position
  return len(line)


def _elements(shape: str) -> list[str]:
  """Those of a tuple."""
  parts, depth, start = [], 0, 1
  for position, character in enumerate(shape):
    depth += (character in '({[') - (character in ')}]')
    if (character == ',' and depth == 1) or not depth:
      parts.append(shape[start:position].strip())
      start = position + 1
  return parts


def shape_bytes(shape: str) -> int:
  """Of an array, or of all arrays of a tuple."""
  return sum(_bits(name) * math.prod(int(size) for size in sizes.split(',') if size) // 8
             for name, sizes in _ARRAY.findall(shape))


def _bits(name: str) -> int:
  """Of a number: f32, bf16, s8, u4, f8e4m3fn, c64; a pred is a byte."""
  digits = re.match(r'[a-z]+(\d+)', name)
  return int(digits[1]) if digits else 8 if name == 'pred' else 0
