"""Stage "causal": teacher-forced block-causal flow matching, through the sampler's own cache.

A clip is walked block by block exactly as the sampler walks a video: noisy versions of block i
attend the packed history (sink, selected mid, recent), then the clean pass computes the block's
keys/values at both resolutions and commits them. Only the block's latents are the true ones instead
of generated ones. Gradients of later blocks flow back through the history, the compressed mid
keys/values included, into the compressor's HR branch and the LR branch's patch embedding.

Loss: mean over blocks and noise levels of |x0 - predicted x0|^2 / (sigma^2 weight), with levels
drawn logit-normally (plus a share of uniform ones) and shifted towards noise.

Source: arXiv:2603.25730 (recipe); Self-Forcing's teacher forcing, here as a scan over blocks
instead of a masked [clean | noisy] concatenation.
"""

import dataclasses
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from pf_jax import cache as cache_lib
from pf_jax.cache import CacheSpec, Layout, PackCache
from pf_jax.diffusion import flow as flow_lib
from pf_jax.diffusion import schedule
from pf_jax.models.bundle import Models
from pf_jax.rollout import step
from pf_jax.types import Array, KeyValues


@dataclasses.dataclass(frozen=True)
class TeacherForcingSpec:
  """Choices of the stage.

  Attributes:
    noise_levels: noisy versions of each block that share one history.
    shift: timestep shift of the noise levels.
    uniform_share: share of levels drawn uniformly instead of logit-normally.
    loss: 'x0' weighs the squared flow error by sigma^2, 'flow' by 1.
    context_noise: the history's latents get noise of a random level up to this, so that the model
      learns to trust an imperfect past.
    drop_sink: probability that a clip's blocks see no sink.
    drop_mid: probability that they see no mid block.
    sink_blocks: sink sizes to train with, drawn per step; the cache's own if empty.
    scatter_mid: probability that the mid blocks of a clip take random slots among top_k, as if the
      others were there: trains the positions of long videos on short clips.

  Raises:
    ValueError: a value out of range.
  """

  noise_levels: int = 3
  shift: float = 5.0
  uniform_share: float = 0.2
  loss: str = 'x0'
  context_noise: float = 0.1
  drop_sink: float = 0.1
  drop_mid: float = 0.1
  sink_blocks: tuple[int, ...] = (1, 2)
  scatter_mid: float = 0.7

  def __post_init__(self):
    if self.noise_levels < 1:
      raise ValueError(f'noise_levels={self.noise_levels} must be at least 1.')
    if self.loss not in ('x0', 'flow'):
      raise ValueError(f"loss={self.loss!r} is unknown; use 'x0' or 'flow'.")
    for name in ('uniform_share', 'context_noise', 'drop_sink', 'drop_mid', 'scatter_mid'):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f'{name}={getattr(self, name)} must be within 0..1.')


class ClipBatch(NamedTuple):
  """Encoded clips.

  Attributes:
    latents: [B, blocks * F, h, w, C].
    lr_latents: [B, blocks, f, h', w', C].
    ids: [B, rows] token ids of the prompts.
    mask: [B, rows] bool.
  """

  latents: Array
  lr_latents: Array
  ids: Array
  mask: Array


def draw_sigmas(key: Array, shape: tuple[int, ...], spec: TeacherForcingSpec) -> Array:
  """Noise levels in (0, 1): logit-normal with a share of uniform ones, then shifted."""
  normal, uniform, choose = jax.random.split(key, 3)
  levels = jnp.where(jax.random.bernoulli(choose, spec.uniform_share, shape),
                     jax.random.uniform(uniform, shape), jax.nn.sigmoid(
                         jax.random.normal(normal, shape)))
  return schedule.shift_sigma(levels, spec.shift)


class Drops(NamedTuple):
  """What a clip's blocks do not see, and how its mid blocks are placed; drawn once per clip."""

  sink: Array
  mid: Array
  scatter: Array
  order: Array
  between: Array


def draw_drops(key: Array, batch: int, cache: CacheSpec, spec: TeacherForcingSpec) -> Drops:
  """Draws the ablations of each clip of a batch."""
  keys = jax.random.split(key, 5)
  # Ranks of K random numbers: the first n of a sorted random subset, for any n.
  order = jax.random.uniform(keys[3], (batch, cache.top_k))
  return Drops(sink=jax.random.bernoulli(keys[0], spec.drop_sink, (batch,)),
               mid=jax.random.bernoulli(keys[1], spec.drop_mid, (batch,)),
               scatter=jax.random.bernoulli(keys[2], spec.scatter_mid, (batch,)),
               order=order, between=jax.random.uniform(keys[4], (batch,)))


def training_layout(blocks: Array, drops: Drops, cache: CacheSpec) -> Layout:
  """The sampler's layout with some partitions hidden and the few mid blocks spread out.

  A clip with `scatter` places its n selected blocks in n random slots, in order, of a random number
  of slots between n and K; nothing fills the others.
  """
  selected = jnp.minimum(cache_lib.archived_blocks(blocks, cache), cache.top_k)
  room = selected + jnp.floor(drops.between * (cache.top_k - selected + 1)).astype(jnp.int32)
  room = jnp.where(drops.scatter & (selected > 0), room, selected)
  taken = jnp.arange(cache.top_k)[None]
  # Among `room` slots keep those with the `selected` smallest draws, in slot order.
  draw = jnp.where(taken < room[:, None], drops.order, jnp.inf)
  keep = jnp.argsort(jnp.argsort(draw, axis=1), axis=1) < selected
  slots = jnp.sort(jnp.where(keep, taken, cache.top_k), axis=1)
  slots = jnp.where(drops.scatter[:, None], slots, taken)
  room = jnp.where(drops.mid, 0, room)
  layout = cache_lib.layout(blocks, cache, mid_slots=slots, num_mid_slots=room)
  return dataclasses.replace(layout, sink_valid=layout.sink_valid & ~drops.sink[:, None],
                             mid_valid=layout.mid_valid & ~drops.mid[:, None])


class BlockInput(NamedTuple):
  """One block of every clip, as the scan sees it."""

  latents: Array
  lr_latents: Array
  key: Array


def _noisy_loss(models: Models, block: BlockInput, cache: PackCache, layout: Layout,
                text: KeyValues, cache_spec: CacheSpec, spec: TeacherForcingSpec):
  """Flow-matching loss of several noisy versions of one block, and the history they saw."""
  level_key, noise_key = jax.random.split(block.key)
  x0 = jnp.repeat(block.latents, spec.noise_levels, axis=0)
  sigma = draw_sigmas(level_key, (x0.shape[0], 1, 1, 1, 1), spec)
  noise = jax.random.normal(noise_key, x0.shape)
  out = models.transformer(
      flow_lib.add_noise(x0, noise, sigma),
      jnp.broadcast_to(schedule.timestep(sigma[:, :, 0, 0, 0]), x0.shape[:2]), text,
      slices=cache.layers, context_fn=step.select_history(cache.blocks, layout, cache_spec))
  error = jnp.mean((out.flow - flow_lib.flow_target(x0, noise))**2, axis=(1, 2, 3, 4))
  sigma = sigma[:, 0, 0, 0, 0]
  loss = error * (sigma**2 if spec.loss == 'x0' else 1.0)
  return loss, sigma, out.aux[1]


def clip_loss(models: Models, batch: ClipBatch, key: Array, *, cache: CacheSpec,
              spec: TeacherForcingSpec) -> tuple[Array, dict[str, Array]]:
  """Loss of a batch of clips, averaged over blocks and noise levels, and its diagnosis.

  Args:
    models: networks; only transformer, compressor and text encoder take part.
    batch: encoded clips.
    key: randomness of levels, noise and drops.
    cache: sizes of the history.
    spec: choices of the stage.

  Returns:
    The loss and metrics: loss per block at high noise (`high_noise/block_i`): where it falls below
    block 0's, copying from the cache has begun; the average hides that.
  """
  drop_key, noise_key = jax.random.split(key)
  frames = cache.frames_per_block
  latents = einops.rearrange(batch.latents, 'b (n f) h w c -> n b f h w c', f=frames)
  lr_latents = jnp.moveaxis(batch.lr_latents, 1, 0)
  count, size = latents.shape[:2]
  text = models.text_keys_values(batch.ids, batch.mask)
  drops = draw_drops(drop_key, size, cache, spec)

  def body(history: PackCache, block: BlockInput):
    layout = training_layout(history.blocks, drops, cache)
    loss, sigma, context = _noisy_loss(models, block, history, layout, text, cache, spec)
    strength_key, context_key = jax.random.split(jax.random.fold_in(block.key, 1))
    strength = spec.context_noise * jax.random.uniform(strength_key, (size, 1, 1, 1, 1))
    past = flow_lib.add_noise(block.latents, jax.random.normal(context_key, block.latents.shape),
                              strength)
    full, compressed, _ = step.clean_pass(models, past, block.lr_latents, text, slices=context,
                                          context_fn=step.reuse_history)
    return cache_lib.commit(history, full, compressed, spec=cache), (loss, sigma)

  inputs = BlockInput(latents, lr_latents, jax.random.split(noise_key, count))
  _, (loss, sigma) = jax.lax.scan(body, cache_lib.init(cache, size), inputs)
  high = sigma > 0.9
  per_block = jnp.sum(loss * high, axis=1) / jnp.maximum(jnp.sum(high, axis=1), 1)
  metrics = {f'high_noise/block_{i}': per_block[i] for i in range(count)}
  return jnp.mean(loss), metrics


class CausalObjective:
  """`fit`'s view of the stage: trains transformer, compressor and text encoder; the VAE is frozen.

  Args:
    models: the networks to start from; their VAE is carried along untouched.
    cache: sizes of the history while sampling; `spec.sink_blocks` varies its sink.
    spec: choices of the stage.
  """

  def __init__(self, models: Models, cache: CacheSpec, spec: TeacherForcingSpec):
    self._models, self._spec = models, spec
    sizes = spec.sink_blocks or (cache.sink_blocks,)
    self._caches = [dataclasses.replace(cache, sink_blocks=size) for size in sizes]

  def init(self, seed: int) -> dict[str, nnx.Module]:
    """The trained parts; `seed` is unused, the models come initialised."""
    del seed
    return {name: getattr(self._models, name) for name in ('transformer', 'compressor', 'text')}

  def param_groups(self, params) -> dict:
    """Gradient norms are reported for the transformer, the compressor and the text encoder."""
    return {name: jax.tree.map(lambda _, name=name: name, part) for name, part in params.items()}

  def assemble(self, params: dict[str, nnx.Module]) -> Models:
    """All networks, with the trained parts put in."""
    models = jax.tree.map(lambda x: x, self._models)  # a new module around the same arrays
    for name, part in params.items():
      setattr(models, name, part)
    return models

  def loss(self, params, batch: ClipBatch, key: Array) -> tuple[Array, dict[str, Array]]:
    """See `clip_loss`; the sink's size is drawn per step."""
    models = self.assemble(params)
    choice, key = jax.random.split(key)
    branches = [lambda k, cache=cache: clip_loss(models, batch, k, cache=cache, spec=self._spec)
                for cache in self._caches]
    if len(branches) == 1:
      return branches[0](key)
    index = jax.random.randint(choice, (), 0, len(branches))
    return jax.lax.switch(index, branches, key)
