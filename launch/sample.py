"""Samples videos of any length with a bounded cache.

  python -m launch.sample --config=configs/digits/sample.py --output=runs/seven --seconds=120 \\
    --prompt="a white seven drifts right on a teal background"

A prompt may change on the way: --prompt="a white three ... | 40: a white seven ..." (at block 40).
Ctrl-C, SIGTERM and even SIGKILL leave what is finished playable; the same command with --resume
continues bit for bit. --dry_run says what memory a run takes and makes nothing.
--profile=DIR traces a few blocks.

Released weights (Wan2.1, Self-Forcing) are sampled with the configs of configs/wan:

  python -m launch.sample --config=configs/wan/t2v_1_3b.py:frames=3 --weights=Wan2.1-T2V-1.3B \\
    --transformer=self_forcing_dmd.pt --prompt="..." --seconds=120 --output=runs/wan
"""

import pathlib
import sys
from typing import Any

from absl import flags

from launch import config_flags
from launch.build import ConfigError, build

config_flags.define_config()
flags.DEFINE_string('prompt', None, 'What the video shows; "text | BLOCK: text".')
flags.DEFINE_string('prompts', None, 'A UTF-8 file with one prompt a line.')
flags.DEFINE_float('seconds', 120.0, 'Length; rounded up to whole blocks.')
flags.DEFINE_integer('seed', 0, 'Of the first video; the next ones count up from it.')
flags.DEFINE_string('output', None, 'Directory of all files.')
flags.DEFINE_string(
    'checkpoint', None, 'A model directory or a training workdir; default: the packaged model.')
flags.DEFINE_string('weights', None, 'A directory of released or converted weights.')
flags.DEFINE_string('transformer', None, 'Another transformer checkpoint, beside --weights.')
flags.DEFINE_string('entry', None, 'Which entry of --transformer, if it holds several.')
flags.DEFINE_string('compressor', None, 'A trained compressor, beside --weights.')
flags.DEFINE_string('init_image', None, 'A picture that the video begins with.')
flags.DEFINE_string('init_video', None, 'A video that is continued.')
flags.DEFINE_float('init_start', 0.0, 'Where in --init_video the used piece starts, seconds.')
flags.DEFINE_float('init_seconds', 5.0, 'Longest piece of --init_video that is used.')
flags.DEFINE_bool('overwrite', False, 'Replace files of the same names.')
flags.DEFINE_bool('resume', False, 'Continue a run that was cut short.')
flags.DEFINE_bool('save_latents', False, 'Keep latents for launch.decode.')
flags.DEFINE_string('profile', None, 'New directory for a trace of some blocks, for XProf or '
                    'Perfetto.')
flags.DEFINE_integer('profile_first', 2, 'With --profile: the first block to trace.')
flags.DEFINE_integer('profile_blocks', 3, 'With --profile: how many blocks to trace.')
flags.DEFINE_bool('dry_run', False, 'Print the memory plan and stop.')
flags.DEFINE_string('target', None, 'With --dry_run: compile a block for this card (h200, h100).')
flags.DEFINE_float('memory_gb', None, 'With --dry_run: memory to fit into; default: this device.')

_BESIDE_WEIGHTS = ('transformer', 'entry', 'compressor')


def _check_flags(args: Any) -> None:
  if (args.prompt is None) == (args.prompts is None):
    raise ConfigError('give either --prompt="..." or --prompts=FILE.')
  if not args.output and not args.dry_run:
    raise ConfigError('--output=... is missing; see --help.')
  if args.overwrite and args.resume:
    raise ConfigError('--resume continues a run and --overwrite starts again; give one of them.')
  for name in ('init_start', 'init_seconds'):
    if flags.FLAGS[name].present and args.init_video is None:
      raise ConfigError(f'--{name} chooses a piece of --init_video, which is missing.')
  if args.init_image is not None and args.init_video is not None:
    raise ConfigError('a video begins with --init_image or with --init_video; give one of them.')
  if not args.dry_run and (args.target is not None or args.memory_gb is not None):
    raise ConfigError('--target and --memory_gb belong to --dry_run.')
  if args.memory_gb is not None and not 0 < args.memory_gb < 1e6:
    raise ConfigError(f'--memory_gb={args.memory_gb} must be a positive number of gigabytes.')
  has_model = 'model' in args.config
  if args.checkpoint is not None and (args.weights is not None or has_model):
    raise ConfigError('--checkpoint brings its own sizes; leave out --weights, and use a config '
                      'without a section model, such as configs/digits/sample.py.')
  if has_model and args.weights is None and not args.dry_run:
    raise ConfigError('this config has a section model, the sizes of released weights; say where '
                      'they are with --weights=DIR.')
  if args.weights is not None and not has_model:
    raise ConfigError('--weights needs a config that says the sizes in a section model, such as '
                      'configs/wan/t2v_1_3b.py.')
  for name in _BESIDE_WEIGHTS:
    if getattr(args, name) is not None and args.weights is None:
      raise ConfigError(f'--{name} goes beside --weights=DIR.')


def _sample() -> int:
  from pf_jax import request as request_lib  # no JAX inside
  from pf_jax.sampling.config import SampleSpec

  args = flags.FLAGS
  _check_flags(args)
  trace = _trace(args)
  try:
    prompts = ((args.prompt,) if args.prompts is None
               else request_lib.read_prompts(args.prompts))
    request = request_lib.Request(prompts, args.seconds, args.seed)
  except request_lib.RequestError as error:
    raise ConfigError(str(error)) from error
  spec = build(SampleSpec, {name: args.config[name] for name in args.config if name != 'model'},
               'config')
  return _run(request, spec, trace, args)


def _trace(args: Any) -> Any:
  """`TraceSpec`, or None."""
  from pf_jax.sampling.config import TraceSpec  # no JAX inside

  for name in ('profile_first', 'profile_blocks'):
    if flags.FLAGS[name].present and args.profile is None:
      raise ConfigError(f'--{name} chooses what --profile traces, which is missing.')
  if args.profile is None:
    return None
  if args.dry_run:
    raise ConfigError('--profile traces a run and --dry_run makes none; give one of them.')
  try:
    return TraceSpec(args.profile, args.profile_first, args.profile_blocks)
  except ValueError as error:
    raise ConfigError(f'--profile_first, --profile_blocks: {error}') from error


def _beginning(args: Any) -> Any:
  from pf_jax.sampling.beginning import Beginning

  if args.init_image is not None:
    return Beginning(args.init_image, 'image')
  if args.init_video is None:
    return None
  try:
    return Beginning(args.init_video, 'video', args.init_start, args.init_seconds)
  except ValueError as error:
    raise ConfigError(f'--init_video: {error}') from error


def _run(request: Any, spec: Any, trace: Any, args: Any) -> int:
  import jax

  from pf_jax import outputs
  from pf_jax.models.bundle import ModelSpec
  from pf_jax.released import ReleasedWeights
  from pf_jax.sampling import budget, dry_run, job
  from pf_jax.sampling.plan import SampleError
  from pf_jax.sampling.source import ModelSource

  model = build(ModelSpec, args.config.model, 'config.model') if 'model' in args.config else None
  weights = None
  if args.weights is not None and model is not None:
    weights = ReleasedWeights(args.weights, model, args.transformer, args.entry, args.compressor)
  source, beginning = ModelSource(args.checkpoint, weights, model), _beginning(args)
  try:
    if args.dry_run:
      dry_run.dry_run(request, spec, source, output=pathlib.Path(args.output or '.'),
                      beginning=beginning, target=args.target,
                      memory=int(args.memory_gb * 1e9) if args.memory_gb else None)
      return 0
    result = job.run(request, spec, args.output, source=source, beginning=beginning,
                     overwrite=args.overwrite, resume=args.resume, save_latents=args.save_latents,
                     trace=trace)
  except (SampleError, budget.DoesNotFit, outputs.NotWritable, outputs.DirectoryInUse,
          OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except jax.errors.JaxRuntimeError as error:  # mostly memory that runs out while it runs
    print(f'error: {str(error).splitlines()[0]}; see --dry_run --target for what it takes.',
          file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('interrupted; finished blocks, if any, play and --resume continues.', file=sys.stderr)
    return 130
  return 0 if result.interrupted is None else 128 + result.interrupted


if __name__ == '__main__':
  config_flags.run(_sample, required=('config',))
