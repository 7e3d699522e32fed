"""The glyph classifier: accuracy of the shipped weights, training, files."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import ndimage

from pf_jax.data import digits
from pf_jax.evals import classifier, metrics

WORLD = digits.DigitsWorld()
IDS = WORLD.images('test')
LABELS = digits.digit_labels()[IDS]


@pytest.fixture(scope='module')
def shipped():
  return classifier.load()


def accuracy(model, crops):
  return (classifier.predict(model, crops).argmax(-1) == LABELS).mean()


def test_shipped_weights_read_held_out_glyphs(shipped):
  measured = classifier.held_out_accuracy(shipped.model, WORLD)
  assert measured >= 0.975
  assert measured == pytest.approx(shipped.held_out_accuracy, abs=1e-3)
  assert classifier.WEIGHTS.stat().st_size <= 100_000


def test_soft_and_noisy_glyphs_are_still_read(shipped):
  crops = classifier.located_glyphs(WORLD, IDS)
  soft = ndimage.gaussian_filter(crops, (0, 2, 2))
  noisy = np.clip(soft + 0.05 * np.random.default_rng(0).normal(size=soft.shape), 0, 1)
  assert accuracy(shipped.model, noisy) >= 0.96


def test_what_is_not_the_glyph_is_not_read(shipped):
  """Mutations: the accuracy above is about the glyph, not about something that leaks."""
  crops = classifier.located_glyphs(WORLD, IDS)
  assert accuracy(shipped.model, np.zeros_like(crops)) < 0.15
  assert accuracy(shipped.model, np.roll(crops, 1, axis=0)) < 0.2
  assert accuracy(shipped.model, crops[:, ::-1]) < 0.6
  rgb = np.zeros_like(crops) + np.linspace(0, 1, len(crops))[:, None, None]
  assert accuracy(shipped.model, rgb) < 0.2


def test_predictions_do_not_depend_on_the_batch(shipped):
  crops = classifier.located_glyphs(WORLD, IDS[:70])
  together = classifier.predict(shipped.model, crops)
  alone = np.concatenate([classifier.predict(shipped.model, crops[i:i + 1]) for i in (0, 5, 69)])
  np.testing.assert_allclose(together[[0, 5, 69]], alone, atol=1e-6)
  np.testing.assert_allclose(together.sum(1), 1, atol=1e-5)
  assert classifier.predict(shipped.model, crops[:0]).shape == (0, 10)


def test_other_glyph_sizes_are_resized(shipped):
  world = digits.DigitsWorld(height=64, width=96, glyph_size=48)
  assert classifier.held_out_accuracy(shipped.model, world) >= 0.95


def test_saving_and_loading(tmp_path, shipped):
  path = tmp_path / 'deep' / 'c.safetensors'
  classifier.save(shipped, path)
  loaded = classifier.load(path)
  assert loaded.held_out_accuracy == shipped.held_out_accuracy
  crops = classifier.located_glyphs(WORLD, IDS[:8])
  np.testing.assert_array_equal(classifier.predict(loaded.model, crops),
                                classifier.predict(shipped.model, crops))
  assert [p.name for p in path.parent.iterdir()] == ['c.safetensors']


def test_files_that_do_not_fit(tmp_path):
  from safetensors.numpy import save_file
  with pytest.raises(FileNotFoundError, match=r'python -m launch.train_classifier'):
    classifier.load(tmp_path / 'none')
  save_file({'conv1': np.zeros((3, 3, 1, 4), np.float16)}, tmp_path / 'odd')
  with pytest.raises(ValueError, match='does not hold a glyph classifier'):
    classifier.load(tmp_path / 'odd')


def test_augmented_glyphs_stay_in_range_and_in_place():
  spec = classifier.TrainSpec(noise=0.0, fade=0.0, shift=1, blurs=(0.0, 2.0))
  glyphs = classifier.located_glyphs(WORLD, IDS[:4])
  bank = jnp.asarray(classifier._blurred_bank(glyphs, spec))
  np.testing.assert_allclose(bank[0, :, 1:-1, 1:-1], glyphs)
  augment = jax.jit(lambda key: classifier._augment(bank, np.arange(4), key, spec))
  out = augment(jax.random.key(0))
  assert out.shape == (4, 32, 32)
  assert metrics.similarity(np.asarray(out), glyphs, shift=1).diagonal().min() > 0.8


def test_a_short_training_learns_and_the_command_line_repeats_it(tmp_path):
  here = classifier.train(spec=classifier.TrainSpec(steps=60, seed=5))
  assert here.held_out_accuracy > 0.7
  output = tmp_path / 'c.safetensors'
  result = subprocess.run(
      [sys.executable, '-m', 'launch.train_classifier', f'--output={output}', '--steps=60',
       '--seed=5'], capture_output=True, text=True, timeout=100, check=False)
  assert result.returncode == 0, result.stderr
  assert f'held-out accuracy {here.held_out_accuracy:.3f}' in result.stdout
  there = classifier.load(output)
  assert there.held_out_accuracy == pytest.approx(here.held_out_accuracy, abs=1e-4)
  for a, b in zip(jax.tree.leaves(nnx.state(here.model)), jax.tree.leaves(nnx.state(there.model)),
                  strict=True):
    np.testing.assert_array_equal(a, b)
