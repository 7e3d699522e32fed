"""One block of video: denoise it, decode it, remember it.

  denoise_block  reads the cache: select in the first pass, a few steps, x0.
  finish_block   writes it: decode, compress, clean pass, commit.
  sample_block   one after the other.

The halves meet in two small arrays, the block's latents and the selected block numbers. Whoever
kept those can replay `finish_block` alone and gets the very same state (see `stream`).

Source: arXiv:2603.25730, algorithm of the inference loop; Self-Forcing for the clean pass.
"""

import dataclasses

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
  shape = models.spec.video.block_latent_shape
  layout = cache_lib.layout(cache.blocks, spec.cache)
  sigmas = spec.sampler.sigmas
  x = block_noise(keys, cache.blocks, 0, shape)
  slices: PyTree = cache.layers
  context_fn = step.select_history(cache.blocks, layout, spec.cache)
  selected: Array | None = None
  for index, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
    noise = block_noise(keys, cache.blocks, index + 1, shape)
    with jax.named_scope(f'denoise_{index}'):
      x, aux = step.denoise_step(models, x, sigma, sigma_next, noise, text, slices=slices,
                                 context_fn=context_fn, solver=spec.sampler.solver,
                                 given=given)
    if selected is None:
      selected = aux
      slices = cache.layers, selected
      context_fn = step.selected_history(cache.blocks, layout, spec.cache)
  assert selected is not None  # a sampler has at least one pass
  return x if given is None else x.at[:, :given.shape[1]].set(given), selected


def _decode(models: VideoModels, decoder: DecoderState, latents: Array, first: bool
            ) -> tuple[Array, DecoderState]:
  if first:
    return models.vae.decode_first(latents)
  return models.vae.decode_next(decoder, latents)


def _remember(buffer: Array, value: Array, slot: Array) -> Array:
  return jax.lax.dynamic_update_index_in_dim(buffer, value.astype(buffer.dtype), slot, axis=1)


def finish_block(models: VideoModels, state: RolloutState, latents: Array, selected: Array,
                 text: KeyValues, *, first: bool, spec: RolloutSpec
                 ) -> tuple[RolloutState, Array]:
  """Decodes a denoised block, computes its keys/values at both resolutions, and commits them.

  Args:
    models: networks.
    state: before this block.
    latents: the block's x0 [B, F, h, w, C].
    selected: what its denoising attended [L, B, K].
    text: cross-attention keys/values.
    first: whether this is the video's first block (its first latent frame is one picture).
    spec: static choices.

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
    block, compressed, _ = step.clean_pass(
        models, latents, tokens, text, slices=(state.cache.layers, selected),
        context_fn=step.selected_history(state.cache.blocks, layout, spec.cache))
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
        models, latents, models.compress(latents, lr_latents), text, slices=cache.layers,
        context_fn=step.select_history(cache.blocks, layout, spec.cache))
    cache = cache_lib.replace_recent(cache, order, block, compressed, spec=spec.cache)
  return dataclasses.replace(state, cache=cache)
