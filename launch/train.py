"""Trains one stage: python -m launch.train --config=configs/digits/vae.py --workdir=runs/vae

A killed or interrupted run continues when the same command is given again.
"""

import sys
from typing import Any

from absl import flags

from launch import config_flags
from launch.build import ConfigError, build, nearest

config_flags.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run: checkpoints and metrics.')

STAGES = ('vae', 'causal', 'teacher', 'ode', 'dmd')


def _train() -> int:
  from pf_jax.train.config import TrainConfig  # no JAX inside

  config = flags.FLAGS.config
  if config.stage not in STAGES:
    raise ConfigError(f'config.stage={config.stage!r} is unknown{nearest(config.stage, STAGES)}; '
                      f'use {" or ".join(STAGES)}.')
  train = build(TrainConfig, config.train, 'config.train')

  from pf_jax import outputs
  from pf_jax.train import checkpoint, stages
  from pf_jax.train.loop import NonFiniteTraining

  stage_type, run = stages.STAGES[config.stage]
  fields = {name: config[name] for name in config if name not in ('stage', 'train')}
  stage: Any = build(stage_type, fields, 'config')
  try:
    result = run(stage, train, flags.FLAGS.workdir)
  except (outputs.DirectoryInUse, outputs.NotWritable, checkpoint.CheckpointMismatch,
          checkpoint.CheckpointDamaged, checkpoint.CheckpointNotSaved, NonFiniteTraining,
          OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(f'{"stopped" if result.interrupted else "finished"} at step {result.step}.')
  return 0


if __name__ == '__main__':
  config_flags.run(_train, required=('config', 'workdir'))
