"""Computes once what a training reads: python -m launch.prepare --config=CONFIG --prompts=FILE

For the stage "dmd": the text rows of a list of prompts, one a line, into the store that
`config.prompts` names, with the text encoder of `config.start`. An interrupted run continues when
the same command is given again.
"""

import sys
from typing import Any

from absl import flags

from launch import config_flags
from launch.build import ConfigError, build

config_flags.define_config()
_PROMPTS = flags.DEFINE_string('prompts', None, 'Text file with a prompt a line.')
_BATCH = flags.DEFINE_integer('batch_size', 16, 'Prompts encoded at once.', lower_bound=1)
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace a store of other prompts.')


def _prepare() -> int:
  config = flags.FLAGS.config
  if config.get('stage') != 'dmd':
    raise ConfigError(f'config.stage={config.get("stage")!r} rolls out no prompts; wanted a config '
                      'of the stage dmd, such as configs/wan/dmd_1_3b.py.')
  if not config.prompts:
    raise ConfigError('config.prompts names no directory for the store; give one with '
                      '--config.prompts=DIR.')

  from pf_jax.data import text_rows
  from pf_jax.data.latents import StoreError
  from pf_jax.request import RequestError, read_prompts
  from pf_jax.train.dmd_stage import DmdStage
  from pf_jax.weights.package import PackageError
  from pf_jax.weights.tensors import WeightsError

  fields = {name: config[name] for name in config if name not in ('stage', 'train')}
  stage: Any = build(DmdStage, fields, 'config')
  try:
    prompts = read_prompts(str(_PROMPTS.value))
    origin = stage.student_origin()
    rows = text_rows.write(origin.prompt_encoder(), prompts, stage.prompts,
                           about=origin.text_digests(), batch_size=_BATCH.value,
                           overwrite=_OVERWRITE.value)
  except (RequestError, StoreError, PackageError, WeightsError, OSError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('interrupted; the same command continues.', file=sys.stderr)
    return 130
  print(f'{stage.prompts}: {len(prompts)} prompts, {rows} text rows each.')
  return 0


if __name__ == '__main__':
  config_flags.run(_prepare, required=('config', 'prompts'))
