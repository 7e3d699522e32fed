"""What 8-bit storage costs a video: the cache's keys and values whole, as int8, as float8.

Purpose: the table "Storage" of EVIDENCE.md. Per way of storing 16 videos of 120 blocks from text
alone; metrics and paired differences to `full` as in `evaluate`.
Cost: 3 rollouts of 16 x 120 blocks, a quarter of an hour on two quiet cores.

Command:
  python -m launch.evaluate --config=configs/digits/storage.py --output=runs/storage
Variant `tiny` is for tests.
"""

from ml_collections import ConfigDict

from configs.digits import evaluate


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.evals.config.EvaluateConfig`."""
  config = evaluate.get_config(arg)
  config.unlock()
  config.ablation.baseline = 'full'
  config.ablation.starts = ('prompt',)
  config.ablation.policies = ConfigDict({
      name: dict(storage=name) for name in ('full', 'int8', 'float8_e4m3fn')})
  config.headline = ('class_accuracy', 'background_drift', 'dynamic_degree', 'sharpness', 'seam')
  config.parts.blocks = 0
  config.lock()
  return config
