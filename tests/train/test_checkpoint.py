"""Checkpoints: exact round trip, mismatches named, damage detected and survived."""

import contextlib
import dataclasses
import errno
import os
import pathlib
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pf_jax.train import checkpoint, state
from tests.train import toy


def make_state(value=1.0, width=3, ema=True):
  params = {'w': jnp.full((2, width), value), 'layers': [jnp.arange(4, dtype=jnp.bfloat16)],
            'none': jnp.zeros((0, 5))}
  return state.init_state(params, optax.adam(1e-3), seed=3, ema=ema)


def at_step(train_state, step):
  return dataclasses.replace(train_state, step=jnp.int32(step))


def save_steps(workdir, *steps):
  with checkpoint.Checkpoints(workdir) as checkpoints:
    for step in steps:
      checkpoints.save(at_step(make_state(float(step)), step), meta={'data_position': step})


def restore(workdir, template=None, **kwargs):
  warnings = []
  with checkpoint.Checkpoints(workdir, warn=warnings.append) as checkpoints:
    return checkpoints.restore(template or make_state(), **kwargs), warnings


def test_round_trip_is_exact(tmp_path):
  original = at_step(make_state(0.1), 7)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(original, meta={'data_position': 7})
    checkpoints.save(original)  # the same step again is no error
  (loaded, meta), warnings = restore(tmp_path)
  assert jax.tree.structure(loaded) == jax.tree.structure(original)
  for a, b in zip(jax.tree.leaves(original), jax.tree.leaves(loaded), strict=True):
    assert a.dtype == b.dtype
    if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  np.testing.assert_array_equal(jax.random.key_data(loaded.rng), jax.random.key_data(original.rng))
  assert meta['data_position'] == 7
  assert warnings == []


def test_nothing_to_restore(tmp_path):
  assert restore(tmp_path) == (None, [])


def test_keeps_the_newest_and_forgets_their_manifests(tmp_path):
  save_steps(tmp_path, 1, 2, 3, 4, 5)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [3, 4, 5]
  names = sorted(p.name for p in (tmp_path / 'checkpoints' / 'manifests').iterdir())
  assert names == ['00000003.json', '00000004.json', '00000005.json']
  with pytest.raises(ValueError, match='keep=1'):
    checkpoint.Checkpoints(tmp_path, keep=1)


def test_mismatches_are_all_listed_and_never_fallen_back_from(tmp_path):
  save_steps(tmp_path, 1, 2)
  params = {'w': jnp.ones((2, 4)), 'layers': [jnp.zeros(4)], 'new': jnp.ones(1)}
  other = state.init_state(params, optax.adam(1e-3), seed=3, ema=True)
  with pytest.raises(checkpoint.CheckpointMismatch) as error:
    restore(tmp_path, other)
  text = str(error.value)
  assert 'params/w: checkpoint has float32[2, 3], this run wants float32[2, 4]' in text
  assert 'params/layers/0: checkpoint has bfloat16[4], this run wants float32[4]' in text
  assert 'params/new: missing in the checkpoint' in text
  assert restore(tmp_path)[0] is not None  # and nothing was deleted


def data_files(workdir, step):
  files = checkpoint._files(pathlib.Path(workdir) / 'checkpoints' / f'{step:08d}')
  return [path for path in files.values() if path.stat().st_size]


def flip(path, rng):
  data = bytearray(path.read_bytes())
  bit = int(rng.integers(len(data) * 8))
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)


def test_every_flipped_bit_is_found(tmp_path):
  save_steps(tmp_path, 1)
  rng = np.random.default_rng(0)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.damage(1) == ''
    for path in data_files(tmp_path, 1):
      good = path.read_bytes()
      for _ in range(4):
        flip(path, rng)
        assert path.name in checkpoints.damage(1)
        path.write_bytes(good)
      for broken in (good[:-1], good + b'x'):
        path.write_bytes(broken)
        assert path.name in checkpoints.damage(1)
      path.unlink()
      assert 'missing' in checkpoints.damage(1)
      path.write_bytes(good)
    assert checkpoints.damage(1) == ''


def test_damaged_step_falls_back_loudly(tmp_path):
  save_steps(tmp_path, 1, 2)
  flip(max(data_files(tmp_path, 2), key=lambda p: p.stat().st_size), np.random.default_rng(0))
  (loaded, meta), warnings = restore(tmp_path)
  assert int(loaded.step) == meta['data_position'] == 1
  assert float(loaded.params['w'][0, 0]) == 1
  assert any('step 2 is damaged' in warning for warning in warnings)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1]  # so that the step can be written again
    checkpoints.save(at_step(make_state(9.0), 2))
  assert float(restore(tmp_path)[0][0].params['w'][0, 0]) == 9


def test_nothing_good_left_is_an_error(tmp_path):
  save_steps(tmp_path, 1, 2)
  for step in (1, 2):
    flip(data_files(tmp_path, step)[0], np.random.default_rng(step))
  with pytest.raises(checkpoint.CheckpointDamaged, match=r'step 2.*step 1'):
    restore(tmp_path)


def test_step_without_manifest_is_used_and_said(tmp_path):
  save_steps(tmp_path, 1, 2)
  (tmp_path / 'checkpoints' / 'manifests' / '00000002.json').unlink()
  (loaded, _), warnings = restore(tmp_path)
  assert int(loaded.step) == 2
  assert 'no manifest' in warnings[0]


def test_a_deleted_step_can_be_written_again(tmp_path):
  save_steps(tmp_path, 1, 2)
  shutil.rmtree(tmp_path / 'checkpoints' / '00000002')  # by hand, or by a run that was killed then
  save_steps(tmp_path, 2)
  (loaded, _), warnings = restore(tmp_path)
  assert int(loaded.step) == 2
  assert warnings == []


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"files": []}', '{"files": {"a": 1}}',
                                  '{"files": {"a": [1]}}'])
def test_unreadable_manifest_is_damage(text, tmp_path):
  save_steps(tmp_path, 1)
  (tmp_path / 'checkpoints' / 'manifests' / '00000001.json').write_text(text)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert 'manifest unreadable' in checkpoints.damage(1)


def test_unreadable_file_is_damage(tmp_path, monkeypatch):
  save_steps(tmp_path, 1, 2)
  crc32_of = checkpoint.crc32_of

  def bad_sector(path):
    if '00000002' in str(path):
      raise OSError(errno.EIO, os.strerror(errno.EIO))
    return crc32_of(path)

  monkeypatch.setattr(checkpoint, 'crc32_of', bad_sector)
  (loaded, _), warnings = restore(tmp_path)
  assert int(loaded.step) == 1
  assert 'is unreadable (Input/output error)' in warnings[0]


def test_torn_step_without_manifest_falls_back(tmp_path):
  save_steps(tmp_path, 1, 2)
  (tmp_path / 'checkpoints' / 'manifests' / '00000002.json').unlink()
  shutil.rmtree(tmp_path / 'checkpoints' / '00000002' / 'params')
  (loaded, _), warnings = restore(tmp_path)
  assert int(loaded.step) == 1
  assert any('falling back' in warning for warning in warnings)


def test_leftovers_of_killed_saves_are_removed(tmp_path):
  save_steps(tmp_path, 1)
  leftover = tmp_path / 'checkpoints' / '00000002.orbax-checkpoint-tmp'
  shutil.copytree(tmp_path / 'checkpoints' / '00000001', leftover)
  manifest = tmp_path / 'checkpoints' / 'manifests' / '.00000002.99.tmp.json'
  manifest.write_text('{')
  assert int(restore(tmp_path)[0][0].step) == 1
  assert not leftover.exists()
  assert not manifest.exists()


@contextlib.contextmanager
def full_disk(size):
  """No file may grow beyond `size` bytes: the same failed write as on a full disk."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def big_state(step):
  """2 MB of noise, which does not compress."""
  params = {'w': jax.random.normal(jax.random.key(0), (512, 512))}
  return at_step(state.init_state(params, optax.sgd(1e-3), seed=3, ema=True), step)


def test_full_disk_is_one_error_and_leaves_the_earlier_step(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(big_state(1))
  with pytest.raises(checkpoint.CheckpointNotSaved, match=r'too large\. Step 1 is intact; free'):
    with full_disk(100_000), checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(big_state(2))
      # The write fails in the background; whoever waits or saves next hears of it.
      checkpoints.save(big_state(3))
  assert not list((tmp_path / 'checkpoints').glob('*tmp*'))
  assert int(restore(tmp_path, big_state(0))[0][0].step) == 1
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(big_state(2))
  assert int(restore(tmp_path, big_state(0))[0][0].step) == 2


def test_no_room_for_the_manifest_is_the_same_error(tmp_path, monkeypatch):
  save_steps(tmp_path, 1)

  def full(path, value):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.outputs, 'write_json', full)
    with pytest.raises(checkpoint.CheckpointNotSaved, match=r': No space left on device\. Step'):
      save_steps(tmp_path, 2)
  assert int(restore(tmp_path)[0][0].step) in (1, 2)


def test_damaged_newest_step_does_not_change_what_is_loaded(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      made = at_step(make_state(1.0), step)
      average = jax.tree.map(lambda leaf: leaf + 1, made.ema)
      checkpoints.save(dataclasses.replace(made, ema=average))
  shutil.rmtree(tmp_path / 'checkpoints' / '00000002' / 'ema')
  assert float(checkpoint.load_params(tmp_path, make_state().params)['w'][0, 0]) == 2


def test_parameters_alone(tmp_path):
  with pytest.raises(FileNotFoundError, match='no checkpoints'):
    checkpoint.load_params(tmp_path, make_state().params)
  train_state = at_step(make_state(1.0), 5)
  average = jax.tree.map(lambda leaf: leaf + 1, train_state.ema)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(dataclasses.replace(train_state, ema=average))
  template = jax.eval_shape(lambda: make_state().params)
  in_progress = tmp_path / 'checkpoints' / '00000009.orbax-checkpoint-tmp'
  in_progress.mkdir()
  assert float(checkpoint.load_params(tmp_path, template)['w'][0, 0]) == 2
  assert float(checkpoint.load_params(tmp_path, template, ema=False)['w'][0, 0]) == 1
  with pytest.raises(checkpoint.CheckpointMismatch, match='ema/w'):
    checkpoint.load_params(tmp_path, {**template, 'w': jnp.ones((9, 9))})
  assert in_progress.is_dir()  # reading leaves a running training alone


def test_modules_round_trip(tmp_path):
  train_state = state.init_state(toy.Toy().init(0), optax.adam(1e-3), 0, ema=False)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(train_state)
  net = checkpoint.load_params(tmp_path, toy.Toy().init(1))
  np.testing.assert_array_equal(net.first.kernel[...], train_state.params.first.kernel[...])


def test_a_committed_step_has_its_checksums_at_once(tmp_path):
  """Not only when the next save begins: a run that is killed meanwhile could verify nothing."""
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(at_step(make_state(), 1))
    manifest = tmp_path / 'checkpoints' / 'manifests' / '00000001.json'
    for _ in range(600):
      if manifest.exists():
        break
      time.sleep(0.05)
    assert manifest.exists()
