"""Names, locks and atomic writes (bad prompts, two runs, kills)."""

import json
import os
import pathlib
import re
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
