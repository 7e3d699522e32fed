"""Trains in one process after another, each killed at a random moment, until enough have been.

As a script: python -m tests.reliability.kills PLACE OBJECTIVE KILLS SEED. The last line it prints
is a JSON object of what it found.

A process takes seconds to import JAX, so that each is forked from one that has imported everything
and started nothing: no thread, no backend.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import random
import select
import signal
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint
import tensorboardX

from pf_jax.train import checkpoint, loop, metrics
from tests.reliability import duel
from tests.train import toy

IMPORTED_EARLY = (orbax.checkpoint, tensorboardX)
STEPS, SAVE_EVERY, KEEP = 32, 4, 2  # not a multiple of the duel's turn of three steps
BAD = (10, 11, 25)  # 12 is saved with a count of bad steps in a row
FIRST_SAVES = 3  # kills fall before the end of the third save of a process


def batches(step):
  for index, batch in enumerate(toy.batches(step), start=step):
    if index in BAD:
      batch['x'][0, 0] = np.nan
    yield batch


def fingerprint(state):
  """One hash over all that a state holds."""
  leaves = jax.tree.leaves(dataclasses.replace(state, rng=jax.random.key_data(state.rng)))
  return hashlib.sha256(b''.join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


# --- in the child ---------------------------------------------------------------------------------


def count_file_operations(last):
  """Counts what Python does to files; dies at number `last`."""
  count = itertools.count(1)
  seen = [0]

  def hook(event, unused):
    if event == 'open' or event.startswith(('os.', 'shutil.')):
      seen[0] = next(count)
      if seen[0] == last:
        os.kill(os.getpid(), signal.SIGKILL)

  sys.addaudithook(hook)
  return seen


def train(objective, workdir, tell, last_operation):
  """`fit`, telling what it restores, saves and ends with."""
  operations = count_file_operations(last_operation)

  class Telling(checkpoint.Checkpoints):
    def __init__(self, *arguments, **named):
      super().__init__(*arguments, **named, warn=lambda text: tell('warning', text))

    def restore(self, template):
      found = super().restore(template)
      left = [path.name for path in pathlib.Path(workdir).rglob('*tmp*')]
      tell('resumed', *((int(found[0].step), fingerprint(found[0])) if found else (0, '')), left)
      return found

    def save(self, state, *, meta=None):
      tell('saving', int(state.step), fingerprint(state), operations[0])
      super().save(state, meta=meta)

  loop.Checkpoints = Telling
  config = toy.settings(STEPS, save_every=SAVE_EVERY, log_every=SAVE_EVERY, keep=KEEP, mfu=False)
  result = loop.fit(duel.OBJECTIVES[objective](), batches, config, workdir)
  tell('done', fingerprint(result.state))


# --- in the parent --------------------------------------------------------------------------------


class Kill(NamedTuple):
  """When a process is killed: at a file operation, or `delay` seconds after it tells `event`."""

  operation: int = 0
  event: str = ''
  delay: float = 0.0


class Child(NamedTuple):
  """What a process told, and when."""

  told: list[tuple[float, list[Any]]]
  killed: bool

  def all(self, event):
    return [about for _, (name, *about) in self.told if name == event]

  def since_start(self, event, index=0):
    return [at for at, (name, *_) in self.told if name == event][index]


def run(objective, workdir, log, kill):
  """Forks a process, kills it as planned unless it ends before, and returns what it told."""
  reading, writing = os.pipe()
  pid = os.fork()
  if not pid:
    os.close(reading)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
      train(objective, workdir, lambda *said: os.write(writing, f'{json.dumps(said)}\n'.encode()),
            kill.operation)
    except BaseException:
      sys.excepthook(*sys.exc_info())
      os._exit(1)
    os._exit(0)
  os.close(writing)
  told = listen(reading, pid, kill)
  os.close(reading)
  status = os.waitpid(pid, 0)[1]
  if status and os.WTERMSIG(status) != signal.SIGKILL:
    raise RuntimeError(f'training failed:\n{pathlib.Path(log).read_text()[-3000:]}')
  return Child(told, bool(status))


def listen(reading, pid, kill):
  """What the process tells until its end; kills it when its time has come."""
  began, told, text = time.monotonic(), [], b''
  deadline = began + kill.delay if kill.event == 'fork' else None
  while True:
    wait = None if deadline is None else max(deadline - time.monotonic(), 0)
    if not select.select([reading], [], [], wait)[0]:
      os.kill(pid, signal.SIGKILL)
      deadline = None
      continue
    if not (data := os.read(reading, 1 << 16)):
      return told
    *lines, text = (text + data).split(b'\n')
    for line in lines:
      told.append((time.monotonic() - began, json.loads(line)))
      if told[-1][1][0] == kill.event and deadline is None:
        deadline = time.monotonic() + kill.delay


def whole(folder, manifest):
  """Whether a step's files are those of its manifest."""
  expected = json.loads(manifest.read_text())['files']
  found = checkpoint._files(folder)
  return all(
      name in found and [found[name].stat().st_size, checkpoint.crc32_of(found[name])] == sums
      for name, sums in expected.items())


@dataclasses.dataclass
class Found:
  """What a run directory looks like after a kill."""

  steps: list[int]
  verified: list[int]
  unfinished: bool

  @classmethod
  def look(cls, workdir):
    root = workdir / 'checkpoints'
    steps = sorted(int(path.name) for path in root.glob('[0-9]*') if path.name.isdigit())
    manifests = {step: root / 'manifests' / f'{step:08d}.json' for step in steps}
    return cls(steps, [step for step in steps if manifests[step].exists()
                       and whole(root / f'{step:08d}', manifests[step])],
               any(root.glob('*tmp*')))

  def moment(self, child):
    """Where the kill fell."""
    if not child.all('resumed'):
      return 'starting'
    if self.unfinished:
      return 'writing a step'
    if self.steps and self.steps[-1] not in self.verified:
      return 'between commit and manifest'
    if len(self.steps) > KEEP or set(self.steps) - set(self.verified):
      return 'deleting an old step'
    return 'between saves'


def records(workdir):
  """The run's metrics, without what depends on time."""
  timed = ('time', 'steps_per_second')
  return [{name: value for name, value in record.items() if name not in timed}
          for record in metrics.read_metrics(workdir / metrics.METRICS_FILE)]


class Trial:
  """Kills, and what they did."""

  def __init__(self, place, objective, seed):
    self._place, self._objective, self._draw = place, objective, random.Random(seed)
    self.moments = collections.Counter()
    self.runs = self.kills = self.lost = self.torn = self.left_over = self.different = 0
    self.unverified = 0
    straight = self._run(place / 'straight', Kill())
    self._states = {step: print_ for step, print_, _ in straight.all('saving')}
    self._end, self._records = straight.all('done')[0][0], records(place / 'straight')
    self._starting = straight.since_start('saving')
    self._saving = straight.since_start('saving', FIRST_SAVES) - self._starting
    self._operations = straight.all('saving')[FIRST_SAVES][2]

  def _run(self, workdir, kill):
    return run(self._objective, workdir, self._place / 'log', kill)

  def _next_kill(self):
    kind = self._draw.randrange(4)
    if kind == 0:
      return Kill(event='fork', delay=self._draw.uniform(0, self._starting))
    if kind == 1:
      return Kill(event='saving', delay=self._draw.uniform(0, self._saving))
    return Kill(operation=self._draw.randint(1, self._operations))

  def train(self, kills):
    """A run from its beginning to its end, with up to so many kills."""
    workdir = self._place / f'run_{self.runs}'
    self.runs += 1
    before, start = Found([], [], False), self.kills
    while True:
      child = self._run(workdir, self._next_kill() if self.kills - start < kills else Kill())
      self._check_start(child, before)
      if not child.killed:
        break
      self.kills += 1
      after = Found.look(workdir)
      self.moments[after.moment(child)] += 1
      self._check_disk(before, after)
      before = after
    self.different += (child.all('done') != [[self._end]]) + (records(workdir) != self._records)

  def _check_start(self, child, before):
    """Restores the newest step, every bit of it; what a killed save left is gone."""
    for step, print_, left in child.all('resumed'):
      self.lost += step != (before.steps[-1] if before.steps else 0)
      self.torn += step > 0 and print_ != self._states[step]
      self.left_over += len(left)
    self.different += any(self._states[step] != print_ for step, print_, _ in child.all('saving'))
    for warning, in child.all('warning'):
      self.torn += 'no manifest' not in warning
      self.unverified += 'no manifest' in warning

  def _check_disk(self, before, after):
    """The steps that are to be kept are whole; the newest may lack its manifest."""
    self.lost += bool(before.steps) and (not after.steps or after.steps[-1] < before.steps[-1])
    self.lost += len(set(after.steps[-KEEP:-1]) - set(after.verified))
    self.lost += len(after.steps) < min(KEEP, len(before.steps))


def main():
  place, objective, kills, seed = sys.argv[1:]
  assert len(os.listdir('/proc/self/task')) == 1, 'a process with threads cannot be forked'
  trial = Trial(pathlib.Path(place), objective, int(seed))
  while trial.kills < int(kills):
    trial.train(int(kills) - trial.kills)
  names = ('kills', 'runs', 'lost', 'torn', 'left_over', 'different', 'unverified', 'moments')
  print(json.dumps({name: getattr(trial, name) for name in names}))


if __name__ == '__main__':
  main()
