"""Writes a model in the form that other libraries load.

  python -m launch.export --format=diffusers --checkpoint=DIR --output=DIR

What it writes is described in `pf_jax.weights.export`. The directory holds the whole export or what
was there before, whenever it is looked at.
"""

import sys

from absl import flags

from launch import config_flags
from launch.build import ConfigError, nearest

FORMATS = ('diffusers',)
flags.DEFINE_string('format', 'diffusers', f'One of {", ".join(FORMATS)}.')
flags.DEFINE_string(
    'checkpoint', None, 'A model directory or a training workdir; default: the packaged model.')
flags.DEFINE_string('output', None, 'Directory to write.')
flags.DEFINE_bool('overwrite', False, 'Replace an earlier export.')


def _export() -> int:
  args = flags.FLAGS
  if args.format not in FORMATS:
    raise ConfigError(f'--format={args.format} is unknown{nearest(args.format, FORMATS)}; use '
                      f'{" or ".join(FORMATS)}.')

  from pf_jax import outputs, pipeline
  from pf_jax.weights import export, package
  from pf_jax.weights.tensors import WeightsError

  try:
    export.check_output(args.output, overwrite=args.overwrite)  # before gigabytes are read
    directory = pipeline.find_model(args.checkpoint)
    loaded = package.load_model(directory)
    root = export.export_diffusers(loaded.models, pipeline.find_tokenizer(directory), args.output,
                                   choices=loaded.choices, overwrite=args.overwrite, progress=print)
  except (package.PackageError, WeightsError, outputs.NotWritable, outputs.DirectoryInUse,
          OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt as error:
    # It has something to say if it came when everything was done.
    print(f'interrupted; {str(error) or f"{args.output} is as it was"}.', file=sys.stderr)
    return 130
  print(f'wrote {root}.')
  return 0


if __name__ == '__main__':
  config_flags.run(_export, required=('output',))
