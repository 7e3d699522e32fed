"""Fills a small file system at several moments of a save, and of a run.

As a script: python -m tests.reliability.full_disk PLACE OFFSETS, where PLACE is a file system of
`SIZE` bytes. Prints a JSON object for each attempt.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
import time

import jax
import numpy as np
import optax

from pf_jax.train import checkpoint, loop, state
from tests.reliability.kills import fingerprint
from tests.train import toy

SIZE = 12 << 20
PAGE = 4096
_usage = shutil.disk_usage


def big_state(step):
  """2 MB of noise, which does not compress, and its average."""
  params = {'w': jax.random.normal(jax.random.key(step), (512, 512))}
  made = state.init_state(params, optax.sgd(1e-3), seed=3, ema=True)
  return dataclasses.replace(made, step=jax.numpy.int32(step))


def fill(place, free):
  """Leaves so many bytes, in whole pages."""
  with open(place / 'ballast', 'wb', buffering=0) as ballast:
    size = max(_usage(place).free - free, 0) // PAGE * PAGE
    while size > 0:
      size -= ballast.write(b'x' * min(size, 1 << 20))


def await_file(path, seconds=30):
  """What a background thread is about to write."""
  end = time.monotonic() + seconds
  while not path.exists():
    if time.monotonic() > end:
      raise TimeoutError(f'{path} did not appear; there are {sorted(path.parent.parent.iterdir())}')
    time.sleep(0.01)


def save(workdir, step):
  """What a save has to complain about; '' if nothing."""
  try:
    with checkpoint.Checkpoints(workdir, warn=print) as checkpoints:
      checkpoints.save(big_state(step))
  except checkpoint.CheckpointNotSaved as error:
    return str(error)
  return ''


def restored(workdir):
  with checkpoint.Checkpoints(workdir, warn=print) as checkpoints:
    return checkpoints.restore(big_state(0))[0]


def try_save(place, workdir, free):
  """A save for which there is not enough room, found out only while it is being written."""
  fill(place, free)
  shutil.disk_usage = lambda path: _usage(path)._replace(free=SIZE)
  message = save(workdir, 2)
  shutil.disk_usage = _usage
  found = {'free': free, 'message': message,
           'intact': fingerprint(restored(workdir)) == fingerprint(big_state(1)),
           'left_over': [path.name for path in workdir.rglob('*tmp*')]}
  (place / 'ballast').unlink()
  afterwards = not save(workdir, 2) and fingerprint(restored(workdir)) == fingerprint(big_state(2))
  shutil.rmtree(workdir / 'checkpoints' / '00000002')
  return {**found, 'saved_afterwards': afterwards}


def try_run(place):
  """Training, on a disk that is full from step 5 on; then there is room again."""
  fit = lambda name, batches: loop.fit(
      toy.Toy(), batches, toy.settings(12, save_every=4, mfu=False), place / name, say=print)
  straight = fit('straight', toy.batches)

  def filling(step):
    for index, batch in enumerate(toy.batches(step), start=step):
      if index == 5:
        await_file(place / 'run' / 'checkpoints' / 'manifests' / '00000004.json')
        fill(place, 0)
      yield batch

  message, resumed = '', []
  try:
    fit('run', filling)
  except checkpoint.CheckpointNotSaved as error:
    message = str(error)
  (place / 'ballast').unlink()

  def noticing(step):
    resumed.append(step)
    return toy.batches(step)

  again = fit('run', noticing)
  return {'message': message, 'resumed': resumed[0],
          'equal': fingerprint(again.state) == fingerprint(straight.state)}


def main():
  place, offsets = pathlib.Path(sys.argv[1]), int(sys.argv[2])
  workdir = place / 'saves'
  save(workdir, 1)
  needed = sum(path.stat().st_blocks * 512 for path in workdir.rglob('*'))
  for free in np.linspace(0, 0.95 * needed, offsets):
    print(json.dumps(try_save(place, workdir, int(free))), flush=True)
  shutil.rmtree(workdir)
  print(json.dumps(try_run(place)), flush=True)


if __name__ == '__main__':
  main()
