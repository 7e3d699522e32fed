"""Ctrl-C during an export: what is said about the directory is true of it."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from pf_jax.pipeline import PACKAGED
from pf_jax.testing import random_models, tiny_model_spec
from pf_jax.weights import export, package
from tests.sampled import environment

pytestmark = pytest.mark.timeout(400)
ROOT = pathlib.Path(__file__).resolve().parents[2]
# The launcher, and Ctrl-C at a call inside it.
CODE = """
import os, shutil, signal, sys
from launch import config_flags
from launch import export as launcher
from pf_jax.weights import export

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs are started deaf to it

def interrupt(module, name):
  inner = getattr(module, name)
  def call(*arguments, **named):
    setattr(module, name, inner)  # once
    os.kill(os.getpid(), signal.SIGINT)
    return inner(*arguments, **named)
  setattr(module, name, call)

if sys.argv.pop(1) == 'while it is written':
  interrupt(export, '_write_compressor')
else:
  interrupt(shutil, 'rmtree')
config_flags.run(launcher._export, required=('output',))
"""


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A model and its export."""
  root, models = tmp_path_factory.mktemp('made'), random_models(tiny_model_spec(), 1)
  package.save_model(root / 'model', models)
  export.export_diffusers(models, PACKAGED / 'tokenizer.json', root / 'out')
  return root


@pytest.mark.parametrize(('when', 'said', 'replaced'), [
    ('while it is written', 'is as it was', False),
    ('while the old one is deleted', 'is complete', True)])
def test_an_interruption_says_what_is_there(when, said, replaced, made, tmp_path):
  out = shutil.copytree(made / 'out', tmp_path / 'out')
  os.utime(out / 'model_index.json', (0, 0))
  done = subprocess.run(
      [sys.executable, '-c', CODE, when, f'--checkpoint={made}/model', f'--output={out}',
       '--overwrite'],
      cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment())
  assert (done.returncode, done.stderr) == (130, f'interrupted; {out} {said}.\n')
  assert ((out / 'model_index.json').stat().st_mtime > 0) == replaced
  assert os.listdir(tmp_path) == ['out']
