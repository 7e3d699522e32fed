"""Addresses of the hub, without a network: what is asked of the library, and what is refused."""

import fnmatch
import pathlib
import sys
import types

import pytest

from pf_jax.weights import hub
from pf_jax.weights.hub import Address
from pf_jax.weights.tensors import WeightsError

COMMIT = '37ec512624d61f7aa208f7ea8140a131f93afc9a'


def fake_library(monkeypatch, download):
  module = types.ModuleType('huggingface_hub')
  module.snapshot_download = download
  monkeypatch.setitem(sys.modules, 'huggingface_hub', module)


def test_paths_are_left_alone(monkeypatch):
  fake_library(monkeypatch, lambda *a, **k: pytest.fail('asked the hub'))
  assert hub.local('weights/Wan2.1') == pathlib.Path('weights/Wan2.1')


def test_one_file_is_asked_for_by_its_name(monkeypatch, tmp_path):
  def download(repository, *, revision, allow_patterns):
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

  def download(repository, *, revision, allow_patterns):
    asked.append((repository, revision, allow_patterns))
    (tmp_path / 'vae').mkdir(exist_ok=True)
    return str(tmp_path)

  fake_library(monkeypatch, download)
  assert hub.local(f'hub:Wan-AI/Wan2.1-T2V-1.3B@{COMMIT}') == tmp_path
  assert hub.local(f'hub:Wan-AI/Wan2.1-T2V-1.3B@{COMMIT}/vae') == tmp_path / 'vae'
  assert asked == [
      ('Wan-AI/Wan2.1-T2V-1.3B', COMMIT, list(hub.ALLOWED)),
      ('Wan-AI/Wan2.1-T2V-1.3B', COMMIT, [f'vae/{pattern}' for pattern in hub.ALLOWED])]
  assert not any(pattern.endswith(('.py', '*')) for pattern in hub.ALLOWED)
  with pytest.raises(WeightsError, match=r"there is no 'dit' with weights in that revision"):
    hub.local(f'hub:Wan-AI/Wan2.1-T2V-1.3B@{COMMIT}/dit')


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
