"""Evaluation of the miniature: cache policies over two minutes, and what each part does.

Purpose: the tables of the README. Per policy 16 videos of 120 blocks from the prompts of held-out
draws, once from text alone and once after two blocks of a true held-out clip; class accuracy,
background drift and the rest at blocks 5/30/60/120 with 95% bootstrap intervals, and paired
differences to `pack`. Then reconstruction, the text's influence, and the compressor's branches.
Cost: 10 rollouts of 16 x 120 blocks and 5 short ones; a run's seconds per block are in
`results.json`. Each run is kept when it is finished, so an interrupted evaluation goes on.

Command:
  python -m launch.evaluate --config=configs/digits/evaluate.py --output=runs/evaluate
Variant `tiny` evaluates two videos of a few blocks under two policies (tests).
"""

from ml_collections import ConfigDict

from configs import arguments


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.evals.config.EvaluateConfig`."""
  tiny = arguments.parse(arg, tiny=False)['tiny']
  config = ConfigDict()
  config.videos = 2 if tiny else 16
  config.batch = 2 if tiny else 4  # more in lockstep is slower on two cores: caches overflow
  config.seed = 0
  config.instances = 10
  config.resamples = 100 if tiny else 2000
  config.confidence = 0.95
  config.headline = ('class_accuracy', 'background_drift')
  config.sheet_videos = 2 if tiny else 6
  config.sheet_columns = 4 if tiny else 10
  config.world = ConfigDict(dict(height=64, width=64, fps=16, glyph_size=32, speed=1))
  config.ablation = ConfigDict(dict(
      baseline='pack', starts=('prompt', 'clip'), start_blocks=1 if tiny else 2,
      blocks=3 if tiny else 120, judged=(2, 3) if tiny else (5, 30, 60, 120),
      curve_every=0 if tiny else 10))
  # Fields of `pf_jax.cache.CacheSpec` that differ from what the model is shipped with.
  policies = dict(pack=dict(), no_sink=dict(sink_blocks=0), no_mid=dict(top_k=0),
                  no_realignment=dict(positions='absolute'), pack_fifo=dict(selection='fifo'))
  if tiny:
    policies = {name: policies[name] for name in ('pack', 'no_mid')}
  config.ablation.policies = ConfigDict(policies)
  config.parts = ConfigDict(dict(
      clip_blocks=2 if tiny else 5, branches=('both',) if tiny else ('both', 'hr', 'lr', 'none'),
      start='prompt',
      blocks=2 if tiny else 30, judged=(2,) if tiny else (5, 30)))
  config.lock()
  return config
