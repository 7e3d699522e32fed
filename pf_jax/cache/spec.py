"""`CacheSpec`: every size of the PackForcing cache, in one validated place.

Source: arXiv:2603.25730 (partitions, top-k selection, re-aligned positions). What the paper leaves
open is a field here, with its alternatives listed.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from pf_jax.kernels import quantization
from pf_jax.kernels.rope import MidOffsets

Selection = Literal['top_k', 'fifo']
ScoreKeys = Literal['pre_rope', 'rope_no_slot_phase', 'absolute']
Positions = Literal['packed', 'absolute']
Storage = Literal['full', 'int8', 'float8_e4m3fn']


def _choices(alias) -> tuple[str, ...]:
  return alias.__args__


@dataclasses.dataclass(frozen=True)
class CacheSpec:
  """Static sizes and choices of a cache.

  Attributes:
    num_layers: transformer layers; each keeps keys/values and selects for itself.
    num_heads: heads per layer.
    head_dim: reals per head.
    grid: (frames, height, width) of a full-resolution block in tokens.
    mid_grid: the same of a compressed block.
    sink_blocks: first blocks, kept for ever at full resolution (S).
    recent_blocks: newest blocks, kept at full resolution (R).
    top_k: compressed blocks that a block attends (K).
    mid_capacity: compressed blocks that the archive holds before it evicts the oldest (C). The
      paper gives none; 128 holds all of 120 s.
    selection: 'top_k' by relevance, or 'fifo', the newest K (baseline).
    score_keys: which keys a block's key-sum adds up: 'rope_no_slot_phase' (rotated by the position
      inside their block, as stored), 'pre_rope' (that rotation undone, on queries too), or
      'absolute' (rotated to the block's true distance in time).
    score_heads: heads that vote; None means all (the paper uses half of them).
    score_query_stride: use every n-th query (the paper subsamples; 1 is exact).
    positions: 'packed' re-aligns the history without gaps; 'absolute' leaves every block where it
      was generated (the ablation "no re-alignment").
    mid_position_stride: latent frames that one selected block spans in packed positions; None is
      the block's own length (the paper).
    mid_offsets: where a compressed token sits inside its block.
    storage: 'full' keeps keys and values in `dtype`; 'int8' and 'float8_e4m3fn' in 8 bits with a
      scale for every head of every block (for sampling: what is rounded has no gradient).
    dtype: of keys and values as the model makes them and attention reads them.

  Raises:
    ValueError: sizes that contradict each other; says got, wanted and a remedy.
  """

  num_layers: int
  num_heads: int
  head_dim: int
  grid: tuple[int, int, int]
  mid_grid: tuple[int, int, int]
  sink_blocks: int = 2
  recent_blocks: int = 1
  top_k: int = 16
  mid_capacity: int = 128
  selection: Selection = 'top_k'
  score_keys: ScoreKeys = 'rope_no_slot_phase'
  score_heads: int | None = None
  score_query_stride: int = 1
  positions: Positions = 'packed'
  mid_position_stride: int | None = None
  mid_offsets: MidOffsets = 'center'
  storage: Storage = 'full'
  dtype: str = 'float32'

  def __post_init__(self):
    for name in ('num_layers', 'num_heads', 'head_dim', 'recent_blocks', 'score_query_stride'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    for name in ('sink_blocks', 'top_k', 'mid_capacity'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} must not be negative; 0 leaves it out.')
    if self.top_k > self.mid_capacity:
      raise ValueError(f'top_k={self.top_k} blocks cannot be selected from an archive of '
                       f'mid_capacity={self.mid_capacity}; raise mid_capacity or lower top_k.')
    for axis, full, mid in zip(('frames', 'height', 'width'), self.grid, self.mid_grid,
                               strict=True):
      if not 1 <= mid <= full:
        raise ValueError(f'mid_grid={self.mid_grid} has {mid} {axis} for {full} of the block, '
                         f'wanted 1..{full}; change the compressor strides.')
    if self.score_heads is not None and not 1 <= self.score_heads <= self.num_heads:
      raise ValueError(f'score_heads={self.score_heads} is not within 1..{self.num_heads}; use '
                       f'None for all heads.')
    if self.mid_position_stride is not None and self.mid_position_stride < 1:
      raise ValueError(f'mid_position_stride={self.mid_position_stride} must be at least 1; use '
                       f'None for the block length {self.frames_per_block}.')
    for name, alias in (('selection', Selection), ('score_keys', ScoreKeys),
                        ('positions', Positions), ('mid_offsets', MidOffsets),
                        ('storage', Storage)):
      if getattr(self, name) not in _choices(alias):
        raise ValueError(f'{name}={getattr(self, name)!r} is unknown; use one of '
                         f'{", ".join(_choices(alias))}.')
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(f'dtype={self.dtype!r} is not supported; use float32 or bfloat16.')

  @property
  def quantized(self) -> bool:
    """Whether keys and values are stored in 8 bits."""
    return self.storage in quantization.DTYPES

  def trainable(self) -> 'CacheSpec':
    """Itself, if gradients go through it.

    Raises:
      ValueError: they would end where keys and values are rounded to 8 bits.
    """
    if self.quantized:
      raise ValueError(f'storage={self.storage!r} has no gradient; train with \'full\' and choose '
                       'it when sampling.')
    return self

  @property
  def stored_dtype(self) -> str:
    """Of stored keys and values."""
    return self.storage if self.quantized else self.dtype

  @property
  def frames_per_block(self) -> int:
    return self.grid[0]

  @property
  def block_tokens(self) -> int:
    """Tokens of a full-resolution block (T)."""
    return self.grid[0] * self.grid[1] * self.grid[2]

  @property
  def mid_tokens(self) -> int:
    """Tokens of a compressed block (M)."""
    return self.mid_grid[0] * self.mid_grid[1] * self.mid_grid[2]

  @property
  def mid_stride(self) -> int:
    """Latent frames that a selected block spans in packed positions."""
    return self.mid_position_stride or self.frames_per_block

  @property
  def context_tokens(self) -> int:
    """History tokens attended in the steady state, without the current block."""
    full = (self.sink_blocks + self.recent_blocks) * self.block_tokens
    return full + self.top_k * self.mid_tokens

  @property
  def attention_tokens(self) -> int:
    """Keys per query in the steady state, the current block included."""
    return self.context_tokens + self.block_tokens

  @property
  def steady_block(self) -> int:
    """First block whose context has reached its full, constant size."""
    return self.sink_blocks + self.top_k + self.recent_blocks

  @property
  def largest_position(self) -> int:
    """Largest packed temporal position that any token ever has (the sink starts at 0)."""
    history = self.frames_per_block * (self.sink_blocks + self.recent_blocks)
    return history + self.mid_stride * self.top_k + self.frames_per_block - 1

  def token_bytes(self, dtype: str | None = None) -> int:
    """Bytes of one token's keys and values over all layers, by default as they are stored."""
    size = jnp.dtype(dtype or self.stored_dtype).itemsize
    return 2 * self.num_layers * self.num_heads * self.head_dim * size

  def scale_bytes(self) -> int:
    """Bytes of one block's scales over all layers."""
    return self.quantized * 2 * self.num_layers * self.num_heads * jnp.dtype('float32').itemsize

  def partition_bytes(self, batch: int = 1) -> dict[str, int]:
    """Bytes of every partition for `batch` videos."""
    key_sum = self.num_layers * self.num_heads * self.head_dim * jnp.dtype('float32').itemsize
    blocks = {'sink': (self.sink_blocks, self.block_tokens),
              'archive': (self.mid_capacity, self.mid_tokens),
              'pending': (self.recent_blocks, self.mid_tokens),
              'recent': (self.recent_blocks, self.block_tokens)}
    sizes = {name: batch * count * (tokens * self.token_bytes() + self.scale_bytes())
             for name, (count, tokens) in blocks.items()}
    sizes['key_sums'] = batch * self.mid_capacity * key_sum
    return sizes

  def attended_bytes(self, batch: int = 1) -> int:
    """Bytes of one layer's attended history as it lies in the cache."""
    blocks = self.sink_blocks + self.top_k + self.recent_blocks
    stored = self.context_tokens * self.token_bytes() + blocks * self.scale_bytes()
    return batch * stored // self.num_layers

  def context_bytes(self, batch: int = 1) -> int:
    """Bytes of one layer's packed history, which exists while that layer attends it."""
    return batch * self.context_tokens * self.token_bytes(self.dtype) // self.num_layers
