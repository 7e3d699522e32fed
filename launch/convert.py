"""Converts one released network to files of ours; an interrupted conversion goes on.

  python -m launch.convert --source=Wan2.1-T2V-1.3B --model=wan_1_3b --output=weights

Nothing has to be converted to be sampled: launch.sample --weights reads released files as well.
Converted ones are smaller (bfloat16 instead of float32), laid out for loading, and need no name of
a network or tensor to be guessed.
"""

import sys
from typing import Any

from absl import flags

from launch import config_flags
from launch.build import ConfigError, nearest

MODELS = ('wan_1_3b', 'wan_14b', 'umt5', 'vae')
FORMATS = ('safetensors', 'orbax', 'both')
DTYPES = ('bfloat16', 'float32')
flags.DEFINE_string('source', None, 'A checkpoint, a directory of released weights, or hub:owner/'
                    'name@commit.')
flags.DEFINE_string('model', None, f'What it is: {", ".join(MODELS)}.')
flags.DEFINE_string('output', None, 'Directory to write.')
flags.DEFINE_string('entry', None, 'Which entry of a training checkpoint that holds several.')
flags.DEFINE_string('format', 'both', f'What to write: {", ".join(FORMATS)}.')
flags.DEFINE_string('dtype', 'bfloat16', f'Precision of parameters: {" or ".join(DTYPES)}.')
flags.DEFINE_bool('overwrite', False, 'Replace a finished conversion.')


def _spec(model: str, dtype: str) -> Any:
  from pf_jax.models.text import TextSpec
  from pf_jax.models.transformer import TransformerSpec
  from pf_jax.models.vae import VaeSpec
  from pf_jax.types import DTypes

  presets = dict(zip(MODELS, (TransformerSpec.wan_1_3b, TransformerSpec.wan_14b,
                              TextSpec.umt5_xxl, VaeSpec.wan21), strict=True))
  return presets[model](dtypes=DTypes(dtype, dtype, dtype))


def _convert() -> int:
  args = flags.FLAGS
  for name, known in (('model', MODELS), ('format', FORMATS), ('dtype', DTYPES)):
    if (given := getattr(args, name)) not in known:
      raise ConfigError(f'--{name}={given} is unknown{nearest(given, known)}; use one of '
                        f'{", ".join(known)}.')

  from pf_jax import outputs
  from pf_jax.progress import Progress
  from pf_jax.weights import convert, hub, networks, sources
  from pf_jax.weights.tensors import WeightsError

  spec = _spec(args.model, args.dtype)
  progress = Progress(convert.pieces_of(spec), unit='tensor', every_s=10)
  try:
    source = hub.local(args.source, wanted=sources.patterns(networks.kind_of(spec)))
    written = convert.convert(source, spec, args.output, entry=args.entry,
                              form=args.format, overwrite=args.overwrite,
                              progress=progress.update, say=progress.say)
  except (WeightsError, outputs.NotWritable, outputs.DirectoryInUse, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('interrupted; the same command continues.', file=sys.stderr)
    return 130
  finally:
    progress.close()
  for path in written:
    print(f'wrote {path}.')
  return 0


if __name__ == '__main__':
  config_flags.run(_convert, required=('source', 'model', 'output'))
