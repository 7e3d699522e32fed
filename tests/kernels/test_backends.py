"""All backends of attention on the same cases, against float32.

Cards are not there: cuDNN's call is answered by XLA from the row that it is handed, and our kernel
by its slow model from the pools and tables that it is handed. The kernel itself is interpreted
(`test_interpreted`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pf_jax.kernels.attention import Segment, attend, pallas_gpu
from tests.kernels import interpreted
from tests.kernels.slow_kernel import slow_kernel

BACKENDS = ('reference', 'cudnn', 'pallas')
CASES = {name: (q, segments) for name, q, segments in interpreted.cases()}
LARGEST, MOST = 8e-3, 6e-3  # errors of all numbers, and of 99%


@pytest.fixture(scope='module', autouse=True)
def without_cards():
  def answered(original, *args, implementation, **kwargs):
    return original(*args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pallas_gpu, 'attend_pools', slow_kernel)
    patch.setattr(jax.nn, 'dot_product_attention',
                  functools.partial(answered, jax.nn.dot_product_attention))
    yield


def errors(implementation, q, segments, wanted=None):
  """(largest, of 99%) against float32, or against what is wanted."""
  out = attend(q, segments, implementation=implementation)
  assert out.dtype == q.dtype
  wanted = interpreted.expected(q, segments)[0] if wanted is None else wanted
  error = np.abs(np.asarray(out, np.float32) - wanted)
  return error.max(), np.quantile(error, 0.99)


@pytest.mark.parametrize('implementation', BACKENDS)
@pytest.mark.parametrize('case', CASES)
def test_equals_float32(case, implementation):
  largest, most = errors(implementation, *CASES[case])
  assert largest <= LARGEST
  assert most <= MOST


@pytest.mark.parametrize('implementation', BACKENDS)
@pytest.mark.parametrize('change', [
    lambda x: x._replace(shift=x.shift + 1), lambda x: x._replace(chosen=x.chosen[:, ::-1]),
    lambda x: x._replace(valid=x.valid & (jnp.arange(x.valid.shape[1]) > 0))],
    ids=['a place later', 'in another order', 'one less'])
def test_a_wrong_table_is_heard(change, implementation):
  """The mutation: what is wanted is of other places, blocks or counts than what is asked for."""
  q, (sink, mid, own) = CASES['three partitions, two heads']
  wanted = interpreted.expected(q, [sink, mid, own])[0]
  assert errors(implementation, q, [sink, change(mid), own], wanted)[0] > 2 * LARGEST


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_counts_and_tables(data):
  """Blocks chosen and counted at random, one or two videos, a ragged block of their own."""
  videos, attended = data.draw(st.integers(1, 2)), 3
  chosen = [data.draw(st.permutations(range(4)))[:attended] for _ in range(videos)]
  valid = [data.draw(st.lists(st.booleans(), min_size=attended, max_size=attended))
           for _ in range(videos)]
  rng = np.random.default_rng(data.draw(st.integers(0, 99)))
  history = interpreted.partition(rng, videos, 4, 22, chosen, valid,
                                  [list(range(-attended - 1, -1))], 1)
  storage = data.draw(st.sampled_from([None, 'int8', 'float8_e4m3fn']))
  if storage:
    history = interpreted.in_8_bits(history, storage)
  q, k, v = (interpreted.draw(rng, videos, 13, 1, interpreted.HEAD) for _ in range(3))
  for implementation in BACKENDS:
    assert errors(implementation, q, [history, Segment(k, v)])[0] <= 2 * LARGEST
