"""A whole rollout as one compiled scan over `sample_block`.

The scan carries `RolloutState`, whose size never changes, and emits frames: nothing in it knows how
long the video is. Use `stream` where blocks should leave as they are made, or memory must not grow
with the output.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pf_jax.models.bundle import VideoModels
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec, RolloutState
from pf_jax.types import Array, KeyValues


class RolloutOutput(NamedTuple):
  """A finished rollout of n blocks.

  Attributes:
    state: after the last block; more blocks may follow.
    frames: uint8 [B, T, H, W, 3], all pixel frames.
    latents: [B, n * F, h, w, C].
    selected: archived blocks each layer attended, [n, L, B, K] int32, -1 for none.
  """

  state: RolloutState
  frames: Array
  latents: Array
  selected: Array


def to_frames(pixels: Array) -> Array:
  """Pixels in [-1, 1] to uint8 frames."""
  return jnp.round((jnp.clip(pixels, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def rollout(models: VideoModels, text: KeyValues, prompt_index: Array, keys: Array, *,
            spec: RolloutSpec) -> RolloutOutput:
  """Samples videos from their first block on; wrap it in `jax.jit` (with `spec` static).

  Args:
    models: networks.
    text: cross-attention keys/values of all prompts of a video, [P, L, B, rows, N, H].
    prompt_index: [n] int32, the prompt of each block; its length is the length of the video. Where
      it changes, the recent blocks are recomputed under the new prompt.
    keys: [B] typed random keys, one per video.
    spec: static choices.

  Returns:
    `RolloutOutput`.
  """

  def take(index: Array) -> KeyValues:
    return jax.tree.map(lambda x: x[index], text)

  state = block_lib.init(models, keys.shape[0], spec)
  state, pixels, latents, selected = block_lib.sample_block(
      models, state, take(prompt_index[0]), keys, first=True, spec=spec)

  def body(state: RolloutState, prompts: tuple[Array, Array]):
    before, now = prompts
    state = jax.lax.cond(
        before != now, lambda s: block_lib.switch_prompt(models, s, take(now), spec=spec),
        lambda s: s, state)
    state, pixels, latents, selected = block_lib.sample_block(
        models, state, take(now), keys, first=False, spec=spec)
    return state, (to_frames(pixels), latents, selected)

  first = (to_frames(pixels), latents, selected)
  state, rest = jax.lax.scan(body, state, (prompt_index[:-1], prompt_index[1:]))
  frames, latents = (_join(a, b) for a, b in zip(first[:2], rest[:2], strict=True))
  return RolloutOutput(state, frames, latents, jnp.concatenate([first[2][None], rest[2]]))


def _join(first: Array, rest: Array) -> Array:
  """[B, t, ...] and [n, B, T, ...] to one time axis, [B, t + n*T, ...]."""
  rest = jnp.moveaxis(rest, 0, 1)
  return jnp.concatenate([first, rest.reshape(first.shape[0], -1, *first.shape[2:])], axis=1)
