"""Computes once what a training reads: python -m launch.prepare --config=CONFIG --videos=DIR

Stages "causal" and "teacher", --videos=DIR: clips of a directory of videos with captions
(street.mp4, its caption in street.txt beside it), encoded by the VAE of `config.vae` into the store
that `config.dataset` names. Their size and rate are the model's, their length is
`config.clip_blocks`. Files that cannot be used are named, with the reason, and again in the store's
skipped.json.

Stage "dmd", --prompts=FILE: the text rows of a list of prompts, one a line, into the store that
`config.prompts` names, with the text encoder of `config.start`.

An interrupted run continues when the same command is given again.
"""

import sys
from typing import Any

from absl import flags

from launch import config_flags
from launch.build import ConfigError, build

config_flags.define_config()
_PROMPTS = flags.DEFINE_string('prompts', None, 'Text file with a prompt a line.')
_BATCH = flags.DEFINE_integer('batch_size', 16, 'With --prompts: encoded at once.', lower_bound=1)
_VIDEOS = flags.DEFINE_string('videos', None, 'Directory of videos with captions.')
_CLIPS = flags.DEFINE_integer('clips_per_video', 1, 'With --videos: most clips of one of them.',
                              lower_bound=1)
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace a store of other content.')

# What a stage is prepared from: the flag, the field that names the store, the flag's own option.
_FROM_PROMPTS = ('prompts', 'prompts', 'batch_size')
_FROM_VIDEOS = ('videos', 'dataset', 'clips_per_video')
_SOURCES = {'dmd': _FROM_PROMPTS, 'causal': _FROM_VIDEOS, 'teacher': _FROM_VIDEOS}


def _check(config: Any) -> None:
  """Refuses flags that do not belong to the stage, before anything is imported."""
  name = config.get('stage')
  if name not in _SOURCES:
    raise ConfigError(f'config.stage={name!r} reads nothing that is prepared; wanted a config of '
                      'the stage causal or teacher (--videos=DIR) or dmd (--prompts=FILE).')
  flag, field, option = _SOURCES[name]
  other, _, foreign = _FROM_VIDEOS if flag == 'prompts' else _FROM_PROMPTS
  for wrong in (other, foreign):
    if flags.FLAGS[wrong].present:
      raise ConfigError(f'--{wrong} is not for config.stage={name!r}, which is prepared from '
                        f'--{flag}=... (and --{option}); leave it out.')
  if not flags.FLAGS[flag].value:
    raise ConfigError(f'--{flag}=... is missing; see --help.')
  if not config[field]:
    raise ConfigError(f'config.{field} names no directory for the store; give one with '
                      f'--config.{field}=DIR.')


def _prepare() -> int:
  config = flags.FLAGS.config
  _check(config)

  from pf_jax.data.latents import StoreError
  from pf_jax.request import RequestError
  from pf_jax.train import stages
  from pf_jax.weights.package import PackageError
  from pf_jax.weights.tensors import WeightsError

  fields = {name: config[name] for name in config if name not in ('stage', 'train')}
  stage: Any = build(stages.STAGES[config.stage].settings, fields, 'config')
  try:
    (_prompts if config.stage == 'dmd' else _videos)(stage)
  except (RequestError, StoreError, PackageError, WeightsError, OSError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('interrupted; the same command continues.', file=sys.stderr)
    return 130
  return 0


def _prompts(stage: Any) -> None:
  """Writes the store of text rows."""
  from pf_jax.data import text_rows
  from pf_jax.request import read_prompts

  prompts = read_prompts(str(_PROMPTS.value))
  origin = stage.student_origin()
  rows = text_rows.write(origin.prompt_encoder(), prompts, stage.prompts,
                         about=origin.text_digests(), batch_size=_BATCH.value,
                         overwrite=_OVERWRITE.value)
  print(f'{stage.prompts}: {len(prompts)} prompts, {rows} text rows each.')


def _videos(stage: Any) -> None:
  """Writes the store of clips."""
  from pf_jax.train import clips

  store = clips.encode_videos(stage, str(_VIDEOS.value), clips_per_video=_CLIPS.value,
                              overwrite=_OVERWRITE.value)
  print(f'{stage.dataset}: {len(store)} clips of {stage.frames} frames; files that are not used '
        f'are in {store.path / clips.SKIPPED_FILE}.')


if __name__ == '__main__':
  config_flags.run(_prepare, required=('config',))
