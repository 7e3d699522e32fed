"""Plots: training curves, and the life of every block in the cache.

All functions draw with matplotlib's file backend and return uint8 pictures, so they behave alike
in scripts, tests and notebooks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pf_jax.cache.inspect import Partition

_DPI = 120


# Distinguishable in print and for colour-blind readers.
_COLOURS = {
    Partition.ABSENT: '#ffffff', Partition.SINK: '#1b4f8f', Partition.SELECTED: '#e08214',
    Partition.ARCHIVED: '#fdd9a5', Partition.PENDING: '#b2abd2', Partition.RECENT: '#35978f',
    Partition.GENERATED: '#111111', Partition.EVICTED: '#e4e4e4'}
_NAMES = {
    Partition.SINK: 'sink', Partition.SELECTED: 'mid, selected',
    Partition.ARCHIVED: 'mid, archived', Partition.PENDING: 'pending',
    Partition.RECENT: 'recent', Partition.GENERATED: 'generated',
    Partition.EVICTED: 'evicted'}


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), dpi=_DPI, layout='constrained')
  FigureCanvasAgg(figure)
  return figure, figure.subplots(rows, columns, squeeze=False)


def _pixels(figure: Any) -> np.ndarray:
  figure.canvas.draw()
  return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def cache_timeline(states: np.ndarray, *, title: str = '', width: float = 9.0,
                   height: float = 6.0) -> np.ndarray:
  """Where each block was (rows) while each block was generated (columns).

  Args:
    states: [generated blocks, blocks] of `Partition` values.
    title: shown above.
    width: inches.
    height: inches.

  Returns:
    uint8 [height, width, 3].

  Raises:
    ValueError: not a 2-D array of `Partition` values.
  """
  states = np.asarray(states)
  if states.ndim != 2 or not np.isin(states, [int(p) for p in Partition]).all():
    raise ValueError(f'states of shape {states.shape} must be [generated, blocks] with values of '
                     'Partition.')
  from matplotlib.colors import ListedColormap
  from matplotlib.patches import Patch

  figure, axes = _figure(width, height)
  axis = axes[0, 0]
  colours = ListedColormap([_COLOURS[p] for p in Partition])
  axis.imshow(states.T, origin='lower', aspect='auto', interpolation='nearest', cmap=colours,
              vmin=-0.5, vmax=len(Partition) - 0.5)
  axis.set_xlabel('block being generated')
  axis.set_ylabel('block in memory')
  axis.set_title(title, loc='left')
  _grid_lines(axis, states.shape)
  shown = [p for p in _NAMES if (states == p).any()]
  axis.legend(handles=[Patch(facecolor=_COLOURS[p], edgecolor='#888888', label=_NAMES[p])
                       for p in shown], loc='upper left', bbox_to_anchor=(1.01, 1), frameon=False)
  return _pixels(figure)


def _grid_lines(axis: Any, shape: tuple[int, ...]) -> None:
  """Thin lines between the cells of small grids; whole-number ticks on all."""
  from matplotlib.ticker import MaxNLocator

  for side, count in ((axis.xaxis, shape[0]), (axis.yaxis, shape[1])):
    side.set_major_locator(MaxNLocator(integer=True))
    if max(shape) <= 40:
      side.set_ticks(np.arange(-0.5, count), minor=True)
  if max(shape) <= 40:
    axis.grid(which='minor', color='white', linewidth=0.8)
    axis.tick_params(which='minor', length=0)


# Colours of curves: distinguishable in print and for colour-blind readers (Okabe and Ito's).
_CURVES = ('#111111', '#d55e00', '#0072b2', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')


def interval_curves(panels: Mapping[str, Mapping[str, np.ndarray]], *, x_label: str,
                    references: Mapping[str, Mapping[str, float]] | None = None,
                    title: str = '') -> np.ndarray:
  """Curves with bands, one panel per quantity.

  Args:
    panels: title of the panel -> name of the curve -> [4, n]: x, value, low, high.
    x_label: below every panel.
    references: title of the panel -> name -> height of a dashed line, such as chance.
    title: shown above.

  Returns:
    uint8 [height, width, 3].

  Raises:
    ValueError: no panels, or a curve that is not [4, n].
  """
  if not panels or any(np.ndim(c) != 2 or len(c) != 4 for p in panels.values()
                       for c in p.values()):
    raise ValueError('wanted at least one panel, and curves [4, n]: x, value, low, high.')
  figure, axes = _figure(1.5 + 4.6 * len(panels), 3.6, 1, len(panels))
  for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
    for number, (label, (x, value, low, high)) in enumerate(curves.items()):
      colour = _CURVES[number % len(_CURVES)]
      axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
      axis.plot(x, value, color=colour, linewidth=1.6, marker='o', markersize=2.5, label=label)
    for label, height in (references or {}).get(name, {}).items():
      axis.axhline(height, color='#777777', linewidth=1, linestyle='--')
      axis.annotate(label, (1, height), xycoords=('axes fraction', 'data'), fontsize=8,
                    color='#777777', ha='right', va='bottom')
    axis.set_xlabel(x_label)
    axis.set_title(name, loc='left')
    axis.grid(alpha=0.3)
  axes[0, -1].legend(loc='upper left', bbox_to_anchor=(1.01, 1), frameon=False)
  if title:
    figure.suptitle(title)
  return _pixels(figure)


def _plain_log_labels(axis: Any) -> None:
  """0.2, 0.5, 1, 2, 5, 10 instead of powers of ten."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

  axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
  axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
  axis.yaxis.set_minor_locator(NullLocator())


def training_curves(records: Sequence[Mapping[str, Any]], names: Sequence[str] = ('loss',), *,
                    kind: str = 'train', log: bool = True, smooth: int = 1, title: str = ''
                    ) -> np.ndarray:
  """Curves of a `metrics.jsonl`, one panel per name.

  Args:
    records: from `pf_jax.train.metrics.read_metrics`.
    names: which metrics.
    kind: 'train' or 'eval'.
    log: logarithmic vertical axis where all values are positive.
    smooth: running mean over this many records, drawn over the raw curve.
    title: shown above.

  Returns:
    uint8 [height, width, 3].

  Raises:
    ValueError: no record has one of the names.
  """
  figure, axes = _figure(1 + 4.2 * len(names), 3.4, 1, len(names))
  for axis, name in zip(axes[0], names, strict=True):
    points = [(r['step'], r[name]) for r in records
              if r.get('kind', kind) == kind and r.get(name) is not None]
    if not points:
      known = sorted({key for r in records for key in r} - {'step', 'kind', 'time'})
      raise ValueError(f'no {kind} record has {name!r}; there are {known}.')
    steps, values = np.array(points, np.float64).T
    smoothed = smooth > 1 and len(values) >= smooth
    axis.plot(steps, values, color='#1b4f8f', linewidth=1, alpha=0.35 if smoothed else 1)
    if smoothed:
      mean = np.convolve(values, np.full(smooth, 1 / smooth), 'valid')
      axis.plot(steps[(smooth - 1) // 2:][:len(mean)], mean, color='#1b4f8f', linewidth=1.6)
    if log and (values > 0).all():
      axis.set_yscale('log')
      _plain_log_labels(axis)
    axis.set_xlabel('step')
    axis.set_title(name, loc='left')
    axis.grid(alpha=0.3)
  if title:
    figure.suptitle(title)
  return _pixels(figure)
