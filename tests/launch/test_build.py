"""ConfigDicts to dataclasses: every mistake is named, together, with the likely key."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import hypothesis
import pytest
from hypothesis import strategies as st
from ml_collections import ConfigDict

from launch.build import ConfigError, build, nearest
from pf_jax.train.config import OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Inner:
  width: int
  rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
  inner: Inner
  name: str = 'x'
  on: bool = False
  sizes: tuple[int, ...] = ()
  box: tuple[int, float] | None = None
  scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
  mode: Literal['a', 'b'] = 'a'
  anything: Any = None

  def __post_init__(self):
    if self.name == 'bad':
      raise ValueError('name=bad is not allowed; use x.')


GOOD = dict(inner=dict(width=3, rate=1), sizes=[1, 2], box=(1, 2), scale=dict(a=1), on=True)


@pytest.mark.parametrize('wrap', [dict, ConfigDict])
def test_builds_nested_values(wrap):
  got = build(Outer, wrap(GOOD))
  assert got == Outer(Inner(3, 1.0), on=True, sizes=(1, 2), box=(1, 2.0), scale={'a': 1.0})
  assert isinstance(got.inner.rate, float)
  assert isinstance(got.sizes, tuple)


@pytest.mark.parametrize(('change', 'message'), [
    (dict(nmae='x'), r'config\.nmae is unknown \(did you mean name\?\)'),
    (dict(inner=dict(width=3, rte=1.0)), r'config\.inner\.rte is unknown \(did you mean rate\?\)'),
    (dict(inner=dict()), r'config\.inner\.width is missing; wanted int'),
    (dict(inner=3), r'config\.inner=3 is int; wanted a section with the fields of Inner'),
    (dict(inner=dict(width='3')), r"config\.inner\.width='3' is str; wanted int"),
    (dict(inner=dict(width=3.0)), r'config\.inner\.width=3\.0 is float; wanted int'),
    (dict(inner=dict(width=True)), r'width=True is bool; wanted int'),
    (dict(inner=dict(width=1, rate='fast')), r"rate='fast' is str; wanted float"),
    (dict(on=1), r'config\.on=1 is int; wanted bool'),
    (dict(sizes=(1, 'a')), r"config\.sizes\[1\]='a' is str; wanted int"),
    (dict(sizes=4), r'config\.sizes=4 is int; wanted tuple\[int, \.\.\.\]'),
    (dict(box=(1,)), r'config\.box=\(1,\) has 1 entries; wanted tuple\[int, float\]'),
    (dict(scale=dict(a='x')), r"config\.scale\.a='x' is str; wanted float"),
    (dict(mode='c'), r"config\.mode='c' is not one of 'a', 'b'"),
    (dict(name='bad'), r'config: name=bad is not allowed; use x'),
])
def test_mistakes_are_named(change, message):
  with pytest.raises(ConfigError, match=message):
    build(Outer, GOOD | change)


def test_all_mistakes_at_once():
  with pytest.raises(ConfigError) as error:
    build(Outer, dict(inner=dict(wdth=1), nme='x', on='yes'))
  assert len(str(error.value).splitlines()) == 4  # wdth, missing width, nme, on


def test_values_the_dataclass_refuses_carry_their_section():
  with pytest.raises(ConfigError, match=r'config\.train\.optimizer: .*sgd.*use adamw or muon'):
    build(TrainConfig, dict(optimizer=dict(name='sgd')), 'config.train')


def test_nearest_finds_a_leaf_under_the_wrong_parent():
  names = ['config.train.steps', 'config.train.optimizer.learning_rate']
  assert 'config.train.steps?' in nearest('config.train.step', names)
  assert 'learning_rate?' in nearest('config.learning_rate', names)
  assert nearest('config.zzzzzz', ['a']) == ''


junk = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
field_names = st.sampled_from([f.name for cls in (TrainConfig, OptimizerConfig)
                               for f in dataclasses.fields(cls)]) | st.text(max_size=8)


@hypothesis.given(st.dictionaries(field_names, junk, max_size=4))
@hypothesis.settings(max_examples=500, deadline=None)
def test_any_config_builds_or_is_refused_with_its_key(values):
  built, message = None, ''
  try:
    built = build(TrainConfig, values, 'config.train')
  except ConfigError as error:
    message = str(error)
  lines = message.splitlines()
  assert isinstance(built, TrainConfig) or lines
  assert all(line.startswith('config.train') for line in lines)
