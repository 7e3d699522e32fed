"""Comparison of the miniature's models: four distilled steps against the causal model's many.

Purpose: the table of the README. 16 videos of 120 blocks each on the same prompts and noise: the
shipped student in its four passes, and the causal model that it was distilled from in four, in
sixteen, and in 24 of Euler's; 95% bootstrap intervals and paired differences to the student.

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
  config.ablation.baseline = 'distilled_4'
  config.ablation.starts = ('prompt',)
  causal = dict(causal_4=4) if tiny else dict(causal_4=4, causal_16=16, causal_euler_24=24)
  config.ablation.policies = ConfigDict({name: {} for name in ('distilled_4', *causal)})
  config.ablation.checkpoints = ConfigDict(dict.fromkeys(causal, 'digits/causal'))
  config.ablation.samplers = ConfigDict({
      name: dict(solver='euler' if 'euler' in name else 'renoise',
                 steps=tuple(1000 - 1000 * i / passes for i in range(passes)))
      for name, passes in causal.items()})
  config.parts.blocks = 0
  config.lock()
  return config
