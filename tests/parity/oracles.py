"""Tiny diffusers/transformers models with every weight randomised, as NumPy in and out.

Released models start with zero heads, unit norms and zero biases in places; left like that, they
hide bugs. `randomise` therefore draws every parameter. Arrays go in and come out channels last,
as everywhere in pf_jax; only this file knows torch's layouts.

Weights leave under Wan2.1's original names (`wan_tensors`), so that the loaders under test are the
ones that read the released checkpoints.
"""

import contextlib
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

with warnings.catch_warnings():
  warnings.simplefilter('ignore')  # import-time deprecations of the libraries
  import torch
  import transformers
  from diffusers import WanTransformer3DModel
  from diffusers.models.transformers.transformer_wan import WanAttnProcessor

# From clean to pure noise; among them a few-step student's four at shift 5, two of which are whole.
TIMESTEPS = (0, 250.25, 625, 833.3333, 937.5, 1000)

# diffusers' name -> Wan2.1's, in order; each pattern replaces a whole part of the name.
_DIT_RENAMES = (
    (r'^condition_embedder\.text_embedder\.linear_1\.', 'text_embedding.0.'),
    (r'^condition_embedder\.text_embedder\.linear_2\.', 'text_embedding.2.'),
    (r'^condition_embedder\.time_embedder\.linear_1\.', 'time_embedding.0.'),
    (r'^condition_embedder\.time_embedder\.linear_2\.', 'time_embedding.2.'),
    (r'^condition_embedder\.time_proj\.', 'time_projection.1.'),
    (r'^scale_shift_table$', 'head.modulation'),
    (r'^proj_out\.', 'head.head.'),
    (r'\.scale_shift_table$', '.modulation'),
    (r'\.attn1\.', '.self_attn.'),
    (r'\.attn2\.', '.cross_attn.'),
    (r'\.to_([qkv])\.', r'.\1.'),
    (r'\.to_out\.0\.', '.o.'),
    # Wan's norm3 is the affine norm before the cross-attention; its norm2 has no parameters.
    (r'\.norm2\.', '.norm3.'),
    (r'\.ffn\.net\.0\.proj\.', '.ffn.0.'),
    (r'\.ffn\.net\.2\.', '.ffn.2.'),
)
# transformers' name -> Wan2.1's.
_TEXT_RENAMES = (
    (r'^shared\.', 'token_embedding.'),
    (r'^encoder\.final_layer_norm\.', 'norm.'),
    (r'^encoder\.block\.', 'blocks.'),
    (r'\.layer\.0\.layer_norm\.', '.norm1.'),
    (r'\.layer\.1\.layer_norm\.', '.norm2.'),
    (r'\.layer\.0\.SelfAttention\.relative_attention_bias\.', '.pos_embedding.embedding.'),
    (r'\.layer\.0\.SelfAttention\.', '.attn.'),
    (r'\.layer\.1\.DenseReluDense\.wi_0\.', '.ffn.gate.0.'),
    (r'\.layer\.1\.DenseReluDense\.wi_1\.', '.ffn.fc1.'),
    (r'\.layer\.1\.DenseReluDense\.wo\.', '.ffn.fc2.'),
)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
  """max|d| / max|ref|, the measure of all float32 gates; shapes must be equal."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  if ours.shape != theirs.shape:
    raise ValueError(f'ours {ours.shape} is not shaped like theirs {theirs.shape}.')
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def angular_error(ours: np.ndarray, theirs: np.ndarray) -> float:
  """1 - cos between the flattened arrays, the measure of the bfloat16 gates."""
  ours, theirs = (np.asarray(x, np.float64).ravel() for x in (ours, theirs))
  return float(1 - ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
  """Draws every parameter of a module, in place; norms around one, the rest around zero.

  Matrices and kernels get 1/sqrt(fan in), so that activations stay of order one through layers.

  Args:
    module: any torch module.
    seed: of NumPy's generator; parameters are drawn in the order of their names.

  Returns:
    The module, in evaluation mode.
  """
  rng = np.random.default_rng(seed)
  for name, parameter in sorted(module.named_parameters()):
    draw = rng.standard_normal(parameter.shape)
    if 'norm' in name and name.endswith(('weight', 'gamma')):
      draw = 1 + 0.3 * draw
    elif name.endswith('bias'):
      draw = 0.2 * draw
    elif parameter.ndim >= 2 and not name.endswith(
        ('scale_shift_table', 'shared.weight', 'relative_attention_bias.weight')):
      draw = draw / np.sqrt(np.prod(parameter.shape[1:]))
    else:
      draw = 0.5 * draw
    parameter.data = torch.tensor(draw, dtype=torch.float32)
  return module.eval().requires_grad_(False)


def wan_tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
  """A model's weights under Wan2.1's original names and layouts, float32.

  Args:
    model: from `tiny_wan_transformer` or `tiny_umt5`.

  Returns:
    name -> array, as in the released checkpoints (kernels [out, in, ...]).
  """
  renames = _DIT_RENAMES if isinstance(model, WanTransformer3DModel) else _TEXT_RENAMES
  tensors = {}
  for name, parameter in model.named_parameters():
    for pattern, replacement in renames:
      name = re.sub(pattern, replacement, name)
    tensors[name] = parameter.detach().float().numpy()
  return tensors


# UMT5 ---------------------------------------------------------------------------------------------


def tiny_umt5(seed: int) -> transformers.UMT5EncoderModel:
  """UMT5's encoder at vocabulary 97, width 32, 3 heads of 8, hidden 56, 3 layers."""
  config = transformers.UMT5Config(
      vocab_size=97, d_model=32, d_kv=8, d_ff=56, num_layers=3, num_heads=3, dropout_rate=0.0,
      feed_forward_proj='gated-gelu', relative_attention_num_buckets=32,
      relative_attention_max_distance=128)
  return randomise(transformers.UMT5EncoderModel(config), seed)


def umt5_oracle(model: transformers.UMT5EncoderModel, ids: np.ndarray,
                mask: np.ndarray) -> np.ndarray:
  """Encodes ids [B, T] under mask [B, T] -> float32 [B, T, D], rows outside the mask zeroed."""
  output = model(input_ids=torch.tensor(ids, dtype=torch.long),
                 attention_mask=torch.tensor(mask, dtype=torch.long))
  return output.last_hidden_state.numpy() * np.asarray(mask, np.float32)[..., None]


# DiT ----------------------------------------------------------------------------------------------


class _Float64Sinusoid(torch.nn.Module):
  """The timestep sinusoid in float64, as Wan2.1 has it (diffusers' is float32)."""

  def __init__(self, width: int):
    super().__init__()
    self.half = width // 2

  def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
    rates = 10_000.0 ** (-torch.arange(self.half, dtype=torch.float64) / self.half)
    angles = timesteps.double()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class _FrameRope(torch.nn.Module):
  """Rotations at any temporal positions: fractional, negative, beyond diffusers' table."""

  def __init__(self, rope: torch.nn.Module, frame_positions: Sequence[float]):
    super().__init__()
    self.rope = rope
    self.frame_positions = np.asarray(frame_positions, np.float64)

  def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [B, C, F, h, w] -> (cos, sin), each [1, tokens, 1, head_dim]."""
    frames, rows, columns = (size // p for size, p in zip(
        hidden_states.shape[2:], self.rope.patch_size, strict=True))
    if len(self.frame_positions) != frames:
      raise ValueError(f'{len(self.frame_positions)} temporal positions for {frames} frames.')
    grid = np.meshgrid(self.frame_positions, np.arange(rows), np.arange(columns), indexing='ij')
    return _rotations(self.rope, np.stack(grid, axis=-1).reshape(1, -1, 3))


def _rotations(rope: torch.nn.Module, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
  """Positions [B, T, 3] (time, row, column) -> (cos, sin), each [B, T, 1, head_dim]."""
  parts = []
  for axis, width in enumerate((rope.t_dim, rope.h_dim, rope.w_dim)):
    rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
    parts.append(np.repeat(positions[..., axis, None] * rates, 2, axis=-1))
  angles = torch.tensor(np.concatenate(parts, axis=-1), dtype=torch.float64)[:, :, None]
  return angles.cos().float(), angles.sin().float()


class _QueryGroup(NamedTuple):
  """Queries that share a view: their rows, a mask over all keys, rotations of all tokens."""

  rows: slice
  mask: torch.Tensor  # bool, broadcasts to [B, N, queries, keys]
  rotations: tuple[torch.Tensor, torch.Tensor] | None = None  # None: the model's own


class _MaskedProcessor(WanAttnProcessor):
  """diffusers' own attention, run once per group of queries; only the group's rows are kept."""

  def __init__(self, groups: Sequence[_QueryGroup]):
    super().__init__()
    self.groups = groups

  def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
               rotary_emb=None):
    output = torch.full_like(hidden_states, torch.nan)
    for group in self.groups:
      whole = super().__call__(attn, hidden_states, encoder_hidden_states, group.mask,
                               group.rotations or rotary_emb)
      output[:, group.rows] = whole[:, group.rows]
    return output


@contextlib.contextmanager
def _self_attention(model: WanTransformer3DModel, groups: Sequence[Sequence[_QueryGroup]]):
  """Gives each layer's self-attention its groups, for the duration."""
  originals = [layer.attn1.processor for layer in model.blocks]
  for layer, layer_groups in zip(model.blocks, groups, strict=True):
    layer.attn1.processor = _MaskedProcessor(layer_groups)
  try:
    yield
  finally:
    for layer, processor in zip(model.blocks, originals, strict=True):
      layer.attn1.processor = processor


@contextlib.contextmanager
def _parts(model: WanTransformer3DModel, **parts: torch.nn.Module):
  """Swaps submodules of a model, for the duration."""
  originals = {name: getattr(model, name) for name in parts}
  for name, part in parts.items():
    setattr(model, name, part)
  try:
    yield
  finally:
    for name, part in originals.items():
      setattr(model, name, part)


def tiny_wan_transformer(seed: int, *, num_layers: int = 2, out_channels: int = 6,
                         float64_sinusoid: bool = False) -> WanTransformer3DModel:
  """Wan's transformer at 3 heads of 16, hidden 80, time 32, text 20, 4 channels in.

  Args:
    seed: of all weights.
    num_layers: L.
    out_channels: 6 tells the way out from the way in; a sampler needs 4.
    float64_sinusoid: put a float64 timestep sinusoid into it, for the tighter gate.
  """
  model = WanTransformer3DModel(
      patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=16, in_channels=4,
      out_channels=out_channels, text_dim=20, freq_dim=32, ffn_dim=80, num_layers=num_layers,
      cross_attn_norm=True, qk_norm='rms_norm_across_heads', eps=1e-6, rope_max_seq_len=1024)
  if float64_sinusoid:
    model.condition_embedder.timesteps_proj = _Float64Sinusoid(32)
  return randomise(model, seed)


def wan_oracle(model: WanTransformer3DModel, latents: np.ndarray, timesteps: np.ndarray,
               text: np.ndarray, *, positions: Sequence[float] | None = None) -> np.ndarray:
  """One bidirectional pass.

  Args:
    model: from `tiny_wan_transformer`.
    latents: [B, F, h, w, C].
    timesteps: [B], or [B, F] for one per latent frame.
    text: [B, rows, text_dim]; rows after the prompt are zeros and are attended.
    positions: [F] temporal positions instead of 0, 1, 2, ...

  Returns:
    Flow, float32 [B, F, h, w, C'].
  """
  timesteps = np.asarray(timesteps, np.float32)
  if timesteps.ndim == 2:
    timesteps = np.repeat(timesteps, _tokens_per_frame(model, latents), axis=1)
  rope = model.rope if positions is None else _FrameRope(model.rope, positions)
  with _parts(model, rope=rope):
    return _forward(model, latents, timesteps, text)


def _forward(model, latents, timesteps, text) -> np.ndarray:
  output = model(hidden_states=torch.tensor(np.moveaxis(latents, -1, 1), dtype=torch.float32),
                 timestep=torch.tensor(timesteps, dtype=torch.float32),
                 encoder_hidden_states=torch.tensor(text, dtype=torch.float32),
                 return_dict=False)[0]
  return np.moveaxis(output.numpy(), 1, -1)


def window(count: int, *, sink: int, recent: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
  """What each of `count` blocks sees under a sink and a recent window, and where, without gaps.

  Args:
    count: n blocks.
    sink: first blocks that stay in view.
    recent: blocks before a block that are in its view.
    frames: latent frames of a block.

  Returns:
    bool [n, n], query block by key block; temporal positions [n, n * frames] of all latent frames
    as each block sees them (of those out of view, any).
  """
  query, key = np.indices((count, count))
  visible = (key <= query) & ((key < sink) | (key >= query - recent))
  slots = np.where(visible, np.cumsum(visible, axis=1) - 1, 0)
  return visible, (frames * slots[..., None] + np.arange(frames)).reshape(count, -1)


def masked_causal_oracle(model: WanTransformer3DModel, blocks: Sequence[np.ndarray],
                         timesteps: np.ndarray, text: np.ndarray, *,
                         visible: np.ndarray | None = None,
                         positions: np.ndarray | None = None) -> np.ndarray:
  """What a cached rollout predicts for its last block, computed in one masked pass.

  The clean past and the noisy block run together; a mask at the granularity of blocks reaches
  self-attention only. It is exact because a cached block's keys and values depend on nothing but
  its own window.

  Args:
    model: from `tiny_wan_transformer`.
    blocks: per block latents [B, F_i, h, w, C]; the clean past in order, then the noisy block.
    timesteps: [B, F] over all F = sum F_i latent frames: 0 for the clean past, t for the block.
    text: [B, rows, text_dim].
    visible: bool [n, n] or, per layer, [L, n, n]: whether queries of block i see keys of block j.
      The default is block-causal (everything up to and including the block itself).
    positions: temporal positions. [F]: one per latent frame, for everybody. [n, F]: row i is where
      block i's queries (and keys) stand when block i attends, so that re-aligned, packed histories
      are exact, too. The default is 0, 1, 2, ...

  Returns:
    Flow of the last block, float32 [B, F_n, h, w, C'].

  Raises:
    ValueError: `visible` or `positions` has another shape, or a block does not see itself.
  """
  latents = np.concatenate(blocks, axis=1)
  sizes = [block.shape[1] for block in blocks]
  count, frames, layers = len(sizes), latents.shape[1], len(model.blocks)
  visible = np.tril(np.ones((count, count), bool)) if visible is None else np.asarray(visible, bool)
  visible = np.broadcast_to(visible, (layers, count, count))
  if not visible[:, range(count), range(count)].all():
    raise ValueError('every block must see itself; set the diagonal of `visible`.')
  per_block = positions is not None and np.ndim(positions) == 2
  if per_block and np.shape(positions) != (count, frames):
    raise ValueError(f'positions of {np.shape(positions)}, wanted {(count, frames)}.')
  tokens = np.asarray(sizes) * _tokens_per_frame(model, latents)
  views = [(slice(None), None)]
  if per_block:
    hidden, ends = np.moveaxis(latents, -1, 1), np.cumsum(tokens)
    views = [(slice(end - size, end), _FrameRope(model.rope, row)(hidden))
             for end, size, row in zip(ends, tokens, positions, strict=True)]
  masks = [torch.tensor(seen.repeat(tokens, 0).repeat(tokens, 1))[None, None] for seen in visible]
  groups = [[_QueryGroup(rows, mask, turn) for rows, turn in views] for mask in masks]
  with _self_attention(model, groups):
    flow = wan_oracle(model, latents, timesteps, text,
                      positions=None if per_block else positions)
  return flow[:, frames - sizes[-1]:]


def _tokens_per_frame(model: WanTransformer3DModel, latents: np.ndarray) -> int:
  _, rows, columns = model.config.patch_size
  return (latents.shape[2] // rows) * (latents.shape[3] // columns)


# DiT through the whole PackForcing cache ----------------------------------------------------------


class _GivenTokens(torch.nn.Module):
  """Stands in for the patch embedding: returns tokens that were made beforehand."""

  def __init__(self, tokens: torch.Tensor):
    super().__init__()
    self.tokens = tokens

  def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
    """-> [B, D, T, 1, 1]: every token is a frame of one patch."""
    return self.tokens.movedim(1, 2)[..., None, None]


def pack_oracle(model: WanTransformer3DModel, blocks: Sequence[np.ndarray],
                compressed: Sequence[np.ndarray], offsets: np.ndarray, timestep: float,
                text: np.ndarray, *, sink_blocks: int, recent_blocks: int, selected: np.ndarray,
                mid_stride: int | None = None, packed: bool = True) -> np.ndarray:
  """What a rollout with sink, compressed mid and recent predicts for its last block.

  All clean blocks, their compressed versions and the noisy block run as one sequence of tokens.
  Each block's queries see what the cache would show them, at the positions it would give.

  Args:
    model: from `tiny_wan_transformer`.
    blocks: n arrays of latents [B, F, h, w, C]: the clean past, then the noisy block.
    compressed: n - 1 arrays of compressed tokens [B, M, D], one per clean block.
    offsets: [M, 3] positions of the compressed tokens inside their block (may be fractional).
    timestep: of the noisy block; everything else is at 0.
    text: [B, rows, text_dim].
    sink_blocks: first blocks that stay visible.
    recent_blocks: newest blocks that are visible at full resolution.
    selected: int [n, L, B, K]: compressed blocks that block i attends, ascending; -1 for none (at
      the end). Only blocks that have left the recent ones may appear.
    mid_stride: latent frames that a selected block spans; default F.
    packed: positions without gaps; otherwise every block stands where it was generated.

  Returns:
    Flow of the last block, float32 [B, F, h, w, C'].
  """
  batch, frames, height, width, _ = blocks[0].shape
  _, q, r = model.config.patch_size
  grid = (frames, height // q, width // r)
  places = np.stack(np.meshgrid(*map(np.arange, grid), indexing='ij'), axis=-1).reshape(-1, 3)
  tokens, spans, local = [], [], []
  for index, latents in enumerate(blocks):
    embedded = model.patch_embedding(torch.tensor(np.moveaxis(latents, -1, 1)))
    streams = [(embedded.flatten(2).movedim(1, 2), places)]
    if index < len(compressed):
      streams.append((torch.tensor(compressed[index]), offsets))
    for stream, (rows, inside) in enumerate(streams):
      start = sum(map(len, local))
      spans.append((index, stream, slice(start, start + len(inside))))
      tokens.append(rows)
      local.append(np.asarray(inside, np.float64))
  spans, local = tuple(spans), np.concatenate(local)
  view = _PackView(sink_blocks, recent_blocks, frames, mid_stride or frames, packed, spans)
  groups = [[view.group(model, local, index, stream, selected[index, layer])
             for index, stream, _ in spans] for layer in range(len(model.blocks))]
  last = spans[-1][2]
  times = np.zeros((batch, len(local)), np.float32)
  times[:, last] = timestep
  dummy = np.zeros((batch, len(local), q, r, model.config.in_channels), np.float32)
  with _parts(model, patch_embedding=_GivenTokens(torch.cat(tokens, dim=1))):
    with _self_attention(model, groups):
      patches = _forward(model, dummy, times, text)[:, last]
  flow = patches.reshape(batch, *grid, q, r, -1).transpose(0, 1, 2, 4, 3, 5, 6)
  return flow.reshape(batch, frames, height, width, -1)


class _PackView(NamedTuple):
  """Who sees what, and where, under sink | selected mid | recent | current."""

  sink_blocks: int
  recent_blocks: int
  frames: int
  mid_stride: int
  packed: bool
  spans: tuple[tuple[int, int, slice], ...]  # (block, 0 full resolution or 1 compressed, tokens)

  def starts(self, index: int, selected: Sequence[int]) -> dict[tuple[int, int], int]:
    """(block, stream) in view of block `index` -> where it starts in time, latent frames."""
    sinks = [j for j in range(self.sink_blocks) if j < index]
    mids = [int(j) for j in selected if j >= 0]
    recents = [j for j in range(max(index - self.recent_blocks, 0), index) if j not in sinks]
    for j in mids:
      if not self.sink_blocks <= j < index - self.recent_blocks:
        raise ValueError(f'block {j} is not in the archive of block {index}.')
    order = [(j, 0) for j in sinks] + [(j, 1) for j in mids] + [(j, 0) for j in [*recents, index]]
    spans = [self.mid_stride if stream else self.frames for _, stream in order]
    places = np.cumsum([0, *spans[:-1]]) if self.packed else [j * self.frames for j, _ in order]
    return dict(zip(order, map(int, places), strict=True))

  def group(self, model, local: np.ndarray, index: int, stream: int,
            selected: np.ndarray) -> _QueryGroup:
    """The queries of one stream of one block; `selected` [B, K] is one layer's."""
    batch, total = len(selected), len(local)
    seen, positions = np.zeros((batch, total), bool), np.broadcast_to(local, (batch, total, 3))
    positions, rows = positions.copy(), slice(0)
    for sample, chosen in enumerate(selected):
      starts = self.starts(index, chosen)
      for block, kind, span in self.spans:
        own = block == index
        if own and kind == stream:
          rows = span
        # A block's two streams stand at the same place and see themselves, not each other.
        shown = kind == stream if own else (block, kind) in starts
        if shown:
          seen[sample, span] = True
          positions[sample, span, 0] += starts[block, 0 if own else kind]
    return _QueryGroup(rows, torch.tensor(seen)[:, None, None], _rotations(model.rope, positions))
