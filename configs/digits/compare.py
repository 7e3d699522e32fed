"""Comparison of the miniature's models: four distilled steps against the causal model's many.

Purpose: the table of the README. 16 videos of 120 blocks each on the same prompts and noise: the
shipped student in its four passes; the same before it was distilled on its own rollouts, which had
learnt the ends of the teacher's trajectories; the causal model that it began as, in four passes and
in sixteen. 95% bootstrap intervals, and paired differences to the student.

Command:
  python -m launch.evaluate --config=configs/digits/compare.py --output=runs/compare
Variant `tiny` evaluates two videos of a few blocks (tests).
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.digits import evaluate


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.evals.config.EvaluateConfig`."""
  tiny = arguments.parse(arg, tiny=False)['tiny']
  config = evaluate.get_config(arg)
  config.unlock()
  config.headline = ('class_accuracy', 'background_drift', 'dynamic_degree', 'sharpness', 'seam')
  config.ablation.baseline = 'distilled_4'
  config.ablation.starts = ('prompt',)
  others = dict(ode_4='digits/ode', causal_4='digits/causal', causal_16='digits/causal')
  if tiny:
    others = dict(causal_4='digits/causal')
  config.ablation.policies = ConfigDict({name: {} for name in ('distilled_4', *others)})
  config.ablation.checkpoints = ConfigDict(others)
  # All others have a choice of their own, of four passes.
  sixteen = dict(steps=tuple(1000 - 1000 * i / 16 for i in range(16)))
  config.ablation.samplers = ConfigDict({} if tiny else dict(causal_16=sixteen))
  config.parts.blocks = 0
  config.lock()
  return config
