"""One block of video: denoise it, decode it, remember it.

  denoise_block  reads the cache: select in the first pass, a few steps, x0.
  finish_block   writes it: decode, compress, clean pass, commit.
  sample_block   one after the other.

The halves meet in two small arrays, the block's latents and the selected block numbers. Whoever
kept those can replay `finish_block` alone and gets the very same state (see `stream`).

Source: arXiv:2603.25730, algorithm of the inference loop; Self-Forcing for the clean pass.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pf_jax import cache as cache_lib
from pf_jax.cache import CacheSpec, PackCache
from pf_jax.diffusion import schedule
from pf_jax.diffusion import solver as solver_lib
from pf_jax.models.bundle import ModelSpec, VideoModels
from pf_jax.models.vae import DecoderState
from pf_jax.rollout import step
from pf_jax.types import Array, KeyValues, PyTree


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
  """How a block is denoised.

  Attributes:
    solver: 'euler' for models trained by flow matching, 'renoise' for distilled students.
    steps: unshifted timesteps of the passes.
    shift: timestep shift.

  Raises:
    ValueError: unknown solver or steps that do not fall within (0, 1000].
  """

  solver: solver_lib.Solver = 'euler'
  steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
  shift: float = 5.0

  def __post_init__(self):
    if self.solver not in solver_lib.SOLVERS:
      raise ValueError(f'solver={self.solver!r} is unknown; use one of '
                       f'{", ".join(solver_lib.SOLVERS)}.')
    if self.shift <= 0:
      raise ValueError(f'shift={self.shift} must be positive; Wan2.1 uses 5.')
    schedule.few_step_sigmas(self.steps, self.shift)

  @property
  def sigmas(self):
    """Noise levels of the passes and the final 0, [steps + 1] float64."""
    return schedule.few_step_sigmas(self.steps, self.shift)


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
  """Everything static about a rollout."""

  cache: CacheSpec
  sampler: SamplerSpec = SamplerSpec()


def cache_spec(model: ModelSpec, **choices) -> CacheSpec:
  """A `CacheSpec` whose sizes are the model's; `choices` are its other fields."""
  dit = model.transformer
  return CacheSpec(num_layers=dit.num_layers, num_heads=dit.num_heads, head_dim=dit.head_dim,
                   grid=model.grid, mid_grid=model.mid_grid, mid_offsets=model.mid_offsets,
                   dtype=dit.dtypes.cache, **choices)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutState:
  """Everything that a video carries from block to block; its size never changes.

  Attributes:
    cache: the packed history.
    decoder: the VAE decoder's temporal state.
    recent_latents: [B, R, F, h, w, C] of the recent blocks, slot b % R like the cache's; kept so
      that a prompt switch can recompute their keys and values.
    recent_lr: [B, R, f, h', w', C], their low-resolution latents.
  """

  cache: PackCache
  decoder: DecoderState
  recent_latents: Array
  recent_lr: Array


def init(models: VideoModels, batch: int, spec: RolloutSpec) -> RolloutState:
  """The state before the first block of `batch` videos."""
  video, recent = models.spec.video, spec.cache.recent_blocks
  frames, rows, columns = models.spec.mid_grid
  low = (frames, rows * video.patch[1], columns * video.patch[2], video.latent_channels)
  return RolloutState(
      cache=cache_lib.init(spec.cache, batch),
      decoder=models.vae.init_decoder_state(batch, video.latent_height, video.latent_width),
      recent_latents=jnp.zeros((batch, recent, *video.block_latent_shape)),
      recent_lr=jnp.zeros((batch, recent, *low)))


class InputShapes(NamedTuple):
  """Everything that a block's programs take beside the networks, as `jax.ShapeDtypeStruct`.

  Attributes:
    state: `RolloutState`.
    rows: text rows [B, rows, D] of the prompts.
    text: cross-attention keys/values of them.
    keys: [B] random keys.
    latents: [B, F, h, w, C] of a block.
    selected: [L, B, K].
    picture: [B, 1, h, w, C], a given first latent frame.
  """

  state: PyTree
  rows: PyTree
  text: PyTree
  keys: PyTree
  latents: PyTree
  selected: PyTree
  picture: PyTree


def input_shapes(models: VideoModels, batch: int, spec: RolloutSpec) -> InputShapes:
  """Shapes for `batch` videos; the networks may be arrays or shapes themselves."""
  state = jax.eval_shape(lambda m: init(m, batch, spec), models)
  text_spec = models.spec.text
  rows = jax.ShapeDtypeStruct((batch, text_spec.max_tokens, text_spec.width), jnp.float32)
  text = jax.eval_shape(lambda m, r: m.transformer.text_keys_values(r), models, rows)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
  latents, selected = jax.eval_shape(lambda *given: denoise_block(*given, spec=spec), models,
                                     state.cache, text, keys)
  picture = jax.ShapeDtypeStruct((batch, 1, *latents.shape[2:]), jnp.float32)
  return InputShapes(state, rows, text, keys, latents, selected, picture)


def block_noise(keys: Array, block: Array, number: int, shape: tuple[int, ...]) -> Array:
  """Noise of one block, a pure function of (video's key, block, number): [B, *shape].

  It does not depend on the batch around a video nor on how many blocks came before.
  """

  def one(key):
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, block), number), shape)

  return jax.vmap(one)(keys)


def denoise_block(models: VideoModels, cache: PackCache, text: KeyValues, keys: Array,
                  given: Array | None = None, *, spec: RolloutSpec) -> tuple[Array, Array]:
  """Generates the latents of the next block.

  Args:
    models: networks.
    cache: the history; read, never written.
    text: cross-attention keys/values [L, B, rows, N, H].
    keys: [B] typed random keys, one per video.
    given: [B, g, h, w, C], latents that the block's first g frames are to have (image to video).
    spec: static choices.

  Returns:
    Latents x0 [B, F, h, w, C], and the archived blocks each layer attended [L, B, K] (-1: none).
  """
  sigmas = spec.sampler.sigmas
  denoise = _Passes(models, cache, text, keys, given, spec)
  with jax.named_scope('denoise_0'):
    x, selected = denoise.first(denoise.noise(0), sigmas[0], sigmas[1])
  for index in range(1, len(sigmas) - 1):
    with jax.named_scope(f'denoise_{index}'):
      x = denoise.later(x, selected, index, sigmas[index], sigmas[index + 1])
  return x if given is None else x.at[:, :given.shape[1]].set(given), selected


class ExitBlock(NamedTuple):
  """A block whose denoising ended early, with what its last pass saw.

  Attributes:
    x_t: [B, F, h, w, C], noisy input of the last pass.
    latents: [B, F, h, w, C], the x0 it predicted.
    selected: [L, B, K].
  """

  x_t: Array
  latents: Array
  selected: Array


def denoise_to_exit(models: VideoModels, cache: PackCache, text: KeyValues, keys: Array,
                    exit_step: Array, *, spec: RolloutSpec) -> ExitBlock:
  """`denoise_block` up to a pass whose x0 becomes the block; at the last one it is the same block.

  Training draws the pass anew for every rollout, so that each level learns to end a block.

  Args:
    models: networks.
    cache: the history; read, never written.
    text: cross-attention keys/values [L, B, rows, N, H].
    keys: [B] typed random keys, one per video.
    exit_step: int32 [], number of the last pass, 0 .. steps - 1.
    spec: static choices.

  Source: Self-Forcing.
  """
  sigmas = jnp.asarray(spec.sampler.sigmas, jnp.float32)
  denoise = _Passes(models, cache, text, keys, None, spec)

  def next_level(index):
    return jnp.where(index == exit_step, 0.0, sigmas[index + 1])  # at level 0 solvers return x0

  noise = denoise.noise(0)
  x0, selected = denoise.first(noise, sigmas[0], next_level(0))

  def body(index, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    _, x = carry
    return x, denoise.later(x, selected, index, sigmas[index], next_level(index))

  x_t, x0 = jax.lax.fori_loop(1, exit_step + 1, body, (noise, x0))
  return ExitBlock(x_t, x0, selected)


class _Passes:
  """The passes of one block: the first one selects, the later ones reuse what it selected."""

  def __init__(self, models: VideoModels, cache: PackCache, text: KeyValues, keys: Array,
               given: Array | None, spec: RolloutSpec):
    self._models, self._cache, self._text, self._keys = models, cache, text, keys
    self._given, self._spec = given, spec
    self._layout = cache_lib.layout(cache.blocks, spec.cache)

  def noise(self, number) -> Array:
    """Fresh noise of the block: 0 to start from, i + 1 for pass i."""
    return block_noise(self._keys, self._cache.blocks, number,
                       self._models.spec.video.block_latent_shape)

  def first(self, x: Array, sigma, sigma_next) -> tuple[Array, Array]:
    """Pass 0: the block at `sigma_next`, and the selection [L, B, K]."""
    context_fn = step.select_history(self._cache.blocks, self._layout, self._spec.cache)
    return self._step(x, 0, sigma, sigma_next, _numbers(self._spec), context_fn)

  def later(self, x: Array, selected: Array, index, sigma, sigma_next) -> Array:
    """Pass `index` > 0: the block at `sigma_next`."""
    context_fn = step.selected_history(self._cache.blocks, self._layout, self._spec.cache)
    slices = _numbers(self._spec), selected
    return self._step(x, index, sigma, sigma_next, slices, context_fn)[0]

  def _step(self, x: Array, index, sigma, sigma_next, slices: PyTree, context_fn):
    return step.denoise_step(self._models, x, sigma, sigma_next, self.noise(index + 1), self._text,
                             slices=slices,
                             context_fn=step.of_all_layers(self._cache.layers, context_fn),
                             solver=self._spec.sampler.solver, given=self._given)


def _numbers(spec: RolloutSpec) -> Array:
  """Of all layers, to scan over."""
  return jnp.arange(spec.cache.num_layers)


def _decode(models: VideoModels, decoder: DecoderState, latents: Array, first: bool
            ) -> tuple[Array, DecoderState]:
  if first:
    return models.vae.decode_first(latents)
  return models.vae.decode_next(decoder, latents)


def _remember(buffer: Array, value: Array, slot: Array) -> Array:
  return jax.lax.dynamic_update_index_in_dim(buffer, value.astype(buffer.dtype), slot, axis=1)


def finish_block(models: VideoModels, state: RolloutState, latents: Array, selected: Array,
                 text: KeyValues, *, first: bool, spec: RolloutSpec,
                 remembered: tuple[Array, float] | None = None) -> tuple[RolloutState, Array]:
  """Decodes a denoised block, computes its keys/values at both resolutions, and commits them.

  Args:
    models: networks.
    state: before this block.
    latents: the block's x0 [B, F, h, w, C].
    selected: what its denoising attended [L, B, K].
    text: cross-attention keys/values.
    first: whether this is the video's first block (its first latent frame is one picture).
    spec: static choices.
    remembered: noisy latents and their level, for full-resolution keys/values that are not quite
      those of the block (training only, see `SelfForcingSpec.context_noise`).

  Returns:
    The next state and the block's pixels [B, T, H, W, 3] in [-1, 1].
  """
  with jax.named_scope('decode'):
    pixels, decoder = _decode(models, state.decoder, latents, first)
  with jax.named_scope('compress'):
    lr_latents = models.encode_low_resolution(pixels)
    tokens = models.compress(latents, lr_latents)
  with jax.named_scope('clean_pass'):
    layout = cache_lib.layout(state.cache.blocks, spec.cache)
    seen, sigma = remembered or (latents, 0.0)
    block, compressed, _ = step.clean_pass(
        models, seen, tokens, text, slices=(_numbers(spec), selected), sigma=sigma,
        context_fn=step.of_all_layers(state.cache.layers, step.selected_history(
            state.cache.blocks, layout, spec.cache)))
  with jax.named_scope('commit'):
    # After the pass that reads the cache: XLA would copy the archive to write it any earlier.
    blocks, block = jax.lax.optimization_barrier((state.cache.blocks, block))
    cache = dataclasses.replace(state.cache, blocks=blocks)
    cache = cache_lib.commit(cache, block, compressed, spec=spec.cache)
  slot = state.cache.blocks % spec.cache.recent_blocks
  return RolloutState(cache=cache, decoder=decoder,
                      recent_latents=_remember(state.recent_latents, latents, slot),
                      recent_lr=_remember(state.recent_lr, lr_latents, slot)), pixels


def sample_block(models: VideoModels, state: RolloutState, text: KeyValues, keys: Array, *,
                 first: bool, spec: RolloutSpec) -> tuple[RolloutState, Array, Array, Array]:
  """One block from noise to cache.

  Returns:
    The next state, pixels [B, T, H, W, 3], latents [B, F, h, w, C] and the selection [L, B, K].
  """
  latents, selected = denoise_block(models, state.cache, text, keys, spec=spec)
  state, pixels = finish_block(models, state, latents, selected, text, first=first, spec=spec)
  return state, pixels, latents, selected


def switch_prompt(models: VideoModels, state: RolloutState, text: KeyValues, *, spec: RolloutSpec
                  ) -> RolloutState:
  """Recomputes the recent blocks' keys/values under a new prompt, oldest first.

  Sink and archive keep what they remember; without this step the last block's keys would pull the
  video back to the old prompt.

  Args:
    models: networks.
    state: after the last block of the old prompt.
    text: cross-attention keys/values of the new prompt.
    spec: static choices.
  """
  cache, recent = state.cache, spec.cache.recent_blocks
  for order in range(recent):
    slot = (cache.blocks + order) % recent
    latents, lr_latents = (jax.lax.dynamic_index_in_dim(buffer, slot, 1, keepdims=False)
                           for buffer in (state.recent_latents, state.recent_lr))
    layout = cache_lib.layout(cache.blocks, spec.cache, num_recent=order)
    block, compressed, _ = step.clean_pass(
        models, latents, models.compress(latents, lr_latents), text, slices=_numbers(spec),
        context_fn=step.of_all_layers(cache.layers, step.select_history(
            cache.blocks, layout, spec.cache)))
    cache = cache_lib.replace_recent(cache, order, block, compressed, spec=spec.cache)
  return dataclasses.replace(state, cache=cache)
