"""Needs the CUDA compiler (`make test-aot`), no GPU. Sizes are Wan2.1-T2V-1.3B's, 832x480."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from configs.wan import t2v_1_3b
from launch.build import build
from pf_jax.aot import host
from pf_jax.aot.compile import compile_for, device_mesh
from pf_jax.aot.targets import TARGETS
from pf_jax.kernels.attention import Segment, attend
from pf_jax.kernels.conv3d import conv3d
from pf_jax.models import bundle
from pf_jax.models.bundle import ModelSpec
from pf_jax.pipeline import rollout_spec
from pf_jax.rollout import block as block_lib
from pf_jax.types import DTypes, tree_bytes

H200 = TARGETS['h200']
GB = 10**9

pytestmark = pytest.mark.timeout(900)


def shape(*sizes, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(sizes, dtype)


def test_bytes_of_a_product_by_hand():
  report = compile_for(lambda x, w: (x @ w, x + 1), (shape(256, 512), shape(512, 128)), H200,
                       donate=(0,))
  assert report.argument_bytes == 2 * (256 * 512 + 512 * 128)
  assert report.alias_bytes == 2 * 256 * 512
  # Results are in a table of addresses besides.
  assert 0 <= report.output_bytes - 2 * (256 * 128 + 256 * 512) <= 64
  assert report.total_bytes == (report.argument_bytes + report.output_bytes - report.alias_bytes
                                + report.scratch_bytes)
  assert report.compile_seconds > 0


def split(*sizes, axis=0, devices=8, dtype=jnp.bfloat16):
  """A shape that is split over some cards along an axis."""
  spec = PartitionSpec(*[None] * axis, 'data')
  return jax.ShapeDtypeStruct(sizes, dtype,
                              sharding=NamedSharding(device_mesh(H200, devices), spec))


def test_bytes_on_each_card_of_a_split_product_by_hand():
  arguments = split(256, 512), split(512, 128), shape(512, 3)
  report = compile_for(lambda x, w, whole: (x @ w, x + whole[0, 0]), arguments, H200, devices=8,
                       donate=(0,))
  assert report.devices == 8
  assert report.argument_bytes == 2 * (32 * 512 + 64 * 128 + 512 * 3)
  assert report.alias_bytes == 2 * 32 * 512
  assert 0 <= report.output_bytes - 2 * (32 * 128 + 32 * 512) <= 64
  # Every card needs all of the second factor.
  assert report.scratch_bytes >= 2 * 512 * 128
  text = report.executable.as_text()
  assert re.search(r'bf16\[512,128\]\S* all-gather(-done)?\(', text)
  assert 'num_partitions=8' in text


def test_refuses_shares_of_other_cards():
  with pytest.raises(ValueError, match=r'shape \[8, 4\] has sharding .* device_mesh\(target, 8\)'):
    compile_for(lambda x: x, (split(8, 4, devices=2),), H200, devices=8)


def test_leaves_the_compilation_cache_alone(tmp_path):
  changes = {'jax_compilation_cache_dir': str(tmp_path),
             'jax_persistent_cache_min_compile_time_secs': 0}
  before = {name: getattr(jax.config, name) for name in changes}
  for name, value in changes.items():
    jax.config.update(name, value)
  try:
    for _ in range(2):  # what was stored the first time could not be loaded the second time
      compile_for(lambda x: x * 3, (shape(7),), H200)
    assert not list(tmp_path.iterdir())
    jax.jit(lambda x: x * 5)(jnp.ones(7))
    assert list(tmp_path.iterdir())
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_attention_is_one_kernel_without_logits():
  def attention(q, own, history, valid, order):
    return attend(q, [Segment(*history, valid, order), Segment(*own)])

  own, history = ((shape(1, rows, 12, 128),) * 2 for rows in (6240, 21_632))
  slots = [shape(1, 21_632, dtype=dtype) for dtype in (jnp.bool_, jnp.int32)]
  report = compile_for(attention, (own[0], own, history, *slots), H200)
  assert report.executable.as_text().count('custom_call_target="__cudnn$fmhaSoftmax"') == 1
  # One row of keys and one of values, side by side; logits alone would be 12.5 GB.
  rows = tree_bytes(own) + tree_bytes(history)
  assert rows <= report.scratch_bytes < 1.02 * rows


def test_attention_and_its_gradient_stay_on_their_card():
  """A layer's two: of a video over itself, and over a text that all videos share."""
  def loss(weights, x, lengths, text):
    q, k, v = ((x @ w).reshape(*x.shape[:2], 12, 128) for w in weights)
    valid = jnp.arange(x.shape[1]) < lengths[:, None]
    read = attend(attend(q, [Segment(k, v, valid)]), [Segment(*text)])
    return jnp.mean(read.astype(jnp.float32))

  arguments = ([split(256, 1536)] * 3, split(8, 1024, 256), split(8, dtype=jnp.int32),
               [shape(1, 512, 12, 128)] * 2)
  text = compile_for(jax.value_and_grad(loss), arguments, H200, devices=8).executable.as_text()
  for name in ('fmhaSoftmax', 'fmhaSoftmaxBackward'):
    calls = [line for line in text.splitlines() if f'custom_call_target="__cudnn${name}"' in line]
    assert len(calls) == 2
    assert all('[1,12,1024,128]' in call and '[8,' not in call for call in calls)  # one video
  gathered = [line for line in text.splitlines() if ' all-gather' in line]
  assert gathered
  assert not any('1024' in line.split(' all-gather')[0] for line in gathered)  # weights only


def test_convolutions_are_not_those_of_the_machine_that_compiles():
  report = compile_for(conv3d, (shape(1, 6, 32, 32, 16), shape(3, 3, 3, 16, 16), shape(16)), H200)
  # A CPU lays temporal taps out as channels and convolves in two dimensions.
  assert 'window={size=3x3x3' in report.executable.as_text()


@functools.cache
def full_size(vae_dtype='bfloat16', storage='full'):
  """Choices, networks and the shapes of everything else, for one video."""
  config = t2v_1_3b.get_config()
  config.cache.storage = storage
  model = build(ModelSpec, config.model)
  model = dataclasses.replace(model, vae=dataclasses.replace(
      model.vae, dtypes=DTypes(vae_dtype, vae_dtype, vae_dtype)))
  chosen = {name: {key: value for key, value in config[name].items() if value is not None}
            for name in ('cache', 'sampler')}
  spec = rollout_spec(model, chosen)
  models = bundle.shapes(model).without_text()
  return spec, models, block_lib.input_shapes(models, 1, spec)


@pytest.mark.parametrize(('storage', 'arguments'), [('full', 10.6), ('int8', 6.7)])
def test_denoising_needs_almost_no_scratch(storage, arguments):
  spec, models, shapes = full_size(storage=storage)
  report = compile_for(functools.partial(block_lib.denoise_block, spec=spec),
                       (models, shapes.state.cache, shapes.text, shapes.keys), H200)
  # A packed history kept for later passes would be 4 GB, the logits of one layer 12.5 GB, the
  # archive out of its 8 bits 4.3 GB.
  assert report.scratch_bytes < 0.3 * GB
  assert report.argument_bytes < arguments * GB


@pytest.mark.parametrize(('storage', 'total'), [('full', 20), ('int8', 16)])
def test_a_whole_steady_block_fits_and_updates_its_state_in_place(storage, total):
  spec, models, shapes = full_size(storage=storage)
  report = compile_for(functools.partial(block_lib.sample_block, first=False, spec=spec),
                       (models, shapes.state, shapes.text, shapes.keys), H200, donate=(1,))
  assert spec.cache.attention_tokens == 27_872
  assert report.alias_bytes == tree_bytes(shapes.state)
  # The VAE's decoder is 4.9 GB of it. A copy of the archive would add 4.3.
  assert report.scratch_bytes < 6.5 * GB
  assert report.total_bytes < total * GB < H200.info.device_memory_size
  assert host.round_trips(report.executable.as_text()) == []


@pytest.mark.slow
def test_print_the_readme_s_table():
  """`make test-aot PYTEST_ARGS="--slow -s"`: a row for each program."""
  for name, vae, function, inputs, donate in (
      ('denoise a block, 4 steps', 'bfloat16', block_lib.denoise_block,
       lambda s: (s.state.cache, s.text, s.keys), ()),
      ('decode, compress, clean pass, commit', 'bfloat16',
       functools.partial(block_lib.finish_block, first=False),
       lambda s: (s.state, s.latents, s.selected, s.text), (1,)),
      ('the whole steady block', 'bfloat16', functools.partial(block_lib.sample_block, first=False),
       lambda s: (s.state, s.text, s.keys), (1,)),
      ('the same with the VAE in float32', 'float32',
       functools.partial(block_lib.sample_block, first=False),
       lambda s: (s.state, s.text, s.keys), (1,)),
      ('change of prompt', 'bfloat16', block_lib.switch_prompt, lambda s: (s.state, s.text), (1,))):
    spec, models, shapes = full_size(vae)
    report = compile_for(functools.partial(function, spec=spec), (models, *inputs(shapes)), H200,
                         donate=donate)
    figures = (report.argument_bytes, report.output_bytes, report.alias_bytes,
               report.scratch_bytes, report.total_bytes)
    print(f'| {name} | ' + ' | '.join(f'{size / GB:.2f}' for size in figures)
          + f' | {report.trace_seconds + report.compile_seconds:.0f} s |')
    assert report.total_bytes < H200.info.device_memory_size
