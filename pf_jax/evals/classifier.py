"""A small network that reads digits: the judge of identity in the miniature's world.

Input is the coverage of a located glyph (metrics.py), so background, brightness and position are
gone before the network sees anything; it is reduced to 16x16 and passes two convolutions and one
linear layer (10,218 parameters at the default widths). It is trained on the *training* images
only, shifted, blurred, faded and with noise, because sampled glyphs are softer than drawn ones.
Its accuracy on held-out glyphs is measured through the whole chain (draw a clip, locate, crop,
classify) and travels with the weights: it is the ceiling against which sampled videos are read.
"""

import dataclasses
import os
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pf_jax.data import digits
from pf_jax.evals import metrics

INPUT_SIZE = 16
CLASSES = 10
WEIGHTS = pathlib.Path(__file__).parents[1] / 'weights' / 'digits' / 'classifier.safetensors'
_PREDICT_BATCH = 64


class GlyphClassifier(nnx.Module):
  """Two convolutions, each with 2x2 max pooling, and one linear layer."""

  def __init__(self, widths: tuple[int, int] = (16, 32), *, seed: int = 0):
    """Random weights (He); see `load` for the trained ones.

    Drawn with NumPy: nothing is compiled for a network of ten thousand numbers.
    """
    first, second = widths
    rng = np.random.default_rng(seed)

    def normal(*shape):
      deviation = np.sqrt(2 / np.prod(shape[:-1]))
      return nnx.Param(jnp.asarray(deviation * rng.standard_normal(shape), jnp.float32))

    def zeros(size):
      return nnx.Param(jnp.asarray(np.zeros(size, np.float32)))

    self.conv1, self.bias1 = normal(3, 3, 1, first), zeros(first)
    self.conv2, self.bias2 = normal(3, 3, first, second), zeros(second)
    self.head, self.head_bias = normal(second * (INPUT_SIZE // 4)**2, CLASSES), zeros(CLASSES)

  def __call__(self, crops: jax.Array) -> jax.Array:
    """Class logits [B, 10] of coverage crops [B, S, S] of any size S."""
    x = jax.image.resize(crops, (len(crops), INPUT_SIZE, INPUT_SIZE), 'linear')[..., None]
    x = _pool(jax.nn.relu(_conv(x, self.conv1[...]) + self.bias1[...]))
    x = _pool(jax.nn.relu(_conv(x, self.conv2[...]) + self.bias2[...]))
    return x.reshape(len(x), -1) @ self.head[...] + self.head_bias[...]


def _conv(x, kernel):
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME',
                                      dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _pool(x):
  batch, height, width, channels = x.shape
  return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


@jax.jit
def _probabilities(model, crops):
  return jax.nn.softmax(model(crops))


def predict(model: GlyphClassifier, crops: np.ndarray) -> np.ndarray:
  """Class probabilities [N, 10] of coverage crops [N, S, S], in batches of one compiled size."""
  parts = []
  for start in range(0, len(crops), _PREDICT_BATCH):
    part = crops[start:start + _PREDICT_BATCH].astype(np.float32)
    padded = np.pad(part, ((0, _PREDICT_BATCH - len(part)), (0, 0), (0, 0)))
    parts.append(np.asarray(_probabilities(model, padded))[:len(part)])
  return np.concatenate(parts) if parts else np.zeros((0, CLASSES), np.float32)


@dataclasses.dataclass(frozen=True)
class TrainSpec:
  """Recipe of the classifier.

  Attributes:
    steps: optimiser steps.
    batch: glyphs per step.
    learning_rate: peak of a one-cycle cosine schedule.
    weight_decay: of AdamW.
    shift: largest displacement along each axis, pixels at glyph resolution.
    blurs: standard deviations of the Gaussian blurs glyphs are mixed from, pixels.
    noise: standard deviation of the noise added to coverage.
    fade: glyphs are multiplied by 1 - uniform(0, fade).
    seed: of initialisation, order and augmentation.
  """

  steps: int = 1500
  batch: int = 128
  learning_rate: float = 4e-3
  weight_decay: float = 1e-2
  shift: int = 3
  blurs: tuple[float, ...] = (0.0, 1.0, 2.0)
  noise: float = 0.05
  fade: float = 0.3
  seed: int = 0


class Trained(NamedTuple):
  """A trained classifier and what was measured."""

  model: GlyphClassifier
  held_out_accuracy: float
  seconds: float


def train(world: digits.DigitsWorld | None = None, spec: TrainSpec | None = None) -> Trained:
  """Trains a classifier on the world's training glyphs.

  Args:
    world: gives the glyph size and the clips of the final measurement; None: the default.
    spec: the recipe; None: the default.

  Returns:
    The classifier (weights rounded to float16, as they are stored), its accuracy on held-out
    clips and the seconds it took.
  """
  import optax

  started = time.monotonic()
  world, spec = world or digits.DigitsWorld(), spec or TrainSpec()
  ids = world.images('train')
  bank = jnp.asarray(_blurred_bank(located_glyphs(world, ids), spec))
  labels = jnp.asarray(digits.digit_labels()[ids])
  model = GlyphClassifier(seed=spec.seed)
  graph, params = nnx.split(model)
  optimiser = optax.adamw(
      optax.cosine_onecycle_schedule(spec.steps, spec.learning_rate, pct_start=0.1),
      weight_decay=spec.weight_decay)

  def loss_fn(params, crops, targets):
    logits = nnx.merge(graph, params)(crops)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

  # A Python loop, not a scan: inside a scan XLA's CPU convolutions run on one thread, unfused.
  @jax.jit
  def step(params, state, key):
    pick, key = jax.random.split(key)
    chosen = jax.random.randint(pick, (spec.batch,), 0, len(labels))
    grads = jax.grad(loss_fn)(params, _augment(bank, chosen, key, spec), labels[chosen])
    updates, state = optimiser.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = optimiser.init(params)
  for key in jax.random.split(jax.random.key(spec.seed), spec.steps):
    params, state = step(params, state, key)
  params = jax.tree.map(lambda p: p.astype(jnp.float16).astype(jnp.float32), params)
  model = nnx.merge(graph, params)
  return Trained(model, held_out_accuracy(model, world), time.monotonic() - started)


def held_out_accuracy(model: GlyphClassifier, world: digits.DigitsWorld,
                      split: str = 'test') -> float:
  """Share of a split's glyphs that are read correctly, each located in a drawn clip."""
  ids = world.images(split)
  probabilities = predict(model, located_glyphs(world, ids))
  return float((probabilities.argmax(-1) == digits.digit_labels()[ids]).mean())


def located_glyphs(world: digits.DigitsWorld, ids: np.ndarray) -> np.ndarray:
  """Draws each image into a picture and finds it again: coverage [N, S, S].

  Colours and positions vary with the image, so that the chain is exercised as in evaluation.
  """
  base = [world.describe(int(i), 0) for i in ids]
  frames = np.concatenate([
      world.render(dataclasses.replace(attributes, image_id=int(i)), 1).pixels
      for attributes, i in zip(base, ids, strict=True)])
  return metrics.analyse(metrics.to_unit(frames), world.glyph_size)['glyphs']


def _blurred_bank(glyphs: np.ndarray, spec: TrainSpec) -> np.ndarray:
  """Glyphs at every blur, with room to shift: float32 [blurs, N, S + 2 shift, S + 2 shift]."""
  padded = np.pad(glyphs, ((0, 0), (spec.shift,) * 2, (spec.shift,) * 2))
  size = padded.shape[-1]
  distance = np.arange(size)[:, None] - np.arange(size)
  levels = []
  for sigma in spec.blurs:
    kernel = np.exp(-0.5 * (distance / sigma)**2) if sigma else np.eye(size)
    kernel = kernel / kernel[size // 2].sum()
    levels.append(np.einsum('yi,nij,xj->nyx', kernel, padded, kernel, optimize=True))
  return np.stack(levels).astype(np.float32)


def _augment(bank: jax.Array, chosen: jax.Array, key: jax.Array, spec: TrainSpec) -> jax.Array:
  """Shifted, blurred, faded and noisy crops [B, S, S] of the chosen glyphs."""
  size = bank.shape[-1] - 2 * spec.shift
  keys = jax.random.split(key, 4)
  count = len(chosen)
  # Two neighbouring blurs are mixed: any strength in between occurs.
  level = jax.random.uniform(keys[0], (count,)) * (len(spec.blurs) - 1)
  lower = jnp.floor(level).astype(int)
  upper = jnp.minimum(lower + 1, len(spec.blurs) - 1)
  part = (level - lower)[:, None, None]
  mixed = (1 - part) * bank[lower, chosen] + part * bank[upper, chosen]
  corners = jax.random.randint(keys[1], (count, 2), 0, 2 * spec.shift + 1)
  crops = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, (size, size)))(
      mixed, corners)
  gain = 1 - spec.fade * jax.random.uniform(keys[2], (count, 1, 1))
  return jnp.clip(gain * crops + spec.noise * jax.random.normal(keys[3], crops.shape), 0, 1)


def save(trained: Trained, path: str | os.PathLike = WEIGHTS) -> None:
  """Writes the weights (float16) and the measured accuracy, atomically."""
  from safetensors.numpy import save_file

  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  tensors = {name: np.asarray(value, np.float16)
             for name, value in _parameters(trained.model).items()}
  temporary = path.with_name(path.name + '.tmp')
  save_file(tensors, temporary, metadata={
      'held_out_accuracy': f'{trained.held_out_accuracy:.4f}',
      'seconds': f'{trained.seconds:.0f}',
      'data': 'scikit-learn digits (UCI Optical Recognition of Handwritten Digits)',
  })
  temporary.chmod(0o644)  # safetensors writes for the owner only; package data is for everyone
  os.replace(temporary, path)


def load(path: str | os.PathLike = WEIGHTS) -> Trained:
  """Loads a saved classifier with its measured accuracy.

  Raises:
    FileNotFoundError: no such file; says how to make one.
    ValueError: the file holds other tensors.
  """
  from safetensors import safe_open

  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f'There is no classifier at {path}; train one with '
                            '`python -m launch.train_classifier`.')
  with safe_open(path, 'numpy') as file:
    tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    metadata = file.metadata() or {}
  first, second = (tensors[name].shape[-1] if name in tensors else 1 for name in ('conv1', 'conv2'))
  model = GlyphClassifier((first, second))
  wanted = {name: value.shape for name, value in _parameters(model).items()}
  got = {name: value.shape for name, value in tensors.items()}
  if got != wanted:
    raise ValueError(f'{path} does not hold a glyph classifier: {got=}, {wanted=}; train one with '
                     '`python -m launch.train_classifier`.')
  nnx.update(model, {name: jnp.asarray(value, jnp.float32) for name, value in tensors.items()})
  return Trained(model, float(metadata.get('held_out_accuracy', 'nan')),
                 float(metadata.get('seconds', 'nan')))


def _parameters(model: GlyphClassifier) -> dict[str, np.ndarray]:
  names = ('conv1', 'bias1', 'conv2', 'bias2', 'head', 'head_bias')
  return {name: np.asarray(getattr(model, name)[...]) for name in names}
