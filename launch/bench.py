"""Measures what the parts of a rollout cost on this machine, and what the machine could do.

  python -m launch.bench --output=runs/bench
  python -m launch.bench --output=runs/bench --config=configs/wan/t2v_1_3b.py --suite=attention,vae

Suites: attention, context, conv3d, vae, block, rollout. Sizes are the config's; weights are those
of the packaged model, or random ones of released sizes. The suite rollout samples --late_block
blocks to compare a late one with an early one; the rest takes a minute or two. Writes bench.json
(every timing) and bench.md (tables), which is printed too.

With --tune on a card of NVIDIA's, the tiles of our own kernels are timed first; the fastest go into
the table that later programs read (`pf_jax.kernels.tuning`: PF_JAX_TUNING, or the user's cache).
"""

import os
import sys
from typing import Any

from absl import flags

from launch import config_flags
from launch.build import ConfigError, build

CONFIG = 'configs/digits/sample.py'
config_flags.define_config()
flags.DEFINE_string('suite', 'all', 'Comma list of attention, context, conv3d, vae, block and '
                    'rollout.')
flags.DEFINE_string('output', None, 'Directory of bench.json and bench.md.')
flags.DEFINE_string('profile', None, 'New directory for a trace of one turn of each suite, for '
                    'XProf or Perfetto.')
flags.DEFINE_boolean('tune', False, 'First time the tiles of our own kernels in these suites '
                     'and keep the fastest for later programs; on a card.')
flags.DEFINE_float('seconds', 1.0, 'To measure each call of a case, roughly.')
flags.DEFINE_integer('early_block', 20, 'Where the early window of the suite rollout begins.')
flags.DEFINE_integer('late_block', 1100, 'Where its late window begins.')
flags.DEFINE_integer('window', 100, 'Blocks in each window.')


def _settings(args: Any) -> tuple[tuple[str, ...], Any]:
  from pf_jax.bench import config  # no JAX inside

  try:
    return config.parse_suites(args.suite), config.Effort(
        seconds=args.seconds, early_block=args.early_block, late_block=args.late_block,
        window=args.window)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def _location() -> str:
  """The config file with its variant, as it was given."""
  given = [value for value in sys.argv if value.lstrip('-').startswith(f'{config_flags.NAME}=')]
  return given[-1].split('=', 1)[1]


def _bench() -> int:
  from pf_jax.sampling.config import SampleSpec  # no JAX inside

  args = flags.FLAGS
  suites, effort = _settings(args)
  spec = build(SampleSpec, {name: args.config[name] for name in args.config if name != 'model'},
               'config')

  if args.tune:  # the assembler says which tiles spill, see `pf_jax.aot.ptxas`
    os.environ['MOSAIC_GPU_DUMP_PTXAS'] = '1'
  import jax

  from pf_jax import outputs
  from pf_jax.bench import report, run, subject
  from pf_jax.models.bundle import ModelSpec

  model = build(ModelSpec, args.config.model, 'config.model') if 'model' in args.config else None
  try:
    measured = subject.load(model, spec.chosen('cache'), spec.chosen('sampler'))
    record = run.run(measured, suites, effort, args.output, config=_location(),
                     profile=args.profile, tune=args.tune)
  except (ValueError, outputs.DirectoryInUse, outputs.NotWritable, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except jax.errors.JaxRuntimeError as error:  # mostly memory that runs out
    print(f'error: {str(error).splitlines()[0]}; suites that were finished are in bench.json.',
          file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('\ninterrupted; suites that were finished are in bench.json.', file=sys.stderr)
    return 130
  print(report.markdown(record))
  return 0


if __name__ == '__main__':
  if not any(value.lstrip('-').split('=')[0] == config_flags.NAME for value in sys.argv[1:]):
    sys.argv.append(f'--{config_flags.NAME}={CONFIG}')
  config_flags.run(_bench, required=('output',))
