"""Stage "causal": teacher-forced block-causal flow matching, through the sampler's own cache.

A clip is walked block by block exactly as the sampler walks a video: noisy versions of block i
attend the packed history (sink, selected mid, recent), then the clean pass computes the block's
keys/values at both resolutions and commits them. Only the block's latents are the true ones instead
of generated ones. Gradients of later blocks flow back through the history, the compressed mid
keys/values included, into the compressor's HR branch and the LR branch's patch embedding.

Source: arXiv:2603.25730 (recipe); Self-Forcing's teacher forcing, here as a scan over blocks
instead of a masked [clean | noisy] concatenation.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp

from pf_jax import cache as cache_lib
from pf_jax.cache import CacheSpec, LayerCache, Layout, PackCache
from pf_jax.diffusion import flow as flow_lib
from pf_jax.kernels.context import assemble
from pf_jax.models.bundle import Models
from pf_jax.models.transformer import ContextFn
from pf_jax.rollout import step
from pf_jax.train.flow_matching import (
  ClipBatch,
  FlowBatch,
  FlowMatchingSpec,
  PartsObjective,
  add_levels,
  check_shares,
  first_loss,
  flow_loss,
  from_trajectory,
)
from pf_jax.types import Array, KeyValues


@dataclasses.dataclass(frozen=True)
class TeacherForcingSpec(FlowMatchingSpec):
  """Choices of the stage, beside those of `FlowMatchingSpec`.

  Attributes:
    context_noise: the history's latents get noise of a random level up to this, so that the model
      learns to trust an imperfect past.
    drop_sink: probability that a clip's blocks see no sink.
    drop_mid: probability that they see no mid block.
    sink_blocks: sink sizes to train with, drawn per step; the cache's own if empty.
    scatter_mid: probability that the mid blocks of a clip take random slots among top_k, as if the
      others were there: trains the positions of long videos on short clips.
    crowd_mid: probability that those other slots are not left empty but hold copies of the mid
      blocks there are: trains the crowd of keys that long videos attend.

  Raises:
    ValueError: a value out of range.
  """

  context_noise: float = 0.1
  drop_sink: float = 0.1
  drop_mid: float = 0.1
  sink_blocks: tuple[int, ...] = (1, 2)
  scatter_mid: float = 0.7
  crowd_mid: float = 0.5

  def __post_init__(self):
    super().__post_init__()
    check_shares(self, 'context_noise', 'drop_sink', 'drop_mid', 'scatter_mid', 'crowd_mid')


def noisy_past(key: Array, latents: Array, spec: TeacherForcingSpec) -> Array:
  """True latents [n, B, F, h, w, C] as imperfect as generated ones: a random little noise each."""
  strength_key, noise_key = jax.random.split(key)
  strength = spec.context_noise * jax.random.uniform(strength_key, (*latents.shape[:2], 1, 1, 1, 1))
  return flow_lib.add_noise(latents, jax.random.normal(noise_key, latents.shape), strength)


class Drops(NamedTuple):
  """What a clip's blocks do not see, and how its mid blocks are placed; drawn once per clip.

  Attributes:
    sink: [B] bool, the sink is hidden.
    mid: [B] bool, the mid partition is hidden.
    scatter: [B] bool, mid blocks are spread over more slots than they need.
    crowd: [B] bool, where they are, copies fill the slots between.
    order: [B, K] in [0, 1), which slots and which copies.
    between: [B] in [0, 1), how many slots.
  """

  sink: Array
  mid: Array
  scatter: Array
  crowd: Array
  order: Array
  between: Array


def draw_drops(key: Array, batch: int, cache: CacheSpec, spec: TeacherForcingSpec) -> Drops:
  """Draws the ablations of each clip of a batch."""
  keys = jax.random.split(key, 6)
  # Ranks of K random numbers: the first n of a sorted random subset, for any n.
  order = jax.random.uniform(keys[3], (batch, cache.top_k))
  return Drops(sink=jax.random.bernoulli(keys[0], spec.drop_sink, (batch,)),
               mid=jax.random.bernoulli(keys[1], spec.drop_mid, (batch,)),
               scatter=jax.random.bernoulli(keys[2], spec.scatter_mid, (batch,)),
               crowd=jax.random.bernoulli(keys[5], spec.crowd_mid, (batch,)),
               order=order, between=jax.random.uniform(keys[4], (batch,)))


class MidPlan(NamedTuple):
  """Which archived block each mid slot of a training clip shows.

  Attributes:
    selected: [B, K] block numbers in time order, -1 for none.
    slots: [B, K] the slots they take.
    room: [B] slots between sink and recent.
  """

  selected: Array
  slots: Array
  room: Array


def plan_mid(blocks: Array, drops: Drops, cache: CacheSpec) -> MidPlan:
  """Places the few mid blocks of a short clip as a long video would place its many.

  A clip with `scatter` has `room` slots between sink and recent, a random number from the n
  archived blocks up to K. Its blocks take n random slots of them, in order; with `crowd` every one
  of the `room` slots shows an archived block, some of them several times.
  """
  archived = jnp.minimum(cache_lib.archived_blocks(blocks, cache), cache.top_k)
  newest = blocks - cache.recent_blocks
  scattered = archived + jnp.floor(drops.between * (cache.top_k - archived + 1)).astype(jnp.int32)
  room = jnp.where(drops.scatter & (archived > 0), scattered, archived)
  taken = jnp.arange(cache.top_k)[None]
  inside = taken < room[:, None]
  # Among `room` slots keep those with the n smallest draws, in slot order.
  draw = jnp.where(inside, drops.order, jnp.inf)
  keep = jnp.argsort(jnp.argsort(draw, axis=1), axis=1) < archived
  slots = jnp.where(drops.scatter[:, None],
                    jnp.sort(jnp.where(keep, taken, cache.top_k), axis=1), taken)
  selected = jnp.where(taken < archived, newest - archived + taken, -1)
  copies = jnp.floor(jnp.sort(jnp.where(inside, drops.order, 1.0), axis=1) * archived)
  copies = jnp.where(inside, newest - archived + copies.astype(jnp.int32), -1)
  crowd = (drops.scatter & drops.crowd & (archived > 0))[:, None]
  selected = jnp.where(crowd, copies, selected)
  selected = jnp.where(drops.mid[:, None], -1, selected)
  return MidPlan(selected, jnp.where(crowd, taken, slots), jnp.where(drops.mid, 0, room))


def training_layout(blocks: Array, drops: Drops, plan: MidPlan, cache: CacheSpec) -> Layout:
  """The sampler's layout with the plan's mid slots, and some partitions hidden."""
  layout = cache_lib.layout(blocks, cache, mid_slots=plan.slots, num_mid_slots=plan.room)
  return dataclasses.replace(layout, sink_valid=layout.sink_valid & ~drops.sink[:, None],
                             mid_valid=plan.selected >= 0)


def planned_history(blocks: Array, drops: Drops, cache: CacheSpec) -> ContextFn:
  """Context function of training's first pass: the planned mid blocks instead of selected ones.

  A short clip archives no more blocks than are attended, so there is nothing to select.
  """
  plan = plan_mid(blocks, drops, cache)
  layout = training_layout(blocks, drops, plan, cache)

  def context_fn(layer: LayerCache, q: Array):
    del q
    # Kept for later passes, where the cache itself would be larger.
    packed = assemble(cache_lib.context(layer, plan.selected, blocks, layout, spec=cache))
    return (packed,), (plan.selected, packed)

  return context_fn


class BlockInput(NamedTuple):
  """One block of every clip, as the scan sees it.

  Attributes:
    latents: [B, F, h, w, C], what is to be predicted.
    past: the same with context noise, what later blocks remember.
    tokens: [B, M, D], the compressed version of `past`.
    key: of levels and noise.
    trajectory: [B, S, F, h, w, C], see `ClipBatch`, or None.
  """

  latents: Array
  past: Array
  tokens: Array
  key: Array
  trajectory: Array | None


class Prepared(NamedTuple):
  """A batch of clips before it is walked block by block; everything but the history.

  Attributes:
    blocks: `BlockInput` with a leading block axis.
    text: cross-attention keys/values [L, B, rows, N, H].
    key: of the drops.
  """

  blocks: BlockInput
  text: KeyValues
  key: Array


def prepare(models: Models, batch: ClipBatch, key: Array, spec: TeacherForcingSpec) -> Prepared:
  """Cuts clips into blocks, spoils their past, compresses all blocks at once.

  (At once, because convolutions inside a scan are very slow on a CPU.)
  """
  drop_key, noise_key, past_key = jax.random.split(key, 3)
  frames = models.spec.video.frames_per_block
  latents = einops.rearrange(batch.latents, 'b (n f) h w c -> n b f h w c', f=frames)
  count = latents.shape[0]
  past = noisy_past(past_key, latents, spec)
  merged, _ = models.compress(
      einops.rearrange(past, 'n b f h w c -> (n b) f h w c'),
      einops.rearrange(batch.lr_latents, 'b n f h w c -> (n b) f h w c'))
  tokens = einops.rearrange(merged, '(n b) m d -> n b m d', n=count)
  way = batch.trajectory
  if way is not None:
    way = einops.rearrange(way, 'b s (n f) h w c -> n b s f h w c', f=frames)
  inputs = BlockInput(latents, past, tokens, jax.random.split(noise_key, count), way)
  return Prepared(inputs, models.text_keys_values(batch.ids, batch.mask), drop_key)


def clip_loss(models: Models, clips: Prepared, *, cache: CacheSpec, spec: TeacherForcingSpec,
              sigmas: Sequence[float] = ()) -> tuple[Array, dict[str, Array]]:
  """Loss of a batch of clips, averaged over blocks and noise levels, and its diagnosis.

  Args:
    models: networks; only the transformer takes part.
    clips: from `prepare`.
    cache: sizes of the history.
    spec: choices of the stage.
    sigmas: levels of the clips' trajectories, if they have any; no other noise is drawn then.

  Returns:
    The loss and metrics: loss per block at high noise (`high_noise/block_i`): where it falls below
    block 0's, copying from the cache has begun; the average hides that.
  """
  count, size = clips.blocks.latents.shape[:2]
  drops = draw_drops(clips.key, size, cache, spec)
  positions = models.spec.compressed_positions

  def body(history: PackCache, block: BlockInput):
    context_fn = planned_history(history.blocks, drops, cache)
    noised = (add_levels(block.latents, block.key, spec.noise_levels, spec)
              if block.trajectory is None else
              from_trajectory(block.latents, block.trajectory, sigmas))
    out = models.transformer(noised.x_t, noised.timesteps, clips.text, slices=history.layers,
                             context_fn=context_fn)
    _, context = out.aux
    full, compressed, _ = step.clean_pass(models, block.past, (block.tokens, positions),
                                          clips.text, slices=context,
                                          context_fn=step.reuse_history)
    return (cache_lib.commit(history, full, compressed, spec=cache),
            (flow_loss(out.flow, noised, spec), noised.sigma))

  # Recomputing a block is cheaper than storing it, even on a CPU: 4.3 s a step instead of 5.4.
  _, (loss, sigma) = jax.lax.scan(jax.checkpoint(body), cache_lib.init(cache, size), clips.blocks)
  high = sigma > 0.9
  per_block = jnp.sum(loss * high, axis=1) / jnp.maximum(jnp.sum(high, axis=1), 1)
  metrics = {f'high_noise/block_{i}': per_block[i] for i in range(count)}
  return jnp.mean(loss), metrics


class CausalObjective(PartsObjective):
  """`fit`'s view of the stage: trains transformer, compressor and text encoder; the VAE is frozen.

  Args:
    models: the networks to start from; their VAE is carried along untouched.
    cache: sizes of the history while sampling; `spec.sink_blocks` varies its sink.
    spec: choices of the stage.
    sigmas: see `clip_loss`.
  """

  def __init__(self, models: Models, cache: CacheSpec, spec: TeacherForcingSpec,
               sigmas: Sequence[float] = ()):
    super().__init__(models, ('transformer', 'compressor', 'text'))
    self._spec, self._sigmas = spec, tuple(sigmas)
    sizes = spec.sink_blocks or (cache.sink_blocks,)
    # A clip fills a few archive slots only; the others would be carried and differentiated for
    # nothing.
    self._caches = [dataclasses.replace(cache, sink_blocks=size, mid_capacity=cache.top_k)
                    for size in sizes]

  def loss(self, params, batch: FlowBatch, key: Array) -> tuple[Array, dict[str, Array]]:
    """`clip_loss` plus weighted `first_loss`; the sink's size is drawn per step."""
    models = self.assemble(params)
    choice, key = jax.random.split(key)
    loss, metrics = jnp.zeros(()), {}
    if batch.clips is not None:
      loss, metrics = self._clip_loss(models, prepare(models, batch.clips, key, self._spec), choice)
    if batch.first is not None:
      first = first_loss(models, batch.first, jax.random.fold_in(key, 1), self._spec)
      loss += self._spec.first_weight * first
      metrics['first_blocks'] = first
    return loss, metrics

  def _clip_loss(self, models: Models, clips: Prepared, choice: Array):
    branches = [lambda clips, cache=cache: clip_loss(models, clips, cache=cache, spec=self._spec,
                                                     sigmas=self._sigmas)
                for cache in self._caches]
    if len(branches) == 1:
      return branches[0](clips)
    index = jax.random.randint(choice, (), 0, len(branches))
    return jax.lax.switch(index, branches, clips)
