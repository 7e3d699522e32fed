import jax.numpy as jnp
import numpy as np
import pytest

from pf_jax.kernels.context import valid_first


@pytest.mark.parametrize(('valid', 'front'), [
    ([1, 1, 1], [0, 1, 2, 3, 4, 5]),
    ([1, 0, 1], [0, 1, 5]),
    ([0, 1, 0], [2, 3, 4]),
    ([0, 0, 1], [5]),
    ([0, 0, 0], []),
])
def test_rows_of_valid_slots_come_first(valid, front):
  order = valid_first(jnp.array([valid], bool), np.array([2, 3, 1]))
  assert order.shape == (1, 6)
  assert order[0, :len(front)].tolist() == front
  assert 0 <= int(order.min()) <= int(order.max()) < 6


def test_samples_may_differ():
  order = valid_first(jnp.array([[1, 0], [0, 1]], bool), np.array([1, 2]))
  assert order[0, :1].tolist() == [0]
  assert order[1, :2].tolist() == [1, 2]
