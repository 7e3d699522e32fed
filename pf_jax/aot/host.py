"""Where a compiled program waits for its host, read from its text.

A card runs a program's kernels one after another without asking. It has to wait where the host must
know a number first: in a loop of unknown length before every turn, at a branch, in a callback, and
where data is handed over. Each costs a round trip, and no CUDA graph reaches over it.
"""

import re

_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(')
_TURNS = '"known_trip_count"'
_HANDED_OVER = ('infeed', 'outfeed', 'send', 'recv', 'conditional')
_CALLBACK = re.compile(r'custom_call_target="[^"]*callback')


def round_trips(text: str) -> list[str]:
  """Instructions of `compiled.as_text()` that wait for the host, by name, in order."""
  return [match[1] for line in text.splitlines()
          if (match := _INSTRUCTION.match(line)) and _waits(match[2], line)]


def _waits(kind: str, line: str) -> bool:
  if kind == 'while':
    return _TURNS not in line
  if kind == 'custom-call':
    return _CALLBACK.search(line) is not None
  return kind in _HANDED_OVER
