"""Our own kernels, compiled for an H200 (`make test-aot`): no register is put aside in memory."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs.wan import t2v_1_3b
from launch.build import build
from pf_jax.aot import hlo, ptxas
from pf_jax.aot.compile import compile_for
from pf_jax.aot.targets import TARGETS
from pf_jax.kernels.attention import pallas, pallas_gpu
from pf_jax.kernels.conv3d import pallas_gpu as conv3d_gpu
from pf_jax.models import bundle
from pf_jax.models import vae as vae_lib
from pf_jax.models.bundle import ModelSpec
from pf_jax.pipeline import rollout_spec
from pf_jax.rollout import block as block_lib
from pf_jax.types import tree_bytes
from tests.kernels.test_conv3d import STAGES
from tests.kernels.test_pallas import at_full_size

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


@pytest.mark.parametrize('tiles', [pallas_gpu.TileSpec(), pallas_gpu.TileSpec(2, 128, 2)])
def test_attention_reads_the_cache_where_it_lies(tiles):
  q, segments = at_full_size()
  report, kernels = compiled(functools.partial(pallas.attend, tiles=tiles), (q, segments))
  assert len(kernels) == 1
  assert (kernels[0].spill_store_bytes, kernels[0].spill_load_bytes) == (0, 0)
  # Queries a quarter turn further take half of theirs; gathered and moved, the history's keys and
  # values would take 133 MB.
  assert report.scratch_bytes < 0.6 * tree_bytes(q)
  assert '__cudnn' not in report.executable.as_text()


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


def test_a_whole_block_of_the_1_3b_with_it():
  config = t2v_1_3b.get_config()
  model = build(ModelSpec, config.model)
  model = dataclasses.replace(model, transformer=dataclasses.replace(model.transformer,
                                                                     attention='pallas'))
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
  assert f'bf16[1,{",".join(map(str, archive[1:]))}]' not in alone.executable.as_text()
  print(f'traced in {report.trace_seconds:.0f} s, compiled in {report.compile_seconds:.0f} s')


# --- convolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize('name', STAGES)
def test_convolutions_spill_nothing_and_copy_nothing(name):
  stage = STAGES[name]
  report, kernels = compiled(stage.call, stage.arguments())
  tiles = conv3d_gpu.default_tiles(stage.channels)
  print(f'{name}: {tiles.shared_bytes(stage.taps[1])} bytes of shared memory, '
        f'{hlo.traffic(report.executable.as_text()) / 1e6:.0f} MB')
  assert len(kernels) == 1
  assert (kernels[0].spill_store_bytes, kernels[0].spill_load_bytes) == (0, 0)
  text = report.executable.as_text()
  x, kernel, _, past, _, residual = stage.arguments()
  least = tree_bytes((x, kernel, past, residual)) + report.output_bytes
  if stage.strides != (1, 1, 1):
    # Neighbours become channels: one copy of the input, with all zeros around it, and of the taps.
    assert hlo.traffic(text) < least + 2.6 * tree_bytes((x, past)) + 3 * tree_bytes(kernel)
  elif stage.epilogue == 'norm' and tiles.channels < stage.channels:
    assert hlo.traffic(text) < 1.01 * (least + 2 * report.output_bytes)
  else:
    # Every frame is read once from where it lies, and the result is written once.
    assert report.scratch_bytes < 1e5
    assert hlo.traffic(text) < 1.01 * least


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
    one, two = (hlo.traffic(compiled(run, ([block] * n, x, (slot,) * 2 * n))[0]
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
    moved[convolution] = hlo.traffic(text)
    print(f'{convolution}: {moved[convolution] / 1e9:.1f} GB, {report.scratch_bytes / 1e9:.2f} GB '
          f'of scratch, {text.count("__cudnn$conv")} by cuDNN, compiled in '
          f'{report.compile_seconds:.0f} s')
    assert all(kernel.spill_store_bytes == 0 for kernel in kernels)
    assert bool(kernels) == (convolution == 'pallas')
  assert moved['pallas'] < 0.7 * moved[None]
