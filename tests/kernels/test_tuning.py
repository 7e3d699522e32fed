"""Tables of tuned sizes, and tuning itself with a fake compiler and a fake clock."""

import dataclasses
import json
import pathlib

import jax
import pytest
from jax.sharding import use_abstract_mesh

from pf_jax.kernels import tuning
from pf_jax.outputs import NotWritable
from tests.kernels.test_platform import CARD


@dataclasses.dataclass(frozen=True)
class Sizes:
  rows: int = 8
  stages: int = 2

  def __post_init__(self):
    if self.rows % 8:
      raise ValueError(f'rows={self.rows} must be a multiple of 8.')


DEFAULT = Sizes()
PROBLEM = tuning.Problem('toy', 'float32 4x4', 'some card', '0.10.2')


@pytest.fixture
def table(monkeypatch, tmp_path):
  """The user's table, not there yet; and a packaged one that is empty."""
  monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / 'deep' / 'tuning.json'))
  monkeypatch.setattr(tuning, 'PACKAGED', tmp_path / 'packaged.json')
  return tmp_path / 'deep' / 'tuning.json'


def write(path, text):
  path.parent.mkdir(exist_ok=True)
  path.write_text(text)
  tuning._known.cache_clear()


def test_what_is_recorded_is_found_again_and_nothing_else(table):
  assert tuning.sizes(PROBLEM, DEFAULT) == DEFAULT
  tuning.record(PROBLEM, Sizes(16, 3), 1e-3)
  tuning.record(PROBLEM._replace(shape='float32 8x8'), Sizes(24), 2e-3)
  assert tuning.sizes(PROBLEM, DEFAULT) == Sizes(16, 3)
  for change in (dict(kernel='other'), dict(shape='bfloat16 4x4'), dict(device_kind='other card'),
                 dict(jax_version='0.12.0')):
    assert tuning.sizes(PROBLEM._replace(**change), DEFAULT) == DEFAULT
  tuning.record(PROBLEM, Sizes(32), 1e-4)  # in place of the older one
  assert tuning.sizes(PROBLEM, DEFAULT) == Sizes(32)
  assert json.loads(table.read_text()) == {
      'format': 'pf_jax tuning', 'version': 1,
      'sizes': {'toy': {'some card': {'0.10.2': {
          'float32 4x4': {'sizes': {'rows': 32, 'stages': 2}, 'seconds': 1e-4},
          'float32 8x8': {'sizes': {'rows': 24, 'stages': 2}, 'seconds': 2e-3}}}}}}
  assert [path.name for path in table.parent.iterdir()] == ['tuning.json']


def test_the_user_s_table_wins_over_the_packaged_one(table):
  tuning.record(PROBLEM, Sizes(16), 1e-3, tuning.PACKAGED)
  assert tuning.sizes(PROBLEM, DEFAULT) == Sizes(16)
  tuning.record(PROBLEM, Sizes(24), 1e-3)
  assert tuning.sizes(PROBLEM, DEFAULT) == Sizes(24)


def test_where_the_user_s_table_is(monkeypatch):
  monkeypatch.setenv(tuning.VARIABLE, '/some/where.json')
  assert tuning.user_path() == pathlib.Path('/some/where.json')
  monkeypatch.delenv(tuning.VARIABLE)
  monkeypatch.setenv('XDG_CACHE_HOME', '/cache')
  assert tuning.user_path() == pathlib.Path('/cache/pf_jax/tuning.json')
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', '/home/me')
  assert tuning.user_path() == pathlib.Path('/home/me/.cache/pf_jax/tuning.json')


def test_the_packaged_table_is_one():
  assert isinstance(tuning.read(tuning.PACKAGED), dict)


def test_the_device_that_is_traced_for():
  here = tuning.Problem.here('toy', '4x4')
  assert (here.device_kind, here.jax_version) == (jax.devices()[0].device_kind, jax.__version__)
  with use_abstract_mesh(CARD):
    assert tuning.Problem.here('toy', '4x4').device_kind == 'some card'


BAD = {
    'cut off': '{"format": "pf_jax tuning", "vers',
    'no text': '\udcff',
    'something else': '{"a": 1}',
    'a list': '[1, 2]',
    'of a later version': '{"format": "pf_jax tuning", "version": 2, "sizes": {}}',
    'not nested': '{"format": "pf_jax tuning", "version": 1, "sizes": {"toy": {"some card": 3}}}',
}


@pytest.mark.parametrize('case', [*BAD, 'a directory'])
def test_what_is_no_table_is_warned_of_once_and_left_alone(table, case):
  if case == 'a directory':
    table.mkdir(parents=True)
    tuning._known.cache_clear()
  else:
    table.parent.mkdir()
    table.write_bytes(BAD[case].encode('utf-8', 'surrogateescape'))
    tuning._known.cache_clear()
  with pytest.warns(UserWarning, match=r'tuning.json .*; move it away, or name .* PF_JAX_TUNING'):
    assert tuning.sizes(PROBLEM, DEFAULT) == DEFAULT
  assert tuning.sizes(PROBLEM, DEFAULT) == DEFAULT  # warnings are errors here
  for write in (lambda: tuning.record(PROBLEM, DEFAULT, 1.0),
                lambda: tuning.tune(PROBLEM, [DEFAULT], pytest.fail, pytest.fail)):
    with pytest.raises(tuning.BadTable, match='move it away'):
      write()
  if case in BAD:
    assert table.read_bytes() == BAD[case].encode('utf-8', 'surrogateescape')


@pytest.mark.parametrize('sizes', [{'rows': 12}, {'rows': '16'}, {'rows': 16.0}, {'columns': 8},
                                   [16], None])
def test_an_entry_that_is_no_use_is_warned_of(table, sizes):
  write(table, json.dumps({'format': tuning.FORMAT, 'version': 1, 'sizes': {'toy': {'some card': {
      '0.10.2': {'float32 4x4': {'sizes': sizes}}}}}}))
  with pytest.warns(UserWarning, match='an entry for toy, float32 4x4, that is no use'):
    assert tuning.sizes(PROBLEM, DEFAULT) == DEFAULT


class Card:
  """Compiles what it can, and takes (rows - 24)^2 + stages seconds for it."""

  def __init__(self):
    self.compiled = []

  def prepare(self, sizes):
    self.compiled.append(sizes)
    if sizes.rows == 32:
      raise MemoryError
    if sizes.stages > 3:
      raise RuntimeError('needs more shared memory\nthan there is')
    return lambda: sizes

  def time(self, ready):
    assert all(run() == sizes for sizes, run in ready.items())
    return {sizes: (sizes.rows - 24)**2 + float(sizes.stages) for sizes in ready}


def test_the_fastest_that_compiles_is_kept(table):
  card, said = Card(), []
  candidates = [DEFAULT, Sizes(24, 3), Sizes(24, 4), Sizes(32), Sizes(24), Sizes(16)]
  assert tuning.tune(PROBLEM, candidates, card.prepare, card.time, say=said.append) == Sizes(24)
  assert card.compiled == candidates
  assert tuning.sizes(PROBLEM, DEFAULT) == Sizes(24)
  assert said == [
      '  Sizes(rows=24, stages=4): skipped: needs more shared memory',
      '  Sizes(rows=32, stages=2): skipped: MemoryError',
      '  Sizes(rows=8, stages=2): 2.580e+02 s', '  Sizes(rows=24, stages=3): 3.000e+00 s',
      '  Sizes(rows=24, stages=2): 2.000e+00 s', '  Sizes(rows=16, stages=2): 6.600e+01 s',
      f'toy, float32 4x4: Sizes(rows=24, stages=2), now in {table}']


def test_nothing_that_compiles_is_said_and_nothing_recorded(table):
  with pytest.raises(tuning.NothingFits, match='none of 2 candidates for toy, float32 4x4, runs on '
                                               'some card'):
    tuning.tune(PROBLEM, [Sizes(32), Sizes(24, 9)], Card().prepare, pytest.fail, say=str)
  assert not table.exists()


def test_no_room_for_a_table_is_said_before_anything_is_compiled(table):
  table.parent.write_text('a file')
  with pytest.raises((NotWritable, tuning.BadTable)):
    tuning.tune(PROBLEM, [DEFAULT], pytest.fail, pytest.fail)
