"""The diffusion transformer of Wan2.1, causal over blocks of video.

One block of latents is denoised at a time. Inside the block attention is bidirectional; the past
comes in as keys and values from outside. The transformer knows no cache: every layer hands its
queries and an opaque slice (whatever the caller scans over, one entry a layer) to a `context_fn`
and gets back what to attend besides the block itself. Without a `context_fn` this is the
bidirectional base model.

Temporal positions are counted from the start of the current block; the history's keys arrive
relative to it. Parameters and their names match Wan2.1 tensor by tensor (layers are stacked).

Source: Wan2.1 (T2V 1.3B/14B) architecture; per-frame time modulation from Self-Forcing; the
compressed stream of the clean pass from arXiv:2603.25730 (dual-resolution shifting).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pf_jax.kernels import rope
from pf_jax.kernels.attention import Blocks, Segment, attend
from pf_jax.types import Array, DTypes, KeyValues, PyTree, check_shape

EPS = 1e-6

History = Sequence[Segment | Blocks]
# (one layer's slice, queries [B, T, N, H]) -> (history to attend, anything to pass out)
ContextFn = Callable[[PyTree, Array], tuple[History, PyTree]]


@dataclasses.dataclass(frozen=True)
class TransformerSpec:
  """Sizes of the transformer; defaults are the shipped miniature's. See also `wan_1_3b`, `wan_14b`.

  Attributes:
    width: D, of the residual stream.
    ffn_width: hidden width of the feed-forward.
    num_heads: N; D / N reals each.
    num_layers: L.
    in_channels: of the latents.
    out_channels: of the predicted flow.
    patch: latent cells per token along (frame, height, width).
    time_width: of the timestep's sinusoid.
    text_width: of the text encoder's rows.
    remat: recompute each layer's activations in the backward pass instead of keeping them.
    attention: backend of self-attention, see `pf_jax.kernels.attention.attend`; None chooses.
    rotation: of norming and rotating its queries and keys, see `pf_jax.kernels.rope`; None chooses.
    dtypes: precision.

  Raises:
    ValueError: sizes that contradict each other.
  """

  width: int = 128
  ffn_width: int = 512
  num_heads: int = 4
  num_layers: int = 4
  in_channels: int = 8
  out_channels: int = 8
  patch: tuple[int, int, int] = (1, 2, 2)
  time_width: int = 128
  text_width: int = 64
  remat: bool = False
  attention: str | None = None
  rotation: str | None = None
  dtypes: DTypes = DTypes()

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, int) and field.name != 'remat' and value < 1:
        raise ValueError(f'{field.name}={value} must be at least 1.')
    if self.width % self.num_heads:
      raise ValueError(f'width={self.width} is not a multiple of num_heads={self.num_heads}; '
                       f'change one of them.')
    if self.time_width % 2:
      raise ValueError(f'time_width={self.time_width} must be even: cosines and sines share it.')
    if self.rotation not in (None, *rope.IMPLEMENTATIONS):
      raise ValueError(f'rotation={self.rotation!r} is unknown; use one of '
                       f'{list(rope.IMPLEMENTATIONS)} or None.')
    rope.rope_pairs(self.head_dim)

  @classmethod
  def wan_1_3b(cls, **choices) -> 'TransformerSpec':
    """Wan2.1-T2V-1.3B and Self-Forcing: 1,418,996,800 parameters; `choices` are other fields."""
    return cls(width=1536, ffn_width=8960, num_heads=12, num_layers=30, in_channels=16,
               out_channels=16, time_width=256, text_width=4096, **choices)

  @classmethod
  def wan_14b(cls, **choices) -> 'TransformerSpec':
    """Wan2.1-T2V-14B: 14,288,491,584 parameters; `choices` are other fields."""
    return cls(width=5120, ffn_width=13824, num_heads=40, num_layers=40, in_channels=16,
               out_channels=16, time_width=256, text_width=4096, **choices)

  @property
  def head_dim(self) -> int:
    return self.width // self.num_heads

  @property
  def patch_volume(self) -> int:
    return self.patch[0] * self.patch[1] * self.patch[2]


class TransformerOutput(NamedTuple):
  """What one pass returns.

  Attributes:
    flow: [B, F, h, w, C] float32, the predicted noise - x0.
    keys_values: the block's own, [L, B, T, N, H], rotated inside the block.
    compressed: the same of the compressed stream, [L, B, M, N, H]; None without one.
    aux: whatever `context_fn` passed out, stacked over layers.
  """

  flow: Array
  keys_values: KeyValues
  compressed: KeyValues | None
  aux: PyTree


def layer_norm(x: Array) -> Array:
  """Layer norm without parameters, in float32."""
  x = x.astype(jnp.float32)
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + EPS)


class RmsNorm(nnx.Module):
  """Root-mean-square norm with a learned scale, in float32."""

  def __init__(self, width: int):
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

  def __call__(self, x: Array) -> Array:
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + EPS)
    return (x32 * self.scale[...]).astype(x.dtype)


class AffineLayerNorm(nnx.Module):
  """Layer norm with scale and bias, in float32."""

  def __init__(self, width: int):
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
    self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

  def __call__(self, x: Array) -> Array:
    return layer_norm(x) * self.scale[...] + self.bias[...]


def _linear(fan_in: int, fan_out: int, dtypes: DTypes, rngs: nnx.Rngs,
            init: Callable | None = None) -> nnx.Linear:
  return nnx.Linear(fan_in, fan_out, param_dtype=jnp.dtype(dtypes.params),
                    dtype=jnp.dtype(dtypes.compute), rngs=rngs,
                    kernel_init=init or nnx.initializers.xavier_uniform())


class Attention(nnx.Module):
  """Projections of one attention: q and k are RMS-normed over the full width, before the heads."""

  def __init__(self, spec: TransformerSpec, *, rngs: nnx.Rngs):
    self.q = _linear(spec.width, spec.width, spec.dtypes, rngs)
    self.k = _linear(spec.width, spec.width, spec.dtypes, rngs)
    self.v = _linear(spec.width, spec.width, spec.dtypes, rngs)
    self.o = _linear(spec.width, spec.width, spec.dtypes, rngs)
    self.norm_q = RmsNorm(spec.width)
    self.norm_k = RmsNorm(spec.width)
    self.heads = spec.num_heads
    self.rotation = spec.rotation

  def _split(self, x: Array) -> Array:
    return einops.rearrange(x, 'b t (n h) -> b t n h', n=self.heads)

  def queries(self, x: Array) -> Array:
    """[B, T, D] -> [B, T, N, H]."""
    return self._split(self.norm_q(self.q(x)))

  def keys_values(self, x: Array) -> KeyValues:
    """[B, T, D] -> keys (normed) and values (not), each [B, T, N, H]."""
    return KeyValues(self._split(self.norm_k(self.k(x))), self._split(self.v(x)))

  def rotated(self, x: Array, table: rope.RopeTable) -> tuple[Array, KeyValues]:
    """[B, T, D] -> queries, and keys with their values; queries and keys normed and rotated."""
    if self.rotation == 'pallas' and all(
        isinstance(layer, nnx.Linear) for layer in (self.q, self.k, self.v)):
      return self._rotated_out_of_one_product(x, table)
    q, k = (rope.norm_and_rotate(layer(x), norm.scale[...], table, eps=EPS)
            for layer, norm in ((self.q, self.norm_q), (self.k, self.norm_k)))
    return q, KeyValues(k, self._split(self.v(x)))

  def _rotated_out_of_one_product(self, x: Array, table: rope.RopeTable
                                  ) -> tuple[Array, KeyValues]:
    """The same by the kernel, which reads its columns and adds their bias by itself.

    XLA makes one product of the three anyway, and would copy queries and keys out of it for a
    kernel that wants them alone. (Layers with adapters, which are only trained, do without.)
    """
    layers, dtype, width = (self.q, self.k, self.v), self.q.dtype, x.shape[-1]
    kernel, bias = (jnp.concatenate([getattr(layer, name)[...] for layer in layers], axis=-1)
                    .astype(dtype) for name in ('kernel', 'bias'))
    product = x.astype(dtype) @ kernel
    q, k = (rope.norm_and_rotate(product, norm.scale[...], table, bias=bias[first:first + width],
                                 first=first, eps=EPS, implementation='pallas')
            for norm, first in ((self.norm_q, 0), (self.norm_k, width)))
    return q, KeyValues(k, self._split(product[..., 2 * width:] + bias[2 * width:]))

  def project(self, heads: Array) -> Array:
    """[B, T, N, H] -> [B, T, D]."""
    return self.o(einops.rearrange(heads, 'b t n h -> b t (n h)'))


class Stream(NamedTuple):
  """Tokens that run through the layers together, and what modulates and places them.

  Attributes:
    x: [B, T, D] float32 residual stream.
    modulation: [B, F, 6, D] float32; T is F times the tokens of a frame.
    table: rotations of the tokens inside their block.
  """

  x: Array
  modulation: Array
  table: rope.RopeTable


class Layer(nnx.Module):
  """One transformer layer: self-attention, text cross-attention, feed-forward."""

  def __init__(self, spec: TransformerSpec, *, rngs: nnx.Rngs):
    self.modulation = nnx.Param(
        jax.random.normal(rngs.params(), (6, spec.width), jnp.float32) / spec.width**0.5)
    self.self_attn = Attention(spec, rngs=rngs)
    self.cross_attn = Attention(spec, rngs=rngs)
    self.norm3 = AffineLayerNorm(spec.width)
    self.ffn_in = _linear(spec.width, spec.ffn_width, spec.dtypes, rngs)
    self.ffn_out = _linear(spec.ffn_width, spec.width, spec.dtypes, rngs)
    self.backend = spec.attention

  def _modulations(self, stream: Stream) -> Array:
    """[6, B, T, D]: shift, scale, gate of self-attention, then of the feed-forward."""
    per_frame = jnp.moveaxis(self.modulation[...] + stream.modulation, 2, 0)
    return jnp.repeat(per_frame, stream.x.shape[1] // per_frame.shape[2], axis=2)

  def __call__(self, stream: Stream, text: KeyValues,
               history: Callable[[Array], tuple[History, PyTree]]
               ) -> tuple[Array, KeyValues, History, PyTree]:
    """Runs one stream through the layer.

    Args:
      stream: tokens with their modulation and rotations.
      text: cross-attention keys/values [B, rows, N, H].
      history: from the rotated queries to what is attended besides the stream itself.

    Returns:
      The new residual stream, the stream's own keys/values, the history it attended, aux.
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = self._modulations(stream)
    x, attn = stream.x, self.self_attn
    normed = layer_norm(x) * (1 + scale1) + shift1
    q, own = attn.rotated(normed, stream.table)
    context, aux = history(q)
    attended = attend(q, [*context, Segment(own.k, own.v)], implementation=self.backend)
    x = x + attn.project(attended).astype(jnp.float32) * gate1
    cross = self.cross_attn
    read = attend(cross.queries(self.norm3(x)), [Segment(text.k, text.v)])
    x = x + cross.project(read).astype(jnp.float32)
    normed = layer_norm(x) * (1 + scale2) + shift2
    ffn = self.ffn_out(jax.nn.gelu(self.ffn_in(normed), approximate=True))
    return x + ffn.astype(jnp.float32) * gate2, own, context, aux


class PatchEmbedding(nnx.Module):
  """Latents to tokens: a convolution whose kernel is its stride, written as one product.

  The kernel's rows run over (patch frame, patch row, patch column, channel).
  """

  def __init__(self, spec: TransformerSpec, *, rngs: nnx.Rngs):
    self.patch = spec.patch
    self.proj = _linear(spec.patch_volume * spec.in_channels, spec.width, spec.dtypes, rngs)

  def __call__(self, latents: Array) -> Array:
    """[B, F, h, w, C] -> [B, F*h'*w', D] float32; width runs fastest."""
    p, q, r = self.patch
    rows = einops.rearrange(latents, 'b (f p) (h q) (w r) c -> b (f h w) (p q r c)', p=p, q=q, r=r)
    return self.proj(rows).astype(jnp.float32)


class CausalTransformer(nnx.Module):
  """Wan2.1's diffusion transformer; see the module's docstring."""

  def __init__(self, spec: TransformerSpec, *, rngs: nnx.Rngs):
    self.spec = spec
    width = spec.width
    small = nnx.initializers.normal(0.02)
    self.patch_embedding = PatchEmbedding(spec, rngs=rngs)
    self.text_in = _linear(spec.text_width, width, spec.dtypes, rngs, small)
    self.text_out = _linear(width, width, spec.dtypes, rngs, small)
    precise = DTypes()
    self.time_in = _linear(spec.time_width, width, precise, rngs, small)
    self.time_out = _linear(width, width, precise, rngs, small)
    self.time_projection = _linear(width, 6 * width, precise, rngs)
    keys = jax.random.split(rngs.params(), spec.num_layers)
    self.layers = jax.vmap(lambda key: Layer(spec, rngs=nnx.Rngs(key)))(keys)
    self.head_modulation = nnx.Param(
        jax.random.normal(rngs.params(), (2, width), jnp.float32) / width**0.5)
    self.head = _linear(width, spec.patch_volume * spec.out_channels, precise, rngs,
                        nnx.initializers.zeros)

  def text_keys_values(self, text: Array) -> KeyValues:
    """Cross-attention keys/values of a prompt, computed once per prompt.

    Args:
      text: [B, rows, text_width] encoder output. Rows after the prompt's end are zeros and do take
        part in attention.

    Returns:
      [L, B, rows, N, H].
    """
    check_shape('text', text, 'b rows d', d=self.spec.text_width)
    rows = self.text_out(jax.nn.gelu(self.text_in(text), approximate=True))
    return jax.lax.scan(lambda _, layer: (None, layer.cross_attn.keys_values(rows)),
                        None, self.layers)[1]

  def _time(self, timesteps: Array) -> tuple[Array, Array]:
    """Timesteps [B, F] -> embedding [B, F, D] and layer modulation [B, F, 6, D], float32."""
    half = self.spec.time_width // 2
    # Frequencies in float64 on the host: at t = 1000 float32 ones cost a digit of the angle.
    frequencies = jnp.asarray(10_000.0 ** (-np.arange(half, dtype=np.float64) / half), jnp.float32)
    angles = timesteps.astype(jnp.float32)[..., None] * frequencies
    sinusoid = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    embedding = self.time_out(jax.nn.silu(self.time_in(sinusoid)))
    projected = self.time_projection(jax.nn.silu(embedding))
    return embedding, einops.rearrange(projected, 'b f (six d) -> b f six d', six=6)

  def _head(self, x: Array, embedding: Array, grid: tuple[int, int, int]) -> Array:
    """Tokens [B, T, D] -> flow [B, F, h, w, C]."""
    shift, scale = jnp.moveaxis(self.head_modulation[...] + embedding[:, :, None], 2, 0)
    tokens = grid[1] * grid[2]
    shift, scale = (jnp.repeat(m, tokens, axis=1) for m in (shift, scale))
    out = self.head(layer_norm(x) * (1 + scale) + shift)
    p, q, r = self.spec.patch
    # The channel runs fastest here, unlike in Wan's patch embedding kernel.
    return einops.rearrange(out, 'b (f h w) (p q r c) -> b (f p) (h q) (w r) c',
                            f=grid[0], h=grid[1], w=grid[2], p=p, q=q, r=r)

  def __call__(self, latents: Array, timesteps: Array, text: KeyValues, *,
               slices: PyTree = None, context_fn: ContextFn | None = None,
               compressed: tuple[Array, np.ndarray] | None = None) -> TransformerOutput:
    """One pass over one block.

    Args:
      latents: [B, F, h, w, C], noisy (or clean for the clean pass).
      timesteps: [B, F] in [0, 1000], one per latent frame.
      text: [L, B, rows, N, H] from `text_keys_values`; its batch may be smaller by a whole factor.
      slices: pytree with a leading L, one opaque entry per layer for `context_fn`.
      context_fn: (slice, queries [B, T, N, H]) -> (what it attends besides, aux).
      compressed: tokens [B, M, D] of the block's compressed version and their positions [M, 3]
        inside the block. They run as a second stream at timestep 0 that sees the history and
        itself; the full-resolution stream never sees them.

    Returns:
      `TransformerOutput`.

    Raises:
      ValueError: shapes that do not fit the spec.
    """
    spec = self.spec
    sizes = check_shape('latents', latents, 'b f h w c', c=spec.in_channels)
    check_shape('timesteps', timesteps, 'b f', b=sizes['b'], f=sizes['f'])
    if sizes['h'] % spec.patch[1] or sizes['w'] % spec.patch[2] or sizes['f'] % spec.patch[0]:
      raise ValueError(f'latents of {sizes["f"]}x{sizes["h"]}x{sizes["w"]} do not divide into '
                       f'patches of {spec.patch}; use pixels in multiples of stride x patch.')
    p, q, r = spec.patch
    grid = sizes['f'] // p, sizes['h'] // q, sizes['w'] // r
    embedding, modulation = self._time(timesteps)
    streams = [Stream(self.patch_embedding(latents), modulation,
                      rope.rope_table(rope.block_positions(grid), spec.head_dim))]
    if compressed is not None:
      streams.append(self._compressed_stream(*compressed))
    return self._run(streams, embedding, grid, text, slices, context_fn)

  def _compressed_stream(self, tokens: Array, positions: np.ndarray) -> Stream:
    check_shape('compressed tokens', tokens, 'b m d', m=len(positions), d=self.spec.width)
    _, modulation = self._time(jnp.zeros((tokens.shape[0], 1), jnp.float32))
    return Stream(tokens.astype(jnp.float32), modulation,
                  rope.rope_table(positions, self.spec.head_dim))

  def _run(self, streams: list[Stream], embedding: Array, grid: tuple[int, int, int],
           text: KeyValues, slices: PyTree, context_fn: ContextFn | None) -> TransformerOutput:
    """Scans the streams over the stacked layers."""
    context_fn = context_fn or (lambda _, q: ((), None))
    cache_dtype = jnp.dtype(self.spec.dtypes.cache)

    def body(xs, inputs):
      layer, layer_text, layer_slice = inputs
      x, own, context, aux = layer(streams[0]._replace(x=xs[0]), layer_text,
                                   lambda q: context_fn(layer_slice, q))
      outputs, kept = [x], [own]
      for stream, residual in zip(streams[1:], xs[1:], strict=True):
        x, own, _, _ = layer(stream._replace(x=residual), layer_text, lambda q: (context, None))
        outputs.append(x)
        kept.append(own)
      return outputs, (jax.tree.map(lambda a: a.astype(cache_dtype), kept), aux)

    # A scan keeps the copies of what is computed twice apart.
    body = jax.checkpoint(body, prevent_cse=False) if self.spec.remat else body
    xs, (kept, aux) = jax.lax.scan(body, [stream.x for stream in streams],
                                   (self.layers, text, slices))
    return TransformerOutput(self._head(xs[0], embedding, grid), kept[0],
                             kept[1] if len(kept) > 1 else None, aux)
