"""Collectives of an optimised program, read from its text.

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
