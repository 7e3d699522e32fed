"""Samples videos of any length with a bounded cache.

  python -m launch.sample --config=configs/digits/sample.py --output=runs/seven --seconds=120 \\
    --prompt="a white seven drifts right on a teal background"

A prompt may change on the way: --prompt="a white three ... | 40: a white seven ..." (at block 40).
Ctrl-C, SIGTERM and even SIGKILL leave what is finished playable; the same command with --resume
continues bit for bit.
"""

import sys

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
flags.DEFINE_bool('overwrite', False, 'Replace files of the same names.')
flags.DEFINE_bool('resume', False, 'Continue a run that was cut short.')
flags.DEFINE_bool('save_latents', False, 'Keep latents for launch.decode.')


def _sample() -> int:
  from pf_jax import request as request_lib  # no JAX inside
  from pf_jax.sampling.config import SampleSpec

  args = flags.FLAGS
  if (args.prompt is None) == (args.prompts is None):
    raise ConfigError('give either --prompt="..." or --prompts=FILE.')
  if args.overwrite and args.resume:
    raise ConfigError('--resume continues a run and --overwrite starts again; give one of them.')
  try:
    prompts = ((args.prompt,) if args.prompts is None
               else request_lib.read_prompts(args.prompts))
    request = request_lib.Request(prompts, args.seconds, args.seed)
  except request_lib.RequestError as error:
    raise ConfigError(str(error)) from error
  spec = build(SampleSpec, args.config, 'config')

  from pf_jax import outputs
  from pf_jax.sampling import job
  from pf_jax.sampling.plan import SampleError

  try:
    result = job.run(request, spec, args.output, checkpoint=args.checkpoint,
                     overwrite=args.overwrite, resume=args.resume,
                     save_latents=args.save_latents)
  except (SampleError, outputs.NotWritable, outputs.DirectoryInUse, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('interrupted; finished blocks, if any, play and --resume continues.', file=sys.stderr)
    return 130
  return 0 if result.interrupted is None else 128 + result.interrupted


if __name__ == '__main__':
  config_flags.run(_sample, required=('config', 'output'))
