"""Runs the Mosaic GPU attention kernel in Pallas' interpreter, with race detection; needs jax 0.11.

  python -m tests.kernels.interpreted [MUTATION]

Prints the largest error of every case against float32, or what was found wrong.
"""

import os

if __name__ == '__main__':
  os.environ['NPROC'] = '16'

import functools
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.kernels.attention import combine, pallas, pallas_gpu, reference
from pf_jax.kernels.context import Blocks, Segment, assemble
from pf_jax.kernels.quantization import quantize
from tests.kernels import interpreting
from tests.kernels.slow_kernel import slow_kernel

HEAD = 128


def draw(rng: np.random.Generator, *shape: int) -> jax.Array:
  return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)


def partition(rng, videos, blocks, rows, attended, valid, shift, heads):
  """Random blocks; those that no video attends hold NaN in keys and numbers out of scale in v."""
  index = np.array(attended, np.int32).reshape(-1, len(valid[0]))
  valid = np.array(valid, bool)
  shape = videos, blocks, rows, heads, HEAD
  k, v = np.array(draw(rng, *shape)), np.array(draw(rng, *shape))
  for video in range(videos):
    read = {int(b) for b, ok in zip(index[video % len(index)], valid[video % len(valid)],
                                    strict=True) if ok}
    for block in set(range(blocks)) - read:
      k[video, block], v[video, block] = np.nan, 1e4
  return Blocks(jnp.asarray(k), jnp.asarray(v), jnp.asarray(shift, jnp.float32).reshape(
      -1, len(valid[0])), jnp.asarray(valid), jnp.asarray(index))


def inside(blocks, number):
  """The same as one layer of three, of which the others hold NaN."""
  k, v = (jnp.full((3, *x.shape), jnp.nan, x.dtype).at[number].set(x) for x in blocks[:2])
  return blocks._replace(k=k, v=v, layer=jnp.int32(number))


def in_8_bits(blocks, dtype):
  """The same stored so; scales of blocks that nobody attends are NaN in keys."""
  return blocks._replace(k=quantize(blocks.k, dtype), v=quantize(blocks.v, dtype))


def cases():
  """Name -> queries and what they attend."""
  rng = np.random.default_rng(0)

  def sink(videos=1, heads=1, valid=((1, 1),)):
    return partition(rng, videos, 2, 64, [[0, 1]], valid, [[-9, -7]], heads)

  def mid(videos=1, heads=1, attended=((6, 1, 3),), valid=((1, 1, 1),)):
    return partition(rng, videos, 8, 22, attended, valid, [[-5, -4, -3]], heads)

  def own(videos, rows, heads=1):
    return Segment(draw(rng, videos, rows, heads, HEAD), draw(rng, videos, rows, heads, HEAD))

  def q(videos, rows, heads=1):
    return draw(rng, videos, rows, heads, HEAD)

  yield 'own block alone', q(1, 192), [own(1, 128)]
  yield 'ragged own block', q(1, 92), [own(1, 92)]
  yield 'three partitions, two heads', q(1, 200, 2), [sink(heads=2), mid(heads=2), own(1, 200, 2)]
  yield 'empty partitions', q(1, 64), [sink(valid=((0, 0),)), mid(valid=((0, 0, 0),)), own(1, 64)]
  yield 'a hole in the middle', q(1, 64), [sink(valid=((0, 1),)), mid(valid=((1, 0, 1),)),
                                          own(1, 64)]
  yield 'each video its own', q(2, 64), [
      sink(2), mid(2, attended=((6, 1, 3), (0, 2, 7)), valid=((1, 1, 0), (1, 1, 1))), own(2, 64)]
  yield 'two noisy versions share a history', q(2, 64), [sink(1), own(2, 64)]
  stacked = [inside(s, 1) for s in (sink(2), mid(2))]
  yield 'the second of three layers', q(2, 64), [*stacked, own(2, 64)]
  yield 'int8, two heads', q(1, 200, 2), [in_8_bits(x, 'int8') for x in (
      sink(heads=2), mid(heads=2, valid=((1, 0, 1),)))] + [own(1, 200, 2)]
  yield 'float8, each video its own, the second of three layers', q(2, 64), [
      in_8_bits(x, 'float8_e4m3fn') for x in (inside(sink(2, valid=((0, 1),)), 1), inside(mid(
          2, attended=((6, 1, 3), (0, 2, 7)), valid=((1, 1, 0), (1, 1, 1))), 1))] + [own(2, 64)]


def float8_cases():
  """Name -> queries and what they attend with products in float8."""
  known = {name: (q, segments) for name, q, segments in cases()}
  q, (*history, own) = known['three partitions, two heads']
  yield 'products in float8, two heads', q, [in_8_bits(x, pallas.FLOAT8) for x in history] + [own]
  name = 'float8, each video its own, the second of three layers'
  yield f'products in {name}', *known[name]
  # Logits are 0 and their unit is tiny; still no row beside a block counts.
  q, (_, mid, own) = known['three partitions, two heads']
  yield 'products in float8 with queries of nothing', 0 * q, [in_8_bits(mid, pallas.FLOAT8), own]


def halves():
  """Name -> queries, and what they attend in two parts that are computed apart."""
  known = {name: (q, segments) for name, q, segments in cases()}
  for name in ('three partitions, two heads', 'each video its own', 'empty partitions'):
    q, (*history, own) = known[name]
    yield name, q, (history, [own])


def expected_in_float8(q, segments):
  """What the kernel is to compute, by its slow model: queries are rounded once they are turned."""
  with mock.patch.object(pallas_gpu, 'attend_pools', slow_kernel):
    return pallas.attend(q, segments, float8=True)


def expected(q, segments):
  """Float32 softmax over gathered rows, and the log of its sum."""
  parts = [s for s in segments if isinstance(s, Blocks)]
  rest = [s for s in segments if isinstance(s, Segment)]
  tree = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x,
                      ([assemble(parts)] if parts else []) + rest)
  # What does not count must not be heard: it is NaN.
  tree = [s if s.valid is None else s._replace(k=jnp.where(s.valid[..., None, None], s.k, 0))
          for s in tree]
  return reference.attend(q.astype(jnp.float32), tree, return_lse=True)


# Planted bugs: what is replaced, by what, and how that shows: a pattern of what is said, or None
# for a kernel that waits for ever. Who comes first is chance: keys that nobody waited for are
# noticed as a race, by a phase that nobody saw, or by their numbers.
MUTATIONS = {
    'no wait for keys': ('plgpu.barrier_wait(scratch.k_ready.at[stage])', 'pass',
                         'RACE DETECTED|observed|wrong values'),
    'no wait for free room': ('plgpu.barrier_wait(half.free.at[stage])', 'pass', 'RACE DETECTED'),
    'one tile less': ('lax.fori_loop(plain, count,', 'lax.fori_loop(plain, count - 1,', None),
    'rotation of the last block': ('_group, turn)', '_group, jnp.maximum(turn - 1, 0))',
                                   'wrong values'),
    'no wait for what is stored': ('plgpu.barrier_wait(half.stored_ready.at[place])', 'pass',
                                   'RACE DETECTED|observed|wrong values'),
    'the scale of the next block': ('self._scales.k[video, table.slot[video, number]',
                                    'self._scales.k[video, table.slot[video, number + 1]',
                                    'wrong values'),
    'the keys\' scale on values': ('weights * self._scales.v', 'weights * self._scales.k',
                                   'wrong values'),
    'values of the next tile': ('table.place[video, number]', 'table.place[video, number] + 1',
                                'wrong values'),
    'queries turned the other way': ('head * c + turned * s', 'head * c - turned * s',
                                     'wrong values'),
    'mask one row late': ('column < table.high[video, number]',
                          'column <= table.high[video, number]', 'wrong values'),
    'a logarithm in base 2': ('top * math.log(2)', 'top', 'wrong values'),
}


def main(mutation: str) -> int:
  interpret = interpreting.prepare(pallas_gpu, MUTATIONS, mutation)
  tiles = pallas_gpu.TileSpec(warpgroups=3, keys=64, stages=2)
  attend = functools.partial(pallas.attend, tiles=tiles, interpret=interpret)

  def run(q, segments, **options):
    return jax.block_until_ready(jax.jit(functools.partial(attend, **options))(q, segments))

  for name, q, segments in cases():
    if not compare(name, run(q, segments), expected(q, segments)[0]):
      return 1
  for name, q, segments in float8_cases():
    found = run(q, segments, float8=True)
    if not compare(name, found, expected_in_float8(q, segments)):
      return 1
  for name, q, parts in halves():
    found = combine([run(q, segments, return_lse=True) for segments in parts])
    wanted = expected(q, [segment for segments in parts for segment in segments])
    for what, *pair in zip(('combined', 'log-sum-exp'), found, wanted, strict=True):
      if not compare(f'{name}, {what}', *pair):
        return 1
  return 0


def compare(name: str, found: jax.Array, wanted: jax.Array) -> bool:
  """Says how far off it is, and whether that is good enough."""
  error = np.abs(np.asarray(found, np.float32) - np.asarray(wanted, np.float32))
  return interpreting.accept(name, error, 8e-3, 6e-3)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ''))
