"""Directories of videos with captions: which clips, in which order, which files are not used.

Frame n of a test video is the grey 4 n, so that the mean of a decoded frame tells its number.
"""

import os

import numpy as np
import pytest

from pf_jax.data import latents, source, videos
from pf_jax.viz.video import VideoWriter

SHAPE = videos.ClipShape(frames=5, height=16, width=24, fps=16)
CAPTIONS = {'b.mp4': 'a street', 'B.MP4': 'naïve ☃', 'inside/a.mp4': 'a cat'}


def write(path, frames, caption='a street', fps=16):
  path.parent.mkdir(parents=True, exist_ok=True)
  with VideoWriter(path.with_suffix('.mp4'), 16, 24, fps, quality=0) as writer:
    writer.write(np.tile(4 * np.arange(frames, dtype=np.uint8)[:, None, None, None],
                         (1, 16, 24, 3)))
  path.with_suffix('.mp4').rename(path)
  if caption is not None:
    path.with_suffix('.txt').write_text(caption, encoding='utf-8')
  return path


def scan(root, **options):
  return videos.scan(root, SHAPE, progress=False, **options)


def numbers(clip):
  return np.round(clip.pixels.mean(axis=(1, 2, 3)) / 4).astype(int).tolist()


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  """Videos of 17, 9 and 5 frames."""
  root = tmp_path_factory.mktemp('good')
  for (name, caption), frames in zip(CAPTIONS.items(), (17, 9, 5), strict=True):
    write(root / name, frames, caption)
  return root


def test_clips_follow_each_other_in_the_order_of_paths(good):
  found = scan(good, clips_per_video=2)
  assert [(clip.name, clip.number) for clip in found.clips] == [
      ('B.MP4', 0), ('b.mp4', 0), ('b.mp4', 1), ('inside/a.mp4', 0)]
  assert (found.files, found.skipped, found.cut) == (3, {}, {})
  clips = list(found.read(range(4)))
  assert [numbers(clip) for clip in clips] == [
      [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]
  assert [clip.prompt for clip in clips] == ['naïve ☃', 'a street', 'a street', 'a cat']
  assert {clip.pixels.shape for clip in clips} == {(5, 16, 24, 3)}
  size = len('naïve ☃'.encode())
  assert clips[3].fields['text'].tobytes() == b'a cat'.ljust(size, b'\0')
  assert [numbers(clip)[0] for clip in found.read([2, 0])] == [5, 0]
  assert len(scan(good).clips) == 3
  assert len(scan(good, clips_per_video=9).clips) == 5


def test_other_rates_are_resampled(tmp_path):
  write(tmp_path / 'a.mp4', 48, fps=24)
  found = videos.scan(tmp_path, SHAPE._replace(frames=7), clips_per_video=9, progress=False)
  shown = [number for clip in found.read(range(len(found.clips))) for number in numbers(clip)]
  assert shown == [n * 3 // 2 for n in range(28)]  # without a gap where clips meet


@pytest.mark.parametrize('threads', [1, 3])
def test_threads_and_the_order_of_a_disk_do_not_change_anything(good, monkeypatch, threads):
  wanted, walk = scan(good, clips_per_video=2), list(os.walk(good))
  monkeypatch.setattr(videos, '_THREADS', threads)
  monkeypatch.setattr(os, 'walk', lambda *unused, **options: [
      (folder, names, sorted(files)[::-1]) for folder, names, files in walk[::-1]])
  found = scan(good, clips_per_video=2)
  assert found == wanted
  assert [numbers(clip) for clip in found.read(range(4))] == [
      numbers(clip) for clip in wanted.read(range(4))]


def test_every_file_that_is_not_used_is_named(tmp_path):
  write(tmp_path / 'good.mp4', 6)
  write(tmp_path / 'short.mp4', 4)
  write(tmp_path / 'mute.mp4', 6, caption=None)
  write(tmp_path / 'blank.mp4', 6, caption=' \r\n')
  write(tmp_path / 'control.mp4', 6, caption='\0\x01')
  write(tmp_path / 'latin.mp4', 6).with_suffix('.txt').write_bytes(b'caf\xe9')
  write(tmp_path / 'empty.mp4', 6).write_bytes(b'')
  write(tmp_path / 'text.mkv', 6).write_bytes(b'no video at all')
  whole = write(tmp_path / 'torn.mp4', 6).read_bytes()
  (tmp_path / 'torn.mp4').write_bytes(whole[:len(whole) // 2])
  write(tmp_path / os.fsdecode(b'n\xff.mp4'), 6, caption=None)
  (tmp_path / 'notes.md').write_text('not a video, not counted')
  found = scan(tmp_path)
  assert [clip.name for clip in found.clips] == ['good.mp4']
  wanted = {
      'short.mp4': '4 frames at 16 fps, a clip has 5', 'mute.mp4': 'wanted mute.txt beside it',
      'blank.mp4': 'blank.txt is empty', 'control.mp4': 'control.txt holds no text',
      'latin.mp4': 'is not utf-8 text', 'empty.mp4': 'is empty',
      'text.mkv': 'is not a video that can be read', 'torn.mp4': 'no whole frame',
      'n\\udcff.mp4': 'there is no caption'}
  assert set(found.skipped) == set(wanted)
  for name, reason in wanted.items():
    assert reason in found.skipped[name]
  lines = found.report()
  assert len(lines) == 10
  assert f'skipped: mute.mp4: {found.skipped["mute.mp4"]}' in lines
  assert lines[-1].endswith('1 clips of 1 videos; 9 files skipped, 0 cut short.')


def test_a_damaged_end_costs_the_clips_behind_it_and_is_named(tmp_path):
  path = tmp_path / 'a.mp4'
  with VideoWriter(path, 16, 24, 16) as writer:
    for _ in range(20):  # a fragment each
      writer.write(np.zeros((1, 16, 24, 3), np.uint8))
  path.with_suffix('.txt').write_text('black')
  data = path.read_bytes()
  path.write_bytes(data[:[i for i in range(len(data)) if data[i:i + 4] == b'moof'][12] + 20])
  found = scan(tmp_path, clips_per_video=4)
  assert len(found.clips) == 2
  assert found.cut == {'a.mp4': 'the file is damaged or cut off: what is whole ends after 0.75 s'}
  assert found.skipped == {}
  assert found.report()[0].startswith('cut short: a.mp4: the file is damaged')


def test_what_no_one_expects_ends_nothing(good, monkeypatch):
  def read(path, *unused, **options):
    raise MemoryError if path.name == 'b.mp4' else ZeroDivisionError('by\nzero')
  monkeypatch.setattr(videos.media, 'read_video', read)
  assert scan(good).skipped == {'B.MP4': 'by zero', 'b.mp4': 'MemoryError',
                                'inside/a.mp4': 'by zero'}


def test_the_digest_is_of_names_captions_content_and_clips(tmp_path):
  def digest(folder, name='a.mp4', frames=11, caption='a street', most=2):
    write(tmp_path / folder / name, frames, caption)
    return scan(tmp_path / folder, clips_per_video=most).sha256

  assert digest('one') == digest('same') == scan(tmp_path / 'one', clips_per_video=2).sha256
  changed = [digest('one', 'b.mp4'), digest('name', 'c.mp4'), digest('frames', frames=12),
             digest('caption', caption='a cat'), digest('most', most=1)]
  assert len({digest('again'), *changed}) == 6


def test_captions(tmp_path):
  def read(data):
    (tmp_path / 'a.b.txt').write_bytes(data)
    return videos.read_caption(tmp_path / 'a.b.mp4')

  assert read('\ufeffa cat,\r\n\r\n  orange \r\n'.encode()) == 'a cat, orange'
  assert read('naïve | ☃'.encode('utf-16')) == 'naïve | ☃'


def test_nothing_there(tmp_path):
  found = scan(tmp_path)
  assert (found.clips, found.skipped) == ((), {})
  with pytest.raises(videos.VideosError, match=r'there is no directory .*/nowhere'):
    scan(tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='clips_per_video=0 must be at least 1'):
    scan(tmp_path, clips_per_video=0)


def test_a_directory_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  scandir = os.scandir

  def refuse(path):
    if str(path).endswith('closed'):
      raise PermissionError(13, 'Permission denied', path)
    return scandir(path)

  (tmp_path / 'closed').mkdir()
  monkeypatch.setattr(os, 'scandir', refuse)
  assert scan(tmp_path).skipped == {'closed': 'cannot be read (Permission denied)'}


def encode(pixels, prompts):
  """Stands in for a VAE: the first grey of every frame, and the length of the prompt."""
  return {'latents': pixels[:, :, 0, 0, :1], 'ids': np.array([[len(p)] for p in prompts])}


def store_of(found, path, encode_fn=encode, batch_size=2):
  return latents.write_store(
      latents.ClipEncoder(encode_fn, found.read, batch_size), range(len(found.clips)), path,
      facts={'videos': found.sha256}, clips_per_shard=2, progress=False)


def test_a_killed_encoding_continues(good, tmp_path):
  found = scan(good, clips_per_video=9)
  calls = []

  def killed(pixels, prompts):
    calls.append(prompts)
    if len(calls) == 3:  # the first one learns the shapes
      raise KeyboardInterrupt
    return encode(pixels, prompts)

  with pytest.raises(KeyboardInterrupt):
    store_of(found, tmp_path / 'a', killed)
  calls.clear()
  resumed = store_of(scan(good, clips_per_video=9), tmp_path / 'a',
                     lambda *given: calls.append(given[1]) or encode(*given))
  assert calls == [['a street', 'a street'], ['a cat', 'a cat']]  # filled up
  whole = store_of(found, tmp_path / 'b', batch_size=3)
  got, wanted = resumed.read(slice(None)), whole.read(slice(None))
  assert set(got) == {'latents', 'ids', 'text'}
  for name in got:
    np.testing.assert_array_equal(got[name], wanted[name])
  firsts = [round((float(clip[0, 0]) + 1) * 127.5 / 4) for clip in got['latents']]
  assert firsts == [0, 0, 5, 10, 0]
  assert [resumed.prompt(i) for i in (0, 3, 4)] == ['naïve ☃', 'a street', 'a cat']
  with pytest.raises(latents.StoreError, match='holds other data: videos: got'):
    store_of(scan(good), tmp_path / 'a')


def test_batches_do_not_depend_on_threads_hosts_or_where_a_run_resumed(good, tmp_path):
  store = store_of(scan(good, clips_per_video=9), tmp_path / 'a')

  def texts(batch_size, **options):
    stream = source.batches(store, batch_size, shuffle_seed=3, **options)
    return [sorted(map(bytes, next(stream)['text'])) for _ in range(4)]

  wanted = texts(2, num_threads=0)
  assert texts(2, num_threads=3) == wanted
  assert texts(2, start_step=2)[:2] == wanted[2:]
  hosts = [texts(1, process=(index, 2)) for index in range(2)]
  assert [sorted(a + b) for a, b in zip(*hosts, strict=True)] == wanted


@pytest.mark.parametrize('left', [0, 7])
def test_a_file_that_changes_meanwhile_ends_the_encoding_in_one_line(tmp_path, left):
  path = write(tmp_path / 'a.mp4', 10)
  found = scan(tmp_path, clips_per_video=2)
  path.unlink()
  if left:
    write(path, left)
  with pytest.raises(videos.VideosError, match=r'a\.mp4.*start again\.'):
    store_of(found, tmp_path / 'store')
  assert not (tmp_path / 'store').exists()
