"""What a dry run counts; it refuses what the run would refuse, and loads and writes nothing."""

import dataclasses
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image

from configs.wan import sampling
from launch.build import build
from pf_jax.models.bundle import ModelSpec
from pf_jax.released import ReleasedWeights
from pf_jax.request import Request
from pf_jax.sampling import budget, job
from pf_jax.sampling.beginning import Beginning
from pf_jax.sampling.config import SampleSpec
from pf_jax.sampling.dry_run import dry_run
from pf_jax.sampling.plan import SampleError, make_plan
from pf_jax.sampling.source import ModelSource
from pf_jax.testing import random_models
from pf_jax.types import tree_bytes
from pf_jax.weights import hub, networks
from tests.sampled import loaded_fixture, tiny_fixture  # noqa: F401 (found by pytest)
from tests.weights import checkpoints, hostile

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = '--config=configs/wan/t2v_1_3b.py'
TINY = sampling.get_config('1_3b', frames=4, tiny=True)
MODEL = build(ModelSpec, TINY.model)
SPEC = build(SampleSpec, {name: TINY[name] for name in TINY if name != 'model'})
REQUEST = Request(('a white seven',), 4.0)
MEMORY = 10**9


def plan_of(source=None, request=REQUEST, **options):
  said = []
  got = dry_run(request, SPEC, source or ModelSource(model=MODEL), say=said.append,
                **{'memory': MEMORY, **options})
  return got, said


def test_dry_run_counts_the_full_size_and_refuses_what_cannot_fit():
  done, switches, small = hostile.launch('sample', [
      [CONFIG, f'--prompt={prompt}', '--dry_run', f'--memory_gb={memory}']
      for prompt, memory in (('a', 141), ('a | 3: b | 9: c', 141), ('a', 12))])
  assert done.code == 0, done.err
  lines = {line.rsplit('  ', 1)[0].strip(): line for line in done.out.splitlines()}
  # 6,240 tokens a block, 184,320 bytes a token over all layers; 182 tokens a compressed block.
  for name, size in (('cache: sink', 2 * 6240 * 184_320), ('cache: recent', 6240 * 184_320),
                     ('cache: archive', 128 * 182 * 184_320),
                     ('packed context of one layer', 21_632 * 184_320 / 30),
                     ('transformer (1,418,996,800 parameters)', 2_873_1e5),
                     ('text (5,680,910,336 parameters)', 11_362_2e5)):
    assert f'{size / 1e9:.4f} GB' in lines[name], lines[name]
  assert '27,872 keys per query from block 19 on' in done.out
  assert "if the programs' scratch stays below 127.7 GB" in done.out
  # 512 rows x 184,320 bytes over all layers, for each of three texts.
  (line,) = (line for line in switches.out.splitlines() if line.startswith('text keys/values'))
  assert line.endswith(f'{3 * 512 * 184_320 / 1e9:.4f} GB'), line
  assert small.code == 1
  assert small.err.startswith('error: 13.3 GB are needed, the device has 12.0 GB; lower cache.')
  # 120 blocks of 4 x 60 x 104 x 16 float32 and 30 x 16 selected numbers; 0.3 bits a pixel.
  assert f'{120 * (4 * 99_840 * 4 + 4 * 480) / 1e9:.4f} GB' in lines['on disk: latents']
  size = 1917 * 480 * 832 * 0.3 / 8
  assert f'{size / 1e9:.4f} GB' in lines['on disk: videos, about (content decides)']


def test_the_numbers_add_up():
  got, _ = plan_of()
  models = random_models(MODEL, 0)
  assert got.networks == {name: tree_bytes(getattr(models, name)) for name in got.networks}
  assert got.video_networks == sum(got.networks.values()) - got.networks['text']
  assert got.begin_phase == got.video_networks + got.encoder
  assert got.video_phase == got.video_networks + sum(got.cache.values()) + (
      got.decoder + got.kept + got.text + got.context)
  with_scratch = dataclasses.replace(got, scratch=12345)  # which holds the packed context
  assert with_scratch.video_phase == got.video_phase - got.context + 12345
  assert got.disk == got.latents_file + got.videos_file
  three, _ = plan_of(request=Request(('a', 'b', 'c'), 4.0))
  assert three.disk == pytest.approx(3 * got.disk, abs=2)
  assert three.cache == got.cache, 'one video at a time'
  finer = make_plan(REQUEST, dataclasses.replace(SPEC, quality=12), ModelSource(model=MODEL),
                    ROOT).budget()
  assert finer.videos_file == pytest.approx(2 * got.videos_file, abs=1)


@pytest.mark.parametrize(('change', 'remedy'), [
    (dict(networks={'text': 9, 'vae': 1}), 'bfloat16 for the text encoder'),
    (dict(networks={'text': 1, 'vae': 9}), 'bfloat16 for the networks'),
    (dict(cache={'archive': 9}), 'lower cache.mid_capacity'),
    (dict(scratch=9), "lower the picture's size or batch_size"),
    (dict(text=9), 'fewer prompt switches')])
def test_the_remedy_is_for_what_takes_most(change, remedy):
  nothing = budget.Budget({}, {'text': 0, 'vae': 0}, {}, 0, 0, 0, 0, 0, 0, 0, 0)
  large = dataclasses.replace(nothing, **change)
  large.check(large.peak, 'the device')
  with pytest.raises(budget.DoesNotFit, match=remedy):
    large.check(large.peak - 1, 'the device')


def test_what_the_run_would_refuse(tmp_path, monkeypatch):
  with pytest.raises(SampleError, match=r'block 9 is never reached, the video has blocks 0\.\.3'):
    plan_of(request=Request(('a | 9: b',), 4.0))
  with pytest.raises(SampleError, match=r'nothing\.png'):
    plan_of(beginning=Beginning(str(tmp_path / 'nothing.png'), 'image'))
  with pytest.raises(SampleError, match=r"target='h3' is unknown; use one of h200"):
    plan_of(target='h3')
  disk = types.SimpleNamespace(free=100)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: disk)
  with pytest.raises(budget.DoesNotFit, match=r'about 0\.00 GB of files are expected .* free'):
    plan_of(output=tmp_path / 'not' / 'yet')
  assert not list(tmp_path.iterdir())


def test_weights_are_compared_by_their_headers(tmp_path, monkeypatch):
  monkeypatch.setattr(networks, 'fill', lambda *a, **k: pytest.fail('was read'))
  wan = checkpoints.write_wan(tmp_path / 'Wan2.1', random_models(MODEL, 1))
  _, said = plan_of(ModelSource(weights=ReleasedWeights(str(wan), MODEL)))
  assert sum(line.startswith('reads ') for line in said) == 5
  deeper = dataclasses.replace(MODEL, transformer=dataclasses.replace(
      MODEL.transformer, num_layers=3))
  with pytest.raises(SampleError, match=r'does not fit the transformer: 2\d missing'):
    plan_of(ModelSource(weights=ReleasedWeights(str(wan), deeper)))


def test_weights_of_the_hub_are_not_downloaded(monkeypatch):
  def download(*unused, local_files_only, **options):
    assert local_files_only
    raise OSError

  hub._snapshot.cache_clear()
  library = types.ModuleType('huggingface_hub')
  library.snapshot_download = download
  monkeypatch.setitem(sys.modules, 'huggingface_hub', library)
  address = f'hub:owner/name@{"0" * 40}'
  _, said = plan_of(ModelSource(weights=ReleasedWeights(address, MODEL)))
  assert said[0] == f'{address} is not on this machine yet. Sizes are those of the config.'


def test_a_picture_is_read(tmp_path):
  Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(tmp_path / 'a.png')
  _, said = plan_of(beginning=Beginning(str(tmp_path / 'a.png'), 'image'))
  assert any(line.startswith('a.png: 48x40') for line in said)


def test_scratch_that_does_not_fit_is_refused_after_compiling(loaded, tmp_path, monkeypatch):
  source = ModelSource(loaded.directory)
  request, spec = Request(('a white seven',), 2.0), SampleSpec()
  before = make_plan(request, spec, source, tmp_path).budget()
  scratch = loaded.pipeline.programs(1).scratch_bytes
  assert scratch > before.context
  for memory, fits in ((before.peak, False), (before.peak + scratch, True)):
    monkeypatch.setattr(budget, 'device_memory', lambda memory=memory: (memory, 'the device'))
    if fits:
      job.run(request, spec, tmp_path, source=source, say=str)
    else:
      with pytest.raises(budget.DoesNotFit, match=r'the device has 0\.0 GB'):
        job.run(request, spec, tmp_path, source=source, say=str)
      assert [path.name for path in tmp_path.iterdir()] == ['.lock']
