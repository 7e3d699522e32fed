"""Addresses of the hub, without a network: what is asked of the library, and what is refused."""

import fnmatch
import pathlib
import sys
import types

import pytest

from pf_jax.weights import hub, sources
from pf_jax.weights.hub import Address
from pf_jax.weights.tensors import WeightsError

COMMIT = '37ec512624d61f7aa208f7ea8140a131f93afc9a'


@pytest.fixture(autouse=True)
def _forget():
  hub._snapshot.cache_clear()


def fake_library(monkeypatch, download):
  module = types.ModuleType('huggingface_hub')
  module.snapshot_download = download
  monkeypatch.setitem(sys.modules, 'huggingface_hub', module)


def test_paths_are_left_alone(monkeypatch):
  fake_library(monkeypatch, lambda *a, **k: pytest.fail('asked the hub'))
  assert hub.local('weights/Wan2.1') == pathlib.Path('weights/Wan2.1')


def test_one_file_is_asked_for_by_its_name(monkeypatch, tmp_path):
  def download(repository, *, revision, local_files_only, allow_patterns):
    for name in ('checkpoints/self_forcing_dmd.pt', 'checkpoints/ode_init.pt'):
      if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    return str(tmp_path)

  fake_library(monkeypatch, download)
  got = hub.local(f'hub:gdhe17/Self-Forcing@{COMMIT}/checkpoints/self_forcing_dmd.pt')
  assert got == tmp_path / 'checkpoints' / 'self_forcing_dmd.pt'
  assert got.is_file()
  assert not (tmp_path / 'checkpoints' / 'ode_init.pt').exists()


def test_a_pinned_snapshot_of_allowed_files(monkeypatch, tmp_path):
  asked = []

  def download(repository, *, revision, local_files_only, allow_patterns):
    asked.append((repository, revision, allow_patterns, local_files_only))
    (tmp_path / 'vae').mkdir(exist_ok=True)
    return str(tmp_path)

  fake_library(monkeypatch, download)
  assert hub.local(f'hub:Wan-AI/Wan2.1-T2V-1.3B@{COMMIT}') == tmp_path
  assert hub.local(f'hub:Wan-AI/Wan2.1-T2V-1.3B@{COMMIT}/vae') == tmp_path / 'vae'
  assert asked == [
      ('Wan-AI/Wan2.1-T2V-1.3B', COMMIT, list(hub.ALLOWED), False),
      ('Wan-AI/Wan2.1-T2V-1.3B', COMMIT, [f'vae/{pattern}' for pattern in hub.ALLOWED], False)]
  hub.local(f'hub:Wan-AI/Wan2.1-T2V-1.3B@{COMMIT}')
  assert len(asked) == 2, 'the hub is asked once'
  assert not any(pattern.endswith(('.py', '*')) for pattern in hub.ALLOWED)
  with pytest.raises(WeightsError, match=r"there is no 'dit' with weights in that revision"):
    hub.local(f'hub:Wan-AI/Wan2.1-T2V-1.3B@{COMMIT}/dit')


PUBLISHED = {  # what lies beside what, in Wan2.1's own repository and in diffusers'
    'transformer': ['diffusion_pytorch_model.safetensors', 'transformer/config.json',
                    'diffusion_pytorch_model-00001-of-00006.safetensors',
                    'diffusion_pytorch_model.safetensors.index.json',
                    'transformer/diffusion_pytorch_model-00001-of-00002.safetensors',
                    'transformer/diffusion_pytorch_model.safetensors.index.json'],
    'vae': ['Wan2.1_VAE.pth', 'vae/diffusion_pytorch_model.safetensors'],
    'text': ['models_t5_umt5-xxl-enc-bf16.pth', 'text_encoder/model-00001-of-00005.safetensors',
             'text_encoder/model.safetensors.index.json']}


def test_a_network_asks_for_its_own_files():
  for kind in PUBLISHED:
    asked = Address.parse(f'hub:Wan-AI/Wan2.1-T2V-1.3B@{COMMIT}').patterns(sources.patterns(kind))
    for other, names in PUBLISHED.items():
      for name in names:
        assert any(fnmatch.fnmatch(name, p) for p in asked) == (kind == other), (kind, name)


def test_what_must_not_be_downloaded(monkeypatch, tmp_path):
  def download(repository, *, revision, local_files_only, allow_patterns):
    assert local_files_only
    raise OSError('not in the cache')

  fake_library(monkeypatch, download)
  with pytest.raises(hub.NotDownloaded, match='is not on this machine yet'):
    hub.local(f'hub:owner/name@{COMMIT}', download=False)
  fake_library(monkeypatch, lambda *a, **k: str(tmp_path))
  with pytest.raises(hub.NotDownloaded, match="no 'vae' with weights on this machine yet"):
    hub.local(f'hub:owner/other@{COMMIT}/vae', download=False)


@pytest.mark.parametrize(('text', 'message'), [
    ('hub:owner/name@main', r"revision 'main' can move; wanted the full hash"),
    ('hub:owner/name@v1.0', "revision 'v1.0' can move"),
    (f'hub:owner/name@{COMMIT[:12]}', 'can move'),
    ('hub:owner/name', 'is not an address of the hub; wanted hub:owner/name@revision'),
    (f'hub:name@{COMMIT}', 'is not an address'),
    (f'hub:owner/name@{COMMIT}/../../etc', 'is not an address')])
def test_addresses_that_are_refused(text, message):
  with pytest.raises(WeightsError, match=message):
    Address.parse(text)


def test_failures_are_one_line(monkeypatch):
  def download(*unused, **options):
    raise OSError('no route\nto host')

  fake_library(monkeypatch, download)
  with pytest.raises(WeightsError, match=r'could not be downloaded \(OSError: no route\); check'):
    hub.local(f'hub:owner/name@{COMMIT}')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(WeightsError, match=r'needs the package huggingface_hub; install it with'):
    hub.local(f'hub:owner/name@{COMMIT}')
