"""A tiny model on disk and its compiled pipeline, shared by the tests of sampling."""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax import pipeline as pipeline_lib
from pf_jax.models import bundle
from pf_jax.models.bundle import Models
from pf_jax.pipeline import Pipeline
from pf_jax.rollout.stream import Programs
from pf_jax.testing import tiny_model_spec
from pf_jax.weights import package

CHOICES = {'cache': {'sink_blocks': 1, 'recent_blocks': 1, 'top_k': 1, 'mid_capacity': 2},
           'sampler': {'steps': [1000.0, 500.0]}}


def random_models(seed: int = 0) -> Models:
  """Random parameters of a size that keeps pictures varied, drawn without compiling anything."""
  rng = np.random.default_rng(seed)

  def draw(leaf):
    fan_in = max(int(np.prod(leaf.shape[-5:-1])), 1)
    return jnp.asarray(rng.standard_normal(leaf.shape) * (1.5 / fan_in**0.5), leaf.dtype)

  return jax.tree.map(draw, bundle.shapes(tiny_model_spec()))


@dataclasses.dataclass
class Tiny:
  """The model directory and its pipeline."""

  directory: pathlib.Path
  pipeline: Pipeline


_made: list[Tiny] = []


def make_tiny(root: pathlib.Path) -> Tiny:
  """Saves and compiles the model."""
  directory = package.save_model(root / 'model', random_models(), choices=CHOICES)
  pipeline = pipeline_lib.load(directory)
  pipeline.programs(1)
  return Tiny(directory, pipeline)


@pytest.fixture(scope='session', name='tiny')
def tiny_fixture(tmp_path_factory):
  # An imported fixture is set up once per module; the model is made once per process.
  if not _made:
    _made.append(make_tiny(tmp_path_factory.mktemp('tiny')))
  return _made[0]


@pytest.fixture(name='loaded')
def loaded_fixture(tiny, monkeypatch):
  """Jobs in this process use the compiled pipeline, if they ask for its model unchanged."""
  load = pipeline_lib.load

  def shared(checkpoint=None, *, cache=None, sampler=None):
    # Decoding names all choices of the run, sampling none.
    named = {'cache': dict(cache or {}), 'sampler': dict(sampler or {})}
    same = named == {'cache': {}, 'sampler': {}} or tuple_steps(named) == tiny.pipeline.choices
    if same and checkpoint is not None and pathlib.Path(checkpoint) == tiny.directory:
      return tiny.pipeline
    return load(checkpoint, cache=cache, sampler=sampler)

  monkeypatch.setattr(pipeline_lib, 'load', shared)
  return tiny


def tuple_steps(choices):
  """Choices as they were before they went through JSON."""
  sampler = choices['sampler']
  return choices | {'sampler': sampler | {'steps': tuple(sampler.get('steps', ()))}}


class Rowwise:
  """Programs of a batch that run those of a single video row by row, so nothing is compiled."""

  def __init__(self, single: Programs, batch: int):
    self.single, self.batch = single, batch
    self.compile_seconds, self.scratch_bytes = {'rows': 0.0}, 0

  def _each(self, function, *arguments):
    return [function(*(argument[row] for argument in arguments)) for row in range(self.batch)]

  def text_keys_values(self, rows):
    return self._each(self.single.text_keys_values, rows[:, None])

  def start(self):
    return [self.single.start() for _ in range(self.batch)]

  def denoise(self, state, text, keys):
    rows = self._each(self.single.denoise, state, text, keys[:, None])
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows], 1)

  def finish(self, index, state, latents, selected, text):
    selected = np.moveaxis(np.asarray(selected), 1, 0)[:, :, None]
    rows = self._each(lambda *parts: self.single.finish(index, *parts), state,
                      np.asarray(latents)[:, None], selected, text)
    return [row[0] for row in rows], np.concatenate([row[1] for row in rows])


def environment(**more: str) -> dict[str, str]:
  """Of a subprocess that samples."""
  return os.environ | more
