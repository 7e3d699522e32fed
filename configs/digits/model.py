"""The miniature's networks and geometry, shared by every experiment of this folder.

Not an experiment itself: the other files put `get_config()` into their section `model`. Variant
`tiny`: a few thousand parameters, for tests.
"""

from ml_collections import ConfigDict

from configs import arguments


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.models.bundle.ModelSpec`."""
  tiny = arguments.parse(arg, tiny=False)['tiny']
  config = ConfigDict()
  config.video = ConfigDict(dict(
      height=64, width=64, fps=16, frames_per_block=4, latent_channels=8, temporal_stride=4,
      spatial_stride=8, patch=(1, 2, 2)))
  config.vae = ConfigDict(dict(
      base_width=2 if tiny else 8, latent_channels=8,
      width_multipliers=(1, 1, 1, 1) if tiny else (1, 2, 4, 4),
      num_res_blocks=1, temporal_downsample=(False, True, True)))
  config.text = ConfigDict(dict(
      vocab_size=128, width=16 if tiny else 64, num_layers=1 if tiny else 2,
      num_heads=2 if tiny else 4, head_dim=8 if tiny else 16, ffn_width=16 if tiny else 128,
      num_buckets=32, max_distance=128, max_tokens=16))
  config.transformer = ConfigDict(dict(
      width=24 if tiny else 128, ffn_width=32 if tiny else 512, num_heads=2 if tiny else 4,
      num_layers=2 if tiny else 4, in_channels=8, out_channels=8, patch=(1, 2, 2),
      time_width=16 if tiny else 128, text_width=16 if tiny else 64))
  config.compressor = ConfigDict(dict(
      in_channels=8, channels=(4, 4, 6, 8) if tiny else (16, 32, 64, 128),
      width=24 if tiny else 128, temporal_stride=2))
  return config
