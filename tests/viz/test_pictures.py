"""Contact sheets and plots: geometry and content, on pictures small enough to know."""

import numpy as np
import pytest
from PIL import Image

from pf_jax.viz import plots, sheet


def coloured(frames, colour):
  pixels = np.zeros((frames, 64, 64, 3), np.uint8)
  pixels[:] = colour
  pixels[:, :, :, 2] = np.arange(frames)[:, None, None]
  return pixels


def test_spread_covers_both_ends():
  assert sheet.spread(17, 3) == (0, 8, 16)
  assert sheet.spread(1, 8) == (0,)
  assert sheet.spread(3, 8) == (0, 1, 2)
  with pytest.raises(ValueError, match='total_frames=0'):
    sheet.spread(0, 8)


def has_tile(picture, colour, size):
  return int((picture == np.array(colour, np.uint8)).all(-1).sum()) == size


def test_sheet_holds_the_right_frames_in_pieces_or_whole():
  red, green = coloured(33, (200, 0, 0)), coloured(33, (0, 200, 0))
  whole = sheet.contact_sheet([red, green], fps=16, labels=['red', 'green'], columns=3)
  pieces = sheet.ContactSheet((0, 16, 32), fps=16, labels=['red', 'green'])
  batch = np.stack([red, green])
  for start in range(0, 33, 5):
    pieces.add(batch[:, start:start + 5])
  np.testing.assert_array_equal(pieces.render(), whole)
  for number in (0, 16, 32):
    assert has_tile(whole, (200, 0, number), 128 * 128)
    assert has_tile(whole, (0, 200, number), 128 * 128)


def test_sheet_of_a_video_cut_short_shows_what_there_is():
  cut = sheet.ContactSheet((0, 16, 32), fps=16, labels=['a'], block_of=lambda n: n // 16)
  with pytest.raises(ValueError, match='no frame'):
    cut.render()
  cut.add(coloured(20, (200, 0, 0))[None])
  picture = cut.render()
  assert has_tile(picture, (200, 0, 16), 128 * 128)
  assert picture.shape[1] < 230 + 3 * 134


def test_sheet_survives_long_and_strange_labels(tmp_path):
  label = 'x' * 500 + ' \0 \n 🎬 ' + 'word ' * 300
  picture = sheet.contact_sheet([coloured(2, (9, 9, 9))], fps=16, labels=[label], title='t')
  assert picture.shape[0] < 300
  sheet.write_png(tmp_path / 'a.png', picture)
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / 'a.png')), picture)


@pytest.mark.parametrize(('shape', 'rows'), [((480, 832), 128), ((32, 48), 128), ((200, 100), 128)])
def test_tiles_keep_their_aspect(shape, rows):
  height, width = sheet._tile_size(shape, rows)
  assert height <= rows or height % shape[0] == 0
  assert abs(width / height - shape[1] / shape[0]) < 0.02


def test_bad_sheets():
  with pytest.raises(ValueError, match='all alike'):
    sheet.contact_sheet([coloured(2, 1), coloured(3, 1)], fps=16, labels=['a', 'b'])
  with pytest.raises(ValueError, match='increase'):
    sheet.ContactSheet((3, 1), fps=16, labels=['a'])
  with pytest.raises(ValueError, match='at least one'):
    sheet.ContactSheet((), fps=16, labels=['a'])
  with pytest.raises(ValueError, match='wanted 1'):
    sheet.ContactSheet((0,), fps=16, labels=['a']).add(np.zeros((2, 1, 8, 8, 3), np.uint8))


def test_timeline_colours_match_partitions():
  states = np.full((6, 6), plots.Partition.ABSENT)
  states[np.tril_indices(6)] = plots.Partition.RECENT
  states[:, 0] = plots.Partition.SINK
  picture = plots.cache_timeline(states, title='x')
  for partition in (plots.Partition.SINK, plots.Partition.RECENT):
    colour = np.array([int(plots._COLOURS[partition][i:i + 2], 16) for i in (1, 3, 5)])
    assert (np.abs(picture.astype(int) - colour).max(-1) < 3).sum() > 5000
  with pytest.raises(ValueError, match='Partition'):
    plots.cache_timeline(np.full((2, 2), 99))


def test_curves_draw_and_name_what_is_missing():
  records = [{'step': i, 'kind': 'train', 'loss': 2.0**-i, 'bad': None} for i in range(10)]
  picture = plots.training_curves(records, ('loss',), smooth=3)
  assert picture.dtype == np.uint8
  assert picture.std() > 5
  with pytest.raises(ValueError, match='loss'):
    plots.training_curves(records, ('los',))


def test_interval_curves_stand_where_their_values_are():
  x = np.arange(3.0)
  low, high = np.stack([x, 0 * x, 0 * x, 0 * x]), np.stack([x, 0 * x + 1, 0 * x + 1, 0 * x + 1])
  picture = plots.interval_curves({'one': {'a': low, 'b': high}}, x_label='block',
                                  references={'one': {'chance': 0.5}}).astype(int)

  def rows(colour):
    rgb = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
    axis = picture[:, :picture.shape[1] // 2]  # without the legend
    return np.flatnonzero((np.abs(axis - rgb).max(-1) < 40).sum(1) > axis.shape[1] // 3)
  bottom, top = rows(plots._CURVES[0]).max(), rows(plots._CURVES[1])
  assert len(top)
  assert top.max() + 100 < bottom
  assert any(abs(row - (top.mean() + bottom) / 2) < 15 for row in rows('#777777'))
  with pytest.raises(ValueError, match=r'curves \[4, n\]'):
    plots.interval_curves({'one': {'a': low[:3]}}, x_label='block')
  with pytest.raises(ValueError, match='at least one panel'):
    plots.interval_curves({}, x_label='block')
