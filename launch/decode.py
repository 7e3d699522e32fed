"""Decodes saved latents into the very videos that were sampled.

  python -m launch.decode --latents=runs/seven --output=runs/seven-again

The directory comes from launch.sample --save_latents, or from a run that was cut short.
"""

import sys

from absl import flags

from launch import config_flags

flags.DEFINE_string('latents', None, 'Directory of the sampling run.')
flags.DEFINE_string('output', None, 'Directory of the videos.')
flags.DEFINE_string(
    'checkpoint', None, 'The model that sampled them; default: where it was then.')
flags.DEFINE_string('weights', None, 'Released weights that sampled them, likewise.')
flags.DEFINE_string('transformer', None, 'Their transformer, if it was another file.')
flags.DEFINE_string('compressor', None, 'Their compressor, likewise.')
flags.DEFINE_bool('overwrite', False, 'Replace files of the same names.')


def _decode() -> int:
  from pf_jax import outputs
  from pf_jax.sampling import decode
  from pf_jax.sampling.plan import SampleError

  args = flags.FLAGS
  given = {'checkpoint': args.checkpoint, 'directory': args.weights,
           'transformer': args.transformer, 'compressor': args.compressor}
  try:
    videos = decode.decode(args.latents, args.output, overwrite=args.overwrite,
                           moved={name: path for name, path in given.items() if path})
  except (SampleError, outputs.NotWritable, outputs.DirectoryInUse, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('interrupted; what was decoded plays.', file=sys.stderr)
    return 130
  print('\n'.join(map(str, videos)) or 'there are no latents to decode yet.')
  return 0 if videos else 1


if __name__ == '__main__':
  config_flags.run(_decode, required=('latents', 'output'))
