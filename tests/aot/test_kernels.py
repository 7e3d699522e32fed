"""Our own kernels, compiled for an H200 (`make test-aot`): no register is put aside in memory."""

import dataclasses
import functools
import os
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from configs.wan import t2v_1_3b
from launch.build import build
from pf_jax.aot import ptxas, traffic
from pf_jax.aot.compile import compile_for, device_mesh
from pf_jax.aot.targets import TARGETS
from pf_jax.kernels import rope
from pf_jax.kernels.attention import attend, pallas, pallas_gpu
from pf_jax.kernels.context import Segment, assemble
from pf_jax.kernels.conv3d import pallas_gpu as conv3d_gpu
from pf_jax.models import bundle
from pf_jax.models import vae as vae_lib
from pf_jax.models.bundle import ModelSpec
from pf_jax.models.transformer import Attention, RmsNorm, TransformerSpec
from pf_jax.pipeline import rollout_spec
from pf_jax.rollout import block as block_lib
from pf_jax.types import DTypes, tree_bytes
from tests.kernels.test_conv3d import STAGES
from tests.kernels.test_pallas import at_full_size
from tests.kernels.test_rope import full_size

H200 = TARGETS['h200']

pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(
    os.environ.get(ptxas.VARIABLE) != '1',
    reason=f'the assembler says nothing without {ptxas.VARIABLE}=1; use make test-aot')]


def compiled(function, arguments, **options):
  """What the compiler says, and the kernels that were assembled."""
  with ptxas.captured() as lines:
    report = compile_for(function, arguments, H200, **options)
  kernels = ptxas.parse('\n'.join(lines))
  # Products that wait for each other; those that spill do.
  assert not any('serialized' in line for line in lines) or any(
      kernel.spill_store_bytes for kernel in kernels)
  print(*kernels, sep='\n')  # for BENCHMARKS.md
  return report, kernels


@pytest.mark.parametrize('return_lse', [False, True])
@pytest.mark.parametrize('tiles', [pallas_gpu.TileSpec(), pallas_gpu.TileSpec(2, 128, 2)])
def test_attention_reads_the_cache_where_it_lies(tiles, return_lse):
  q, segments = at_full_size()
  report, kernels = compiled(
      functools.partial(pallas.attend, tiles=tiles, return_lse=return_lse), (q, segments))
  assert len(kernels) == 1
  assert (kernels[0].spill_store_bytes, kernels[0].spill_load_bytes) == (0, 0)
  # Queries a quarter turn further take half of theirs; gathered and moved, the history's keys and
  # values would take 133 MB.
  assert report.scratch_bytes < 0.6 * tree_bytes(q)
  assert '__cudnn' not in report.executable.as_text()


@pytest.mark.parametrize('return_lse', [False, True])
@pytest.mark.parametrize(('storage', 'float8', 'scratch'), [
    ('int8', False, 0.6), ('float8_e4m3fn', False, 0.6), ('float8_e4m3fn', True, 5)])
def test_attention_reads_8_bits_where_they_lie(storage, float8, scratch, return_lse):
  q, segments = at_full_size(storage)
  report, [kernel] = compiled(
      functools.partial(pallas.attend, float8=float8, return_lse=return_lse), (q, segments))
  assert (kernel.spill_store_bytes, kernel.spill_load_bytes) == (0, 0)
  # For products in float8 also queries in its range, values laid out anew, and the block's own.
  assert report.scratch_bytes < scratch * tree_bytes(q)


def test_cudnn_hands_out_its_log_sum_exp():
  q, segments = at_full_size()
  report, _ = compiled(functools.partial(attend, implementation='cudnn', return_lse=True),
                       (q, segments))
  assert '__cudnn$fmhaSoftmax' in report.executable.as_text()
  assert report.output_bytes >= tree_bytes(q) + 4 * 6240 * 12


def test_no_layer_s_cache_is_copied():
  """A scan over two layers by their numbers; slices of the cache would be copies of it."""
  q, segments = at_full_size()
  *history, own = segments
  whole = [blocks._replace(**{name: jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
                              for name, x in (('k', blocks.k), ('v', blocks.v))})
           for blocks in history]

  def layers(q, history, own):
    def layer(q, number):
      return pallas.attend(q, [*(x._replace(layer=number) for x in history), own]), None

    return jax.lax.scan(layer, q, jnp.arange(2))[0]

  def sliced(q, history, own):
    def layer(q, history):
      return pallas.attend(q, [*history, own]), None

    flags = [x._replace(**{name: jnp.stack([getattr(x, name)] * 2)
                           for name in ('shift', 'valid', 'chosen')}) for x in history]
    return jax.lax.scan(layer, q, flags)[0]

  smallest = min(tree_bytes(blocks.k) for blocks in history)
  in_place, copied = (compile_for(f, (q, whole, own), H200).scratch_bytes
                      for f in (layers, sliced))
  assert in_place < 3 * tree_bytes(q)
  assert copied - in_place > 2 * smallest


def test_spills_are_seen():
  """The mutation: tiles for which there are not enough registers."""
  q, segments = at_full_size()
  tiles = pallas_gpu.TileSpec(keys=96, stages=2)
  _, [kernel] = compiled(functools.partial(pallas.attend, tiles=tiles), (q, segments))
  assert kernel.spill_store_bytes > 0


@pytest.mark.parametrize(('storage', 'dtype'), [('full', 'bf16'), ('int8', 's8')])
def test_a_whole_block_of_the_1_3b_with_our_kernels(storage, dtype):
  config = t2v_1_3b.get_config()
  config.cache.storage = storage
  model = build(ModelSpec, config.model)
  model = dataclasses.replace(model, transformer=dataclasses.replace(
      model.transformer, attention='pallas', rotation='pallas'))
  spec = rollout_spec(model, {name: {key: value for key, value in config[name].items()
                                     if value is not None} for name in ('cache', 'sampler')})
  models = bundle.shapes(model).without_text()
  shapes = block_lib.input_shapes(models, 1, spec)
  report, kernels = compiled(functools.partial(block_lib.sample_block, first=False, spec=spec),
                             (models, shapes.state, shapes.text, shapes.keys), donate=(1,))
  assert kernels
  assert all(kernel.spill_store_bytes == 0 for kernel in kernels)
  assert report.alias_bytes == tree_bytes(shapes.state)
  assert report.scratch_bytes < 6.5e9  # the VAE's decoder
  denoise = functools.partial(block_lib.denoise_block, spec=spec)
  alone, _ = compiled(denoise, (models, shapes.state.cache, shapes.text, shapes.keys))
  print(f'denoising: {alone.scratch_bytes / 1e6:.0f} MB of scratch')
  # With cuDNN 287 MB, of which 133 are the history packed.
  assert alone.scratch_bytes < 0.26e9
  archive = shapes.state.cache.layers.archive.k.shape
  assert f'{dtype}[1,{",".join(map(str, archive[1:]))}]' not in alone.executable.as_text()
  print(f'traced in {report.trace_seconds:.0f} s, compiled in {report.compile_seconds:.0f} s')


# --- norm and rotation ----------------------------------------------------------------------------


def moved(report, *, at_least=1e6):
  """(read, written) of each kernel of a program but for small ones, in order."""
  found = traffic.kernels(report.executable.as_text())
  print(*found, sep='\n')
  return [(kernel.read, kernel.written) for kernel in found if kernel.moved > at_least]


def test_xla_reads_queries_twice_and_writes_them_once():
  x, scale, table, _, _ = full_size(products=1)
  report, _ = compiled(rope.norm_and_rotate, (x, scale, table))
  (sums, rotated) = moved(report)
  assert sums == pytest.approx((tree_bytes(x), 0), rel=0.01, abs=1e5)
  assert rotated == pytest.approx((tree_bytes((x, table)), tree_bytes(x)), rel=0.01)


def test_apart_xla_writes_what_is_normed_as_well():
  """The mutation: `RmsNorm`, heads, `rope.rotate`, as the transformer wrote it before."""
  x, scale, table, _, _ = full_size(products=1)

  def apart(x, scale, table):
    norm = RmsNorm(1536)
    norm.scale[...] = scale
    return rope.rotate(norm(x).reshape(1, -1, 12, 128), table)

  report, _ = compiled(apart, (x, scale, table))
  assert sum(map(sum, moved(report))) == pytest.approx(
      4 * tree_bytes(x) + tree_bytes(table), rel=0.01)


@pytest.mark.parametrize(('width', 'tokens'), [(1536, 6240), (1536, 182), (5120, 6240)])
def test_the_kernel_reads_and_writes_queries_once(width, tokens):
  x, scale, table, _, _ = full_size(width, tokens, products=1)
  report, [kernel] = compiled(functools.partial(rope.norm_and_rotate, implementation='pallas'),
                              (x, scale, table))
  assert (kernel.spill_store_bytes, kernel.spill_load_bytes) == (0, 0)
  assert kernel.registers <= 64
  # Besides, scales of first and second numbers are put apart. Pairs are words without a copy.
  small = 16 * width * 4
  [(read, written)] = moved(report, at_least=small)
  assert tree_bytes((x, table)) <= read <= tree_bytes((x, table)) + small
  assert written == tree_bytes(x)


def test_each_card_rotates_its_own_videos():
  x, scale, table, _, first = full_size(tokens=1024)
  x = jax.ShapeDtypeStruct((8, *x.shape[1:]), x.dtype, sharding=NamedSharding(
      device_mesh(H200, 8), PartitionSpec('data')))
  report, [_] = compiled(functools.partial(rope.norm_and_rotate, first=first,
                                           implementation='pallas'),
                         (x, scale, table), devices=8)
  text = report.executable.as_text()
  assert re.search(r'u32\[1,1024,12,64\]\S* custom-call', text)
  assert 'all-gather' not in text


@functools.cache
def rotated_and_attended(attention, rotation):
  """Kernels of self-attention of the 1.3B, from a layer's tokens to what its heads read."""
  dtypes = DTypes('bfloat16', 'bfloat16', 'bfloat16')
  spec = TransformerSpec.wan_1_3b(attention=attention, rotation=rotation, dtypes=dtypes)
  module = jax.eval_shape(lambda: Attention(spec, rngs=nnx.Rngs(0)))
  _, [*history, _] = at_full_size()
  _, _, table, _, _ = full_size()

  def function(module, x, table, history):
    q, own = module.rotated(x, table)
    return attend(q, [*history, Segment(*own)], implementation=attention)

  x = jax.ShapeDtypeStruct((1, 6240, 1536), jnp.bfloat16)
  report, kernels = compiled(function, (module, x, table, history))
  assert all(kernel.spill_store_bytes == 0 for kernel in kernels)
  return tree_bytes(x), tree_bytes(table), moved(report)


def test_xla_rotates_keys_where_it_packs_them():
  """Before cuDNN: the product, two sums, rotated queries, and rows of keys and of values."""
  x, table, found = rotated_and_attended(None, None)
  rows = (21_632 + 6240) * 1536 * 2
  found = sorted(found[1:-1], key=sum)
  assert [sum(pair) for pair in found] == pytest.approx(
      [x, x, 2 * x + table, 2 * rows, 2 * rows + table], rel=0.01)


def test_the_kernel_reads_its_columns_out_of_the_product():
  """Before our attention: nothing between the product and the kernels but the values' bias."""
  x, _, kernel = rotated_and_attended('pallas', 'pallas')
  *_, xla = rotated_and_attended('pallas', None)
  written = [write for _, write in kernel[1:-1]]
  assert sorted(written) == pytest.approx([x / 2, x, x, x], rel=0.01)  # x / 2 turned for attention
  # Each of the two kernels reads a third of the product that it is handed.
  ours = sum(map(sum, kernel)) - 2 * (2 * x)
  assert sum(map(sum, xla)) - ours == pytest.approx(2 * x, rel=0.05)


# --- the history ----------------------------------------------------------------------------------


def test_the_history_is_assembled_in_one_pass():
  """Keys and values, out of the cache of all layers: as many bytes as a copy moves."""
  _, [*history, _] = at_full_size()
  stacked = [blocks._replace(layer=jax.ShapeDtypeStruct((), jnp.int32), **{
      name: jax.ShapeDtypeStruct((30, *x.shape), x.dtype)
      for name, x in (('k', blocks.k), ('v', blocks.v))}) for blocks in history]
  for given in (history, stacked):
    report, _ = compiled(assemble, (given,))
    rows = 21_632 * 1536 * 2
    found = moved(report)
    assert len(found) == 2
    for pair in found:
      assert pair == pytest.approx((rows, rows), rel=0.01)


@pytest.mark.parametrize('storage', ['int8', 'float8_e4m3fn'])
def test_a_history_in_8_bits_is_read_once(storage):
  """Half precision on the way: half the bytes are read, as many are written."""
  _, [*history, _] = at_full_size(storage)
  report, _ = compiled(functools.partial(assemble, dtype='bfloat16'), (history,))
  rows = 21_632 * 1536 * 2
  found = moved(report)
  assert len(found) == 2
  for pair in found:
    assert pair == pytest.approx((rows / 2, rows), rel=0.01)


def test_a_second_pass_over_the_history_shows():
  """The mutation: keys are gathered first and moved afterwards."""
  _, [*history, _] = at_full_size()

  def twice(history):
    segment = assemble(history)
    k = jax.lax.optimization_barrier(segment.k)
    return rope.rotate_time(k, jnp.ones(k.shape[:2])), segment.v

  report, _ = compiled(twice, (history,))
  assert len(moved(report)) == 3


# --- convolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize('name', STAGES)
def test_convolutions_spill_nothing_and_copy_nothing(name):
  stage = STAGES[name]
  report, kernels = compiled(stage.call, stage.arguments())
  tiles = conv3d_gpu.default_tiles(stage.channels)
  print(f'{name}: {tiles.shared_bytes(stage.taps[1])} bytes of shared memory, '
        f'{traffic.moved(report.executable.as_text()) / 1e6:.0f} MB')
  assert len(kernels) == 1
  assert (kernels[0].spill_store_bytes, kernels[0].spill_load_bytes) == (0, 0)
  text = report.executable.as_text()
  x, kernel, _, past, _, residual = stage.arguments()
  least = tree_bytes((x, kernel, past, residual)) + report.output_bytes
  if stage.strides != (1, 1, 1):
    # Neighbours become channels: one copy of the input, with all zeros around it, and of the taps.
    assert traffic.moved(text) < least + 2.6 * tree_bytes((x, past)) + 3 * tree_bytes(kernel)
  elif stage.epilogue == 'norm' and tiles.channels < stage.channels:
    assert traffic.moved(text) < 1.01 * (least + 2 * report.output_bytes)
  else:
    # Every frame is read once from where it lies, and the result is written once.
    assert report.scratch_bytes < 1e5
    assert traffic.moved(text) < 1.01 * least


def test_spills_of_convolutions_are_seen():
  """The mutation: sums for which there are not enough registers."""
  stage = STAGES['decoder 240x416, 1']
  tiles = conv3d_gpu.TileSpec(channels=192, patches=2, weights=2)
  _, [kernel] = compiled(functools.partial(stage.call, tiles=tiles), stage.arguments())
  assert kernel.spill_store_bytes > 0


@pytest.mark.parametrize(('width', 'frames', 'height', 'columns'), [
    (384, 4, 60, 104), (384, 8, 120, 208), (192, 16, 240, 416), (96, 16, 480, 832)])
def test_a_residual_block_moves_less_with_it(width, frames, height, columns):
  """Two in a row less one: at both ends cuDNN's layout costs transposes."""
  x = jax.ShapeDtypeStruct((1, frames, height, columns, width), jnp.bfloat16)
  slot = jax.ShapeDtypeStruct((1, 2, *x.shape[2:]), jnp.bfloat16)

  def run(blocks, x, slots):
    stream = vae_lib._Stream(slots)
    for block in blocks:
      x = block(x, stream)
    return x, stream.kept

  moved = {}
  for convolution in (None, 'pallas'):
    block = nnx.eval_shape(lambda convolution=convolution: vae_lib.ResBlock(
        width, width, rngs=nnx.Rngs(0), implementation=convolution, dtype=jnp.bfloat16))
    one, two = (traffic.moved(compiled(run, ([block] * n, x, (slot,) * 2 * n))[0]
                            .executable.as_text()) for n in (1, 2))
    moved[convolution] = (two - one) / (tree_bytes(x) + tree_bytes(slot))
    print(f'{width} channels, {convolution}: {(two - one) / 1e6:.0f} MB, '
          f'{moved[convolution]:.2f} times all frames')
  assert moved['pallas'] < 0.75 * moved[None]


def test_decoding_a_block_moves_less_with_it():
  spec = build(ModelSpec, t2v_1_3b.get_config().model)
  moved = {}
  for convolution in (None, 'pallas'):
    sizes = dataclasses.replace(spec.vae, convolution=convolution)
    vae = nnx.eval_shape(lambda sizes=sizes: vae_lib.WanVae(sizes, rngs=nnx.Rngs(0)))
    state = jax.eval_shape(lambda vae: vae.init_decoder_state(
        1, spec.video.latent_height, spec.video.latent_width), vae)
    latents = jax.ShapeDtypeStruct((1, *spec.video.block_latent_shape), jnp.float32)
    report, kernels = compiled(lambda vae, state, latents: vae.decode_next(state, latents),
                               (vae, state, latents))
    text = report.executable.as_text()
    moved[convolution] = traffic.moved(text)
    print(f'{convolution}: {moved[convolution] / 1e9:.1f} GB, {report.scratch_bytes / 1e9:.2f} GB '
          f'of scratch, {text.count("__cudnn$conv")} by cuDNN, compiled in '
          f'{report.compile_seconds:.0f} s')
    assert all(kernel.spill_store_bytes == 0 for kernel in kernels)
    assert bool(kernels) == (convolution == 'pallas')
  assert moved['pallas'] < 0.7 * moved[None]
