"""The tile table against a slow model, and by hand."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pf_jax.kernels.attention.tiles import ALIGNMENT, Pool, tile_table, transposed


def pool(rows: int, index, valid, rotation) -> Pool:
  """A pool of which the table needs no keys."""
  videos = len(index)
  empty = jnp.zeros((videos, 0, 0))
  return Pool(empty, empty, rows, *(jnp.asarray(x).reshape(videos, -1)
                                    for x in (index, valid, rotation)))


def listed(table, video: int = 0) -> list[tuple[int, ...]]:
  """(pool, start, low, high, turn) of the tiles that are attended."""
  columns = table.pool, table.start, table.low, table.high, table.turn
  return [tuple(int(x[video, i]) for x in columns) for i in range(int(table.total[video]))]


def test_by_hand():
  """Two whole blocks of 16 rows, then ragged ones of 6; tiles of 8 keys."""
  full = pool(16, [[1, 0]], [[True, True]], [[0, 1]])
  ragged = pool(6, [[0, 3, 2]], [[True, False, True]], [[2, 3, 4]])
  table = tile_table([full, ragged], 1, 8)
  assert listed(table) == [
      (0, 16, 0, 8, 0), (0, 24, 0, 8, -1), (0, 0, 0, 8, 1), (0, 8, 0, 8, -1),  # no mask
      (1, 0, 0, 6, 2),  # block 0: rows 0..5
      (1, 8, 4, 8, 4), (1, 16, 0, 2, -1)]  # block 2: rows 12..17
  assert table.plain.tolist() == [4]


def test_nothing_counts():
  table = tile_table([pool(16, [[0]], [[False]], [[0]]), pool(8, [[2]], [[True]], [[1]])], 1, 8)
  assert listed(table) == [(1, 16, 0, 8, 1)]


def test_videos_may_differ_and_share():
  shared = pool(8, [[1]], [[True]], [[0]])
  own = pool(8, [[0, 1], [1, 0]], [[True, False], [True, True]], [[1, 2], [1, 2]])
  table = tile_table([shared, own], 2, 8)
  assert listed(table, 0) == [(0, 8, 0, 8, 0), (1, 0, 0, 8, 1)]
  assert listed(table, 1) == [(0, 8, 0, 8, 0), (1, 8, 0, 8, 1), (1, 0, 0, 8, 2)]
  assert table.video[:, :2].tolist() == [[0, 0], [0, 1]]


def test_rows_of_a_later_layer():
  """Two videos of layer 3; a history of layer 5 that both share."""
  own = pool(8, [[0], [1]], [[True], [True]], [[0], [0]])._replace(first=jnp.int32(3 * 2))
  shared = pool(8, [[2]], [[True]], [[1]])._replace(first=5)
  table = tile_table([own, shared], 2, 8)
  assert table.video.tolist() == [[6, 5], [7, 5]]
  assert listed(table, 1) == [(0, 8, 0, 8, 0), (1, 16, 0, 8, 1)]


def test_transposed_values_follow_the_tiles():
  """Two videos of the second of two layers: each tile's rows, wherever it stands in the table."""
  v = jnp.arange(4 * 22 * 3.0).reshape(4, 22, 3)
  made = Pool(v, v, 11, jnp.array([[1, 0], [0, 1]]), jnp.array([[True, True], [True, False]]),
              jnp.array([[0, 1], [0, 1]]), first=2)
  table, rows = tile_table([made], 2, 8), transposed(made, 8)
  assert rows.shape == (2, 3, 2 * 3 * 8)  # three tiles, since a block may begin anywhere
  for video in range(2):
    for i in range(int(table.total[video])):
      low, high, place = (int(x[video, i]) for x in (table.low, table.high, table.place))
      start = int(table.start[video, i])
      assert table.video[video, i] - 2 == table.own[video, i] == video
      np.testing.assert_array_equal(rows[video, :, 8 * place + low:8 * place + high],
                                    v[2 + video, start + low:start + high].T)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), keys=st.sampled_from([8, 24, 64]), pools=st.integers(1, 3))
def test_every_row_that_counts_is_read_once(data, keys, pools):
  made, wanted, rotations = [], set(), 0
  for number in range(pools):
    rows, blocks = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 5))
    index = data.draw(st.permutations(range(blocks)))
    valid = data.draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks))
    rotation = [rotations + i for i in range(blocks)]
    rotations += blocks
    made.append(pool(rows, [index], [valid], [rotation]))
    wanted |= {(number, block * rows + row, turn) for block, ok, turn in
               zip(index, valid, rotation, strict=True) if ok for row in range(rows)}
  table = tile_table(made, 1, keys)
  read, turn = [], None
  for place, (number, start, low, high, new) in enumerate(listed(table)):
    assert start % ALIGNMENT == 0
    assert 0 <= low < high <= keys
    assert (place >= int(table.plain[0])) or (low, high) == (0, keys)
    turn = turn if new < 0 else new
    read += [(number, start + row, turn) for row in range(low, high)]
  assert len(read) == len(set(read))
  assert set(read) == wanted
  assert np.all(np.asarray(table.plain) <= np.asarray(table.total))
