"""Sampling from the command line: refusals without JAX, files, measurements, kills, resume."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs.digits import sample as sample_config
from launch.build import build
from pf_jax import outputs, profile
from pf_jax import pipeline as pipeline_lib
from pf_jax.pipeline import cache_choices
from pf_jax.request import Request
from pf_jax.rollout.block import SamplerSpec
from pf_jax.sampling import files, job, meter
from pf_jax.sampling.config import SampleSpec, TraceSpec
from pf_jax.sampling.files import BatchFiles
from pf_jax.sampling.plan import SampleError
from pf_jax.sampling.record import Record, RecordError
from pf_jax.sampling.source import ModelSource
from pf_jax.viz.video import read_video
from tests.sampled import (  # noqa: F401 (fixtures are found by pytest)
  Rowwise,
  environment,
  loaded_fixture,
  tiny_fixture,
)

pytestmark = pytest.mark.timeout(400)
ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPT = 'a white seven | 4: a red three'
REQUEST = Request((PROMPT,), 9.0, 5)  # 9 blocks
SPEC = SampleSpec(sheet_columns=3)


def frames_of(directory):
  """Frames of the only video."""
  (path,) = directory.glob('*.mp4')
  return read_video(path).pixels


def latents_of(directory):
  """The latents folder as bytes, by file name."""
  return {path.name: path.read_bytes()
          for path in sorted((directory / 'latents' / '000' / 'latents').glob('[0-9]*'))}


def read(path):
  return json.loads(path.read_text())


def sidecar_of(directory):
  (path,) = directory.glob('000-*.json')
  return read(path)


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
  """An uninterrupted run with saved latents: the truth that others are compared with."""
  directory = tmp_path_factory.mktemp('finished')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline_lib, 'load', lambda *unused, **choices: tiny.pipeline)
    said = []
    result = job.run(REQUEST, SPEC, directory, source=ModelSource(tiny.directory),
                     save_latents=True, say=said.append)
  return directory, result, said


# --- the command line, without JAX ---------------------------------------------------------------


def start(*arguments, **more):
  return subprocess.Popen([sys.executable, '-m', 'launch.sample', *map(str, arguments)], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | more)


MISTAKES = [
    ([], 'error: give either --prompt="..." or --prompts=FILE.'),
    (['--prompt='], 'is empty'),
    (['--prompt=a', '--seconds=0'], 'seconds=0.0 must be a positive number'),
    (['--prompt=a', '--seconds=nan'], 'seconds=nan'),
    (['--prompts=nowhere.txt'], "cannot read prompts from 'nowhere.txt'"),
    (['--prompt=a', '--resume', '--overwrite'], 'give one of them'),
    (['--prompt=a', '--config.cache.topk=3'], 'did you mean config.cache.top_k?'),
    (['--prompt=a', '--config.batch_size=0'], 'batch_size=0 must be at least 1'),
    (['--prompt=a', '--profile_first=3'], '--profile_first chooses what --profile traces'),
    (['--prompt=a', '--profile=trace', '--profile_first=1'], 'first=1 must be at least 2'),
    (['--prompt=a', '--profile=trace', '--profile_blocks=0'], 'blocks=0 must be at least 1'),
    (['--prompt=a', '--profile=trace', '--dry_run'], 'traces a run and --dry_run makes none'),
]


def test_mistakes_are_named_before_jax_is_imported(without_jax, tmp_path):
  for first in range(0, len(MISTAKES), 2):  # two at a time: most of it is Python starting
    running = [(start('--config=configs/digits/sample.py', f'--output={tmp_path}/run',
                        *arguments, **without_jax), message)
               for arguments, message in MISTAKES[first:first + 2]]
    for process, message in running:
      out, errors = process.communicate(timeout=60)
      assert message in errors, errors
      assert (process.returncode, out) == (2, '')
      assert all(line.startswith('error: ') for line in errors.splitlines())
      assert 'JAX WAS IMPORTED' not in errors
  assert not (tmp_path / 'run').exists()


def test_help_is_quick_and_complete(without_jax):
  begun = time.monotonic()
  out, _ = start('--help', **without_jax).communicate(timeout=60)
  assert time.monotonic() - begun < 3
  assert {'--prompt', '--prompts', '--seconds', '--seed', '--output', '--checkpoint', '--config',
          '--profile', '--profile_first', '--profile_blocks', '--[no]overwrite', '--[no]resume',
          '--[no]save_latents'} <= set(out.replace(':', ' ').split())


def test_the_config_offers_every_choice():
  config = sample_config.get_config()
  assert set(config.cache) == set(cache_choices())
  assert set(config.sampler) == set(SamplerSpec.__dataclass_fields__)
  spec = build(SampleSpec, config)
  assert (spec.chosen('cache'), spec.chosen('sampler')) == ({}, {})
  config.cache.top_k = 3
  config.sampler.steps = (1000.0,)
  assert build(SampleSpec, config).chosen('cache') == {'top_k': 3}
  assert build(SampleSpec, config).chosen('sampler') == {'steps': (1000.0,)}


# --- a whole run ---------------------------------------------------------------------------------


def test_files_of_a_run(finished):
  directory, result, _ = finished
  name = outputs.output_name(0, PROMPT)
  assert {path.name for path in directory.iterdir()} == {
      f'{name}.mp4', f'{name}.json', 'contact_sheet.png', 'metrics.json', 'run.json', 'latents',
      '.lock'}
  assert result.videos == (directory / f'{name}.mp4',)
  assert result.interrupted is None
  assert frames_of(directory).shape == (13 + 8 * 16, 32, 48, 3)
  assert len(latents_of(directory)) == 9


def test_the_video_is_that_of_the_python_api(finished, tiny, tmp_path):
  video = tiny.pipeline.sample(PROMPT, seconds=9, seed=5, progress=False)
  stored = Record(finished[0] / 'latents' / '000', 9, {
      'latents': ((1, 4, 4, 6, 4), 'float32'), 'selected': ((2, 1, 1), 'int32')}, create=False)
  np.testing.assert_array_equal(np.concatenate([pair[0][0] for pair in stored]), video.latents)
  clip = frames_of(finished[0])
  assert np.corrcoef(clip.ravel(), video.frames.ravel())[0, 1] > 0.95


def test_measurements(finished, tiny):
  metrics = read(finished[0] / 'metrics.json')
  assert metrics['status'] == 'finished'
  assert metrics['rollout'] == 'stream'
  assert (metrics['blocks'], metrics['frames'], metrics['videos']) == (9, 141, 1)
  assert metrics['seconds_of_video'] == 141 / 16
  assert (metrics['sampled_blocks'], metrics['replayed_blocks']) == (9, 0)
  # L=2 layers, N=2 heads of 12, float32: 384 bytes a token; 4x2x3=24 tokens a block, 2 compressed.
  assert metrics['cache_bytes'] == metrics['predicted_cache_bytes'] == {
      'sink': 24 * 384, 'archive': 2 * 2 * 384, 'pending': 2 * 384, 'recent': 24 * 384,
      'key_sums': 2 * 2 * 2 * 12 * 4}
  assert metrics['cache_bytes_constant'] is True
  assert metrics['context_bytes'] == (24 + 24 + 2) * 384 / 2  # of one layer
  assert metrics['compilations_after_block_1'] == 0
  # Programs are shared within a process: one for pictures may have been added by another test.
  assert set(metrics['compile_seconds_of']) - {'picture'} == {
      'text', 'init', 'denoise', 'first', 'steady', 'switch'}
  assert metrics['seconds_per_block']['early'] is None  # fewer than 20 blocks
  assert 0 < metrics['seconds_per_block']['median'] < 10
  assert metrics['peak_memory_bytes'] > 50e6
  assert metrics['estimate']['blocks'] == 9
  assert metrics['versions']['jax'] == jax.__version__


def test_the_estimate_comes_first_and_says_what_it_is_based_on(finished):
  said = '\n'.join(finished[2])
  assert 'estimate: memory' in said
  assert 'archive 0.00154 MB' in said
  assert 'for 9 blocks, from a timed trial block' in said
  assert said.index('estimate: time') < said.index('wrote 1 video')


def test_sidecar(finished, tiny):
  sidecar = sidecar_of(finished[0])
  assert sidecar['texts'] == ['a white seven ', ' a red three']
  assert sidecar['text_of_block'] == [0] * 4 + [1] * 5
  assert (sidecar['seed'], sidecar['blocks'], sidecar['status']) == (5, 9, 'finished')
  assert sidecar['config']['cache']['top_k'] == 1
  assert sidecar['config']['sampler']['steps'] == [1000.0, 500.0]
  assert sidecar['model'] == {name: outputs.file_digest(tiny.directory / name)
                              for name in ('model.json', 'model.safetensors')}


def test_late_over_early_is_a_ratio_of_medians():
  measured = meter.Meter(meter.CompileCounter())
  state = type('State', (), {})()
  measured_sizes = {'sink': 1}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(meter, 'partition_bytes', lambda state: dict(measured_sizes))
    for number in range(120):
      seconds = 2.0 if number < 40 else 3.0
      measured.add(number, 100.0 if number % 10 == 0 else seconds, state, replayed=number < 15)
    assert measured.to_json()['cache_bytes_constant'] is True
    measured_sizes['sink'] = 2
    measured.add(120, 1.0, state, replayed=False)
  result = measured.to_json()
  assert result['seconds_per_block']['early'] == 2.0
  assert result['seconds_per_block']['late'] == 3.0
  assert result['seconds_per_block']['late_over_early'] == 1.5
  assert (result['sampled_blocks'], result['replayed_blocks']) == (106, 15)
  assert result['cache_bytes_constant'] is False
  assert result['compilations_after_block_1'] is None  # the counter was never switched on


def test_compilations_are_really_counted(monkeypatch):
  monkeypatch.setattr(meter, 'partition_bytes', lambda state: {})
  with meter.CompileCounter() as counter:
    function = jax.jit(lambda x: x * 3 + 1)
    argument = np.ones(11, np.float32)
    assert (counter.count, counter.works) == (0, True)
    function(argument)
    assert counter.count == 1
    function(argument)
    assert counter.count == 1
    measured = meter.Meter(counter)
    for number in range(4):
      if number == 3:
        function(np.ones(12, np.float32))  # another shape
      measured.add(number, 1.0, None, replayed=False)
    assert measured.to_json()['compilations_after_block_1'] == 1
  function(np.ones(13, np.float32))
  assert counter.count == 2


# --- refusals before any work --------------------------------------------------------------------


@pytest.fixture
def no_compiling(monkeypatch):
  """Fails a test that gets as far as compiling."""
  def refuse(*unused):
    raise AssertionError('work was begun')
  monkeypatch.setattr(job, '_prepare', refuse)


def run(tiny, directory, request=REQUEST, spec=SPEC, **options):
  return job.run(request, spec, directory, source=ModelSource(tiny.directory), **options)


def test_existing_files_are_never_replaced_unasked(loaded, finished, no_compiling, tmp_path):
  directory = tmp_path / 'run'
  shutil.copytree(finished[0], directory)
  before = {path: path.stat().st_mtime_ns for path in directory.rglob('*.*')
            if path.name != '.lock'}
  with pytest.raises(outputs.OutputExists, match=r'--resume continues .* --overwrite starts'):
    run(loaded, directory)
  (directory / 'run.json').unlink()
  with pytest.raises(outputs.OutputExists, match=r'\.mp4 exists already; pass --overwrite'):
    run(loaded, directory)
  for path in directory.glob('*.*'):
    if path.name != '.lock':
      path.unlink()
  with pytest.raises(outputs.OutputExists, match='holds latents already'):
    run(loaded, directory)
  assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.exists())


def test_overwriting_leaves_alone_what_is_not_its_own(finished, tmp_path):
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  (tmp_path / 'latents' / '2024').mkdir()
  (tmp_path / 'latents' / '2024' / 'mine').write_text('')
  (tmp_path / 'mine.mp4').write_text('')
  files.clear(tmp_path, files.video_names(REQUEST), 1)
  assert {path.name for path in tmp_path.rglob('*')} == {
      f'{outputs.output_name(0, PROMPT)}.mp4', 'latents', '2024', 'mine', 'mine.mp4', '.lock'}


def test_unusable_directories(loaded, no_compiling, tmp_path):
  (tmp_path / 'file').write_text('')
  for bad in (tmp_path / 'file', tmp_path / 'file' / 'below', '/proc/nothing'):
    with pytest.raises(outputs.NotWritable, match='cannot write into'):
      run(loaded, bad)
  with outputs.claim_directory(tmp_path / 'run'):
    with pytest.raises(outputs.DirectoryInUse, match='is in use by process'):
      run(loaded, tmp_path / 'run')
  (tmp_path / 'run' / f'{outputs.output_name(0, PROMPT)}.mp4').mkdir()
  with pytest.raises(outputs.NotWritable, match='is a directory or a link'):
    run(loaded, tmp_path / 'run', overwrite=True)


def test_impossible_requests(loaded, no_compiling, tmp_path):
  with pytest.raises(SampleError, match=r'block 4 is never reached, the video has blocks 0..1'):
    run(loaded, tmp_path, Request((PROMPT,), 2.0))
  with pytest.raises(SampleError, match='does not exist'):
    job.run(REQUEST, SPEC, tmp_path, source=ModelSource(tmp_path / 'nowhere'))
  with pytest.raises(SampleError, match='cannot be selected from an archive'):
    run(loaded, tmp_path, spec=SampleSpec(cache={'top_k': 9}))
  shutil.copytree(loaded.directory, tmp_path / 'model')
  model = read(tmp_path / 'model' / 'model.json')
  model['spec']['video']['fps'] = 2000
  (tmp_path / 'model' / 'model.json').write_text(json.dumps(model))
  with pytest.raises(SampleError, match='fps=2000 must be positive and at most 1000'):
    job.run(Request(('a',), 1.0), SPEC, tmp_path / 'run', source=ModelSource(tmp_path / 'model'))


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(('prompt', 'warning'), [
    ('../../x 🎬\0\n', 'pieces outside the vocabulary'), ('seven ' * 2000, 'the rest is ignored')])
def test_unusual_prompts_get_harmless_names(loaded, tmp_path, prompt, warning):
  said = []
  result = run(loaded, tmp_path / 'run', Request((prompt,), 0.5), say=said.append)
  assert warning in '\n'.join(said)
  (video,) = result.videos
  assert video == tmp_path / 'run' / outputs.output_name(0, prompt, '.mp4')
  assert len(read_video(video).pixels) == 13
  assert sidecar_of(tmp_path / 'run')['prompt'] == prompt
  assert [path.name for path in tmp_path.iterdir()] == ['run']


def test_several_videos_in_batches(loaded, monkeypatch, tmp_path):
  """Three videos two at a time; each is the one that its prompt and seed give alone."""
  prompts = ('a white seven', 'a white three', 'a white one')
  monkeypatch.setitem(loaded.pipeline._programs, 2, Rowwise(loaded.pipeline.programs(1), 2))
  monkeypatch.setattr(meter, 'partition_bytes',
                      lambda state: {'rows': len(state) if isinstance(state, list) else 1})
  run(loaded, tmp_path, Request(prompts, 3.0, 7), SampleSpec(batch_size=2, sheet_columns=2))
  metrics = read(tmp_path / 'metrics.json')
  assert (metrics['videos'], metrics['batch'], metrics['sampled_blocks']) == (3, 2, 6)
  assert (metrics['status'], metrics['cache_bytes']) == ('finished', {'rows': 2})
  assert metrics['predicted_cache_bytes']['sink'] == 2 * 24 * 384
  assert {path.name for path in tmp_path.glob('*.png')} == {'contact_sheet-000.png',
                                                            'contact_sheet-001.png'}
  assert not (tmp_path / 'latents').exists()
  for index, prompt in enumerate(prompts):
    name = outputs.output_name(index, prompt)
    assert read(tmp_path / f'{name}.json')['seed'] == 7 + index
    run(loaded, tmp_path / 'alone', Request((prompt,), 3.0, 7 + index), overwrite=True)
    alone = tmp_path / 'alone' / outputs.output_name(0, prompt, '.mp4')
    np.testing.assert_array_equal(read_video(tmp_path / f'{name}.mp4').pixels,
                                  read_video(alone).pixels)


# --- traces ---------------------------------------------------------------------------------------


def trace_files(directory):
  """Of a run: the ends of their names."""
  return sorted(path.name.split('.', 1)[1] for path in directory.rglob('*.*') if path.is_file())


def test_the_command_leaves_a_trace_of_steady_blocks_and_says_where(tiny, tmp_path):
  traced = tmp_path / 'run' / 'trace'
  process = start('--config=configs/digits/sample.py:tiny', f'--checkpoint={tiny.directory}',
                  f'--prompt={PROMPT}', '--seconds=6', f'--output={tmp_path}/run',
                  f'--profile={traced}', '--profile_blocks=2')
  out, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  assert trace_files(traced) == ['trace.json.gz', 'xplane.pb']
  (picture,) = traced.rglob('*.trace.json.gz')
  assert out.splitlines()[-1] == (f'traced blocks 2, 3: xprof --logdir={traced}, or open {picture} '
                                  'in https://ui.perfetto.dev')
  assert read(tmp_path / 'run' / 'metrics.json')['traced_blocks'] == [2, 3]
  (data,) = traced.rglob('*.xplane.pb')
  names = data.read_bytes()
  assert all(name in names for name in (b'denoise_0', b'denoise_1', b'select_blocks', b'decode',
                                        b'compress', b'clean_pass', b'commit'))


def test_nothing_is_traced_unasked(loaded, finished, monkeypatch, tmp_path):
  def refuse(*unused, **options):
    raise AssertionError('something was traced')
  monkeypatch.setattr(jax.profiler, 'start_trace', refuse)
  monkeypatch.setattr(jax.profiler, 'trace', refuse)
  said = []
  run(loaded, tmp_path, say=said.append)
  assert read(tmp_path / 'metrics.json')['traced_blocks'] == []
  assert not [line for line in said if line.startswith('traced') or 'no block was' in line]
  np.testing.assert_array_equal(frames_of(tmp_path), frames_of(finished[0]))


@pytest.fixture
def traces(monkeypatch):
  """Directories in place of traces of them."""
  begun = []

  @contextlib.contextmanager
  def note(directory):
    begun.append(str(directory))
    try:
      yield
    finally:
      begun.append('end')
  monkeypatch.setattr(profile, 'trace', note)
  return begun


@pytest.mark.parametrize(('before', 'first', 'blocks', 'numbers'), [
    (0, 2, 3, [2, 3, 4]), (0, 7, 3, [7, 8]), (5, 2, 9, [7, 8]), (5, 8, 1, [8])])
def test_only_sampled_blocks_after_warm_up_are_traced(loaded, finished, traces, tmp_path, before,
                                                      first, blocks, numbers):
  cut_short(finished, tmp_path / 'run', before)
  said, where = [], str(tmp_path / 'trace')
  run(loaded, tmp_path / 'run', resume=True, save_latents=True, say=said.append,
      trace=TraceSpec(where, first, blocks))
  assert traces == [where, 'end']
  assert read(tmp_path / 'run' / 'metrics.json')['traced_blocks'] == numbers
  assert said[-1].startswith(f'traced block{"s" * (len(numbers) > 1)} '
                             f'{", ".join(map(str, numbers))}: xprof --logdir={where}')
  assert_same_as(finished, tmp_path / 'run')


def test_videos_that_end_before_the_blocks_to_trace_are_refused(loaded, no_compiling, tmp_path):
  with pytest.raises(SampleError, match=r'block 9 is the first to trace, .* blocks 0\.\.8; make'):
    run(loaded, tmp_path / 'short', trace=TraceSpec(tmp_path / 'trace', 9))
  assert not list(tmp_path.iterdir())


def test_too_few_blocks_left_to_trace_are_said(loaded, finished, traces, tmp_path):
  cut_short(finished, tmp_path / 'run', 8)
  said = []
  run(loaded, tmp_path / 'run', resume=True, say=said.append, trace=TraceSpec(tmp_path / 'trace'))
  assert said[-1] == 'note: no block was traced: fewer than 3 were left to sample.'
  assert trace_files(tmp_path / 'trace') == traces == []


def test_a_trace_ends_with_a_run_that_is_stopped(loaded, traces, monkeypatch, tmp_path):
  signal_at(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
  said = []
  run(loaded, tmp_path / 'run', trace=TraceSpec(tmp_path / 'trace'), say=said.append)
  assert traces == [str(tmp_path / 'trace'), 'end']
  assert said[-1].startswith('traced blocks 2, 3: ')


def test_traces_need_a_directory_of_their_own(loaded, no_compiling, tmp_path):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'file').write_text('')
  for place, error, message in (
      ('full', outputs.OutputExists, 'full holds something already; traces need a new directory'),
      ('full/file', outputs.NotWritable, 'cannot write into'),
      ('full/file/below', outputs.NotWritable, 'cannot write into'),
      ('/proc/nothing', outputs.NotWritable, 'cannot write into')):
    with pytest.raises(error, match=message):
      run(loaded, tmp_path / 'run', trace=TraceSpec(tmp_path / place))
  assert not (tmp_path / 'run').exists()


# --- interruptions and resume --------------------------------------------------------------------


def signal_at(monkeypatch, block, action):
  """Does something to the run while it stores a block."""
  append = Record.append

  def acting(self, latents, selected):
    append(self, latents, selected)
    if len(self) == block:
      action()
  monkeypatch.setattr(Record, 'append', acting)
  return append


def assert_same_as(finished, directory):
  np.testing.assert_array_equal(frames_of(directory), frames_of(finished[0]))
  (video,), (truth,) = directory.glob('*.mp4'), finished[0].glob('*.mp4')
  assert video.read_bytes() == truth.read_bytes()
  assert latents_of(directory) == latents_of(finished[0])
  assert sidecar_of(directory) == sidecar_of(finished[0])


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_block_at_hand(loaded, finished, monkeypatch, tmp_path, number,
                                                capfd):
  append = signal_at(monkeypatch, 5, lambda: os.kill(os.getpid(), number))
  said = []
  result = run(loaded, tmp_path, save_latents=True, say=said.append)
  assert result.interrupted == number
  assert f'{number.name}: finishing this block.' in capfd.readouterr().err
  assert f'stopped by {number.name} after block 5 of 9' in said[-1]
  np.testing.assert_array_equal(frames_of(tmp_path), frames_of(finished[0])[:13 + 4 * 16])
  assert (sidecar_of(tmp_path)['status'], sidecar_of(tmp_path)['blocks']) == ('unfinished', 5)
  assert read(tmp_path / 'metrics.json')['status'] == 'unfinished'
  monkeypatch.setattr(Record, 'append', append)
  said.clear()
  again = run(loaded, tmp_path, resume=True, save_latents=True, say=said.append)
  assert again.interrupted is None
  metrics = read(tmp_path / 'metrics.json')
  assert (metrics['sampled_blocks'], metrics['replayed_blocks']) == (4, 5)
  assert metrics['compilations_after_block_1'] == 0
  assert_same_as(finished, tmp_path)
  run(loaded, tmp_path, resume=True, say=said.append)
  assert said[-1].endswith('this run is finished already; nothing to do.')


SLOW_RUN = """
import sys, time
from pf_jax.sampling import job
from pf_jax.sampling.record import Record
from pf_jax.sampling.source import ModelSource
from tests.launch.test_sample import REQUEST, SPEC
append = Record.append
def slowly(self, latents, selected):  # so that there is time to be killed
  append(self, latents, selected)
  time.sleep(0.2)
Record.append = slowly
job.run(REQUEST, SPEC, sys.argv[1], source=ModelSource(sys.argv[2]), save_latents=True)
"""


def test_sigkill_and_resume(loaded, finished, tmp_path):
  """A real process, really killed; another one goes on and makes the very same files."""
  begun = subprocess.Popen(
      [sys.executable, '-c', SLOW_RUN, str(tmp_path), str(loaded.directory)], cwd=ROOT,
      env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
  stored = tmp_path / 'latents' / '000' / 'selected'
  while begun.poll() is None and len(list(stored.glob('[0-9]*.0.0.0'))) < 6:
    time.sleep(0.02)
  with pytest.raises(outputs.DirectoryInUse):
    run(loaded, tmp_path, resume=True)
  begun.kill()
  _, errors = begun.communicate()
  assert begun.returncode == -signal.SIGKILL, errors.decode()
  played = frames_of(tmp_path)  # all but the newest two blocks, at worst
  assert 13 + 3 * 16 <= len(played) < 141
  np.testing.assert_array_equal(played, frames_of(finished[0])[:len(played)])
  assert sidecar_of(tmp_path)['status'] == 'unfinished'
  run(loaded, tmp_path, resume=True, save_latents=True)
  assert read(tmp_path / 'metrics.json')['replayed_blocks'] >= 6
  assert_same_as(finished, tmp_path)


def cut_short(finished, directory, blocks):
  """A copy of the finished run as a kill after `blocks` blocks would leave it."""
  shutil.copytree(finished[0], directory, dirs_exist_ok=True)
  for array in ('latents', 'selected'):
    for chunk in (directory / 'latents' / '000' / array).glob('[0-9]*'):
      if int(chunk.name.split('.')[0]) >= blocks:
        chunk.unlink()
  (sidecar,) = directory.glob('000-*.json')
  sidecar.write_text(sidecar.read_text().replace('"finished"', '"unfinished"'))
  return directory


def test_torn_and_damaged_records_cost_only_their_blocks(loaded, finished, tmp_path):
  cut_short(finished, tmp_path, 7)
  chunks = tmp_path / 'latents' / '000'
  broken = bytearray((chunks / 'latents' / '4.0.0.0.0.0').read_bytes())
  broken[100] ^= 1  # a flipped bit
  (chunks / 'latents' / '4.0.0.0.0.0').write_bytes(broken)
  (chunks / 'selected' / '5.0.0.0').write_bytes(b'')  # torn
  (chunks / 'latents' / '7.0.0.0.0.0.__lock').write_bytes(b'half')  # in the middle of a write
  (tmp_path / 'contact_sheet.png').unlink()
  run(loaded, tmp_path, resume=True, save_latents=True)
  metrics = read(tmp_path / 'metrics.json')
  assert (metrics['sampled_blocks'], metrics['replayed_blocks']) == (5, 4)
  (chunks / 'latents' / '7.0.0.0.0.0.__lock').unlink(missing_ok=True)
  assert_same_as(finished, tmp_path)


def test_a_kill_before_the_first_block_or_after_the_last(loaded, finished, tmp_path):
  early = cut_short(finished, tmp_path / 'early', 0)
  shutil.rmtree(early / 'latents')
  (video,) = early.glob('*.mp4')
  video.write_bytes(b'')
  run(loaded, early, resume=True, save_latents=True)
  assert_same_as(finished, early)
  late = cut_short(finished, tmp_path / 'late', 9)
  run(loaded, late, resume=True, save_latents=True)
  assert read(late / 'metrics.json')['replayed_blocks'] == 9
  assert_same_as(finished, late)


def test_a_second_kill_while_replaying_keeps_the_longer_video(loaded, finished, monkeypatch,
                                                              tmp_path):
  cut_short(finished, tmp_path, 6)
  (video,) = tmp_path.glob('*.mp4')
  before = video.read_bytes()
  add = BatchFiles.add

  def failing(self, frames):
    if self._blocks == 3:
      raise KeyboardInterrupt
    add(self, frames)
  monkeypatch.setattr(BatchFiles, 'add', failing)
  with pytest.raises(KeyboardInterrupt):
    run(loaded, tmp_path, resume=True, save_latents=True)
  assert video.read_bytes() == before
  assert list(tmp_path.glob('*.mp4')) == [video]
  monkeypatch.setattr(BatchFiles, 'add', add)
  run(loaded, tmp_path, resume=True, save_latents=True)
  assert_same_as(finished, tmp_path)


def test_a_full_disk_is_an_error_that_says_how_to_go_on(loaded, finished, monkeypatch, tmp_path):
  def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  append = signal_at(monkeypatch, 4, full)
  with pytest.raises(SampleError, match=r'No space left .* 4 blocks are stored; .* --resume'):
    run(loaded, tmp_path, save_latents=True)
  monkeypatch.setattr(Record, 'append', append)
  run(loaded, tmp_path, resume=True, save_latents=True)
  assert_same_as(finished, tmp_path)


def test_only_the_same_run_is_resumed(loaded, finished, no_compiling, tmp_path):
  cut_short(finished, tmp_path, 6)
  for request, what in ((Request((PROMPT,), 9.0, 6), 'seed was 5, is now 6'),
                        (Request((PROMPT + '!',), 9.0, 5), 'prompts was'),
                        (Request((PROMPT,), 10.0, 5), 'blocks was 9, is now 10')):
    with pytest.raises(SampleError, match=f'another run: .*{what}'):
      run(loaded, tmp_path, request, resume=True)
  with pytest.raises(SampleError, match='cache was'):
    run(loaded, tmp_path, spec=SampleSpec(cache={'sink_blocks': 2}), resume=True)
  (tmp_path / 'run.json').write_text('{"version": 1')
  with pytest.raises(SampleError, match=r'run\.json is missing, damaged'):
    run(loaded, tmp_path, resume=True)


def test_other_versions_are_pointed_out(loaded, finished, monkeypatch, tmp_path):
  cut_short(finished, tmp_path, 6)
  monkeypatch.setattr(job, '_prepare', lambda *unused: (_ for _ in ()).throw(TimeoutError))
  monkeypatch.setattr(meter, 'versions', lambda: meter_versions | {'jax': '99'})
  meter_versions = read(tmp_path / 'run.json')['versions']
  said = []
  with pytest.raises(TimeoutError):
    run(loaded, tmp_path, resume=True, say=said.append)
  assert f'jax was {jax.__version__}, is now 99' in said[0]


def test_overwriting_starts_from_nothing(loaded, finished, tmp_path):
  cut_short(finished, tmp_path, 6)
  run(loaded, tmp_path, overwrite=True, save_latents=True)
  assert read(tmp_path / 'metrics.json')['replayed_blocks'] == 0
  assert_same_as(finished, tmp_path)


def test_resume_of_nothing_starts(loaded, tmp_path):
  run(loaded, tmp_path, Request(('a seven',), 1.0), resume=True)
  assert read(tmp_path / 'metrics.json')['sampled_blocks'] == 1
  assert not (tmp_path / 'latents').exists()


def test_a_record_that_cannot_be_written_is_an_error_that_says_so(tmp_path):
  shapes = {'latents': ((1, 2), 'float32'), 'selected': ((1,), 'int32')}
  record = Record(tmp_path / 'r', 3, shapes)
  record.append(np.ones((1, 2), np.float32), np.ones(1, np.int32))
  assert len(Record(tmp_path / 'r', 3, shapes)) == 1
  with pytest.raises(IndexError, match='outside the 1 finished'):
    record[1]
  with pytest.raises(RecordError, match='cannot be used'):
    Record(tmp_path / 'r', 3, shapes | {'latents': ((1, 3), 'float32')})
  with pytest.raises(RecordError, match='cannot be used'):
    Record(tmp_path / 'none', 3, shapes, create=False)
  assert not (tmp_path / 'none').exists()
  shutil.rmtree(tmp_path / 'r' / 'latents')
  (tmp_path / 'r' / 'latents').write_text('in the way')
  with pytest.raises(RecordError, match='cannot store block 1'):
    record.append(np.ones((1, 2), np.float32), np.ones(1, np.int32))
