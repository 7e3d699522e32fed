"""Measures a model: cache policies over long videos, and what each of its parts does.

  python -m launch.evaluate --config=configs/digits/evaluate.py --output=DIR [--checkpoint=DIR]

Writes table.md, results.json, curves and contact sheets. Finished runs are kept: the same command
goes on where an interrupted one stopped.
"""

import sys

from absl import flags

from launch import config_flags
from launch.build import build

config_flags.define_config()
_OUTPUT = flags.DEFINE_string('output', None, 'Directory of the results.')
_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'Model directory or workdir of a training; default: the packaged model.')
_OVERWRITE = flags.DEFINE_bool(
    'overwrite', False, 'Do runs again that the directory holds with other settings.')

INTERRUPTED = 130


def _evaluate() -> int:
  from pf_jax.evals.config import EvaluateConfig  # no JAX inside

  config = build(EvaluateConfig, flags.FLAGS.config, 'config')

  from pf_jax import outputs, pipeline
  from pf_jax.evals import results, study

  try:
    model = pipeline.load(flags.FLAGS.checkpoint)
  except (ValueError, OSError) as error:  # whatever is wrong with the files
    print(f'error: {error}', file=sys.stderr)
    return 1
  try:
    results.run(config, model, flags.FLAGS.output, overwrite=flags.FLAGS.overwrite)
  except (outputs.DirectoryInUse, outputs.NotWritable, study.StudyError, ImportError,
          OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('\ninterrupted: finished runs are kept; the same command goes on.', file=sys.stderr)
    return INTERRUPTED
  print(f'{flags.FLAGS.output}/table.md')
  return 0


if __name__ == '__main__':
  config_flags.run(_evaluate, required=('config', 'output'))
