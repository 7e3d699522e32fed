"""Runs the Mosaic GPU convolution in Pallas' interpreter, with race detection; needs jax 0.11.

  python -m tests.kernels.interpreted_conv3d [MUTATION]

Prints the largest error of every case against float32, or what was found wrong.
"""

import os

if __name__ == '__main__':
  os.environ['NPROC'] = '16'

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.kernels.conv3d import pallas, pallas_gpu, reference
from pf_jax.kernels.conv3d.reference import Epilogue
from tests.kernels import interpreting

SMALL = pallas_gpu.TileSpec(warpgroups=2, blocks=1, columns=32, channels=32, chunk=32, patches=2,
                            weights=2)
SAME = (1, 1), (1, 1)


class Problem(NamedTuple):
  """Arguments of `pallas.conv3d`."""

  x: Any
  kernel: Any
  bias: Any
  past: Any = None
  epilogue: Epilogue = Epilogue()
  strides: tuple[int, int, int] = (1, 1, 1)
  padding: Any = SAME
  tiles: Any = SMALL


def problem(seed, x, taps, channels, *, past=0, gain=False, silu=False, residual=False, spare=0,
            **options) -> Problem:
  """Random numbers; `spare` last frames, which no tap reaches, hold NaN."""
  rng = np.random.default_rng(seed)

  def draw(*shape, scale=1.0):
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.bfloat16)

  frames = draw(*x)
  if spare:
    frames = frames.at[:, -spare:].set(jnp.nan)
  before = draw(x[0], past, *x[2:]) if past else None
  fan_in = np.prod(taps) * x[-1]
  made = Problem(frames, draw(*taps, x[-1], channels, scale=fan_in**-0.5), draw(channels), before,
                 **options)
  shape = jax.eval_shape(lambda: expected(made)).shape
  return made._replace(epilogue=Epilogue(
      gain=jnp.asarray(1 + rng.random(channels), jnp.float32) if gain else None, silu=silu,
      residual=draw(*shape) if residual else None))


def expected(given: Problem):
  """Float32, from the same rounded numbers."""
  wide = [None if x is None else x.astype(jnp.float32)
          for x in (given.x, given.kernel, given.bias, given.past, given.epilogue.residual)]
  return reference.conv3d(*wide[:3], strides=given.strides, padding=given.padding, past=wide[3],
                          epilogue=given.epilogue._replace(residual=wide[4]))


def convolve(given: Problem, arrays, interpret=None):
  """What the kernel says; arrays are (x, kernel, bias, past, gain, residual)."""
  *arrays, past, gain, residual = arrays
  return pallas.conv3d(*arrays, past=past, epilogue=Epilogue(gain, given.epilogue.silu, residual),
                       strides=given.strides, padding=given.padding, tiles=given.tiles,
                       interpret=interpret)


def cases() -> dict[str, Problem]:
  three = pallas_gpu.TileSpec(3, 1, 64, 32, 32, 2, 3)
  return {
      'two frames and their past': problem(0, (1, 2, 4, 32, 32), (3, 3, 3), 32, past=2, silu=True),
      'ragged picture, norm over two pieces': problem(
          1, (1, 1, 5, 21, 32), (1, 3, 3), 64, gain=True, silu=True,
          tiles=pallas_gpu.TileSpec(2, 1, 32, 64, 32, 2, 3)),
      'three warpgroups, residual, two chunks': problem(
          2, (1, 3, 3, 40, 64), (3, 1, 1), 32, residual=True, tiles=three),
      'two tiles of channels, two videos': problem(
          3, (2, 1, 3, 20, 32), (1, 3, 3), 64, gain=True, silu=True, residual=True),
      'half the frames': problem(4, (1, 5, 3, 20, 16), (4, 3, 3), 32, past=1, silu=True,
                                 strides=(2, 1, 1)),
      'half the picture': problem(5, (1, 3, 10, 22, 32), (3, 4, 4), 32, silu=True,
                                  strides=(1, 2, 2)),
      'half the picture, taps and zeros on one side': problem(
          6, (1, 1, 6, 18, 32), (1, 3, 3), 32, strides=(1, 2, 2), padding=((0, 1), (0, 1))),
      'a frame that no tap reaches': problem(7, (1, 4, 2, 16, 32), (3, 1, 1), 32, spare=1,
                                             strides=(2, 1, 1), padding=((0, 0), (0, 0))),
  }


# Planted bugs: what is replaced, by what, and how that shows (see interpreted.py), in words that no
# traceback has by itself.
MUTATIONS = {
    'no wait for patches': ('plgpu.barrier_wait(scratch.patch_ready.at[place])', 'pass',
                            'phase|RACE DETECTED|wrong values'),
    'no wait for weights': ('plgpu.barrier_wait(scratch.weights_ready.at[at])', 'pass',
                            'phase|RACE DETECTED|wrong values'),
    'no wait for free room': ('plgpu.barrier_wait(scratch.patch_free.at[place])', 'pass',
                              'phase|RACE DETECTED'),
    'taps along the height turned round': (
        'first + down * tiles.columns', 'first + (taps - 1 - down) * tiles.columns',
        'wrong values'),
    'taps along the width turned round': (
        '- low[1] + across', '- low[1] + taps[2] - 1 - across', 'wrong values'),
    'zeros behind the rows': ('tiles.rows - low[0]', 'tiles.rows + low[0]', 'wrong values'),
    'zeros behind the columns': ('tiles.columns - low[1]', 'tiles.columns + low[1]',
                                 'wrong values'),
    'one round less': ('@pl.loop(0, rounds)\n    def _(number):\n      place',
                       '@pl.loop(0, rounds - 1)\n    def _(number):\n      place', 'phase'),
    'one chunk of channels': ('* (channels_in // tiles.chunk)', '* 1', 'wrong values'),
    'residual not waited for': ('plgpu.barrier_wait(scratch.residual_ready)', 'pass',
                                'phase|RACE DETECTED|wrong values'),
    'room given back too early': (
        'number * taps + down - 1, number - 1 if', 'number * taps + down, number - 1 if',
        'phase|RACE DETECTED|wrong values'),
    'gone before it is written': ('  plgpu.wait_smem_to_gmem(0)\n', '', 'before kernel finished'),
}


def main(mutation: str) -> int:
  interpret = interpreting.prepare(pallas_gpu, MUTATIONS, mutation)
  for name, given in cases().items():
    run = jax.jit(lambda arrays, given=given: convolve(given, arrays, interpret))
    out = run((*given[:4], given.epilogue.gain, given.epilogue.residual))
    out, wanted = (np.asarray(jax.block_until_ready(y), np.float32)
                   for y in (out, expected(given)))
    error = np.abs(out - wanted) / (1 + np.abs(wanted))
    if not interpreting.accept(name, error, 8e-3, 6e-3):
      return 1
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ''))
