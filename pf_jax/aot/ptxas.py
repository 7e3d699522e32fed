"""Registers and spills of Pallas kernels (Mosaic GPU), from what the assembler prints.

With MOSAIC_GPU_DUMP_PTXAS=1 in the environment before JAX is imported, ptxas reports on each kernel
while its program is compiled: from C++, to the standard output of the process. A kernel that an
earlier program had is not compiled again, and not printed; programs name theirs by a hash.
"""

import contextlib
import ctypes
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterator

VARIABLE = 'MOSAIC_GPU_DUMP_PTXAS'
_STDOUT = 1

_ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(.+)' for '.+'")
_SPILLS = re.compile(r'(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads')
_REGISTERS = re.compile(r'ptxas info\s*: Used (\d+) registers')
_CALL = re.compile(r'custom_call_target="mosaic_gpu.*kernel_hash = "([^"]*)"')
_REPORT = re.compile(r'ptxas info\s*:|\s*\d+ bytes stack frame|\s*$')


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What the assembler says of a kernel. Bytes are those of each thread.

  Attributes:
    name: of its entry.
    registers: of each thread; a kernel may share them out anew between its warpgroups.
    stack_bytes: local memory.
    spill_store_bytes: of code that puts registers aside.
    spill_load_bytes: of code that reads them back.
  """

  name: str
  registers: int
  stack_bytes: int
  spill_store_bytes: int
  spill_load_bytes: int


def parse(text: str) -> tuple[Kernel, ...]:
  """Kernels in the order in which they were compiled; other lines are ignored."""
  found: list[Kernel] = []
  name, spills = None, (0, 0, 0)
  for line in text.splitlines():
    if entry := _ENTRY.search(line):
      name, spills = entry[1], (0, 0, 0)
    elif numbers := _SPILLS.search(line):
      spills = int(numbers[1]), int(numbers[2]), int(numbers[3])
    elif name is not None and (used := _REGISTERS.search(line)):
      found.append(Kernel(name, int(used[1]), *spills))
      name = None
  return tuple(found)


class Kernels:
  """Tells which kernels a program holds, of those that were compiled in this process."""

  def __init__(self):
    self._known: dict[str, list[Kernel]] = {}

  def of(self, program: str, printed: str) -> tuple[Kernel, ...]:
    """Kernels of a program, each once.

    Kernels of one name that one program brought cannot be told apart: a later program that holds
    one of them is said to hold all.

    Args:
      program: its optimised text.
      printed: what was printed while it was compiled.
    """
    new = parse(printed)
    held: dict[Kernel, None] = {}
    for line in program.splitlines():
      if call := _CALL.search(line):
        if call[1] not in self._known:
          self._known[call[1]] = [kernel for kernel in new if kernel.name in line] or list(new)
        held.update(dict.fromkeys(self._known[call[1]]))
    return tuple(held)


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
  """Collects what C++ code writes to standard output meanwhile.

  Standard error is left alone: it is where a process that dies says why.

  Yields:
    A list that holds the lines once the body has ended. Those that are not ptxas' are printed.
  """
  lines: list[str] = []
  with tempfile.TemporaryFile() as file:
    _flush()
    saved = os.dup(_STDOUT)
    os.dup2(file.fileno(), _STDOUT)
    try:
      yield lines
    finally:
      _flush()
      os.dup2(saved, _STDOUT)
      os.close(saved)
      file.seek(0)
      lines += file.read().decode(errors='replace').splitlines()
      for line in lines:
        if not _REPORT.match(line):
          print(line)


def _flush() -> None:
  """Python's buffer and C's."""
  sys.stdout.flush()
  ctypes.CDLL(None).fflush(None)
