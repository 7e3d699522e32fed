"""Self-forcing: the student rolls out its own video, and learns from the last blocks of it.

A step has two halves that run the sampler's own functions:

  generate   no gradient: warm-up blocks, then a window of blocks, as the sampler makes them but for
             the pass at which every block of the window exits. What the last pass of each block saw
             is kept: its noisy input, the selection, the block's latents.
  replay     with gradient: that last pass of every block again, over the same history. Its full
             resolution was kept; what is compressed is computed anew, through the compressor.

History takes no gradient, with one exception: compressed keys/values stay differentiable until
later blocks of the window attend them, which is how the compressor learns. The transformer's own
weights get no gradient from the clean pass, whatever attends its keys/values.

Source: Self-Forcing (exit step, stop-gradient); arXiv:2603.25730 (compressor trained end to end).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from pf_jax import cache as cache_lib
from pf_jax.cache import CacheSpec, LayerCache, PackCache
from pf_jax.diffusion import flow as flow_lib
from pf_jax.diffusion import schedule
from pf_jax.models.bundle import VideoModels
from pf_jax.models.transformer import ContextFn
from pf_jax.rollout import block as block_lib
from pf_jax.rollout import step
from pf_jax.rollout.block import ExitBlock, RolloutSpec, RolloutState
from pf_jax.train import sharding
from pf_jax.types import Array, KeyValues, PyTree


@dataclasses.dataclass(frozen=True)
class SelfForcingSpec:
  """Choices that the paper leaves open.

  Attributes:
    window_blocks: blocks of a rollout that are trained.
    warmup_blocks: most blocks before them; each rollout draws its own number from 0 on. Without
      them a short window hardly ever archives a block that a later one attends.
    beginnings: share of the rollouts that draw no number and have no warm-up: only they train the
      blocks that make something out of nothing, which long warm-ups would hardly ever reach.
    context_noise: noise level at which the window's blocks are remembered: the clean pass sees them
      so noisy, and is told so. They are decoded, compressed and judged clean.

  Raises:
    ValueError: a value out of range.
  """

  window_blocks: int = 5
  warmup_blocks: int = 0
  beginnings: float = 0.0
  context_noise: float = 0.0

  def __post_init__(self):
    if self.window_blocks < 1 or self.warmup_blocks < 0:
      raise ValueError(f'window_blocks={self.window_blocks} must be at least 1 and warmup_blocks='
                       f'{self.warmup_blocks} not negative.')
    if not 0 <= self.beginnings <= 1:
      raise ValueError(f'beginnings={self.beginnings} is a share and must lie within 0..1.')
    if not 0 <= self.context_noise < 1:
      raise ValueError(f'context_noise={self.context_noise} must be at least 0 and below 1.')

  def cache(self, cache: CacheSpec) -> CacheSpec:
    """The sampler's cache with an archive that holds a training rollout and no more."""
    longest = self.warmup_blocks + self.window_blocks
    return dataclasses.replace(cache, mid_capacity=min(
        cache.mid_capacity, max(cache.top_k, longest)))


class WindowBlock(NamedTuple):
  """What is kept of a block; with a leading [n] for a whole window.

  Attributes:
    x_t: [B, F, h, w, C], noisy input of its last pass.
    latents: [B, F, h, w, C], the x0 that the pass predicted.
    lr_latents: [B, f, h', w', C].
    selected: [L, B, K].
  """

  x_t: Array
  latents: Array
  lr_latents: Array
  selected: Array


class _Kept(NamedTuple):
  """What is kept of one block, or of a whole window: see `Window`."""

  blocks: WindowBlock
  full: KeyValues


class Window(NamedTuple):
  """What `replay` needs.

  Attributes:
    cache: before the window's first block.
    blocks: with a leading [n].
    full: [L, B, n, T, N, H], what the cache remembers of the blocks at full resolution.
    sigma: float32 [], noise level of the last pass.
    boundary: [B, 1, h, w, C], the first latent frame as one picture, which is what a model of whole
      clips expects there. A window that begins with the video has it already.
    inside: bool [], whether the window begins inside the video, so that `boundary` differs.
  """

  cache: PackCache
  blocks: WindowBlock
  full: KeyValues
  sigma: Array
  boundary: Array
  inside: Array


def _all(tree: PyTree, axis: int) -> PyTree:
  return jax.tree.map(lambda _: axis, tree)


def state_axes(state: RolloutState) -> PyTree:
  """The axis of the videos in each array of a rollout's state, -1 for none."""
  axes, none = _all(state, 0), _all(state.cache.blocks, -1)
  return dataclasses.replace(axes, cache=PackCache(_all(state.cache.layers, 1), none))


def _kept_axes(kept: _Kept) -> PyTree:
  return _Kept(_all(kept.blocks, 1)._replace(selected=2), _all(kept.full, 1))


def window_axes(window: Window) -> PyTree:
  """The axis of the videos in each array of a window, -1 for none."""
  kept, none = _kept_axes(_Kept(window.blocks, window.full)), _all(window.sigma, -1)
  return Window(PackCache(_all(window.cache.layers, 1), none), kept.blocks, kept.full, none,
                _all(window.boundary, 0), none)


@functools.partial(jax.jit, static_argnames='spec')
def _start(models: VideoModels, keys: Array, *, spec: RolloutSpec) -> RolloutState:
  state = block_lib.init(models, keys.shape[0], spec)
  return sharding.constrain_videos(state, state_axes(state))


@functools.partial(jax.jit, static_argnames='spec')
def _denoise(models: VideoModels, cache: PackCache, text: KeyValues, keys: Array, exit_step: Array,
             *, spec: RolloutSpec) -> ExitBlock:
  return block_lib.denoise_to_exit(models, cache, text, keys, exit_step, spec=spec)


class _Finished(NamedTuple):
  """What `finish_block` leaves.

  Attributes:
    state: the next one.
    low: LR latents of the block.
    full: what the cache remembers of it at full resolution.
    picture: the last one of its first latent frame.
  """

  state: RolloutState
  low: Array
  full: KeyValues
  picture: Array


@functools.partial(jax.jit, static_argnames=('first', 'spec', 'noise'), donate_argnums=1)
def _finish(models: VideoModels, state: RolloutState, latents: Array, selected: Array,
            text: KeyValues, keys: Array, *, first: bool, spec: RolloutSpec, noise: float
            ) -> _Finished:
  number, remembered = state.cache.blocks, None
  if noise:
    draw = len(spec.sampler.steps) + 1  # the passes draw 0 to `steps`
    fresh = block_lib.block_noise(keys, number, draw, latents.shape[1:])
    remembered = flow_lib.add_noise(latents, fresh, noise), noise
  state, pixels = block_lib.finish_block(models, state, latents, selected, text, first=first,
                                         spec=spec, remembered=remembered)
  low = jax.lax.dynamic_index_in_dim(state.recent_lr, number % spec.cache.recent_blocks, axis=1,
                                     keepdims=False)
  picture = 0 if first else models.spec.video.temporal_stride - 1
  state = sharding.constrain_videos(state, state_axes(state))
  return _Finished(state, low, cache_lib.newest_block(state.cache, spec.cache),
                   pixels[:, picture:picture + 1])


@jax.jit
def _encode_picture(models: VideoModels, picture: Array) -> Array:
  return models.vae.encode_first(picture)[0]


@functools.partial(jax.jit, static_argnames='count')
def _room(one: _Kept, *, count: int) -> _Kept:
  def zeros(x: Array, axis: int) -> Array:
    return jnp.zeros((*x.shape[:axis], count, *x.shape[axis:]), x.dtype)

  room = _Kept(jax.tree.map(lambda x: zeros(x, 0), one.blocks),
               jax.tree.map(lambda x: zeros(x, 2), one.full))
  return sharding.constrain_videos(room, _kept_axes(room))


@functools.partial(jax.jit, donate_argnums=0)
def _keep(window: _Kept, one: _Kept, index: Array) -> _Kept:
  put = jax.lax.dynamic_update_index_in_dim
  window = _Kept(jax.tree.map(lambda x, new: put(x, new, index, 0), window.blocks, one.blocks),
                 jax.tree.map(lambda x, new: put(x, new, index, 2), window.full, one.full))
  return sharding.constrain_videos(window, _kept_axes(window))


@jax.jit
def _copy(tree: PyTree) -> PyTree:
  return jax.tree.map(jnp.copy, tree)


def generate(models: VideoModels, text: KeyValues, keys: Array, *, warmup: int, exit_step: int,
             rollout: RolloutSpec, spec: SelfForcingSpec) -> Window:
  """Rolls out videos without gradient, block by block from Python, as `rollout.stream` does.

  Args:
    models: networks of the student.
    text: cross-attention keys/values [L, B, rows, N, H].
    keys: [B] typed random keys, one per video.
    warmup: blocks before the window; they take all passes.
    exit_step: pass at which the blocks of the window end.
    rollout: cache (see `SelfForcingSpec.cache`) and sampler.
    spec: choices of the stage.

  Raises:
    ValueError: no such pass.
  """
  steps = len(rollout.sampler.steps)
  if not 0 <= exit_step < steps:
    raise ValueError(f'{exit_step=} is none of the {steps} passes.')
  state = _start(models, keys, spec=rollout)
  for number in range(warmup + spec.window_blocks):
    if number == warmup:
      start = _copy(state.cache)  # `state` is donated
    trained = number >= warmup  # a block of the window
    made = _denoise(models, state.cache, text, keys, jnp.int32(exit_step if trained else steps - 1),
                    spec=rollout)
    done = _finish(models, state, made.latents, made.selected, text, keys, first=number == 0,
                   spec=rollout, noise=spec.context_noise if trained else 0.0)
    state = done.state
    if trained:
      one = _Kept(WindowBlock(made.x_t, made.latents, done.low, made.selected), done.full)
      if number == warmup:
        kept, boundary = _room(one, count=spec.window_blocks), _encode_picture(models, done.picture)
      kept = _keep(kept, one, jnp.int32(number - warmup))
  return Window(start, kept.blocks, kept.full, jnp.float32(rollout.sampler.sigmas[exit_step]),
                boundary, jnp.asarray(warmup > 0))


def programs(models: VideoModels, videos: int, mesh: Mesh | AbstractMesh, *, rollout: RolloutSpec,
             spec: SelfForcingSpec
             ) -> list[tuple[str, Callable, tuple[PyTree, ...], tuple[int, ...]]]:
  """What `generate` runs for every block, for memory plans.

  Args:
    models: shapes.
    videos: rolled out at once.
    mesh: that they are split over.
    rollout: cache and sampler.
    spec: choices of the stage.

  Returns:
    Name, function, shapes of the arguments after `models` with shardings, and the positions (among
    all arguments) of donated ones.
  """
  shapes = block_lib.input_shapes(models, videos, rollout)

  def split(tree: PyTree, axes: PyTree) -> PyTree:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                        tree, sharding.video_shardings(tree, axes, mesh))

  state = split(shapes.state, state_axes(shapes.state))
  text, keys = split(shapes.text, _all(shapes.text, 1)), split(shapes.keys, 0)
  latents, selected = split(shapes.latents, 0), split(shapes.selected, 1)
  exit_step = jax.ShapeDtypeStruct((), jnp.int32)
  denoise = functools.partial(_denoise, spec=rollout)
  finish = functools.partial(_finish, first=False, spec=rollout,
                             noise=spec.context_noise)
  return [('denoise a block', denoise, (state.cache, text, keys, exit_step), ()),
          ('decode, compress, remember it', finish, (state, latents, selected, text, keys), (1,))]


def replay(models: VideoModels, text: KeyValues, window: Window, *, rollout: RolloutSpec) -> Array:
  """The window's blocks once more, differentiably.

  Args:
    models: networks of the student; gradients reach the transformer (through each block's own last
      pass) and the compressor (through the compressed blocks that later ones attend).
    text: cross-attention keys/values [L, B, rows, N, H].
    window: from `generate` with the same networks.
    rollout: as there.

  Returns:
    x0 [n, B, F, h, w, C], the same values as the sampled blocks.
  """
  window = jax.lax.stop_gradient(window)
  still = models.replaced(transformer=jax.lax.stop_gradient(models.transformer))
  count, batch = window.blocks.x_t.shape[:2]
  # All at once: convolutions inside a scan are very slow on a CPU.
  merged = jax.tree.map(lambda x: x.reshape(count * batch, *x.shape[2:]),
                        (window.blocks.latents, window.blocks.lr_latents))
  tokens, positions = still.compress(*merged)
  tokens = tokens.reshape(count, batch, *tokens.shape[1:])
  past = _Past(window, rollout.cache)

  def body(memory: LayerCache, inputs: tuple[Array, WindowBlock, Array]):
    number, block, compressed_tokens = inputs
    context_fn = past.context_fn(number)
    timesteps = jnp.broadcast_to(schedule.timestep(window.sigma), block.x_t.shape[:2])
    out = models.transformer(block.x_t, timesteps, text, slices=past.slices(memory, block.selected),
                             context_fn=context_fn)
    # Only the compressed stream of this pass is used; the compiler drops the other one.
    _, compressed, _ = step.clean_pass(
        still, block.latents, (compressed_tokens, positions), jax.lax.stop_gradient(text),
        slices=jax.lax.stop_gradient(past.slices(memory, block.selected)), context_fn=context_fn)
    return (past.commit(memory, number, compressed),
            flow_lib.predict_x0(block.x_t, out.flow, window.sigma))

  body = jax.checkpoint(body, prevent_cse=False)  # a scan keeps the copies apart
  return jax.lax.scan(body, past.memory(), (jnp.arange(count), window.blocks, tokens))[1]


class _Past:
  """The history of each block of a window: constants, and a memory that is carried along.

  The memory is a cache without sink and recent blocks, which are most of it: a scan that is
  differentiated keeps its carry once for every block.
  """

  def __init__(self, window: Window, spec: CacheSpec):
    self._window, self._spec = window, spec
    self._first = window.cache.blocks

  def memory(self) -> LayerCache:
    """What is carried, before the window."""
    return self._without_full(self._window.cache.layers)

  def _without_full(self, layers: LayerCache) -> LayerCache:
    none = KeyValues(jnp.zeros(()), jnp.zeros(()))
    return dataclasses.replace(layers, sink=none, recent=none)

  def _layers(self, memory: LayerCache) -> LayerCache:
    held = self._window.cache.layers
    return dataclasses.replace(memory, sink=held.sink, recent=held.recent)

  def slices(self, memory: LayerCache, selected: Array) -> PyTree:
    """What `context_fn` gets of every layer."""
    return self._layers(memory), self._window.full, selected

  def context_fn(self, number: Array) -> ContextFn:
    """The history of block `number` of the window."""
    blocks = self._first + number
    history = step.selected_history(blocks, cache_lib.layout(blocks, self._spec), self._spec)

    def context_fn(layer_slice: tuple[LayerCache, KeyValues, Array], q: Array):
      layer, full, selected = layer_slice
      layer = cache_lib.with_later_blocks(layer, full, self._first, blocks, self._spec)
      return history((layer, selected), q)

    return context_fn

  def commit(self, memory: LayerCache, number: Array, compressed: KeyValues) -> LayerCache:
    """The memory after block `number`."""
    cache = PackCache(self._layers(memory), self._first + number)
    full = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 2, keepdims=False),
                        self._window.full)
    return self._without_full(cache_lib.commit(cache, full, compressed, spec=self._spec).layers)


def clips_of(x0: Array, window: Window) -> tuple[Array, Array]:
  """A window as a clip for models of whole clips.

  Args:
    x0: [n, B, F, h, w, C].
    window: that it is from.

  Returns:
    [B, n * F, h, w, C], its first latent frame a picture's, and [B, n * F, 1, 1, 1], 1 where it is
    the window's own and 0 where it was replaced.
  """
  count, batch, frames = x0.shape[:3]
  clip = jnp.moveaxis(x0, 0, 1).reshape(batch, count * frames, *x0.shape[3:])
  first = jnp.where(window.inside, window.boundary, clip[:, :1])
  own = jnp.ones((batch, count * frames, 1, 1, 1)).at[:, :1].set(1.0 - window.inside)
  return jnp.concatenate([first, clip[:, 1:]], axis=1), own


@jax.jit
def text_keys_values(models: VideoModels, rows: Array) -> KeyValues:
  """Cross-attention keys/values [L, B, rows, N, H] of text rows [B, rows, D], for `generate`."""
  return models.transformer.text_keys_values(rows)
