"""Reads the text of an optimised program, and counts the collectives in it.

Bytes are those of the results on each card, for one call of the program: a loop counts its body as
often as it runs. XLA writes a collective in one of three ways: as itself; as a pair NAME-start and
NAME-done, of which the start counts; or as async-start of a computation that holds it.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')
# Starts whose result is (operands, results, ...); that of an all-reduce is the results alone.
_PAIRED = ('all-gather', 'collective-permute', 'reduce-scatter', 'all-to-all')

_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = ')
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\]')
_CALLED = re.compile(
    r'(body|calls|to_apply|branch_computations|true_computation|false_computation)='
    r'(\{[^}]*\}|%?[\w.\-]+)')
_NAME = re.compile(r'%([\w.\-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Instruction(NamedTuple):
  """NAME = SHAPE OPERATION(OPERANDS), ATTRIBUTES; a parameter's operand is its number."""

  name: str
  shape: str
  operation: str
  operands: list[str]
  attributes: str

  @property
  def called(self) -> list[tuple[str, str]]:
    """(attribute, computation) of all that it names, such as ('body', 'layer')."""
    return [(attribute, name.strip(' {}%')) for attribute, names in _CALLED.findall(self.attributes)
            for name in names.split(',')]


class Module(NamedTuple):
  """A program.

  Attributes:
    computations: instructions of each, in order; what the last of them gives is its result.
    entry: name of the computation that is run.
  """

  computations: dict[str, list[Instruction]]
  entry: str


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


def read(text: str) -> Module:
  """Reads `compiled.as_text()`.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, list[Instruction]] = {}
  current: list[Instruction] = []
  entry = None
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = computations[head[2]] = []
      entry = head[2] if head[1] else entry
    elif found := _INSTRUCTION.match(line):
      current.append(_instruction(found[1], line[found.end():]))
  if entry is None:
    raise ValueError('no ENTRY computation found; wanted the text of an optimised HLO module.')
  return Module(computations, entry)


def _instruction(name: str, line: str) -> Instruction:
  """Of what follows the ' = '."""
  end = _shape_end(line)
  operation, _, rest = line[end:].lstrip().partition('(')
  closing = _closing(rest)
  operands = [rest[:closing]] if operation == 'parameter' else _NAME.findall(rest[:closing])
  return Instruction(name, line[:end], operation, operands, rest[closing:])


def collectives(text: str) -> Collectives:
  """Counts the collectives of `compiled.as_text()`.

  Args:
    text: an optimised module. Of conditions all branches count.

  Raises:
    ValueError: the text has no entry computation.
  """
  module = read(text)
  kinds: dict[str, Collective] = {}
  complete = True
  for kind, size, turns, known in _walk(module, module.entry):
    before = kinds.get(kind, Collective(0, 0))
    kinds[kind] = Collective(before.number + turns, before.bytes + turns * size)
    complete = complete and known
  return Collectives(kinds, complete)


def _walk(module: Module, name: str, turns: int = 1, known: bool = True
          ) -> Iterator[tuple[str, int, int, bool]]:
  """(kind, bytes, how often it runs, whether that is known) of all collectives under `name`."""
  for each in module.computations.get(name, ()):
    kind = each.operation.removesuffix('-start')
    if kind in KINDS:
      paired = kind != each.operation and kind in _PAIRED and each.shape.startswith('(')
      yield kind, shape_bytes(_elements(each.shape)[1] if paired else each.shape), turns, known
    trips = _TRIPS.search(each.attributes)
    for attribute, other in each.called:
      counted = attribute != 'body' or trips is not None
      times = int(trips[1]) if attribute == 'body' and trips else 1
      yield from _walk(module, other, turns * times, known and counted)


def _shape_end(line: str) -> int:
  """Where the shape at the beginning ends; tuples hold blanks, layouts hold parentheses."""
  depth = 0
  for position, character in enumerate(line):
    depth += (character in '({') - (character in ')}')
    if character == ' ' and not depth:
      return position
  return len(line)


def _closing(rest: str) -> int:
  """Where the bracket that is open at the beginning is closed."""
  depth = 1
  for position, character in enumerate(rest):
    depth += (character == '(') - (character == ')')
    if not depth:
      return position
  return len(rest)


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
  return sum(_bits(name) * number // 8 for name, number in _arrays(shape))


def shape_numbers(shape: str) -> int:
  """How many numbers an array has, or all arrays of a tuple."""
  return sum(number for _, number in _arrays(shape))


def _arrays(shape: str) -> list[tuple[str, int]]:
  """(dtype, numbers) of each."""
  return [(name, math.prod(int(size) for size in sizes.split(',') if size))
          for name, sizes in _ARRAY.findall(shape)]


def _bits(name: str) -> int:
  """Of a number: f32, bf16, s8, u4, f8e4m3fn, c64; a pred is a byte."""
  digits = re.match(r'[a-z]+(\d+)', name)
  return int(digits[1]) if digits else 8 if name == 'pred' else 0
