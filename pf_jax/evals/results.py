"""A finished study as files, and the one call that makes and writes it.

What is written:
  DIR/table.md       all tables, ready for a README.
  DIR/results.json   everything: rows, per-video values, settings, versions.
  DIR/curves-*.png   headline metrics over blocks, a curve per policy.
"""

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata

import jax
import numpy as np

import pf_jax
from pf_jax import outputs
from pf_jax.evals import evaluator, tables
from pf_jax.evals.config import EvaluateConfig
from pf_jax.evals.study import TRUTH, Json, Study, digest
from pf_jax.pipeline import Pipeline
from pf_jax.progress import Progress
from pf_jax.viz import plots, sheet

_STARTS = {'prompt': 'From the prompt alone',
           'clip': 'After {n} true blocks of a held-out glyph'}


def versions() -> dict[str, str]:
  """What the numbers were made with."""
  names = ('jax', 'jaxlib', 'flax', 'numpy', 'scikit-learn')
  return {'pf_jax': pf_jax.__version__, 'python': platform.python_version(),
          'platform': platform.platform(), 'backend': jax.default_backend(),
          **{name: metadata.version(name) for name in names}}


def write(study: Study) -> None:
  """Writes `results.json`, `table.md` and the curves of a finished study."""
  config, ablation = study.config, study.config.ablation
  runs: dict[str, Json] = {}
  for run in study.runs:
    runs[run.name] = {**(study.done[run.name] or {})}
    start, _, policy = run.name.partition('-')
    if start in ablation.starts and policy != ablation.baseline:
      baseline = study.report(f'{start}-{ablation.baseline}')
      runs[run.name]['difference'] = evaluator.paired(study.report(run.name), baseline).rows()
  directory = study.pipeline.directory
  outputs.write_json(study.root / 'results.json', {
      'config': dataclasses.asdict(config),
      'model': {'directory': str(directory) if directory else None,
                'digest': digest(study.pipeline.models), 'choices': study.pipeline.choices},
      'versions': versions(), 'prompts': [draw.prompt for draw in study.draws],
      'draws': [dataclasses.asdict(draw) for draw in study.draws],
      TRUTH: study.done[TRUTH], 'runs': runs})
  outputs.write_text(study.root / 'table.md', markdown(study))
  for start in ablation.starts:
    sheet.write_png(study.root / f'curves-{start}.png', curves(study, start))


def curves(study: Study, start: str) -> np.ndarray:
  """The headline metrics over blocks, a curve per policy: a picture."""
  ablation, truth = study.config.ablation, study.report(TRUTH)
  rows = {policy: study.report(f'{start}-{policy}').rows() for policy in ablation.names}
  panels, references = {}, {}
  for metric in study.config.headline:
    panels[_title(metric)] = {tables.words(policy): _curve(rows[policy], metric)
                              for policy in ablation.names}
    references[_title(metric)] = {'true clips': float(truth.values[metric][:, -1].mean())}
    if metric in truth.chance:
      references[_title(metric)]['chance'] = truth.chance[metric]
  return plots.interval_curves(panels, x_label='block', references=references,
                               title=_STARTS[start].format(n=ablation.start_blocks))


def _curve(rows: Sequence[tables.Row], metric: str) -> np.ndarray:
  """Block, mean, low and high [4, n] of one metric."""
  return np.array([[row[key] for key in ('block', 'mean', 'low', 'high')]
                   for row in rows if row['metric'] == metric and row['block'] != evaluator.MEAN]).T


def _title(metric: str) -> str:
  return metric.replace('_', ' ').capitalize()


def markdown(study: Study) -> str:
  """All tables of a finished study."""
  config = study.config
  source = study.pipeline.directory
  about = (f'{config.videos} videos a row: prompts of held-out draws, seeds {config.seed}..'
           f'{config.seed + config.videos - 1}, the same for all rows. In brackets: '
           f'{config.confidence:.0%} bootstrap intervals over videos ({config.resamples} '
           'resamples).')
  lines = [f'# Evaluation of {source.name if source else "a model in memory"}', '', about, '']
  for start in config.ablation.starts:
    lines += _ablation(study, start)
  lines += _parts(study)
  lines += ['## Metrics', '', tables.glossary(), '']
  return '\n'.join(lines)


def _ablation(study: Study, start: str) -> list[str]:
  config, ablation = study.config, study.config.ablation
  reports = {policy: study.report(f'{start}-{policy}') for policy in ablation.names}
  rows: dict[str, Mapping] = {tables.words(name): tables.lookup(report)
                              for name, report in reports.items()}
  rows['true clips'] = tables.lookup(study.report(TRUTH))
  # Reconstructions are short: their mean is not one over the same blocks.
  rows['true clips through the VAE'] = {
      key: row for key, row in tables.lookup(study.report(TRUTH, 'reconstructed')).items()
      if key[1] != evaluator.MEAN}
  chance = study.report(TRUTH).chance
  baseline = reports[ablation.baseline]
  differences = {tables.words(name): tables.lookup(evaluator.paired(report, baseline))
                 for name, report in reports.items() if name != ablation.baseline}
  lines = [f'## {_STARTS[start].format(n=ablation.start_blocks)}', '']
  judged = ablation.all_judged
  for metric in config.headline:
    lines += [f'### {_title(metric)}', '', tables.metric_table(
        rows, metric, ablation.judged, chance=chance.get(metric), mean_of=judged), '']
    if differences:
      lines += [f'Difference to {tables.words(ablation.baseline)}, video by video:', '',
                tables.metric_table(differences, metric, ablation.judged, signed=True,
                                    mean_of=judged), '']
  lines += [f'![Curves](curves-{start}.png)', '', '<details><summary>Other metrics</summary>', '']
  for metric in (m for m in evaluator.METRICS if m not in config.headline):
    lines += [f'#### {_title(metric)}', '', tables.metric_table(
        rows, metric, ablation.judged, chance=chance.get(metric), mean_of=judged), '']
  return [*lines, '</details>', '']


def _parts(study: Study) -> list[str]:
  config, asked = study.config, study.config.parts
  truth = study.done[TRUTH]
  assert truth is not None
  measured = tables.parts_table(truth['parts'], resamples=config.resamples,
                                confidence=config.confidence, seed=config.seed)
  lines = ['## Parts', '',
           f'On {config.videos} true, held-out clips of {asked.clip_blocks} blocks:', '', measured,
           '']
  if not asked.blocks:
    return lines
  chance = study.report(TRUTH).chance
  first = f'parts-{asked.branches[0]}'
  follow = {'own prompt': first, 'swapped prompts, judged by the new one': 'parts-swapped'}
  rows: dict[str, Mapping] = {label: tables.lookup(study.report(name))
                              for label, name in follow.items()}
  rows['swapped prompts, judged by the old one'] = tables.lookup(
      study.report('parts-swapped', 'unswapped'))
  lines += ['### Text', '', 'Same noise, prompts swapped between videos:', '',
            tables.text_table(rows, asked.judged[0], chance), '', '### Compressor branches', '']
  branches = {tables.words(name): tables.lookup(study.report(f'parts-{name}'))
              for name in asked.branches}
  for metric in config.headline:
    lines += [f'{_title(metric)}:', '',
              tables.metric_table(branches, metric, asked.judged, chance=chance.get(metric),
                                  first='branches'), '']
  return lines


def run(config: EvaluateConfig, pipeline: Pipeline, output: str | os.PathLike, *,
        overwrite: bool = False, show: bool = True) -> Study:
  """Evaluates a model into a directory, which is locked meanwhile.

  Args:
    config: what to measure.
    pipeline: the model.
    output: directory of the results; finished runs in it are reused.
    overwrite: do runs again that were made with other settings.
    show: progress on standard error.

  Returns:
    The finished study.

  Raises:
    StudyError: settings that do not fit the model or what the directory holds.
    DirectoryInUse, NotWritable: see `outputs.claim_directory`.
  """
  with outputs.claim_directory(output) as root:
    study = Study(config, pipeline, root, overwrite=overwrite)
    progress = Progress(study.blocks_left, unit='block', every_s=20) if show else None
    try:
      study.execute(progress)
    finally:
      if progress:
        progress.close()
    write(study)
    return study
