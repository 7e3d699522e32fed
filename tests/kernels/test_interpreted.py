"""Our kernels in Pallas' interpreter, with race detection; and planted bugs, which it finds."""

import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import pytest

from tests.kernels import interpreted, interpreted_conv3d, interpreted_rope

VERSION = tuple(map(int, re.findall(r'\d+', jax.__version__)[:2]))
needs_interpreter = pytest.mark.skipif(VERSION < (0, 11), reason='Pallas interprets since jax 0.11')


class Script(NamedTuple):
  """One that interprets a kernel.

  Attributes:
    module: it.
    compared: counts the results that it compares.
    seconds: after which a planted bug waits for ever.
  """

  module: ModuleType
  compared: Callable[[], int]
  seconds: float


SCRIPTS = {
    'attention': Script(interpreted, lambda: sum(number * len(list(cases())) for number, cases in (
        (1, interpreted.cases), (1, interpreted.float8_cases), (2, interpreted.halves))), 120),
    'conv3d': Script(interpreted_conv3d, lambda: len(interpreted_conv3d.cases()), 300),
    'rope': Script(interpreted_rope, lambda: len(interpreted_rope.CASES), 60)}
BUGS = [(name, bug) for name, script in SCRIPTS.items() for bug in script.module.MUTATIONS]


def interpret(script: Script, mutation: str, seconds: float) -> tuple[int | None, str]:
  """Exit status of a run, None if it waits for ever, and what it said."""
  command = [sys.executable, '-m', script.module.__name__, mutation]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False,
                          cwd=pathlib.Path(__file__).parents[2])
  except subprocess.TimeoutExpired:
    return None, ''
  return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(('name', 'bug'), BUGS)
def test_planted_bugs_fit_the_source(name, bug):
  module = SCRIPTS[name].module
  source = pathlib.Path(module.pallas_gpu.__file__).read_text(encoding='utf-8')
  assert source.count(module.MUTATIONS[bug][0]) == 1


@needs_interpreter
@pytest.mark.timeout(600)
@pytest.mark.parametrize('name', SCRIPTS)
def test_equals_what_is_exact_without_races(name):
  status, said = interpret(SCRIPTS[name], '', 500)
  assert status == 0, said
  assert said.count('at most') == SCRIPTS[name].compared()


@needs_interpreter
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(('name', 'bug'), BUGS)
def test_planted_bugs_are_found(name, bug):
  script = SCRIPTS[name]
  symptom = script.module.MUTATIONS[bug][2]
  status, said = interpret(script, bug, script.seconds)
  if symptom is None:
    assert status is None, said
  else:
    assert status, said
    assert re.search(symptom, said), said
