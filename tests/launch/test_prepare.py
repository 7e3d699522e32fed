"""The command line of preparation."""

import os
import pathlib
import subprocess
import sys

import pytest

from pf_jax.data.text_rows import TextStore
from pf_jax.pipeline import PACKAGED
from pf_jax.weights import package

ROOT = pathlib.Path(__file__).resolve().parents[2]


def launch(*arguments):
  return subprocess.run([sys.executable, '-m', 'launch.prepare', *map(str, arguments)], cwd=ROOT,
                        env=os.environ, capture_output=True, text=True, check=False)


def test_prompts_become_a_store(tmp_path):
  lines = tmp_path / 'prompts.txt'
  lines.write_bytes('\ufeffa white seven\r\n\r\n  a white two \r\n'.encode())
  given = ['--config=configs/digits/dmd.py', f'--config.start={PACKAGED}', f'--prompts={lines}',
           f'--config.prompts={tmp_path}/store']
  done = launch(*given)
  assert done.returncode == 0, done.stderr
  assert '2 prompts' in done.stdout
  text = package.read_spec(PACKAGED)['spec'].text
  store = TextStore(tmp_path / 'store', text.max_tokens, text.width)
  assert [store.prompt(i) for i in range(2)] == ['a white seven', 'a white two']
  lines.write_text('a white nine')
  refused = launch(*given)
  assert refused.returncode == 1
  assert 'holds other data' in refused.stderr
  assert 'Traceback' not in refused.stderr


@pytest.mark.parametrize(('arguments', 'code', 'message'), [
    (['--config=configs/digits/causal.py', '--prompts=x'], 2, "config.stage='causal' rolls out no"),
    (['--config=configs/digits/dmd.py', '--prompts=x'], 2, 'config.prompts names no directory'),
    (['--config=configs/digits/dmd.py', '--config.prompts=x'], 2, '--prompts=... is missing'),
    (['--config=configs/wan/dmd_1_3b.py', '--prompts=/nowhere'], 1, 'cannot read prompts from'),
])
def test_what_cannot_be_prepared(arguments, code, message):
  done = launch(*arguments)
  assert (done.returncode, 'Traceback' in done.stderr) == (code, False), done.stderr
  assert message in done.stderr
