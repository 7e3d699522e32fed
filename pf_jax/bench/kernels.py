"""Suites of what a block is made of: attention, context, conv3d, vae."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pf_jax import cache as cache_lib
from pf_jax.bench import counts, torch_peer
from pf_jax.bench.case import Bench, Case
from pf_jax.bench.subject import Subject, draw
from pf_jax.bench.timing import Call
from pf_jax.cache import CacheSpec, LayerCache, Layout
from pf_jax.kernels import rope
from pf_jax.kernels.attention import Blocks, Segment, attend, pallas, pallas_float8
from pf_jax.kernels.context import assemble
from pf_jax.kernels.conv3d import IMPLEMENTATIONS, Epilogue, conv3d, operations, supports
from pf_jax.kernels.platform import target_platform
from pf_jax.models.bundle import VideoModels
from pf_jax.models.vae import ResBlock, Upsample
from pf_jax.types import Array, KeyValues, tree_bytes

_HALF = ('bfloat16', 'float16')


def jitted(function: Callable, *inputs) -> Call:
  """A compiled function of fixed inputs."""
  program = jax.jit(function)
  return Call(lambda: program(*inputs))


def array(*shape: int, dtype: str, seed: int = 0) -> Array:
  """Random normal numbers."""
  return draw(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), seed)


# --- attention ------------------------------------------------------------------------------------


def _attend(q: Array, history: KeyValues | None, own: KeyValues) -> Array:
  """Ours: the history and the block itself, which lie apart."""
  segments = [] if history is None else [Segment(*history)]
  return attend(q, [*segments, Segment(*own)])


def plain_attention(dtype: str) -> tuple[str, Callable]:
  """JAX's own attention over ready-made rows, in its fastest form here, and what to call it."""
  fused = target_platform() == 'cuda' and dtype in _HALF
  implementation = 'cudnn' if fused else 'xla'
  return (f'jax.nn ({implementation})',
          functools.partial(jax.nn.dot_product_attention, implementation=implementation))


def _attention(bench: Bench, name: str, queries: int, history_rows: int, own_rows: int) -> Case:
  dit, dtype = bench.subject.models.spec.transformer, bench.subject.dtype
  heads, size = dit.num_heads, dit.head_dim
  q = array(1, queries, heads, size, dtype=dtype)
  rows = KeyValues(*(array(1, history_rows + own_rows, heads, size, dtype=dtype, seed=seed)
                     for seed in (1, 2)))
  history, own = (KeyValues(*(x[:, start:stop] for x in rows)) for start, stop in (
      (0, history_rows), (history_rows, history_rows + own_rows)))
  ours = (q, history if history_rows else None, own)
  label, plain = plain_attention(dtype)
  present, absent = torch_peer.sorted_out(
      'torch', torch_peer.attention(q.shape, rows.k.shape, dtype))
  return Case(
      name, {'ours': jitted(_attend, *ours), label: jitted(plain, q, *rows), **present}, dtype,
      flops=counts.attention(queries, history_rows + own_rows, dit.width),
      bytes=counts.moved(_attend, *ours), traced_flops=counts.traced(_attend, *ours),
      shapes={'queries': q.shape, 'keys': rows.k.shape, 'of them the history': (history_rows,)},
      absent=absent)


class BlockAttention(NamedTuple):
  """Self-attention of a pass as a rollout has it: the history lies in a cache, block by block."""

  q: Array
  history: tuple[Blocks, ...]
  own: KeyValues

  @property
  def segments(self) -> list[Segment | Blocks]:
    return [*self.history, Segment(*self.own)]


def block_attentions(subject: Subject) -> dict[str, BlockAttention]:
  """Those of a block and of its compressed version."""
  dit, cache, history = subject.models.spec.transformer, subject.spec.cache, subject.history()
  made = {}
  for name, rows in (('block', cache.block_tokens), ('compressed block', cache.mid_tokens)):
    q, k, v = (array(1, rows, dit.num_heads, dit.head_dim, dtype=subject.dtype, seed=seed)
               for seed in (0, 1, 2))
    made[name] = BlockAttention(q, history, KeyValues(k, v))
  return made


def hopper() -> bool:
  """Whether kernels of our own run here."""
  capability = getattr(jax.devices()[0], 'compute_capability', '')
  return target_platform() == 'cuda' and str(capability).startswith('9.')


def in_place(work: BlockAttention, implementation: str) -> Array:
  """Out of the cache: read where it lies, or assembled first, as the implementation does."""
  return attend(work.q, work.segments, implementation=implementation)


def _in_place(bench: Bench, name: str, work: BlockAttention) -> Case:
  """Our kernel beside cuDNN, which is handed its rows in one piece or has to assemble them."""
  dit, dtype = bench.subject.models.spec.transformer, bench.subject.dtype
  keys = bench.subject.spec.cache.context_tokens + work.own.k.shape[1]
  rows = KeyValues(*(array(1, keys, *work.q.shape[2:], dtype=dtype, seed=seed)
                     for seed in (3, 4)))
  label, plain = plain_attention(dtype)

  def by(implementation: str) -> Callable:
    return functools.partial(in_place, implementation=implementation)

  float8 = {}
  if pallas_float8.supports(work.q, work.segments):
    float8 = {'pallas_float8, in place': jitted(by('pallas_float8'), work)}
  stored = bench.subject.spec.cache.attended_bytes()
  return Case(
      f'{name} over its cache',
      {'pallas, in place': jitted(by('pallas'), work), **float8,
       f'{label}, rows ready': jitted(plain, work.q, *rows),
       'cudnn, rows assembled': jitted(by('cudnn'), work)},
      dtype, flops=counts.attention(work.q.shape[1], keys, dit.width),
      bytes=2 * tree_bytes(work.q) + tree_bytes(work.own) + stored,
      traced_flops=counts.traced(by('reference'), work),
      shapes={'queries': work.q.shape, 'keys': rows.k.shape})


def attention(bench: Bench) -> list[Case]:
  """Attention of a pass in the steady state; peers get all rows in one piece."""
  cache, text = bench.subject.spec.cache, bench.subject.models.spec.text
  contenders: list[Case] = []
  absent = {'pallas, in place': f'takes {pallas.LIMITS}, on a Hopper card'}
  if hopper():
    works = {name: work for name, work in block_attentions(bench.subject).items()
             if pallas.supports(work.q, work.segments)}
    contenders = [_in_place(bench, name, work) for name, work in works.items()]
  rows = [
      _attention(bench, 'block over history', cache.block_tokens, cache.context_tokens,
                 cache.block_tokens),
      _attention(bench, 'compressed block over history', cache.mid_tokens, cache.context_tokens,
                 cache.mid_tokens),
      _attention(bench, 'block over text', cache.block_tokens, 0, text.max_tokens)]
  if not contenders:
    rows[0] = dataclasses.replace(rows[0], absent={**rows[0].absent, **absent})
  return [*contenders, *rows]


# --- context --------------------------------------------------------------------------------------


def packed(layer: LayerCache, selected: Array, blocks: Array, layout: Layout, *, spec: CacheSpec
           ) -> tuple[Array, Array]:
  """One layer's history as a fused kernel reads it: keys and values [1, S, N, H] in a row."""
  segment = assemble(cache_lib.context(layer, selected, blocks, layout, spec=spec), spec.dtype)
  return segment.k, segment.v


def _rotated(bench: Bench) -> Case:
  """Queries of a block, normed and rotated out of the product that keys and values come from."""
  cache, dtype = bench.subject.spec.cache, bench.subject.dtype
  width = cache.num_heads * cache.head_dim
  scale, bias = array(width, dtype='float32'), array(width, dtype=dtype, seed=1)
  product = array(1, cache.block_tokens, 3 * width, dtype=dtype, seed=2)
  table = rope.rope_table(rope.block_positions(cache.grid), cache.head_dim)

  def rotated(product: Array, implementation: str) -> Array:
    return rope.norm_and_rotate(product, scale, table, bias=bias, implementation=implementation)

  fits = hopper() and rope.pallas.supports(product, table, bias, first=0)
  calls = {'ours' if name == 'reference' else name: jitted(
      functools.partial(rotated, implementation=name), product)
      for name in rope.IMPLEMENTATIONS if fits or name == 'reference'}
  queries = product[..., :width]
  return Case(
      'queries normed and rotated', {**calls, 'copy': jitted(jnp.copy, queries)}, dtype, flops=0,
      bytes=2 * queries.nbytes + tree_bytes((scale, bias, table)), traced_flops=0,
      shapes={'product': product.shape, 'queries': queries.shape},
      absent={} if fits else {'pallas': f'needs a Hopper card, {rope.pallas.LIMITS}'})


def context(bench: Bench) -> list[Case]:
  """Assembling one layer's history: gathered, moved in time, laid side by side; and queries."""
  spec, cache = bench.subject.spec.cache, bench.subject.state().cache
  layer = jax.tree.map(lambda x: x[0], cache.layers)
  inputs = (layer, bench.subject.selected(cache.blocks), cache.blocks,
            cache_lib.layout(cache.blocks, spec))
  function = functools.partial(packed, spec=spec)
  rows = draw(jax.eval_shape(function, *inputs))
  assert tree_bytes(rows) == spec.context_bytes()
  return [Case(
      'one layer', {'ours': jitted(function, *inputs),
                    'copy': jitted(lambda rows: jax.tree.map(jnp.copy, rows), rows)},
      bench.subject.dtype, flops=0,
      bytes=spec.attended_bytes() + spec.context_bytes(),
      traced_flops=counts.traced(function, *inputs),
      shapes={'keys': rows[0].shape, 'values': rows[1].shape}), _rotated(bench)]


# --- convolutions ---------------------------------------------------------------------------------


def _convolution(name: str, shapes: counts.Convolution, dtype: str) -> Case:
  """All implementations of one convolution that run here; `x` carries past and future frames."""
  (x, kernel, strides), space = shapes, ((1, 1), (1, 1))
  inputs = (array(*x, dtype=dtype), array(*kernel, dtype=dtype, seed=1),
            array(kernel[-1], dtype=dtype, seed=2))
  on_card = hopper()
  functions = {name: functools.partial(conv3d, strides=strides, padding=space, implementation=name)
               for name in IMPLEMENTATIONS
               if supports(name, *inputs[:2], strides) and (name != 'pallas' or on_card)}
  first = next(iter(functions.values()))
  return Case(
      name, {name: jitted(function, *inputs) for name, function in functions.items()}, dtype,
      flops=operations(x, kernel, strides, ((0, 0), *space)),
      bytes=counts.moved(first, *inputs), traced_flops=counts.traced(first, *inputs),
      shapes={'x': x, 'kernel': kernel, 'strides': strides})


def decoder_stages(models: VideoModels) -> list[counts.Convolution]:
  """The convolutions inside the VAE decoder's residual blocks, one a stage.

  Inputs are those of one block with the two frames before it.
  """
  frames, height, width, _ = models.spec.video.block_latent_shape
  stages = []
  for layer in models.vae.decoder.up:
    if isinstance(layer, Upsample):
      frames, height, width = frames * (1 + (layer.time_conv is not None)), 2 * height, 2 * width
    elif isinstance(layer, ResBlock):
      kernel = layer.conv2.kernel.shape
      x = (1, frames + kernel[0] - 1, height, width, kernel[3])
      stages.append(counts.Convolution(x, kernel))
  return list(dict.fromkeys(stages))


def compressor_stages(models: VideoModels) -> list[counts.Convolution]:
  """The convolutions of the compressor's HR branch, with the zeros before and after the block."""
  return [shapes._replace(x=(1, shapes.x[1] + 2, *shapes.x[2:]))
          for shapes in counts.hr_convolutions(models)]


def convolutions(bench: Bench) -> list[Case]:
  """Those of the compressor's HR branch and of the VAE's decoder."""
  models = bench.subject.models
  dtype = models.spec.vae.dtypes.compute
  return [*(_convolution(f'compressor {number}', shapes, 'float32')
            for number, shapes in enumerate(compressor_stages(models))),
          *(_convolution(f'decoder stage {number}', shapes, dtype)
            for number, shapes in enumerate(decoder_stages(models)))]


class ConvolutionWork(NamedTuple):
  """Arguments of `conv3d`."""

  x: Array
  kernel: Array
  bias: Array
  strides: tuple[int, int, int]
  epilogue: Epilogue

  @property
  def options(self) -> dict[str, Any]:
    """All but the arrays to convolve; spaces are padded by 1."""
    return {'strides': self.strides, 'padding': ((1, 1), (1, 1)), 'epilogue': self.epilogue}


def convolution_works(models: VideoModels) -> dict[str, Callable[[], ConvolutionWork]]:
  """The suite's, each with all that follows it anywhere in its network; made when called.

  The compressor's are in half precision, in which our kernel computes them.
  """
  def made(shapes: counts.Convolution, dtype: str, whole: bool) -> ConvolutionWork:
    x, kernel, bias = (array(*size, dtype=dtype, seed=seed) for seed, size in enumerate((
        shapes.x, shapes.kernel, shapes.kernel[-1:])))
    work = ConvolutionWork(x, kernel, bias, shapes.strides, Epilogue(silu=True))
    if not whole:
      return work
    out = jax.eval_shape(lambda: conv3d(x, kernel, bias, **work.options))
    return work._replace(epilogue=Epilogue(bias, True, draw(out, 3)))

  dtype = models.spec.vae.dtypes.compute
  return {
      **{f'compressor {number}': functools.partial(made, shapes, 'bfloat16', False)
         for number, shapes in enumerate(compressor_stages(models))},
      **{f'decoder stage {number}': functools.partial(made, shapes, dtype, True)
         for number, shapes in enumerate(decoder_stages(models))}}


# --- the VAE --------------------------------------------------------------------------------------


def decode(models: VideoModels, slots, latents: Array):
  """A later block's pixels, and the state after it."""
  return models.vae.decode_next(slots, latents)


def encode(models: VideoModels, pixels: Array) -> Array:
  """A block's low-resolution latents."""
  return models.encode_low_resolution(pixels)


def vae(bench: Bench) -> list[Case]:
  """What a block asks of the VAE. There is no peer: nobody else streams these weights."""
  models, cases = bench.subject.models, []
  video, dtype = models.spec.video, models.spec.vae.dtypes.compute
  slots = draw(jax.eval_shape(lambda m: m.vae.init_decoder_state(
      1, video.latent_height, video.latent_width), models))
  latents = array(1, *video.block_latent_shape, dtype='float32')
  pixels = array(1, video.block_frames, video.height, video.width, 3, dtype='float32')
  for name, function, inputs, weights in (
      ('decode a block', decode, (slots, latents), (models.vae.decoder,
                                                    models.vae.post_quant_conv)),
      ('encode its low resolution', encode, (pixels,), (models.vae.encoder,
                                                        models.vae.quant_conv))):
    flops = counts.traced(function, models, *inputs)
    moved = counts.moved(functools.partial(function, models), *inputs) + tree_bytes(weights)
    cases.append(Case(name, {'ours': jitted(function, models, *inputs)}, dtype, flops, moved,
                      {'input': inputs[-1].shape}, traced_flops=flops))
  return cases
