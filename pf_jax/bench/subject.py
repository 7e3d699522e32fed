"""The model that is measured: its networks, sizes, and something to show them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax import cache as cache_lib
from pf_jax import pipeline
from pf_jax.kernels.attention import Blocks
from pf_jax.kernels.quantization import Quantized, quantize
from pf_jax.models import bundle
from pf_jax.models.bundle import ModelSpec, VideoModels
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec, RolloutState
from pf_jax.rollout.stream import Programs
from pf_jax.types import Array, KeyValues, PyTree

PROMPT = 'a white seven drifts right on a teal background'


# Larger arrays repeat themselves: drawing gigabytes takes minutes. The number is a prime, so that
# rows, which are multiples of something, do not repeat each other.
_FRESH = 4_194_301

# From a leaf's path and shape to its mean and standard deviation.
Moments = Callable[[str, tuple[int, ...]], tuple[float, float]]


def draw(shapes: PyTree, seed: int = 0, moments: Moments = lambda path, shape: (0.0, 1.0)
         ) -> PyTree:
  """Arrays of these shapes, random normal numbers; whole ones are 0 and wait to be replaced.

  What is stored in 8 bits is rounded from such numbers, for scales must be positive.

  Args:
    shapes: of arrays.
    seed: of the numbers.
    moments: of each array.
  """
  rng = np.random.default_rng(seed)

  def one(path: tuple, leaf: Any) -> Any:
    if isinstance(leaf, Quantized):
      whole = one(path, jax.ShapeDtypeStruct(leaf.shape, jnp.float32))
      return jax.jit(quantize, static_argnums=1)(whole, leaf.dtype.name)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return jnp.asarray(np.zeros(leaf.shape, leaf.dtype))
    mean, deviation = moments(jax.tree_util.keystr(path), leaf.shape)
    fresh = rng.standard_normal(min(math.prod(leaf.shape), _FRESH), np.float32)
    return jnp.asarray(np.resize((mean + deviation * fresh).astype(leaf.dtype), leaf.shape))

  return jax.tree_util.tree_map_with_path(one, shapes,
                                          is_leaf=lambda x: isinstance(x, Quantized))


def _of_weight(path: str, shape: tuple[int, ...]) -> tuple[float, float]:
  """Moments that keep activations in range."""
  if 'scale' in path or 'gamma' in path:
    return 1.0, 0.1
  if 'kernel' not in path:
    return 0.0, 0.1
  fan_in = shape[1:-1] if 'layers' in path else shape[:-1]  # layers are stacked
  return 0.0, math.prod(fan_in) ** -0.5


def random_weights(model: ModelSpec, seed: int = 0) -> VideoModels:
  """Networks of these sizes with random weights; the text encoder is left out."""
  return draw(bundle.shapes(model).without_text(), seed, _of_weight)


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is measured.

  Attributes:
    models: networks.
    spec: static choices of the rollout.
    rows: text rows [1, rows, D] of the prompt.
    weights: 'packaged' or 'random'.
  """

  models: VideoModels
  spec: RolloutSpec
  rows: Array
  weights: str

  @functools.cached_property
  def programs(self) -> Programs:
    """The rollout's programs for one video, compiled once."""
    return Programs(self.models, 1, self.spec)

  @functools.cached_property
  def text(self) -> KeyValues:
    """Cross-attention keys/values of the prompt, [L, 1, rows, N, H]."""
    return self.programs.text_keys_values(self.rows)

  @property
  def dtype(self) -> str:
    """That the transformer computes in."""
    return self.models.spec.transformer.dtypes.compute

  def state(self, seed: int = 0) -> RolloutState:
    """A rollout's state in the steady state, filled with random numbers."""
    shapes = jax.eval_shape(lambda m: block_lib.init(m, 1, self.spec), self.models)
    state = draw(shapes, seed)
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, blocks=self._blocks))

  def history(self, seed: int = 0) -> tuple[Blocks, ...]:
    """What a block of the steady state attends besides itself, in a cache of one layer."""
    spec = self.spec.cache
    layers = draw(jax.eval_shape(lambda: cache_lib.init(
        dataclasses.replace(spec, num_layers=1), 1)), seed).layers
    view = cache_lib.LayerView(layers, jnp.zeros((), jnp.int32))
    blocks = self._blocks
    return cache_lib.context(view, self.selected(blocks), blocks, cache_lib.layout(blocks, spec),
                             spec=spec)

  @property
  def _blocks(self) -> Array:
    """Committed so far: enough for every partition to be full."""
    return jnp.asarray(self.spec.cache.steady_block + self.spec.cache.mid_capacity, jnp.int32)

  def selected(self, blocks: Array) -> Array:
    """Archived blocks [1, K] from all over a full archive, in time order."""
    ids = np.sort(np.asarray(cache_lib.archive_ids(blocks, self.spec.cache)))
    places = np.linspace(0, max(len(ids) - 1, 0), self.spec.cache.top_k).round().astype(int)
    return jnp.asarray(ids[places], jnp.int32)[None]


def load(model: ModelSpec | None, cache: Mapping[str, Any], sampler: Mapping[str, Any]) -> Subject:
  """The packaged model, or random weights.

  Args:
    model: sizes for random weights; None is the packaged model.
    cache: fields of `CacheSpec` that differ from the model's own choice.
    sampler: fields of `SamplerSpec`, likewise.

  Raises:
    ValueError: choices that contradict each other.
  """
  if model is None:
    packaged = pipeline.load(cache=cache, sampler=sampler)
    rows = jnp.asarray(packaged.prompts([PROMPT]), jnp.float32)
    return Subject(packaged.models, packaged.spec, rows, 'packaged')
  spec = pipeline.rollout_spec(model, {'cache': cache, 'sampler': sampler})
  rows = draw(jax.ShapeDtypeStruct((1, model.text.max_tokens, model.text.width), jnp.float32))
  return Subject(random_weights(model), spec, rows, 'random')
