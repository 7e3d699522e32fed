"""Training that is killed again and again ends as if it had never been."""

import json
import os
import subprocess
import sys
import tempfile

import pytest

MEMORY = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None  # a kill is no loss of power


def slow(*values):
  return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


@pytest.mark.parametrize(('objective', 'kills'), [('duel', 3), slow('duel', 10), slow('toy', 50)])
def test_kills_lose_nothing(objective, kills):
  with tempfile.TemporaryDirectory(dir=MEMORY) as place:
    done = subprocess.run(
        [sys.executable, '-m', 'tests.reliability.kills', place, objective, str(kills), '0'],
        capture_output=True, text=True, check=False,
        env=os.environ | {'OPENBLAS_NUM_THREADS': '1'})  # its threads would make forking unsafe
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  print(f'\n{objective}: {found}')
  assert found['kills'] == kills
  for name in ('lost', 'torn', 'left_over', 'different'):
    assert found[name] == 0, found
