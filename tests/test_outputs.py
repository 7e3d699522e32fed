"""Names, locks and atomic writes (bad prompts, two runs, kills)."""

import fcntl
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from pf_jax import outputs

HOSTILE = ['', ' ', 'a' * 10_000, '🎬🎬', 'שלום', 'a\0b', 'a\nb', '../../x', '/etc/passwd', 'CON',
           '-rf', '.', '..', '~', '$HOME', 'a/b\\c', '%00', '\ufeffBOM', '\udcff', 'é' * 100]


@pytest.mark.parametrize('prompt', HOSTILE)
def test_name_is_one_short_ascii_component(prompt, tmp_path):
  name = outputs.output_name(3, prompt, '.mp4')
  assert re.fullmatch(r'003(-[a-z0-9][a-z0-9-]*)?-[0-9a-f]{8}\.mp4', name)
  assert len(outputs.slug(prompt)) <= 64
  assert len(name) <= 3 + 1 + 64 + 1 + 8 + 4
  path = outputs.output_path(tmp_path, name)
  assert path.parent == tmp_path
  path.write_text('x')  # the operating system agrees


@hypothesis.given(st.text(max_size=300))
@hypothesis.settings(max_examples=200, deadline=None)
def test_any_text_gives_a_safe_name(prompt):
  assert re.fullmatch(r'000(-[a-z0-9][a-z0-9-]{0,63})?-[0-9a-f]{8}', outputs.output_name(0, prompt))


def test_name_reads_well_and_tells_prompts_apart():
  assert outputs.output_name(0, 'A white Seven!', '.mp4').startswith('000-a-white-seven-')
  assert outputs.output_name(0, 'naïve café') == outputs.output_name(0, 'naïve café')
  assert outputs.output_name(0, 'a b') != outputs.output_name(0, 'a  b')
  assert len({outputs.output_name(i, 'same') for i in range(3)}) == 3


@pytest.mark.parametrize(('index', 'suffix'), [(-1, ''), (0, '/x'), (0, 'mp4'), (0, '.')])
def test_bad_name_requests(index, suffix):
  with pytest.raises(ValueError, match=r'index|suffix'):
    outputs.output_name(index, 'x', suffix)


@pytest.mark.parametrize('name', ['', '.', '..', '../x', '/x', 'a/b', 'a\0b'])
def test_paths_stay_inside(tmp_path, name):
  with pytest.raises(ValueError, match='plain file name'):
    outputs.output_path(tmp_path, name)


def test_never_overwrites_unasked(tmp_path):
  (tmp_path / 'a.mp4').write_text('old')
  with pytest.raises(outputs.OutputExists, match='--overwrite'):
    outputs.output_path(tmp_path, 'a.mp4')
  assert outputs.output_path(tmp_path, 'a.mp4', overwrite=True) == tmp_path / 'a.mp4'
  (tmp_path / 'd').mkdir()
  (tmp_path / 'link').symlink_to('/etc/passwd')
  for name in ('d', 'link'):
    with pytest.raises(ValueError, match='directory or a link'):
      outputs.output_path(tmp_path, name, overwrite=True)


def test_unusable_directory(tmp_path):
  (tmp_path / 'file').write_text('')
  for bad in (tmp_path / 'file', tmp_path / 'file' / 'below', '/proc/nothing'):
    with pytest.raises(ValueError, match='cannot write into'):
      outputs.prepare_directory(bad)


def test_second_claim_is_refused_and_the_first_released(tmp_path):
  with outputs.claim_directory(tmp_path / 'run') as path:
    with pytest.raises(outputs.DirectoryInUse, match=f'process {os.getpid()}'):
      with outputs.claim_directory(path):
        pass
  notices = []
  with outputs.claim_directory(tmp_path / 'run', say=notices.append):
    pass
  assert notices == []


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
  code = ('import sys, time\nfrom pf_jax import outputs\n'
          'with outputs.claim_directory(sys.argv[1]):\n  print("held", flush=True)\n'
          '  time.sleep(60)\n')
  with subprocess.Popen([sys.executable, '-c', code, tmp_path], stdout=subprocess.PIPE,
                        text=True) as holder:
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(outputs.DirectoryInUse, match=str(holder.pid)):
      with outputs.claim_directory(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
  notices = []
  with outputs.claim_directory(tmp_path, say=notices.append):
    assert len(notices) == 1
    assert str(holder.pid) in notices[0]


def test_files_that_a_killed_process_was_writing_are_deleted(tmp_path):
  dead = subprocess.Popen(['true'])
  dead.wait()
  torn = [f'.metrics.{dead.pid}.tmp.jsonl', f'.log.{dead.pid}.tmp']
  kept = [f'.metrics.{os.getpid()}.tmp.jsonl', f'metrics.{dead.pid}.tmp.jsonl', '.a.b.tmp',
          f'.a.{"9" * 30}.tmp']
  for name in (*torn, *kept):
    (tmp_path / name).write_text('{')
  (tmp_path / f'.model.{dead.pid}.tmp').mkdir()  # has a lock of its own; see `atomic_directory`
  with outputs.claim_directory(tmp_path):
    left = set(os.listdir(tmp_path))
  assert left == {*kept, f'.model.{dead.pid}.tmp', outputs.LOCK_NAME}


def test_unreadable_lock_file_is_harmless(tmp_path):
  (tmp_path / outputs.LOCK_NAME).write_text('garbage')
  with outputs.claim_directory(tmp_path):
    assert json.loads((tmp_path / outputs.LOCK_NAME).read_text())['pid'] == os.getpid()


def test_writes_are_whole_or_absent(tmp_path):
  target = tmp_path / 'a.json'
  outputs.write_json(target, {'a': [1, float('nan'), float('inf')], 'b': {'c': 2.5}})
  assert json.loads(target.read_text()) == {'a': [1, None, None], 'b': {'c': 2.5}}
  with pytest.raises(RuntimeError, match='broken'), outputs.atomic_path(target) as temporary:
    temporary.write_text('half')
    raise RuntimeError('broken')
  assert 'half' not in target.read_text()
  assert [p.name for p in pathlib.Path(tmp_path).iterdir()] == ['a.json']


# --- directories ---------------------------------------------------------------------------------


def fill(root, text):
  root.mkdir(exist_ok=True)
  for name in 'ab':
    (root / name).write_text(text)


def texts(root):
  return {path.name: path.read_text() for path in root.iterdir()} if root.exists() else None


OLD, NEW = {'a': 'old', 'b': 'old'}, {'a': 'new', 'b': 'new'}


def replace(target, text='new', check=lambda path: None, say=lambda line: None):
  with outputs.atomic_directory(target, check, say=say) as root:
    fill(root, text)


@pytest.mark.parametrize('before', ['missing', 'empty', 'full', 'linked'])
def test_a_directory_appears_whole(before, tmp_path):
  target = tmp_path / 'below' / 'out'
  if before != 'missing':
    target.mkdir(parents=True)
  if before == 'full':
    fill(target, 'old')
  if before == 'linked':
    fill(tmp_path / 'elsewhere', 'old')
    target.rmdir()
    target.symlink_to(tmp_path / 'elsewhere')
  seen = []
  with outputs.atomic_directory(target, seen.append) as root:
    fill(root, 'new')
    assert root.name == f'.{target.resolve().name}.{os.getpid()}.tmp'
    assert texts(target) == {'missing': None, 'empty': {}}.get(before, OLD)
  assert texts(target) == NEW
  assert target.is_symlink() == (before == 'linked')
  assert os.listdir(tmp_path / 'below') == ['out']
  # Before anything is written, and before it is replaced.
  assert seen == ([target.resolve()] * 2 if before in ('full', 'linked') else [])
  assert set(os.listdir(tmp_path)) == {'below'} | ({'elsewhere'} if before == 'linked' else set())


# Replaces a directory in one child after another, each killed one file operation later than the
# one before, and prints what is there: after the kill; after a call that fails; after one that
# does not. With 'lost', somebody deletes the directory after the kill.
SWEEP = """
import itertools, json, os, pathlib, shutil, signal, sys
from pf_jax import outputs
from tests.test_outputs import fill, replace, texts

def killed(target, operation):
  pid = os.fork()
  if not pid:
    count = itertools.count()
    def hook(event, unused):
      if event == 'open' or event.startswith('os.'):
        if next(count) == operation:
          os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    replace(target)
    os._exit(0)
  return os.waitpid(pid, 0)[1] != 0

lost, first = 'lost' in sys.argv, 'first' in sys.argv
for operation in itertools.count():
  target = pathlib.Path(sys.argv[1], str(operation), 'out')
  target.parent.mkdir()
  if not first:
    fill(target, 'old')
  if not killed(target, operation):
    break
  states = [texts(target)]
  if lost and target.exists():
    shutil.rmtree(target)
  try:
    with outputs.atomic_directory(target, lambda path: None):
      1 / 0
  except ZeroDivisionError:
    states.append(texts(target))
  replace(target, 'newer')
  print(json.dumps(states + [texts(target), os.listdir(target.parent)]))
"""


def sweep(tmp_path, *how):
  done = subprocess.run([sys.executable, '-c', SWEEP, tmp_path, *how], capture_output=True,
                        text=True, check=True, timeout=100)
  runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('[')]
  assert all(run[2:] == [{'a': 'newer', 'b': 'newer'}, ['out']] for run in runs)
  return [run[0] for run in runs], [run[1] for run in runs]


def phases(states):
  return [state for state, _ in itertools.groupby(states)]


def test_a_kill_at_any_moment_leaves_the_old_directory_or_the_new(tmp_path):
  killed, repaired = sweep(tmp_path)
  assert len(killed) > 20
  assert phases(killed) == [OLD, None, NEW]
  assert killed.count(None) == 1  # between two renames; then the next call moves it back
  assert repaired == [state or OLD for state in killed]


def test_a_kill_before_there_was_anything_leaves_the_new_directory_or_nothing(tmp_path):
  killed, repaired = sweep(tmp_path, 'first')
  assert phases(killed) == [None, NEW]
  assert repaired == killed


def test_what_a_killed_process_was_deleting_never_comes_back(tmp_path):
  killed, repaired = sweep(tmp_path, 'lost')
  assert phases(repaired) == [None, OLD, None]
  assert repaired[killed.index(None)] == OLD


def test_an_error_leaves_the_old_directory(tmp_path, monkeypatch):
  target = tmp_path / 'out'
  fill(target, 'old')
  with pytest.raises(RuntimeError, match='broken'), outputs.atomic_directory(target, str) as root:
    fill(root, 'half')
    raise RuntimeError('broken')
  assert (texts(target), os.listdir(tmp_path)) == (OLD, ['out'])


@pytest.mark.parametrize('failing', ['.tmp', '.tmp and .old'])
def test_a_rename_that_fails_loses_nothing(failing, tmp_path, monkeypatch):
  target, rename = tmp_path / 'out', os.replace
  fill(target, 'old')

  def partly(source, destination):
    if destination == target and source.suffix in failing:
      raise OSError(f'cannot rename {source.suffix}')
    rename(source, destination)

  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', partly)
    with pytest.raises(OSError, match=f'cannot rename {failing[-4:]}'):
      replace(target)
  aside = f'.out.{os.getpid()}.old'
  assert os.listdir(tmp_path) == (['out'] if failing == '.tmp' else [aside])
  with pytest.raises(ZeroDivisionError), outputs.atomic_directory(target, str):
    1 / 0  # noqa: B018
  assert (texts(target), os.listdir(tmp_path)) == (OLD, ['out'])


def test_everything_is_on_disk_before_the_name(tmp_path, monkeypatch):
  target, log, rename = tmp_path / 'out', [], os.replace
  monkeypatch.setattr(os, 'fsync', lambda fd: log.append(os.readlink(f'/proc/self/fd/{fd}')))
  monkeypatch.setattr(os, 'replace', lambda *paths: (log.append('rename'), rename(*paths)))
  with outputs.atomic_directory(target, str) as root:
    (root / 'c').mkdir()
    fill(root / 'c', 'new')
  assert sorted(log[:4]) == [f'{root}', f'{root}/c', f'{root}/c/a', f'{root}/c/b']
  assert log[4:] == ['rename', f'{tmp_path}']


@pytest.mark.parametrize('presses', [1, 2])
def test_an_interruption_after_the_last_rename_says_so(presses, tmp_path, monkeypatch):
  target, delete, pressed = tmp_path / 'out', shutil.rmtree, itertools.count(1)
  fill(target, 'old')

  def interrupted(*path, **named):
    if next(pressed) <= presses:
      raise KeyboardInterrupt
    delete(*path, **named)

  monkeypatch.setattr(shutil, 'rmtree', interrupted)
  with pytest.raises(KeyboardInterrupt, match=f'^{target} is complete$'):
    replace(target)
  assert texts(target) == NEW
  assert len(os.listdir(tmp_path)) == presses
  with pytest.raises(KeyboardInterrupt, match=r'^$'), outputs.atomic_directory(target, str):
    raise KeyboardInterrupt
  assert os.listdir(tmp_path) == ['out']


def test_a_directory_that_must_stay(tmp_path):
  target = tmp_path / 'out'
  fill(target, 'old')

  def check(path):
    if 'mine' in texts(path):
      raise outputs.NotWritable('mine')

  with pytest.raises(outputs.NotWritable, match='mine'):
    with outputs.atomic_directory(target, check) as root:
      fill(root, 'new')
      (target / 'mine').write_text('mine')
  assert texts(target) == OLD | {'mine': 'mine'}
  with pytest.raises(outputs.NotWritable, match='mine'):
    with outputs.atomic_directory(target, check) as root:
      raise AssertionError('the body must not run')
  assert os.listdir(tmp_path) == ['out']


def test_left_over_siblings_of_this_name_only_are_deleted(tmp_path):
  others = ['.out.tmp', '.out.x.tmp', '.out.b.5.tmp', '.out2.5.tmp', 'out.5.tmp', '.out.5.tmp2']
  for name in ('out', *others, '.out.5.tmp', '.out.6.old', '.out.6.old.tmp', '.out.7.old'):
    fill(tmp_path / name, 'half')
  replace(tmp_path / 'out')
  assert sorted(os.listdir(tmp_path)) == sorted([*others, 'out'])


def test_what_was_set_aside_survives_whoever_took_its_name(tmp_path):
  fill(tmp_path / '.out.5.old', 'old')
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'mine').write_text('mine')
  with pytest.raises(ZeroDivisionError):
    replace(tmp_path / 'out', check=lambda path: 1 / 0)
  assert texts(tmp_path / '.out.5.old') == OLD
  (tmp_path / 'out' / 'mine').unlink()
  said = []
  with pytest.raises(ZeroDivisionError):
    replace(tmp_path / 'out', check=lambda path: 1 / 0, say=said.append)
  assert texts(tmp_path / 'out') == OLD
  assert said == [f'{tmp_path}/out: moved back what an interrupted run had set aside.']


def test_one_process_writes_a_directory(tmp_path):
  with outputs.atomic_directory(tmp_path / 'out', str) as root:
    with pytest.raises(outputs.DirectoryInUse, match=f'out is in use by process {os.getpid()}'):
      replace(tmp_path / 'out')
    replace(tmp_path / 'other')
    fill(root, 'new')
  assert texts(tmp_path / 'out') == NEW
  assert sorted(os.listdir(tmp_path)) == ['other', 'out']


def test_a_lock_file_that_was_just_removed_locks_nothing(tmp_path, monkeypatch):
  lock = fcntl.flock

  def late(stream, how):
    os.unlink(stream.name)
    lock(stream, how)

  monkeypatch.setattr(fcntl, 'flock', late)
  with pytest.raises(outputs.DirectoryInUse):
    replace(tmp_path / 'out')
  assert not os.listdir(tmp_path)


def test_directories_that_cannot_be_replaced(tmp_path):
  (tmp_path / 'file').write_text('')
  for bad, reason in ((tmp_path / 'file', 'is not a directory'), ('/proc', 'is a mount point'),
                      (tmp_path / 'file' / 'below', 'is not a directory'),
                      ('/proc/nothing', 'cannot write into')):
    with pytest.raises(outputs.NotWritable, match=reason):
      replace(bad)
  assert os.listdir(tmp_path) == ['file']
