"""What the sampling experiments of this folder share; not an experiment itself."""

from ml_collections import ConfigDict

from configs.digits import sample
from configs.wan import model


def get_config(size: str, *, frames: int, tiny: bool) -> ConfigDict:
  """The paper's cache and Self-Forcing's sampler around the networks of one size.

  Args:
    size: of the transformer, see `model`.
    frames: latent frames of a block.
    tiny: small networks and a small cache, for tests.
  """
  config = sample.get_config()
  config.unlock()
  config.batch_size = 1
  config.model = model.get_config(f'size={size},frames={frames}' + ',tiny' * tiny)
  config.cache.update(dict(sink_blocks=1, recent_blocks=1, top_k=1, mid_capacity=2) if tiny else
                      dict(sink_blocks=2, recent_blocks=1, top_k=16, mid_capacity=128))
  config.sampler.update(dict(solver='renoise', shift=5.0,
                             steps=(1000.0, 500.0) if tiny else (1000.0, 750.0, 500.0, 250.0)))
  config.lock()
  return config
