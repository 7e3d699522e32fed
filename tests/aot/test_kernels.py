"""Our own kernels, compiled for an H200 (`make test-aot`): no register is put aside in memory."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import pytest

from configs.wan import t2v_1_3b
from launch.build import build
from pf_jax.aot import ptxas
from pf_jax.aot.compile import compile_for
from pf_jax.aot.targets import TARGETS
from pf_jax.kernels.attention import attend, pallas, pallas_gpu
from pf_jax.models import bundle
from pf_jax.models.bundle import ModelSpec
from pf_jax.pipeline import rollout_spec
from pf_jax.rollout import block as block_lib
from pf_jax.types import tree_bytes
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


@pytest.mark.parametrize(('storage', 'float8_keys', 'scratch'), [
    ('int8', False, 0.6), ('float8_e4m3fn', False, 0.6), ('float8_e4m3fn', True, 2.6)])
def test_attention_reads_8_bits_where_they_lie(storage, float8_keys, scratch):
  q, segments = at_full_size(storage)
  report, [kernel] = compiled(functools.partial(pallas.attend, float8_keys=float8_keys),
                              (q, segments))
  assert (kernel.spill_store_bytes, kernel.spill_load_bytes) == (0, 0)
  # For products in float8: queries in its range, a quarter turn further, and the block's keys.
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
def test_a_whole_block_of_the_1_3b_with_it(storage, dtype):
  config = t2v_1_3b.get_config()
  config.cache.storage = storage
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
  assert f'{dtype}[1,{",".join(map(str, archive[1:]))}]' not in alone.executable.as_text()
  print(f'traced in {report.trace_seconds:.0f} s, compiled in {report.compile_seconds:.0f} s')
