"""The cache itself: an immutable pytree of fixed shapes.

Life of block i with S sink blocks, R recent blocks and an archive of C compressed ones:

  sink     blocks 0 .. S-1, full resolution, slot b holds block b.
  recent   the newest R blocks from S on, full resolution, slot b % R.
  pending  the compressed versions of the recent blocks, slot b % R, waiting to be archived.
  archive  compressed blocks S .. i-R-1, slot (b - S) % C; the oldest is overwritten when full.

The number of committed blocks alone therefore says which block sits where; nothing else is
counted, so no two layers can ever disagree about it.

Source: arXiv:2603.25730, section on the three-partition cache; the archive's capacity and the
pending slots are this package's decisions.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pf_jax.cache.spec import CacheSpec
from pf_jax.kernels.quantization import Quantized
from pf_jax.types import Array, KeyValues


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """What the layers remember; all layers stacked [L, ...], or one layer's slice without L.

  Stored keys are rotated by (height, width) and by the frame's place inside its own block, never by
  a slot's position, and are never rotated again. In 8 bits (`CacheSpec.storage`) each of them is a
  `Quantized`, values and scales with the same axes.

  Attributes:
    sink: [L, B, S, T, N, H].
    archive: [L, B, C, M, N, H].
    key_sums: [L, B, C, N, H] float32, the sum over each archived block's scoring keys.
    pending: [L, B, R, M, N, H].
    recent: [L, B, R, T, N, H].
  """

  sink: KeyValues
  archive: KeyValues
  key_sums: Array
  pending: KeyValues
  recent: KeyValues


  @property
  def batch(self) -> int:
    """Videos of one layer's slice."""
    return self.sink.k.shape[0]

  @property
  def number(self) -> None:
    """A slice is one layer already."""
    return None


class LayerView(NamedTuple):
  """One layer where it lies, among all of them: a slice would be a copy to a kernel.

  Attributes:
    layers: all layers, stacked.
    number: int32 [], which one.
  """

  layers: LayerCache
  number: Array

  @property
  def sink(self) -> KeyValues:
    return self.layers.sink

  @property
  def archive(self) -> KeyValues:
    return self.layers.archive

  @property
  def recent(self) -> KeyValues:
    return self.layers.recent

  @property
  def key_sums(self) -> Array:
    """Of the one layer; they are small."""
    return jax.lax.dynamic_index_in_dim(self.layers.key_sums, self.number, keepdims=False)

  @property
  def batch(self) -> int:
    """Videos."""
    return self.layers.sink.k.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackCache:
  """The whole cache: the stacked layers and the number of blocks committed so far (int32)."""

  layers: LayerCache
  blocks: Array


def init(spec: CacheSpec, batch: int) -> PackCache:
  """An empty cache for `batch` videos that advance in lockstep.

  Raises:
    ValueError: `batch` is not positive.
  """
  if batch < 1:
    raise ValueError(f'{batch=} must be at least 1.')
  heads = (spec.num_heads, spec.head_dim)

  def zeros(blocks: int, tokens: int) -> KeyValues:
    shape = (spec.num_layers, batch, blocks, tokens, *heads)
    # Distinct buffers: a donated cache must not hold the same one twice.
    return KeyValues(_zeros(shape, spec), _zeros(shape, spec))

  return PackCache(
      layers=LayerCache(
          sink=zeros(spec.sink_blocks, spec.block_tokens),
          archive=zeros(spec.mid_capacity, spec.mid_tokens),
          key_sums=jnp.zeros((spec.num_layers, batch, spec.mid_capacity, *heads), jnp.float32),
          pending=zeros(spec.recent_blocks, spec.mid_tokens),
          recent=zeros(spec.recent_blocks, spec.block_tokens)),
      blocks=jnp.zeros((), jnp.int32))


def _zeros(shape: tuple[int, ...], spec: CacheSpec) -> Any:
  values = jnp.zeros(shape, spec.stored_dtype)
  if not spec.quantized:
    return values
  return Quantized(values, jnp.zeros((*shape[:-3], 1, shape[-2], 1), jnp.float32))


def sink_ids(blocks: Array, spec: CacheSpec) -> Array:
  """Block held by each sink slot [S], -1 where empty; `blocks` are committed so far."""
  slots = jnp.arange(spec.sink_blocks)
  return jnp.where(slots < blocks, slots, -1)


def recent_ids(blocks: Array, spec: CacheSpec) -> Array:
  """The recent blocks in time order [R], -1 where there is none yet."""
  ids = blocks - spec.recent_blocks + jnp.arange(spec.recent_blocks)
  return jnp.where(ids >= spec.sink_blocks, ids, -1)


def archive_ids(blocks: Array, spec: CacheSpec) -> Array:
  """Block held by each archive slot [C], -1 where empty."""
  slots = jnp.arange(spec.mid_capacity)
  archived = blocks - spec.recent_blocks - spec.sink_blocks
  # The newest archived block of slot c is the largest n < archived with n % C == c.
  newest = archived - 1 - (archived - 1 - slots) % max(spec.mid_capacity, 1)
  return jnp.where(newest >= 0, newest + spec.sink_blocks, -1)


def archived_blocks(blocks: Array, spec: CacheSpec) -> Array:
  """How many compressed blocks the archive holds now, a scalar of at most C."""
  archived = blocks - spec.recent_blocks - spec.sink_blocks
  return jnp.clip(archived, 0, spec.mid_capacity)
