"""Comparison of four ways to populate the cache while distilling, two trainings of each.

Purpose: whether the published setting (two sink blocks, windows of five blocks that begin with the
video) starves the compressor, as one would expect: only the last block of such a window attends a
compressed block that it can teach. 240 steps of the stage "dmd" each, with and without warm-up,
with one and with two sink blocks while training; sampled with the shipped cache from the same
prompts and noise.

Cost: 13 minutes on one core for each training (n=8). Command:
  for seed in 0 1; do for warmup in 5 0; do for sink in 1 2; do
    python -m launch.train --config=configs/digits/dmd.py --config.train.seed=$seed \\
      --config.self_forcing.warmup_blocks=$warmup --config.train_sink_blocks=$sink \\
      --workdir=runs/context/w${warmup}_s${sink}_seed$seed
  done; done; done
  python -m launch.evaluate --config=configs/digits/context_in_training.py \
    --output=runs/context/table
Result: EVIDENCE.md, "Context in training".
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.digits import evaluate

SETTINGS = ('w5_s1', 'w0_s1', 'w5_s2', 'w0_s2')
SEEDS = (0, 1)


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.evals.config.EvaluateConfig`; `runs=DIR` says where the trainings are."""
  runs = arguments.parse(arg, runs='runs/context')['runs']
  config = evaluate.get_config()
  config.unlock()
  names = [f'{setting}_seed{seed}' for setting in SETTINGS for seed in SEEDS]
  config.ablation.baseline = names[0]
  config.ablation.starts = ('prompt',)
  config.ablation.blocks = 60
  config.ablation.judged = (5, 30, 60)
  config.ablation.policies = ConfigDict({name: {} for name in names})
  config.ablation.checkpoints = ConfigDict({name: f'{runs}/{name}' for name in names})
  config.parts.blocks = 0
  config.lock()
  return config
