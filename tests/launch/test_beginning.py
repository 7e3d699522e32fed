"""Image to video and continuation, as jobs: notes, given blocks, resume, decode, refusals."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pf_jax.request import Request
from pf_jax.sampling import job
from pf_jax.sampling.beginning import Beginning
from pf_jax.sampling.config import SampleSpec
from pf_jax.sampling.decode import decode
from pf_jax.sampling.plan import SampleError
from pf_jax.sampling.source import ModelSource
from pf_jax.viz.video import VideoWriter
from tests.sampled import loaded_fixture, tiny_fixture  # noqa: F401 (found by pytest)

pytestmark = pytest.mark.timeout(400)
REQUEST = Request(('a white seven',), 5.0, 5)  # 5 blocks, 77 frames
SPEC = SampleSpec(sheet_columns=3)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A picture larger than the video, and a clip of 50 frames at its size and rate."""
  root = tmp_path_factory.mktemp('files')
  ramp = np.linspace(0, 255, 64 * 96 * 3).reshape(64, 96, 3).astype(np.uint8)
  Image.fromarray(ramp).save(root / 'picture.png')
  with VideoWriter(root / 'clip.mp4', 32, 48, 16, quality=1) as writer:
    writer.write(np.stack([np.full((32, 48, 3), 4 * i, np.uint8) for i in range(50)]))
  return root


def run(loaded, directory, beginning, **options):
  said = []
  job.run(REQUEST, SPEC, directory, source=ModelSource(loaded.directory), beginning=beginning,
          save_latents=True, say=said.append, **options)
  return said, json.loads((directory / 'metrics.json').read_text())


def latents_of(directory):
  return [path.read_bytes() for path in
          sorted((directory / 'latents' / '000' / 'latents').glob('[0-9]*'))]


@jax.jit
def encode(vae, pixels):
  """Latents of uint8 pixels [T, H, W, 3]."""
  return vae.encode(pixels[None].astype(jnp.float32) / 127.5 - 1)


def floats(chunk):
  """The values of a stored block; a crc32c ends it."""
  return np.frombuffer(chunk[:-4], np.float32)


def test_a_clip_becomes_the_first_blocks(loaded, files, tmp_path):
  """50 frames: the last 45 fill three blocks."""
  beginning = Beginning(str(files / 'clip.mp4'), 'video')
  said, metrics = run(loaded, tmp_path / 'run', beginning)
  assert 'clip.mp4: the first 5 of 50 frames left out: the last 45 fill whole blocks (3).' in said
  assert 'the video begins with 3 given blocks, 2.81 s.' in said
  assert (metrics['given_blocks'], metrics['blocks'], metrics['frames']) == (3, 5, 77)
  assert (metrics['replayed_blocks'], metrics['sampled_blocks']) == (3, 2)
  given = beginning.read(loaded.pipeline.video, 5, lambda note: None)
  wanted = encode(loaded.pipeline.models.vae, given)
  stored = np.concatenate([floats(block) for block in latents_of(tmp_path / 'run')[:3]])
  np.testing.assert_allclose(stored, np.asarray(wanted).ravel(), atol=2e-5)
  (path,) = (tmp_path / 'run').glob('*.mp4')
  sidecar = json.loads(path.with_suffix('.json').read_text())
  assert sidecar['beginning']['file'] == 'clip.mp4'
  (again,) = decode(tmp_path / 'run', tmp_path / 'again', say=said.append)
  assert again.read_bytes() == path.read_bytes()


def test_a_killed_continuation_resumes_to_the_same_bits(loaded, files, tmp_path):
  beginning = Beginning(str(files / 'clip.mp4'), 'video')
  run(loaded, tmp_path / 'whole', beginning)
  shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
  for array in ('latents', 'selected'):  # as if killed after a given block, and after a sampled one
    for block in (2, 3, 4):
      for chunk in (tmp_path / 'cut' / 'latents' / '000' / array).glob(f'{block}*'):
        chunk.unlink()
  (sidecar,) = (tmp_path / 'cut').glob('000-*.json')
  sidecar.write_text(json.dumps({'status': 'unfinished'}))
  run(loaded, tmp_path / 'cut', beginning, resume=True)
  assert latents_of(tmp_path / 'cut') == latents_of(tmp_path / 'whole')
  other = Beginning(str(files / 'clip.mp4'), 'video', start=0.5)
  with pytest.raises(SampleError, match='another run: beginning was'):
    run(loaded, tmp_path / 'cut', other, resume=True)


def test_a_picture_begins_the_first_block(loaded, files, tmp_path):
  said, metrics = run(loaded, tmp_path / 'run', Beginning(str(files / 'picture.png'), 'image'))
  assert 'picture.png: 96x64 scaled to 48x32.' in said
  assert 'the video begins with the picture; the rest of its first block is made around it.' in said
  assert (metrics['given_blocks'], metrics['blocks'], metrics['frames']) == (1, 5, 77)
  picture = Beginning(str(files / 'picture.png'), 'image').read(loaded.pipeline.video, 5, str)
  wanted = encode(loaded.pipeline.models.vae, picture)
  first = floats(latents_of(tmp_path / 'run')[0])
  np.testing.assert_allclose(first[:wanted.size], np.asarray(wanted).ravel(), atol=2e-5)


def test_what_cannot_begin_a_video(loaded, files, tmp_path):
  with pytest.raises(SampleError, match=r'fills 3 blocks and the video has 3; ask for more than'):
    job.run(Request(('a',), 3.0), SPEC, tmp_path / 'a', source=ModelSource(loaded.directory),
            beginning=Beginning(str(files / 'clip.mp4'), 'video'))
  for path, kind in ((files / 'none.mp4', 'video'), (files / 'clip.mp4', 'image'),
                     (files / 'picture.png', 'image')):
    if path.name == 'picture.png':
      path = files / 'cut.png'
      path.write_bytes((files / 'picture.png').read_bytes()[:40])
    with pytest.raises(SampleError) as error:
      run(loaded, tmp_path / 'b', Beginning(str(path), kind))
    assert path.name in str(error.value)
    assert '\n' not in str(error.value)
  assert not list(tmp_path.rglob('*.mp4'))
  with pytest.raises(ValueError, match="kind='sound' is unknown"):
    Beginning('x', 'sound')
