"""Decoding saved latents again: the very frames that were sampled, or a clear refusal."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pf_jax import outputs
from pf_jax.request import Request
from pf_jax.sampling import job
from pf_jax.sampling.config import SampleSpec
from pf_jax.sampling.decode import decode
from pf_jax.sampling.plan import SampleError
from pf_jax.sampling.source import ModelSource
from pf_jax.viz.video import read_video
from pf_jax.weights import package
from tests.sampled import (  # noqa: F401 (fixtures are found by pytest)
  CHOICES,
  loaded_fixture,
  random_models,
  tiny_fixture,
)

pytestmark = pytest.mark.timeout(400)
ROOT = pathlib.Path(__file__).resolve().parents[2]
REQUEST = Request(('a white seven | 2: a red three',), 4.0, 3)
NAME = outputs.output_name(0, REQUEST.prompts[0])


@pytest.fixture
def sampled(loaded, tmp_path):
  job.run(REQUEST, SampleSpec(sheet_columns=2, quality=12), tmp_path / 'sampled',
          source=ModelSource(loaded.directory), save_latents=True)
  return tmp_path / 'sampled'


def test_the_same_video_comes_out(sampled, tmp_path):
  (video,) = decode(sampled, tmp_path / 'decoded')
  assert video == tmp_path / 'decoded' / f'{NAME}.mp4'
  assert video.read_bytes() == (sampled / f'{NAME}.mp4').read_bytes()
  assert len(read_video(video).pixels) == 13 + 3 * 16
  sidecar = (tmp_path / 'decoded' / f'{NAME}.json').read_text()
  assert f'"decoded_from": "{sampled}"' in sidecar
  assert '"status": "finished"' in sidecar
  assert {path.name for path in video.parent.iterdir()} == {
      video.name, f'{NAME}.json', 'contact_sheet.png', '.lock'}
  with pytest.raises(outputs.OutputExists, match='--overwrite'):
    decode(sampled, tmp_path / 'decoded')
  decode(sampled, tmp_path / 'decoded', overwrite=True)


def test_latents_decide_what_is_seen(sampled, tmp_path):
  """Other latents give other frames, from that block on: nothing is sampled again."""
  chunks = sampled / 'latents' / '000' / 'latents'
  shutil.copy(chunks / '0.0.0.0.0.0', chunks / '2.0.0.0.0.0')
  (video,) = decode(sampled, tmp_path / 'decoded')
  got, truth = read_video(video).pixels, read_video(sampled / f'{NAME}.mp4').pixels
  np.testing.assert_array_equal(got[:13 + 16], truth[:13 + 16])
  assert np.abs(got[13 + 16:].astype(int) - truth[13 + 16:]).mean() > 5


def test_an_unfinished_run_decodes_as_far_as_it_got(sampled, tmp_path):
  for array, key in (('latents', '3.0.0.0.0.0'), ('selected', '3.0.0.0')):
    (sampled / 'latents' / '000' / array / key).unlink()
  said = []
  (video,) = decode(sampled, tmp_path / 'decoded', say=said.append)
  assert 'note: 3 of 4 blocks are there.' in said
  np.testing.assert_array_equal(read_video(video).pixels,
                                read_video(sampled / f'{NAME}.mp4').pixels[:13 + 2 * 16])
  assert '"status": "unfinished"' in (tmp_path / 'decoded' / f'{NAME}.json').read_text()


def test_refusals(sampled, loaded, tmp_path):
  with pytest.raises(SampleError, match=r'run\.json is missing'):
    decode(tmp_path, tmp_path / 'decoded')
  with pytest.raises(outputs.OutputExists):
    decode(sampled, sampled)
  other = package.save_model(tmp_path / 'other', random_models(1), choices=CHOICES)
  with pytest.raises(SampleError, match=r'another run: model was .* Say where the model'):
    decode(sampled, tmp_path / 'decoded', moved={'checkpoint': str(other)})
  with pytest.raises(SampleError, match='--weights does not belong to the model that was used'):
    decode(sampled, tmp_path / 'decoded', moved={'directory': str(other)})
  run = json.loads((sampled / 'run.json').read_text())
  del run['identity']['seed']
  (sampled / 'run.json').write_text(json.dumps(run))
  with pytest.raises(SampleError, match=r"run\.json is damaged \(KeyError\('seed'\)\)"):
    decode(sampled, tmp_path / 'decoded')
  shutil.rmtree(sampled / 'latents')
  with pytest.raises(SampleError, match='sample with --save_latents'):
    decode(sampled, tmp_path / 'decoded')


def test_command_line(tmp_path):
  def launch(*arguments):
    return subprocess.run([sys.executable, '-m', 'launch.decode', *arguments], cwd=ROOT,
                          env=os.environ, capture_output=True, text=True, check=False)

  done = launch(f'--latents={tmp_path}', f'--output={tmp_path}/out')
  assert done.returncode == 1
  assert done.stderr.startswith(f'error: {tmp_path}/run.json is missing, damaged')
  assert 'Traceback' not in done.stderr
  done = launch('--output=x')
  assert (done.returncode, done.stderr) == (2, 'error: --latents=... is missing; see --help.\n')
