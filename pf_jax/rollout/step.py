"""One denoising step, and the clean pass: the two ways a rollout runs the transformer."""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from pf_jax import cache as cache_lib
from pf_jax.cache import CacheSpec, LayerCache, LayerView, Layout
from pf_jax.diffusion import schedule
from pf_jax.diffusion import solver as solver_lib
from pf_jax.kernels.attention import Segment
from pf_jax.models.bundle import VideoModels
from pf_jax.models.transformer import ContextFn
from pf_jax.types import Array, KeyValues, PyTree


def select_history(blocks: Array, layout: Layout, spec: CacheSpec) -> ContextFn:
  """Context function of a block's first pass: select, pack, and pass the selection on.

  Scan it over the cache's `LayerCache`. Its aux is the selection [L, B, K], for the block's later
  passes (see `selected_history`).
  """

  def context_fn(layer: LayerCache, q: Array):
    # Several noisy versions of a block may share a history; scoring is linear in the queries.
    q = einops.reduce(q, '(b g) t n h -> b t n h', 'mean', b=layer.batch)
    with jax.named_scope('select_blocks'):
      selected = cache_lib.select(layer, q, blocks, spec=spec)
    context = cache_lib.context(layer, selected, blocks, layout, spec=spec)
    return context, selected

  return context_fn


def selected_history(blocks: Array, layout: Layout, spec: CacheSpec) -> ContextFn:
  """Context function of all later passes: packs what the first one selected.

  Scan it over (the cache's `LayerCache`, selection [L, B, K]). Reading a packed copy instead would
  cost as much time and 4 GB at full scale.
  """

  def context_fn(layer_and_choice: tuple[LayerCache, Array], q: Array):
    del q
    layer, selected = layer_and_choice
    return cache_lib.context(layer, selected, blocks, layout, spec=spec), None

  return context_fn


def of_all_layers(layers: LayerCache, context_fn: ContextFn) -> ContextFn:
  """A context function over numbers of layers in place of their slices of a cache.

  What a scan slices, a kernel that reads the cache where it lies would be handed as a copy.

  Args:
    layers: all of them, stacked.
    context_fn: takes a layer's slice, or a tuple that begins with it.
  """

  def by_number(number: Array | tuple, q: Array):
    if not isinstance(number, tuple):
      return context_fn(LayerView(layers, number), q)
    return context_fn((LayerView(layers, number[0]), *number[1:]), q)

  return by_number


def reuse_history(context: Segment, q: Array) -> tuple[tuple[Segment], PyTree]:
  """Context function over a history that is already packed, for training."""
  del q
  return (context,), None


def denoise_step(models: VideoModels, x_t: Array, sigma, sigma_next, noise: Array,
                 text: KeyValues, *, slices: PyTree, context_fn: ContextFn,
                 solver: solver_lib.Solver, given: Array | None = None) -> tuple[Array, PyTree]:
  """Moves one noisy block from level sigma to sigma_next; reads the history, writes nothing.

  Args:
    models: networks.
    x_t: [B, F, h, w, C] at level `sigma`.
    sigma: level in (0, 1], a scalar.
    sigma_next: the next lower level, 0 at the end.
    noise: fresh noise like x_t (used by `renoise` only).
    text: cross-attention keys/values [L, B, rows, N, H].
    slices: per-layer pytree for `context_fn`.
    context_fn: `select_history(...)` in the first pass, `selected_history(...)` afterwards.
    solver: 'euler' or 'renoise'.
    given: [B, g, h, w, C], clean latents of the block's first g frames. They take part at
      timestep 0, whatever the level of the others.

  Returns:
    The block at `sigma_next`, and what `context_fn` passed out.
  """
  timesteps = jnp.broadcast_to(schedule.timestep(sigma), x_t.shape[:2])
  if given is not None:
    x_t = x_t.at[:, :given.shape[1]].set(given)
    timesteps = timesteps.at[:, :given.shape[1]].set(0)
  out = models.transformer(x_t, timesteps, text, slices=slices, context_fn=context_fn)
  return solver_lib.step(solver, x_t, out.flow, sigma, sigma_next, noise), out.aux


def clean_pass(models: VideoModels, latents: Array, compressed: tuple[Array, np.ndarray],
               text: KeyValues, *, slices: PyTree, context_fn: ContextFn, sigma=0.0
               ) -> tuple[KeyValues, KeyValues, PyTree]:
  """Keys/values of a finished block at both resolutions, in one pass at timestep 0.

  The compressed version runs as a second stream beside the full one ("dual-resolution shifting"):
  it sees the same history and itself, and the full-resolution stream never sees it.

  Args:
    models: networks.
    latents: [B, F, h, w, C], clean.
    compressed: the block's compressed tokens [B, M, D] and positions [M, 3], from
      `Models.compress`.
    text: cross-attention keys/values.
    slices: per-layer pytree for `context_fn`.
    context_fn: how each layer gets its history.
    sigma: level of the noise that training may have put on `latents`; the compressed stream is
      clean in any case.

  Returns:
    Keys/values [L, B, T, N, H] and [L, B, M, N, H], and what `context_fn` passed out.
  """
  timesteps = jnp.full(latents.shape[:2], schedule.timestep(sigma), jnp.float32)
  out = models.transformer(latents, timesteps, text, slices=slices, context_fn=context_fn,
                           compressed=compressed)
  assert out.compressed is not None  # asked for above
  return out.keys_values, out.compressed, out.aux
