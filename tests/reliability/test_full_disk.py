"""A disk that is really full: a file system of a few megabytes, of this test's own.

The kernel gives one to anybody in a namespace of users, unless it is told not to. The form that
runs everywhere, with a limit on the size of files, is in tests/train/test_checkpoint.py.
"""

import json
import re
import subprocess
import sys

import pytest

from tests.reliability import full_disk


def own_file_system(place):
  """The beginning of a command that runs on a small file system at `place`."""
  mount = f'mount -t tmpfs -o size={full_disk.SIZE} none {place} && exec "$@"'
  for who in (['--user', '--map-root-user'], []):
    command = ['unshare', *who, '--mount', 'sh', '-c', mount, 'sh']
    try:
      if subprocess.run([*command, 'true'], capture_output=True, check=False).returncode == 0:
        return command
    except FileNotFoundError:
      break
  pytest.skip('no file system of its own: the kernel refuses `unshare --mount`')


@pytest.mark.parametrize('offsets', [2, pytest.param(12, marks=[pytest.mark.slow,
                                                               pytest.mark.timeout(900)])])
def test_full_disk_is_said_and_survived(offsets, tmp_path):
  place = tmp_path / 'small'
  place.mkdir()
  done = subprocess.run(
      [*own_file_system(place), sys.executable, '-m', 'tests.reliability.full_disk', place,
       str(offsets)], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  *saves, run = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
  assert len(saves) == offsets
  for save in saves:
    print(f'\n{save["free"] / 1e6:.2f} MB free: {save["message"]}', end='')
    assert re.search(r'No space left.*Step 1 is intact; free some space', save['message'])
    assert save['intact']
    assert not save['left_over']
    assert save['saved_afterwards']
  print(f'\nrun: {run["message"]}')
  assert re.search(r'No space left.*Step 4 is intact; free some space', run['message'])
  assert run['resumed'] == 4
  assert run['equal']
