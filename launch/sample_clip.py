"""Samples one short clip with the bidirectional base model, the quality baseline.

  python -m launch.sample_clip --config=configs/wan/baseline_1_3b.py --weights=Wan2.1-T2V-1.3B \\
    --prompt="..." --output=runs/baseline

The whole clip is denoised at once; for anything longer than 5 s use launch.sample. Ctrl-C and
SIGTERM leave nothing behind. --dry_run says what memory a clip takes and makes nothing.
"""

import signal
import sys
from typing import Any

from absl import flags

from launch import config_flags
from launch.build import ConfigError, build

config_flags.define_config()
flags.DEFINE_string('prompt', None, 'What the clip shows.')
flags.DEFINE_string('negative_prompt', '', 'What it should not be like.')
flags.DEFINE_integer('seed', 0, 'Of its noise.')
flags.DEFINE_string('output', None, 'Directory of all files.')
flags.DEFINE_string('weights', None, 'A directory of released or converted weights.')
flags.DEFINE_string('transformer', None, 'Another transformer checkpoint, beside --weights.')
flags.DEFINE_string('entry', None, 'Which entry of --transformer, if it holds several.')
flags.DEFINE_bool('overwrite', False, 'Replace files of the same names.')
flags.DEFINE_bool('dry_run', False, 'Print the memory plan and stop.')
flags.DEFINE_float('memory_gb', None, 'With --dry_run: memory to fit into; default: this device.')


def _check_flags(args: Any) -> None:
  from pf_jax import request  # no JAX inside

  try:
    request.check_seed(args.seed)
    if len(request.parse_prompt(args.prompt).texts) > 1:
      raise ConfigError('a clip has one prompt; prompt switches are for launch.sample.')
  except request.RequestError as error:
    raise ConfigError(str(error)) from error
  if not args.output and not args.dry_run:
    raise ConfigError('--output=... is missing; see --help.')
  if args.memory_gb is not None and not args.dry_run:
    raise ConfigError('--memory_gb belongs to --dry_run.')
  if args.memory_gb is not None and not 0 < args.memory_gb < 1e6:
    raise ConfigError(f'--memory_gb={args.memory_gb} must be a positive number of gigabytes.')
  if 'model' not in args.config:
    raise ConfigError('a clip needs a config that says the sizes in a section model, such as '
                      'configs/wan/baseline_1_3b.py.')
  if args.weights is None and not args.dry_run:
    raise ConfigError('this config has a section model, the sizes of released weights; say where '
                      'they are with --weights=DIR.')
  for name in ('transformer', 'entry'):
    if getattr(args, name) is not None and args.weights is None:
      raise ConfigError(f'--{name} goes beside --weights=DIR.')


def _sample_clip() -> int:
  args = flags.FLAGS
  _check_flags(args)
  signal.signal(signal.SIGTERM, _terminate)
  try:
    return _run(args)
  except KeyboardInterrupt as interrupt:
    print('interrupted; nothing was kept.', file=sys.stderr)
    return 128 + next(iter(interrupt.args), signal.SIGINT)


def _terminate(number: int, frame: Any) -> None:
  """Ends the run as Ctrl-C does, cleaning up on the way; a second signal ends it at once."""
  del frame
  signal.signal(number, signal.SIG_DFL)
  raise KeyboardInterrupt(number)


def _run(args: Any) -> int:
  import jax

  from pf_jax import outputs
  from pf_jax.models.bundle import ModelSpec
  from pf_jax.released import ReleasedWeights
  from pf_jax.sampling import budget, clip
  from pf_jax.sampling.plan import SampleError

  model = build(ModelSpec, args.config.model, 'config.model')
  spec = build(clip.ClipSpec, {name: args.config[name] for name in args.config if name != 'model'},
               'config')
  weights = None
  if args.weights is not None:
    weights = ReleasedWeights(args.weights, model, args.transformer, args.entry)
  try:
    if args.dry_run or weights is None:
      clip.dry_run(model, spec, weights=weights,
                   memory=int(args.memory_gb * 1e9) if args.memory_gb else None)
    else:
      clip.run(weights, args.prompt, args.seed, spec, args.output,
               negative_prompt=args.negative_prompt, overwrite=args.overwrite)
  except (SampleError, budget.DoesNotFit, outputs.NotWritable, outputs.DirectoryInUse,
          OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except jax.errors.JaxRuntimeError as error:  # mostly memory that runs out while it runs
    print(f'error: {str(error).splitlines()[0]}; see --dry_run for what it takes.',
          file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  config_flags.run(_sample_clip, required=('config', 'prompt'))
