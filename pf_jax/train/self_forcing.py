"""Self-forcing: the student rolls out its own video, and learns from the last blocks of it.

A step has two halves that run the sampler's own functions:

  generate   no gradient: warm-up blocks, then a window of blocks, as the sampler makes them but for
             the pass at which every block of the window exits. What the last pass of each block saw
             is kept: its noisy input, the selection, the block's latents.
  replay     with gradient: that last pass of every block again, over a history that is rebuilt from
             the kept latents by the clean pass and commit.

History takes no gradient, with one exception: compressed keys/values stay differentiable until
later blocks of the window attend them, which is how the compressor learns. The transformer's own
weights get no gradient from the clean pass, whatever attends its keys/values.

Source: Self-Forcing (exit step, stop-gradient); arXiv:2603.25730 (compressor trained end to end).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pf_jax import cache as cache_lib
from pf_jax.cache import CacheSpec, PackCache
from pf_jax.diffusion import flow as flow_lib
from pf_jax.diffusion import schedule
from pf_jax.models.bundle import VideoModels
from pf_jax.rollout import block as block_lib
from pf_jax.rollout import step
from pf_jax.rollout.block import ExitBlock, RolloutSpec, RolloutState
from pf_jax.types import Array, KeyValues, PyTree


@dataclasses.dataclass(frozen=True)
class SelfForcingSpec:
  """Choices that the paper leaves open.

  Attributes:
    window_blocks: blocks of a rollout that are trained.
    warmup_blocks: most blocks before them; each rollout draws its own number from 0 on. Without
      them a short window hardly ever archives a block that a later one attends.
    context_noise: noise level that the window's blocks are finished with (decoded, compressed,
      remembered), as if they were so; 0 finishes them as they are. They are judged clean.

  Raises:
    ValueError: a value out of range.
  """

  window_blocks: int = 5
  warmup_blocks: int = 0
  context_noise: float = 0.0

  def __post_init__(self):
    if self.window_blocks < 1 or self.warmup_blocks < 0:
      raise ValueError(f'window_blocks={self.window_blocks} must be at least 1 and warmup_blocks='
                       f'{self.warmup_blocks} not negative.')
    if not 0 <= self.context_noise < 1:
      raise ValueError(f'context_noise={self.context_noise} must be at least 0 and below 1.')

  def cache(self, cache: CacheSpec) -> CacheSpec:
    """The sampler's cache with an archive that holds a training rollout and no more."""
    return dataclasses.replace(cache, mid_capacity=max(
        cache.top_k, self.warmup_blocks + self.window_blocks))


class WindowBlock(NamedTuple):
  """What is kept of a block; with a leading [n] for a whole window.

  Attributes:
    x_t: [B, F, h, w, C], noisy input of its last pass.
    x0: [B, F, h, w, C], what that pass predicted.
    latents: [B, F, h, w, C], the same as later blocks remember it.
    lr_latents: [B, f, h', w', C].
    selected: [L, B, K].
  """

  x_t: Array
  x0: Array
  latents: Array
  lr_latents: Array
  selected: Array


class Window(NamedTuple):
  """What `replay` needs.

  Attributes:
    cache: before the window's first block.
    blocks: with a leading [n].
    sigma: float32 [], noise level of the last pass.
    boundary: [B, 1, h, w, C], the first latent frame as one picture, which is what a model of whole
      clips expects there. A window that begins with the video has it already.
    inside: bool [], whether the window begins inside the video, so that `boundary` differs.
  """

  cache: PackCache
  blocks: WindowBlock
  sigma: Array
  boundary: Array
  inside: Array


@functools.partial(jax.jit, static_argnames='spec')
def _start(models: VideoModels, keys: Array, *, spec: RolloutSpec) -> RolloutState:
  return block_lib.init(models, keys.shape[0], spec)


@functools.partial(jax.jit, static_argnames='spec')
def _denoise(models: VideoModels, cache: PackCache, text: KeyValues, keys: Array, exit_step: Array,
             *, spec: RolloutSpec) -> ExitBlock:
  return block_lib.denoise_to_exit(models, cache, text, keys, exit_step, spec=spec)


@functools.partial(jax.jit, static_argnames=('first', 'spec'), donate_argnums=1)
def _finish(models: VideoModels, state: RolloutState, latents: Array, selected: Array,
            text: KeyValues, *, first: bool, spec: RolloutSpec
            ) -> tuple[RolloutState, Array, Array]:
  """The next state, the block's LR latents, and the last picture of its first latent frame."""
  slot = state.cache.blocks % spec.cache.recent_blocks
  state, pixels = block_lib.finish_block(models, state, latents, selected, text, first=first,
                                         spec=spec)
  low = jax.lax.dynamic_index_in_dim(state.recent_lr, slot, axis=1, keepdims=False)
  picture = 0 if first else models.spec.video.temporal_stride - 1
  return state, low, pixels[:, picture:picture + 1]


@jax.jit
def _encode_picture(models: VideoModels, picture: Array) -> Array:
  return models.vae.encode_first(picture)[0]


@jax.jit
def _copy(tree: PyTree) -> PyTree:
  return jax.tree.map(jnp.copy, tree)


@functools.partial(jax.jit, static_argnames='draw')
def _remembered(x0: Array, keys: Array, number: Array, level: Array, *, draw: int) -> Array:
  noise = block_lib.block_noise(keys, number, draw, x0.shape[1:])
  return flow_lib.add_noise(x0, noise, level)


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
  kept: list[WindowBlock] = []
  for number in range(warmup + spec.window_blocks):
    if number == warmup:
      start = _copy(state.cache)  # `state` is donated
    last = exit_step if number >= warmup else steps - 1
    made = _denoise(models, state.cache, text, keys, jnp.int32(last), spec=rollout)
    latents = made.latents
    if spec.context_noise and number >= warmup:
      # The passes draw noise 0 to `steps`.
      latents = _remembered(latents, keys, jnp.int32(number), jnp.float32(spec.context_noise),
                            draw=steps + 1)
    state, low, picture = _finish(models, state, latents, made.selected, text, first=number == 0,
                                  spec=rollout)
    if number >= warmup:
      kept.append(WindowBlock(made.x_t, made.latents, latents, low, made.selected))
    if number == warmup:
      boundary = _encode_picture(models, picture)
  return Window(start, jax.tree.map(lambda *x: jnp.stack(x), *kept),
                jnp.float32(rollout.sampler.sigmas[exit_step]), boundary, jnp.asarray(warmup > 0))


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
  positions, cache_spec = models.spec.compressed_positions, rollout.cache
  # All at once: convolutions inside a scan are very slow on a CPU.
  merged = jax.tree.map(lambda x: x.reshape(count * batch, *x.shape[2:]),
                        (window.blocks.latents, window.blocks.lr_latents))
  tokens, _ = still.compress(*merged)
  tokens = tokens.reshape(count, batch, *tokens.shape[1:])

  def body(cache: PackCache, inputs: tuple[WindowBlock, Array]):
    block, compressed_tokens = inputs
    layout = cache_lib.layout(cache.blocks, cache_spec)
    context_fn = step.selected_history(cache.blocks, layout, cache_spec)
    timesteps = jnp.broadcast_to(schedule.timestep(window.sigma), block.x_t.shape[:2])
    out = models.transformer(block.x_t, timesteps, text, slices=(cache.layers, block.selected),
                             context_fn=context_fn)
    past = jax.lax.stop_gradient(cache.layers)
    full, compressed, _ = step.clean_pass(
        still, block.latents, (compressed_tokens, positions), jax.lax.stop_gradient(text),
        slices=(past, block.selected), context_fn=context_fn)
    cache = cache_lib.commit(cache, jax.lax.stop_gradient(full), compressed, spec=cache_spec)
    return cache, flow_lib.predict_x0(block.x_t, out.flow, window.sigma)

  return jax.lax.scan(jax.checkpoint(body), window.cache, (window.blocks, tokens))[1]


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
