"""Trains one stage: python -m launch.train --config=configs/digits/vae.py --workdir=runs/vae

A killed or interrupted run continues when the same command is given again. --dry_run prints what a
run takes of the memory of one card and of eight, and trains nothing.
"""

import dataclasses
import sys
from typing import Any

from absl import flags

from launch import config_flags
from launch.build import ConfigError, build, nearest

config_flags.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run: checkpoints and metrics.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print the memory plan and stop.')
_CARD = flags.DEFINE_string('card', 'h200', 'With --dry_run: the card (h200, h100).')
_CARDS = flags.DEFINE_list('cards', ['1', '8'], 'With --dry_run: how many of them.')

STAGES = ('vae', 'causal', 'teacher', 'ode', 'dmd')


def _train() -> int:
  from pf_jax.train.config import TrainConfig  # no JAX inside

  config = flags.FLAGS.config
  if flags.FLAGS.workdir is None and not _DRY_RUN.value:
    raise ConfigError('--workdir=... is missing; see --help.')
  if config.stage not in STAGES:
    raise ConfigError(f'config.stage={config.stage!r} is unknown{nearest(config.stage, STAGES)}; '
                      f'use {" or ".join(STAGES)}.')
  train = build(TrainConfig, config.train, 'config.train')
  if _DRY_RUN.value:
    _check_cards()

  from pf_jax import outputs
  from pf_jax.data.latents import StoreError
  from pf_jax.train import checkpoint, stages
  from pf_jax.train.loop import NonFiniteTraining
  from pf_jax.weights.package import PackageError
  from pf_jax.weights.tensors import WeightsError

  kind = stages.STAGES[config.stage]
  fields = {name: config[name] for name in config if name not in ('stage', 'train')}
  stage: Any = build(kind.settings, fields, 'config')
  try:
    if _DRY_RUN.value:
      return _plan(kind, stage, train)
    result = kind.train(stage, train, flags.FLAGS.workdir)
  except (outputs.DirectoryInUse, outputs.NotWritable, checkpoint.CheckpointMismatch,
          checkpoint.CheckpointDamaged, checkpoint.CheckpointNotSaved, NonFiniteTraining,
          PackageError, StoreError, WeightsError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(f'{"stopped" if result.interrupted else "finished"} at step {result.step}.')
  return 0


def _check_cards() -> None:
  """Refuses cards that a memory plan cannot be made for; needs no JAX."""
  from pf_jax.aot.targets import TARGETS

  if _CARD.value not in TARGETS:
    raise ConfigError(f'--card={_CARD.value!r} is unknown{nearest(_CARD.value, TARGETS)}; use '
                      f'{" or ".join(TARGETS)}.')
  if wrong := [count for count in _CARDS.value if not count.isdigit() or not int(count)]:
    raise ConfigError(f'--cards={",".join(wrong)} must be numbers of cards, such as 1,8.')


def _plan(kind: Any, stage: Any, train: Any) -> int:
  """Prints the memory plan for some numbers of cards, with equal work for each card."""
  from pf_jax.aot.targets import TARGETS
  from pf_jax.train import plan

  if kind.sketch is None:
    raise ConfigError(f'the stage of {kind.settings.__name__} has no memory plan.')
  fits = True
  for count in map(int, _CARDS.value):
    parts = max(train.accumulate // count, 1)
    config = dataclasses.replace(train, accumulate=parts)
    made = plan.make_plan(kind.sketch(stage, config), config, TARGETS[_CARD.value], count)
    print('\n'.join(made.lines()) + f'\n  (accumulate={parts})')
    fits = fits and made.peak < made.capacity
    if not made.programs:
      print(f'  What programs take besides needs the compiler of the card: {plan.COMPILER}')
  return 0 if fits else 1


if __name__ == '__main__':
  config_flags.run(_train, required=('config',))
