"""Samples one short clip with the bidirectional base model, the quality baseline.

  python -m launch.sample_clip --config=configs/wan/baseline_1_3b.py --weights=Wan2.1-T2V-1.3B \\
    --prompt="..." --output=runs/baseline

The whole clip is denoised at once; for anything longer than 5 s use launch.sample.
"""

import sys

from absl import flags

from launch import config_flags
from launch.build import ConfigError, build

config_flags.define_config()
flags.DEFINE_string('prompt', None, 'What the clip shows.')
flags.DEFINE_string('negative_prompt', '', 'What it should not be like.')
flags.DEFINE_integer('seed', 0, 'Of its noise.')
flags.DEFINE_string('weights', None, 'A directory of released or converted weights.')
flags.DEFINE_string('output', None, 'Directory of all files.')
flags.DEFINE_bool('overwrite', False, 'Replace files of the same names.')


def _sample() -> int:
  from pf_jax import request  # no JAX inside

  args = flags.FLAGS
  try:
    request.check_seed(args.seed)
    if len(request.parse_prompt(args.prompt).texts) > 1:
      raise ConfigError('a clip has one prompt; prompt switches are for launch.sample.')
  except request.RequestError as error:
    raise ConfigError(str(error)) from error

  from pf_jax import outputs
  from pf_jax.models.bundle import ModelSpec
  from pf_jax.released import ReleasedWeights
  from pf_jax.sampling import clip

  model = build(ModelSpec, args.config.model, 'config.model')
  spec = build(clip.ClipSpec, {name: args.config[name] for name in args.config if name != 'model'},
               'config')
  try:
    path = clip.run(ReleasedWeights(args.weights, model), args.prompt, args.seed, spec,
                    args.output, negative_prompt=args.negative_prompt, overwrite=args.overwrite)
  except (ValueError, outputs.NotWritable, outputs.DirectoryInUse, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('interrupted; nothing was kept.', file=sys.stderr)
    return 130
  print(f'wrote {path}.')
  return 0


if __name__ == '__main__':
  config_flags.run(_sample, required=('config', 'prompt', 'weights', 'output'))
