"""Results as markdown, ready for a README."""

from collections.abc import Mapping, Sequence
from typing import Any

from pf_jax.evals import metrics
from pf_jax.evals.evaluator import MEAN, METRICS, Report

Row = Mapping[str, Any]
Rows = Mapping[tuple[str, int | str | None], Row]

_WORDS = {
    'pack': 'pack', 'pack_fifo': 'pack, newest instead of top-k', 'no_sink': 'no sink',
    'no_mid': 'no mid', 'no_realignment': 'no re-alignment', 'both': 'HR + LR', 'hr': 'HR only',
    'lr': 'LR only', 'none': 'neither'}


def words(name: str) -> str:
  """A policy's or branch's name as it reads in a table."""
  return _WORDS.get(name, name.replace('_', ' '))


def lookup(report: Report) -> Rows:
  """A report's rows by (metric, block)."""
  return {(row['metric'], row['block']): row for row in report.rows()}


def cell(row: Row | None, *, signed: bool = False) -> str:
  """mean [low, high], or '-' where nothing was measured."""
  if row is None or row['mean'] != row['mean']:
    return '-'
  sign = '+' if signed else ''
  return f'{row["mean"]:{sign}.3f} [{row["low"]:{sign}.3f}, {row["high"]:{sign}.3f}]'


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """A markdown table; cells are text."""
  return '\n'.join(['| ' + ' | '.join(header) + ' |', '|---' * len(header) + '|',
                    *('| ' + ' | '.join(line) + ' |' for line in lines)])


def metric_table(reports: Mapping[str, Rows], metric: str, blocks: Sequence[int], *,
                 chance: float | None = None, signed: bool = False, first: str = 'policy',
                 mean_of: Sequence[int] = ()) -> str:
  """One metric: a row per report and a column per block; blocks it did not judge show '-'.

  Args:
    reports: rows by the name of the table's row.
    metric: of `METRICS`.
    blocks: columns.
    chance: gets a row of its own.
    signed: write a plus.
    first: heading of the first column.
    mean_of: the judged blocks, for a last column with each video's mean over them; for reports
      that judged just these.
  """
  columns: list[int | str] = [*blocks, *[MEAN] * bool(mean_of)]
  lines = [[name, *(cell(rows.get((metric, block)), signed=signed) for block in columns)]
           for name, rows in reports.items()]
  if chance is not None:
    lines.append(['chance', *[f'{chance:.3f}'] * len(columns)])
  headings = [f'block {block}' for block in blocks]
  headings += [f'mean of {len(mean_of)} blocks'] if mean_of else []
  return table([first, *headings], lines)


def parts_table(values: Mapping[str, Any], *, resamples: int, confidence: float, seed: int) -> str:
  """PSNR and branch norms: mean over clips with interval; `values` as in `parts.PartsReport`."""
  names = {'psnr': ('VAE, PSNR at full resolution', ' dB'),
           'psnr_low_resolution': ('VAE, PSNR at the LR branch\'s resolution', ' dB'),
           'hr_to_lr': ('compressor, norm of HR over LR tokens', ''),
           'cosine': ('compressor, cosine between HR and LR tokens', '')}
  lines = []
  for name, (label, unit) in names.items():
    mean, low, high = metrics.bootstrap(values[name], resamples=resamples, confidence=confidence,
                                        seed=seed)
    lines.append([label, f'{mean:.2f}{unit} [{low:.2f}, {high:.2f}]'])
  return table(['part', 'measured'], lines)


def text_table(reports: Mapping[str, Rows], block: int, chance: Mapping[str, float]) -> str:
  """Class and background at one block and the first block's direction, a row per report."""
  columns = (('class_accuracy', block), ('colour_accuracy', block), ('direction_accuracy', None))
  lines = [[name, *(cell(rows.get(key)) for key in columns)] for name, rows in reports.items()]
  lines.append(['chance', *(f'{chance[metric]:.3f}' for metric, _ in columns)])
  return table(['videos', f'class, block {block}', f'background, block {block}',
                'direction, block 1'], lines)


def glossary() -> str:
  """What the metrics mean, as a list."""
  return '\n'.join(f'- `{name}`: {meaning}' for name, meaning in METRICS.items())
