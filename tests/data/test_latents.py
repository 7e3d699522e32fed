"""The store of encoded clips: values, resume after a kill, damage, mismatches."""

import dataclasses
import shutil

import numpy as np
import pytest

from pf_jax.data import digits, latents, source

WORLD = digits.DigitsWorld()
FRAMES = 5
INDICES = [3, 1, 4, 15, 9, 2, 6]


def encode(pixels, prompts):
  """Stands in for a VAE: every eighth pixel."""
  small = pixels[:, ::4, ::16, ::16]
  return {'latents': small, 'low_res': small[:, :1, :2, :2],
          'ids': np.array([[len(p), 7] for p in prompts], np.int32)}


def build(path, fn=encode, indices=INDICES, **options):
  options = {'frames': FRAMES, 'batch_size': 2, 'clips_per_shard': 3, 'progress': False} | options
  return latents.encode_clips(fn, WORLD, indices, path, **options)


class Killed(BaseException):
  """Stands in for a signal."""


def killed_after(calls):
  """An encoder that dies in its last call but one of `calls`."""
  count = 0

  def fn(pixels, prompts):
    nonlocal count
    count += 1
    if count > calls:
      raise Killed
    return encode(pixels, prompts)
  return fn


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
  path = tmp_path_factory.mktemp('store') / 'clips'
  build(path)
  return path


def test_values_come_back(pristine):
  store = latents.LatentStore(pristine, expect={'latents': (2, 4, 4, 3)})
  assert len(store) == len(INDICES)
  for i, index in enumerate(INDICES):
    clip, record = WORLD.clip(index, 0, FRAMES), store[i]
    wanted = encode(digits.to_float(clip.pixels)[None], [clip.prompt])
    np.testing.assert_array_equal(record['latents'], wanted['latents'][0].astype(np.float16))
    np.testing.assert_array_equal(record['ids'], wanted['ids'][0])
    assert record['latents'].dtype == np.float16
    assert record['ids'].dtype == np.int32
    assert (record['index'], record['digit']) == (index, clip.attributes.digit)
    np.testing.assert_allclose(record['rgb'], clip.attributes.rgb, rtol=1e-3)
    assert store.prompt(i) == clip.prompt


def test_the_encoder_sees_one_batch_size_only(tmp_path):
  sizes = set()

  def fn(pixels, prompts):
    sizes.add((len(pixels), len(prompts)))
    return encode(pixels, prompts)
  build(tmp_path / 's', fn)
  assert sizes == {(2, 2)}


def test_a_store_feeds_batches(pristine):
  store = latents.LatentStore(pristine)
  batch = next(source.batches(store, 4, start_step=1))
  np.testing.assert_array_equal(batch['index'], [9, 2, 6, 3])
  np.testing.assert_array_equal(store.read([6, 0])['index'], [6, 3])
  with pytest.raises(IndexError, match='index=7 is outside'):
    store[7]


@pytest.mark.parametrize('calls', [1, 2, 3, 4, 5])
def test_a_killed_encoding_continues_where_it_stopped(tmp_path, pristine, calls):
  path = tmp_path / 's'
  with pytest.raises(Killed):
    build(path, killed_after(calls))
  assert not path.exists()
  with pytest.raises(latents.StoreError, match='unfinished; run the encoding again'):
    latents.LatentStore(path)
  remaining = 0

  def counted(pixels, prompts):
    nonlocal remaining
    remaining += 1
    return encode(pixels, prompts)
  store = build(path, counted)
  # One call learns the shapes, then two per shard of three and one for the last: 1 + 2 + 2 + 1.
  finished = max(calls - 1, 0) // 2 * 2
  assert remaining == 5 - finished
  reference = latents.LatentStore(pristine)
  for i in range(len(INDICES)):
    for name, value in reference[i].items():
      np.testing.assert_array_equal(store[i][name], value)
  assert not list(path.parent.glob('*.partial'))


def test_a_complete_store_is_not_encoded_again(pristine):
  def never(pixels, prompts):
    raise AssertionError('encoded again')
  assert len(build(pristine, never)) == len(INDICES)


@pytest.mark.parametrize(('options', 'message'), [
    ({'frames': 9}, 'frames: got 5, wanted 9'),
    ({'seed': 1}, 'seed: got 0, wanted 1'),
    ({'about': {'vae': 'abc'}}, "encoder: got {}, wanted {'vae': 'abc'}"),
    ({'indices': [1, 2]}, 'indices: got'),
])
def test_other_content_is_not_mixed_in(pristine, options, message):
  with pytest.raises(latents.StoreError, match=message):
    build(pristine, **options)


def test_a_partial_store_of_other_content_is_not_continued(tmp_path):
  with pytest.raises(Killed):
    build(tmp_path / 's', killed_after(3))
  with pytest.raises(latents.StoreError, match=r'seed: got 0, wanted 1.*overwrite=True'):
    build(tmp_path / 's', seed=1)
  assert build(tmp_path / 's', seed=1, overwrite=True).spec.about['seed'] == 1


def test_shapes_that_do_not_fit_the_model(pristine):
  wrong = r'latents: got \(2, 4, 4, 3\), wanted \(2, 4, 4, 8\)'
  with pytest.raises(latents.StoreError, match=wrong):
    latents.LatentStore(pristine, expect={'latents': (2, 4, 4, 8)})
  with pytest.raises(latents.StoreError, match='mask: got None'):
    latents.LatentStore(pristine, expect={'mask': (2,)})


def test_no_store(tmp_path):
  with pytest.raises(latents.StoreError, match='There is no latent store'):
    latents.LatentStore(tmp_path / 'nowhere')


def test_the_store_is_read_only(pristine):
  store = latents.LatentStore(pristine)
  with pytest.raises(ValueError, match='writ'):
    store._arrays['latents'][0].write(np.zeros((2, 4, 4, 3), np.float16)).result()


def flip_one_bit(path, rng):
  data = bytearray(path.read_bytes())
  data[rng.integers(len(data))] ^= 1 << rng.integers(8)
  path.write_bytes(data)


def test_flipped_bits_are_detected_or_harmless(tmp_path, pristine):
  copy = tmp_path / 'clips'
  shutil.copytree(pristine, copy)
  reference = latents.LatentStore(copy).read(slice(None))
  files = sorted(path for path in copy.rglob('*') if path.is_file())
  data_files = [path for path in files if path.suffix != '.json']
  rng = np.random.default_rng(0)
  detected = set()
  for victim in files:
    intact = victim.read_bytes()
    flip_one_bit(victim, rng)
    try:
      for name, value in latents.LatentStore(copy).read(slice(None)).items():
        np.testing.assert_array_equal(value, reference[name], err_msg=str(victim))
    except latents.StoreError:
      detected.add(victim)
    victim.write_bytes(intact)
  assert detected >= set(data_files)  # in zarr.json a flip may hit an unused field
  assert copy / latents.SPEC_FILE in detected
  latents.LatentStore(copy).verify()  # every file restored: intact again


def test_lost_and_truncated_files_are_detected(tmp_path, pristine):
  for case, damage in enumerate((lambda p: p.unlink(), lambda p: p.write_bytes(b''),
                                 lambda p: p.write_bytes(p.read_bytes()[:-1]))):
    for name in ('latents', 'rgb'):
      copy = tmp_path / f'{case}{name}'
      shutil.copytree(pristine, copy)
      victim = sorted(path for path in (copy / name / 'c').rglob('*') if path.is_file())[0]
      damage(victim)
      with pytest.raises(latents.StoreError, match=r'damaged.*delete it and encode'):
        latents.LatentStore(copy).verify()
  (copy / latents.SPEC_FILE).unlink()
  with pytest.raises(latents.StoreError, match='unreadable'):
    latents.LatentStore(copy)


@pytest.mark.parametrize(('fn', 'message'), [
    (lambda pixels, prompts: {'latents': pixels[:1]}, r'shape \(1, .*leading axis of 2'),
    (lambda pixels, prompts: {'digit': np.zeros(2)}, 'name other than'),
    (lambda pixels, prompts: {'latents': np.full((2, 3), np.nan)}, 'not finite in float16'),
    (lambda pixels, prompts: {'latents': np.full((2, 3), 1e6)}, 'not finite in float16'),
])
def test_useless_encoders_are_refused(tmp_path, fn, message):
  with pytest.raises(ValueError, match=message):
    build(tmp_path / 's', fn)
  assert not (tmp_path / 's').exists()


def test_an_encoder_that_changes_its_mind_is_refused(tmp_path):
  calls = iter(range(10))
  with pytest.raises(ValueError, match='encode_fn changed its output: latents'):
    build(tmp_path / 's', lambda pixels, prompts: {'latents': np.zeros((2, 1 + (next(calls) > 0)))})


def test_versions_are_checked(pristine):
  spec = latents.LatentStore(pristine).spec
  assert latents.StoreSpec.from_json(spec.to_json()) == dataclasses.replace(
      spec, arrays=dict(spec.arrays))
  with pytest.raises(latents.StoreError, match='version 99, wanted 1'):
    latents.StoreSpec.from_json(spec.to_json() | {'version': 99})


def test_empty_requests(tmp_path):
  with pytest.raises(ValueError, match='must be at least 1'):
    build(tmp_path / 's', indices=[])
