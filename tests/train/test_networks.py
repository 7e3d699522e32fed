"""Where a distillation takes networks from and leaves them: released files there and back."""

import jax
import numpy as np
import pytest

from configs.wan import model as wan_model
from launch.build import build
from pf_jax import outputs
from pf_jax.models.bundle import ModelSpec
from pf_jax.released import ReleasedWeights
from pf_jax.testing import random_models
from pf_jax.train.networks import ReleasedOrigin
from tests.weights import checkpoints

SPEC = build(ModelSpec, wan_model.get_config('tiny'))


@pytest.fixture(scope='module')
def models():
  return random_models(SPEC, 1)


@pytest.fixture(scope='module')
def wan(models, tmp_path_factory):
  return checkpoints.write_wan(tmp_path_factory.mktemp('weights') / 'Wan2.1', models)


def assert_same(got, wanted):
  jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_what_was_trained_replaces_what_was_released(models, wan, tmp_path):
  origin = ReleasedOrigin(ReleasedWeights(str(wan), SPEC))
  assert_same(origin.vae(), models.vae)
  assert_same(origin.transformer(), models.transformer)
  trained = models.without_text().replaced(
      transformer=jax.tree.map(lambda x: x * 2, models.transformer))
  for step in (1, 2):  # an earlier result is replaced
    origin.save(tmp_path / 'model', trained, {'sampler': {'shift': 5.0}}, {'step': step})
  again = ReleasedOrigin(ReleasedWeights(
      str(wan), SPEC, transformer=str(tmp_path / 'model'),
      compressor=str(tmp_path / 'model' / 'compressor' / 'compressor.safetensors')))
  assert_same(again.transformer(), trained.transformer)
  assert_same(again.compressor(), models.compressor)
  assert_same(again.vae(), models.vae)
  # Another transformer and a compressor; the text encoder is the same.
  assert 'compressor/compressor.safetensors' in set(again.digests()) - set(origin.digests())
  own, other = ({digest for name, digest in source.digests().items()
                 if name.startswith('transformer/')} for source in (origin, again))
  assert own
  assert other
  assert not own & other
  assert again.text_digests() == origin.text_digests()
  assert not set(origin.digests()) & set(origin.text_digests())


def test_nothing_else_is_replaced(models, wan, tmp_path):
  (tmp_path / 'notes.txt').write_text('mine')
  origin = ReleasedOrigin(ReleasedWeights(str(wan), SPEC))
  with pytest.raises(outputs.NotWritable, match=r'holds notes\.txt'):
    origin.save(tmp_path, models.without_text(), {}, {})
  assert (tmp_path / 'notes.txt').read_text() == 'mine'
