"""Sampling with the miniature: 16 fps, 64x64, blocks of one second, a cache that never grows.

Purpose: a two-minute video (120 blocks, 1,917 frames) from one prompt, with the PackForcing cache.
Everything that is None is the model's own choice; see `CacheSpec` and `SamplerSpec` for what the
fields mean. Variant `tiny`: a small cache and two steps, for tests with a tiny model.

Command:
  python -m launch.sample --config=configs/digits/sample.py --seconds=120 --output=runs/seven \\
    --prompt="a white seven drifts right on a teal background"
"""

from ml_collections import ConfigDict, config_dict

from configs import arguments


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.sampling.config.SampleSpec`."""
  tiny = arguments.parse(arg, tiny=False)['tiny']
  config = ConfigDict()
  config.batch_size = 4
  config.quality = 18
  config.sheet_columns = 8
  config.cache = ConfigDict(dict(
      sink_blocks=config_dict.placeholder(int), recent_blocks=config_dict.placeholder(int),
      top_k=config_dict.placeholder(int), mid_capacity=config_dict.placeholder(int),
      selection=config_dict.placeholder(str), score_keys=config_dict.placeholder(str),
      score_heads=config_dict.placeholder(int), score_query_stride=config_dict.placeholder(int),
      positions=config_dict.placeholder(str), mid_position_stride=config_dict.placeholder(int),
      storage=config_dict.placeholder(str)))
  config.sampler = ConfigDict(dict(
      solver=config_dict.placeholder(str), steps=config_dict.placeholder(tuple),
      shift=config_dict.placeholder(float)))
  if tiny:
    config.cache.update(dict(sink_blocks=1, recent_blocks=1, top_k=1, mid_capacity=2))
    config.sampler.steps = (1000.0, 500.0)
  config.lock()
  return config
