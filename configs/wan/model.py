"""Wan2.1-T2V's networks at full size, shared by every experiment of this folder.

Not an experiment itself: the other files put `get_config()` into their section `model`. Sizes are
those of the released checkpoints (`TransformerSpec.wan_1_3b` and the like say the same; a test
compares them); geometry and block length are yours to change.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import arguments

_TRANSFORMERS = {
    '1_3b': dict(width=1536, ffn_width=8960, num_heads=12, num_layers=30),
    '14b': dict(width=5120, ffn_width=13824, num_heads=40, num_layers=40)}
_HALF = dict(params='bfloat16', compute='bfloat16', cache='bfloat16')
# Every path at a thousandth of the size, for tests.
_TINY = dict(
    video=dict(height=32, width=48),
    vae=dict(base_width=4, width_multipliers=(1, 1, 1, 1), num_res_blocks=1),
    text=dict(vocab_size=128, width=12, num_layers=1, num_heads=2, head_dim=4, ffn_width=16,
              max_tokens=6),
    transformer=dict(width=24, ffn_width=32, num_heads=2, num_layers=2, time_width=16,
                     text_width=12),
    compressor=dict(channels=(4, 6, 8), width=24))


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.models.bundle.ModelSpec`.

  Args:
    arg: 'size=1_3b' or 'size=14b'; 'frames=3' for blocks of three latent frames, the length that
      the public Self-Forcing checkpoints were trained with; 'tiny' for tests.
  """
  given = arguments.parse(arg, size='1_3b', frames=4, tiny=False)
  sizes, frames = _TRANSFORMERS[given['size']], given['frames']
  config = ConfigDict()
  config.video = ConfigDict(dict(
      height=480, width=832, fps=16, frames_per_block=frames, latent_channels=16,
      temporal_stride=4, spatial_stride=8, patch=(1, 2, 2)))
  config.vae = ConfigDict(dict(
      base_width=96, latent_channels=16, width_multipliers=(1, 2, 4, 4), num_res_blocks=2,
      temporal_downsample=(False, True, True),
      latent_mean=(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                   0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
      latent_std=(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                  3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
      convolution=placeholder(str), dtypes=dict(_HALF)))
  config.text = ConfigDict(dict(
      vocab_size=256384, width=4096, num_layers=24, num_heads=64, head_dim=64, ffn_width=10240,
      num_buckets=32, max_distance=128, max_tokens=512, dtypes=dict(_HALF)))
  config.transformer = ConfigDict(dict(
      **sizes, in_channels=16, out_channels=16, patch=(1, 2, 2), time_width=256, text_width=4096,
      remat=False, attention=placeholder(str),
      rotation=placeholder(str), dtypes=dict(_HALF)))
  config.compressor = ConfigDict(dict(
      in_channels=16, channels=(32, 128, 512, 2048), width=sizes['width'],
      # An odd number of latent frames cannot be halved.
      temporal_stride=1 if frames % 2 else 2, convolution=placeholder(str)))
  if given['tiny']:
    for name, small in _TINY.items():
      config[name].update(small)
  return config
