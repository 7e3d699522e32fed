"""Convolutions: one suite over all implementations, and the fused kernel's arguments."""

import contextlib
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from pf_jax.kernels import mosaic, tuning
from pf_jax.kernels.conv3d import Epilogue, conv3d, pallas, pallas_gpu, supports
from pf_jax.kernels.conv3d.pallas_gpu import Finish, TileSpec
from pf_jax.models.compressor import CompressorSpec, HrBranch
from pf_jax.models.vae import DecoderState, VaeSpec, WanVae
from pf_jax.train import flops
from pf_jax.types import DTypes
from tests.kernels import interpreted_conv3d
from tests.kernels.interpreted_conv3d import SAME, problem
from tests.kernels.test_platform import CARD

INTERPRETED = interpreted_conv3d.cases()
CASES = INTERPRETED | {
    'one tap': problem(10, (1, 2, 3, 5, 32), (1, 1, 1), 32, padding=((0, 0), (0, 0)), gain=True),
    'taps and strides everywhere': problem(11, (1, 6, 7, 9, 8), (3, 4, 3), 32, past=1, silu=True,
                                           strides=(2, 2, 2), residual=True),
    'norm over more channels than a tile': problem(12, (1, 1, 4, 9, 32), (3, 3, 3), 384, past=2,
                                                   gain=True, silu=True),
    'one frame of three': problem(13, (2, 7, 3, 8, 32), (2, 1, 1), 32, strides=(3, 1, 1), spare=2,
                                  padding=((0, 0), (0, 0)), gain=True),
}


def slow_convolution(x, kernel, strides, padding):
  """Tap by tap, in NumPy; [B, T, H, W, C] -> [B, T', H', W', O]."""
  x = np.pad(x, ((0, 0), (0, 0), *padding, (0, 0)))
  out = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:4], kernel.shape[:3], strides, strict=True)]
  y = np.zeros((x.shape[0], *out, kernel.shape[4]), x.dtype)
  for tap in np.ndindex(kernel.shape[:3]):
    place = tuple(slice(t, t + (n - 1) * s + 1, s)
                  for t, n, s in zip(tap, out, strides, strict=True))
    y += x[:, *place] @ kernel[tap]
  return y


def slow_finish(y, gain, silu, residual):
  if gain is not None:
    y = y / np.maximum(np.sqrt(np.sum(y * y, -1, keepdims=True)), 1e-12)
    y = y * math.sqrt(y.shape[-1]) * gain
  if silu:
    y = y / (1 + np.exp(-y))
  return y if residual is None else y + residual


def slow_kernel(pieces, kernel, vectors, residual, *, low, size, finish, operations, tiles,
                interpret=None):
  """What `pallas_gpu.convolve` is to compute, in float32."""
  del operations, interpret
  assert pieces[0].shape[4] % tiles.chunk == kernel.shape[4] % tiles.channels == 0
  assert finish.residual == (residual is not None)
  assert not finish.norm or kernel.shape[4] == tiles.channels
  x = np.concatenate([np.asarray(piece, np.float32) for piece in pieces], axis=1)
  high = [s + k - 1 - n - l for s, k, n, l in zip(size, kernel.shape[1:3], x.shape[2:4], low,
                                                  strict=True)]
  y = slow_convolution(x, np.asarray(kernel, np.float32), (1, 1, 1),
                       tuple(zip(low, high, strict=True))) + np.asarray(vectors[0])
  y = slow_finish(y, np.asarray(vectors[1]) if finish.norm else None, finish.silu,
                  None if residual is None else np.asarray(residual, np.float32))
  return jnp.asarray(y, pieces[0].dtype)


@pytest.fixture
def without_the_card(monkeypatch):
  """Sizes of what the kernel was asked for."""
  asked = []

  def kernel(pieces, kernel, *args, **kwargs):
    asked.append(([piece.shape for piece in pieces], kernel.shape, kwargs['finish']))
    return slow_kernel(pieces, kernel, *args, **kwargs)

  monkeypatch.setattr(pallas_gpu, 'convolve', kernel)
  return asked


def convolved(case, implementation, dtype):
  arrays = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x,
                        (*case[:4], case.epilogue.gain, case.epilogue.residual))
  x, kernel, bias, past, gain, residual = arrays
  return conv3d(x, kernel, bias, past=past, strides=case.strides, padding=case.padding,
                epilogue=Epilogue(gain, case.epilogue.silu, residual),
                implementation=implementation)


@pytest.mark.parametrize('implementation', ['reference', 'taps', 'pallas'])
@pytest.mark.parametrize('name', CASES)
def test_equals_taps_one_by_one(name, implementation, without_the_card):
  case = CASES[name]
  dtype = jnp.bfloat16 if implementation == 'pallas' else jnp.float32
  if not supports(implementation, case.x, case.kernel, case.strides):
    assert name == 'one tap'
    return
  out = convolved(case, implementation, dtype)
  x, kernel, bias, past, residual = (None if a is None else np.asarray(a, np.float32) for a in (
      *case[:4], case.epilogue.residual))
  whole = x if past is None else np.concatenate([past, x], axis=1)
  wanted = slow_finish(slow_convolution(whole, kernel, case.strides, case.padding) + bias,
                       case.epilogue.gain, case.epilogue.silu, residual)
  assert out.dtype == dtype
  error = np.abs(np.asarray(out, np.float32) - wanted) / (1 + np.abs(wanted))
  assert error.max() < (1e-2 if dtype == jnp.bfloat16 else 2e-5)
  assert len(without_the_card) == (implementation == 'pallas')


def test_frames_are_handed_over_where_they_lie(without_the_card):
  """At stride 1 the past is not laid in front of the frames, and nothing is padded."""
  case = CASES['two frames and their past']
  convolved(case, 'pallas', jnp.bfloat16)
  [(pieces, kernel, finish)] = without_the_card
  assert pieces == [(1, 2, 4, 32, 32), (1, 2, 4, 32, 32)]
  assert (kernel, finish) == ((3, 3, 3, 32, 32), Finish(silu=True))


def test_strides_become_channels(without_the_card):
  convolved(CASES['half the picture'], 'pallas', jnp.bfloat16)
  [([x], kernel, _)] = without_the_card
  assert (x, kernel) == ((1, 3, 6, 12, 128), (3, 2, 2, 128, 32))


def test_neighbours_as_channels_by_hand():
  """Five frames of one number, stride 2, three taps: two outputs, of frames 0-2 and 2-4."""
  x = jnp.arange(1.0, 6).reshape(1, 5, 1, 1, 1)
  nowhere = (0, 0), (0, 0)
  assert pallas.fold(x, (3, 1, 1), (2, 1, 1), nowhere)[0, :, 0, 0].tolist() == [
      [1, 2], [3, 4], [5, 0]]
  kernel = jnp.array([10.0, 20, 30]).reshape(3, 1, 1, 1, 1)
  assert pallas.fold_kernel(kernel, (2, 1, 1))[:, 0, 0, :, 0].tolist() == [[10, 20], [30, 0]]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_neighbours_as_channels_mean_the_same(data):
  """Exactly, on small integers; frames that no tap reaches are NaN. In NumPy: nothing compiles."""
  def drawn(low, high):
    return data.draw(st.integers(low, high))

  taps, strides = (tuple(drawn(1, high) for _ in range(3)) for high in (4, 3))
  padding = tuple((drawn(0, 2), drawn(0, 2)) for _ in range(2))
  sizes = [drawn(max(k - sum(pads), 1), 7)
           for k, pads in zip(taps, ((0, 0), *padding), strict=True)]
  rng = np.random.default_rng(drawn(0, 2**16))
  x = rng.integers(-4, 5, (1, *sizes, 2)).astype(np.float32)
  kernel = rng.integers(-4, 5, (*taps, 2, 3)).astype(np.float32)
  x[:, (sizes[0] - taps[0]) // strides[0] * strides[0] + taps[0]:] = np.nan
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pallas, 'jnp', np)
    folded = pallas.fold(x, taps, strides, padding), pallas.fold_kernel(kernel, strides)
  wanted = slow_convolution(x, kernel, strides, padding)
  np.testing.assert_array_equal(slow_convolution(*folded, (1, 1, 1), ((0, 0), (0, 0))), wanted)
  assert not np.isnan(wanted).any()


@pytest.mark.parametrize('name', ['two frames and their past', 'two tiles of channels, two videos'])
def test_the_gradient_is_the_library_s(name, without_the_card):
  case = CASES[name]

  def loss(arrays, implementation):
    changed = case._replace(**dict(zip(('x', 'kernel', 'bias', 'past'), arrays[:4], strict=True)),
                            epilogue=Epilogue(arrays[4], case.epilogue.silu, arrays[5]))
    out = convolved(changed, implementation, jnp.bfloat16)
    return jnp.sum(out.astype(jnp.float32) * jnp.arange(out.shape[-1]))

  arrays = (*case[:4], case.epilogue.gain, case.epilogue.residual)
  ours, theirs = (jax.grad(loss)(arrays, name) for name in ('pallas', 'reference'))
  assert len(jax.tree.leaves(ours)) == sum(x is not None for x in arrays)
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_array_equal(one, other)
    assert np.any(np.asarray(one, np.float32) != 0)


def test_refuses_what_does_not_fit():
  half = jnp.zeros((1, 3, 4, 8, 32), jnp.bfloat16)
  kernel, bias = jnp.zeros((3, 3, 3, 32, 32)), jnp.zeros(32)
  for x, k, strides in ((half.astype(jnp.float32), kernel, (1, 1, 1)),
                        (half, kernel[:1, :1, :1], (1, 1, 1)), (half, kernel[..., :3], (1, 1, 1)),
                        (half[..., :16], kernel[..., :16, :], (1, 1, 1))):
    with pytest.raises(ValueError, match=r'pallas takes bfloat16 or float16, more than one tap, .*'
                       r"got x .*\[1, 3, 4, 8, \d+\] and a kernel .* use 'reference' or None"):
      conv3d(x, k, bias[:k.shape[4]], strides=strides, implementation='pallas')
  assert supports('pallas', half[..., :16], kernel[..., :16, :], (2, 1, 1))
  for options, message in (
      (dict(past=half[:, :, :3]), r'past frames have shape \[1, 3, 3, 8, 32\], wanted that of x'),
      (dict(epilogue=Epilogue(gain=jnp.ones(3))), r'the gain has shape \[3\], wanted \[32\]'),
      (dict(epilogue=Epilogue(residual=half)),
       r'residual has shape \[1, 3, 4, 8, 32\], wanted .* \[1, 1, 4, 8, 32\]')):
    with pytest.raises(ValueError, match=message):
      conv3d(half, kernel, bias, **options)
  with use_abstract_mesh(AbstractMesh((2,), ('x',), (AxisType.Auto,))):
    with pytest.raises(ValueError, match='convolves on one card, the mesh has 2'):
      conv3d(half, kernel, bias, implementation='pallas')


def test_refuses_tiles_that_the_hardware_cannot_multiply():
  for wrong, message in ((dict(warpgroups=4), 'warpgroups=4 must be 2 or 3'),
                         (dict(columns=12), 'columns=12 must be a multiple of 8 that divides'),
                         (dict(columns=256), 'divides the 128 pixels of a warpgroup'),
                         (dict(chunk=16), 'chunk=16 must be 32 or 64'),
                         (dict(channels=80), 'channels=80 must be a multiple of chunk=32'),
                         (dict(channels=288), 'multiple of chunk=32 within 32..256'),
                         (dict(patches=1), 'patches=1 and weights=8 must be at least 2')):
    with pytest.raises(ValueError, match=message):
      TileSpec(**wrong)


@pytest.mark.parametrize(('channels', 'wanted'), [
    (32, 32), (96, 96), (128, 128), (192, 192), (384, 192), (512, 128), (2048, 128), (224, 32)])
def test_tiles_divide_the_output_and_fit(channels, wanted):
  tiles = pallas_gpu.default_tiles(channels)
  assert tiles.channels == wanted
  assert tiles.shared_bytes(3) <= mosaic.SHARED_BYTES


# --- the card that is not there -------------------------------------------------------------------


def shape(*sizes, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(sizes, dtype)


@dataclasses.dataclass(frozen=True)
class Stage:
  """A convolution of the 1.3B's VAE or compressor, at 832x480.

  Attributes:
    x: without its past.
    taps: kt, kh, kw.
    channels: of the output.
    past: frames.
    epilogue: 'norm', 'residual', 'silu' or ''.
    strides: along time, height, width.
  """

  x: tuple[int, ...]
  taps: tuple[int, int, int]
  channels: int
  past: int = 2
  epilogue: str = ''
  strides: tuple[int, int, int] = (1, 1, 1)

  def arguments(self):
    kernel = shape(*self.taps, self.x[-1], self.channels)
    past = shape(self.x[0], self.past, *self.x[2:]) if self.past else None
    gain = shape(self.channels) if self.epilogue == 'norm' else None
    residual = shape(*self.x[:-1], self.channels) if self.epilogue == 'residual' else None
    return shape(*self.x), kernel, shape(self.channels), past, gain, residual

  def call(self, x, kernel, bias, past, gain, residual, tiles=None):
    padding = SAME if self.taps[1] > 1 else ((0, 0), (0, 0))
    return pallas.conv3d(x, kernel, bias, past=past, strides=self.strides, padding=padding,
                         epilogue=Epilogue(gain, self.epilogue in ('norm', 'silu'), residual),
                         tiles=tiles)


CUBE = 3, 3, 3
STAGES = {
    'decoder 60x104': Stage((1, 4, 60, 104, 384), CUBE, 384, epilogue='residual'),
    'decoder 120x208': Stage((1, 8, 120, 208, 384), CUBE, 384, epilogue='norm'),
    'decoder 120x208, first': Stage((1, 8, 120, 208, 192), CUBE, 384),
    'decoder 240x416, 1': Stage((1, 16, 240, 416, 192), CUBE, 192, epilogue='norm'),
    'decoder 240x416, 2': Stage((1, 16, 240, 416, 192), CUBE, 192, epilogue='residual'),
    'decoder 480x832, 1': Stage((1, 16, 480, 832, 96), CUBE, 96, epilogue='norm'),
    'decoder 480x832, 2': Stage((1, 16, 480, 832, 96), CUBE, 96, epilogue='residual'),
    'encoder of low resolution': Stage((1, 9, 56, 104, 96), CUBE, 192, epilogue='norm'),
    'frames doubled': Stage((1, 4, 60, 104, 384), (3, 1, 1), 768),
    'picture doubled': Stage((1, 16, 480, 832, 192), (1, 3, 3), 96, 0),
    'compressor 0': Stage((1, 5, 60, 104, 16), (4, 3, 3), 32, 1, 'silu', (2, 1, 1)),
    'compressor 1': Stage((1, 3, 60, 104, 32), (3, 4, 4), 128, 1, 'silu', (1, 2, 2)),
    'compressor 2': Stage((1, 3, 30, 52, 128), (3, 4, 4), 512, 1, 'silu', (1, 2, 2)),
    'compressor 3': Stage((1, 3, 15, 26, 512), (3, 4, 4), 2048, 1, 'silu', (1, 2, 2)),
}


def lower(stage: Stage, tiles=None):
  with use_abstract_mesh(CARD):
    return jax.jit(functools.partial(stage.call, tiles=tiles)).trace(
        *stage.arguments()).lower(lowering_platforms=('cuda',))


@pytest.mark.parametrize('name', STAGES)
def test_lowers_for_a_card_that_is_not_there(name):
  """Checks layouts, shapes of products, divisibility of copies and shared memory."""
  text = lower(STAGES[name]).as_text()
  assert text.count('mosaic_gpu') >= 1
  # At stride 1 frames are neither padded nor joined.
  frames = 'x'.join(map(str, STAGES[name].x[:4]))
  joined = [line for line in text.splitlines() if re.search('pad|concatenate', line)
            and f'tensor<{frames}x' in line]
  assert bool(joined) == (STAGES[name].strides != (1, 1, 1))


@pytest.fixture
def table(monkeypatch, tmp_path):
  """The user's table, empty."""
  monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / 'tuning.json'))


def test_tiles_come_from_the_table(table, monkeypatch):
  used = []

  def convolve(pieces, kernel, *rest, tiles, size, **options):
    used.append(tiles)
    frames = sum(piece.shape[1] for piece in pieces) + 1 - kernel.shape[0]
    return jnp.zeros((1, frames, *size, kernel.shape[4]), pieces[0].dtype)

  monkeypatch.setattr(pallas_gpu, 'convolve', convolve)
  stage, other = STAGES['decoder 480x832, 1'], STAGES['compressor 1']
  tuned, narrow = TileSpec(2, 2, 32, 96, 32, 3, 5), TileSpec(2, 2, 16, 64, 64, 2, 4)
  for key, tiles in (('bfloat16 1x18x480x832x96 by 3x3x3x96', tuned),
                     ('bfloat16 1x4x60x104x32 by 3x4x4x128 every 1x2x2', narrow)):
    tuning.record(tuning.Problem('conv3d', key, 'some card', jax.__version__), tiles, 1e-3)
  default = pallas_gpu.default_tiles(96)
  for mesh, made, asked in ((CARD, stage, None), (None, stage, None), (CARD, stage, default),
                            (CARD, STAGES['decoder 480x832, 2'], None), (CARD, other, None)):
    with contextlib.nullcontext() if mesh is None else use_abstract_mesh(mesh):
      jax.eval_shape(functools.partial(made.call, tiles=asked), *made.arguments())
  assert used == [tuned, default, default, tuned, narrow]


@pytest.mark.parametrize('tiles', [
    TileSpec(2, channels=160), TileSpec(2, channels=64, chunk=64), TileSpec(weights=32)])
def test_tuned_tiles_that_do_not_fit_are_not_used(tiles, table):
  """Channels of the output, of the input, and shared memory."""
  x, kernel, _, past, *_ = STAGES['encoder of low resolution'].arguments()
  shapes = pallas.shape_of(x, kernel, past, (1, 1, 1))
  tuning.record(tuning.Problem.here('conv3d', shapes), tiles, 1e-3)
  assert pallas.tuned(x, kernel, past, (1, 1, 1)) == pallas_gpu.default_tiles(192)


@pytest.mark.parametrize('name', STAGES)
def test_candidates_begin_with_the_default_and_fit(name):
  _, kernel, *_ = STAGES[name].arguments()
  folded = pallas.folded_shape(kernel, STAGES[name].strides)
  first, *rest = found = pallas_gpu.candidates(folded)
  assert first == pallas_gpu.default_tiles(folded[4])
  assert len(set(found)) == len(found) >= 8
  assert first not in rest
  for tiles in found:
    assert folded[3] % tiles.chunk == folded[4] % tiles.channels == 0
    assert tiles.shared_bytes(folded[1]) <= mosaic.SHARED_BYTES


def test_counts_shared_memory(monkeypatch):
  """What is just allowed lowers; the compiler itself refuses what is more."""
  stage = STAGES['decoder 480x832, 1']
  tiles = dataclasses.replace(pallas_gpu.default_tiles(96), weights=12)
  assert tiles.shared_bytes(3) == 2 * (
      3 * 26 * 16 * 32 + 12 * 32 * 96 + 384 * 96) + 2 * 4 * 96
  lower(stage, tiles)
  more = dataclasses.replace(tiles, weights=14)
  with pytest.raises(ValueError, match=r'weights=14\) with 3 taps .* takes \d+ bytes of shared'):
    lower(stage, more)
  monkeypatch.setattr(mosaic, 'SHARED_BYTES', 10**9)
  with pytest.raises(Exception, match=r'(?i)shared memory|smem'):
    lower(stage, more)


def test_a_norm_over_some_channels_is_refused():
  with pytest.raises(ValueError, match='a norm over 64 channels needs all of them in one tile, '
                     'got 32'):
    pallas_gpu.convolve([jnp.zeros((1, 1, 1, 8, 32))], jnp.zeros((1, 3, 3, 32, 64)), None, None,
                        low=(1, 1), size=(1, 8), finish=Finish(norm=True), operations=0,
                        tiles=TileSpec(channels=32))


@pytest.mark.parametrize('name', INTERPRETED)
def test_counts_as_the_reference(name):
  """Taps that meet padding do nothing, nor do those that a stride adds."""
  case = INTERPRETED[name]
  ours, theirs = (flops.count(lambda x, name=name: convolved(case._replace(x=x), name, x.dtype),
                              case.x) for name in ('pallas', 'reference'))
  assert ours == theirs > 0


def test_counts_what_it_does():
  """By hand: 4 rows of 32 pixels, of which 3 - 2/4 and 3 - 2/32 taps meet data."""
  case = INTERPRETED['two frames and their past']
  jaxpr = jax.make_jaxpr(lambda x, past: convolved(
      case._replace(x=x, past=past), 'pallas', jnp.bfloat16))(case.x, case.past)
  assert flops.count_jaxpr(jaxpr) == 2 * 2 * 3 * (4 * 3 - 2) * (32 * 3 - 2) * 32 * 32
  pixels = 4 * 32 * 32  # of a frame, all channels
  assert flops.traffic_of_jaxpr(jaxpr) == 2 * (4 + 2) * pixels + 2 * 27 * 32 * 32 + 2 * 4 * 32


def test_needs_a_card():
  case = CASES['two frames and their past']
  arguments = case.x, case.kernel, case.bias
  out = jax.eval_shape(functools.partial(conv3d, past=case.past, implementation='pallas'),
                       *arguments)
  assert out.shape == (1, 2, 4, 32, 32)  # plans are made anywhere
  with pytest.raises(ValueError, match='Only interpret mode is supported on CPU'):
    conv3d(*arguments, past=case.past, implementation='pallas')


# --- the networks ---------------------------------------------------------------------------------


def test_the_vae_runs_on_it(without_the_card):
  """Frames of a later block; all of its decoder but what reads latents and writes pixels."""
  spec = VaeSpec(32, 4, (1, 2), 1, (True,), dtypes=DTypes('float32', 'bfloat16'))
  rng = np.random.default_rng(0)
  latents = jnp.asarray(rng.standard_normal((1, 2, 3, 4, 4)), jnp.float32)
  # As wide as the convolutions' inputs, in the order in which they come.
  sizes = [((3, 4), 4), *[((3, 4), 64)] * 9, *[((6, 8), width) for width in (32, 32, 32, 32, 32)]]
  state = DecoderState(tuple(jnp.asarray(rng.standard_normal((1, 2, *size, width)), jnp.bfloat16)
                             for size, width in sizes))

  def decode(convolution, dtypes):
    vae = WanVae(dataclasses.replace(spec, convolution=convolution, dtypes=dtypes),
                 rngs=nnx.Rngs(0))

    decode_next = vae.decode_next if convolution == 'pallas' else jax.jit(vae.decode_next)
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(decode_next(state, latents))]

  exact = decode(None, DTypes('float32', 'float32'))
  ours = decode('pallas', spec.dtypes)
  finishes = [finish for _, _, finish in without_the_card]
  blocks = 2 + 2 * 2  # in the middle and in two stages
  assert finishes.count(Finish(norm=True, silu=True)) == blocks
  assert finishes.count(Finish(residual=True)) == blocks
  assert finishes.count(Finish()) == 2  # doubling frames and picture
  theirs = decode(None, spec.dtypes)
  for wanted, one, other in zip(exact, ours, theirs, strict=True):
    assert one.shape == wanted.shape
    scale = np.sqrt(np.mean(wanted**2)) or 1.0
    error, rounding = (np.sqrt(np.mean((x - wanted)**2)) / scale for x in (one, other))
    assert error <= 1.1 * rounding + 1e-6
    assert rounding < 0.03


def test_networks_count_as_with_the_reference():
  """A later block's decoder, and the compressor with its strides.

  The compressor without an implementation leaves its zeros in time to `nnx.Conv`, which does not
  count them; ours are handed them as frames.
  """
  found = {}
  for name in (None, 'reference', 'pallas'):
    spec = VaeSpec(32, 4, (1, 2), 1, (True,), dtypes=DTypes('float32', 'bfloat16'),
                   convolution=name)
    vae = nnx.eval_shape(lambda spec=spec: WanVae(spec, rngs=nnx.Rngs(0)))
    state = jax.eval_shape(lambda vae: vae.init_decoder_state(1, 3, 4), vae)
    branch = nnx.eval_shape(lambda name=name: HrBranch(
        CompressorSpec(16, (32, 64, 64), 8, convolution=name), rngs=nnx.Rngs(1)))
    latents = shape(1, 4, 8, 12, 16, dtype=jnp.float32)
    found[name] = (
        flops.count(lambda vae, *args: vae.decode_next(*args), vae, state, shape(1, 2, 3, 4, 4)),
        flops.count(lambda branch, x: branch(x), branch, latents))
  assert found['pallas'] == found['reference']
  assert found['pallas'][0] == found[None][0]


def test_the_compressor_runs_on_it(without_the_card):
  spec = CompressorSpec(16, (32, 64, 64), 8)
  latents = jax.random.normal(jax.random.key(0), (1, 4, 8, 12, 16))

  def branch(convolution):
    made = HrBranch(dataclasses.replace(spec, convolution=convolution), rngs=nnx.Rngs(1))
    made.out.kernel[...] = jax.random.normal(jax.random.key(2), made.out.kernel.shape) / 8
    return np.asarray(made(latents))

  ours = branch('pallas')
  assert [kernel for _, kernel, _ in without_the_card] == [
      (2, 3, 3, 32, 32), (3, 2, 2, 128, 64), (3, 2, 2, 256, 64)]
  assert ours.dtype == np.float32
  np.testing.assert_allclose(ours, branch(None), atol=0.02)
  np.testing.assert_allclose(branch('reference'), branch(None), atol=1e-5)
