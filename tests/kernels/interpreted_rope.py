"""Runs the norm-and-rotate kernel in Pallas' interpreter, with race detection; needs jax 0.11.

  python -m tests.kernels.interpreted_rope [MUTATION]

Prints the largest error of every case against float64, or what was found wrong.
"""

import os

if __name__ == '__main__':
  os.environ['NPROC'] = '16'

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.kernels import rope
from pf_jax.kernels.rope import pallas, pallas_gpu
from tests.kernels import interpreting

EPS = 1e-6


def case(videos, tokens, heads, size, *, before=0, after=0, biased=True, seed=0, small=()):
  """Arguments of `norm_and_rotate`; the columns that nobody asked for are NaN.

  Args:
    videos: B.
    tokens: T.
    heads: N.
    size: H.
    before: heads in front of those that count.
    after: heads behind them.
    biased: whether there is a bias.
    seed: of the numbers.
    small: tokens that are a million times smaller than others.
  """
  rng = np.random.default_rng(seed)
  width = heads * size
  x = np.full((videos, tokens, before * size + width + after * size), np.nan, np.float32)
  columns = slice(before * size, before * size + width)
  x[:, :, columns] = rng.standard_normal((videos, tokens, width))
  x[:, list(small), columns] *= 1e-6
  scale = jnp.asarray(rng.uniform(0.5, 1.5, width), jnp.float32)
  table = rope.rope_table(rng.uniform(-9, 9, (tokens, 3)), size)
  bias = jnp.asarray(rng.standard_normal(width), jnp.bfloat16) if biased else None
  return jnp.asarray(x, jnp.bfloat16), scale, table, bias, before * size


CASES = {
    'one head': lambda: case(1, 8, 1, 128),
    'heads of 64': lambda: case(1, 8, 3, 64),
    'ragged rows': lambda: case(1, 13, 2, 128),
    'fewer rows than a program has': lambda: case(2, 3, 1, 128),
    'two videos, columns of a wider product': lambda: case(2, 12, 2, 128, before=2, after=1),
    'no bias, tokens near the epsilon': lambda: case(1, 8, 2, 128, biased=False, small=(2, 5)),
    'the 1.3B': lambda: case(1, 10, 12, 128),
    'the 14B': lambda: case(1, 5, 40, 128),
}


def expected(x, scale, table, bias, first):
  """Float64, pair by pair as complex numbers."""
  x = np.asarray(x, np.float64)[..., first:first + scale.shape[0]]
  x = x if bias is None else x + np.asarray(bias, np.float64)
  x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * np.asarray(scale, np.float64)
  cos, sin = (np.asarray(a, np.float64) for a in table)
  pairs = x.reshape(*x.shape[:2], -1, cos.shape[-1], 2)
  turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cos + 1j * sin)[:, None]
  return np.stack([turned.real, turned.imag], axis=-1).reshape(*pairs.shape[:3], -1)


# Planted bugs: what is replaced, by what, and how that shows: a pattern of what is said, or None
# for a kernel that waits for ever.
MUTATIONS = {
    'no wait for the rows': ('plgpu.barrier_wait(ready)', 'pass',
                             'RACE DETECTED|observed|wrong values'),
    'one copy less': ('(scale, scale_s), (cos', '(cos', None),
    'pairs turned the other way': ('a * c - b * s, a * s + b * c', 'a * c + b * s, b * c - a * s',
                                   'wrong values'),
    'halves of a word swapped': ('return a | (b << _LOW)', 'return b | (a << _LOW)',
                                 'wrong values'),
    'one head less in the mean': ('heads, add_squares', 'heads - 1, add_squares', 'wrong values'),
    'the first columns of the product': ('pl.ds(first, heads)', 'pl.ds(0, heads)', 'wrong values'),
    'no epsilon': ('(2 * heads * half) + eps', '(2 * heads * half)', 'wrong values'),
}


def main(mutation: str) -> int:
  interpret = interpreting.prepare(pallas_gpu, MUTATIONS, mutation)
  for name, make in CASES.items():
    *arguments, first = make()
    run = jax.jit(functools.partial(pallas.norm_and_rotate, first=first, eps=EPS,
                                    interpret=interpret))
    out = np.asarray(jax.block_until_ready(run(*arguments)), np.float64)
    wanted = expected(*arguments, first)
    # Of what is largest in a token: pairs may cancel out.
    error = np.abs(out - wanted) / np.abs(wanted).max(axis=(2, 3), keepdims=True)
    if not interpreting.accept(name, error, 2**-8, 3e-3):  # rounded once
      return 1
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ''))
