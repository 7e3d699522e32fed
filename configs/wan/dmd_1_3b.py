"""Stage "dmd" at full size: Wan2.1-T2V-1.3B distilled with the PackForcing cache, 832x480.

Purpose: the paper's training. Student and teacher are released weights (Wan2.1, Apache-2.0), the
student's transformer best a causal one that a teacher's trajectories have prepared: `transformer`.
Prompts alone are needed; their text rows are computed once by `launch.prepare`, so that UMT5-XXL is
not in memory while training. 5 blocks of 4 latent frames are trained, after up to `warmup_blocks`
that are not: with two sink blocks and one recent block a clip of five blocks trains the compressor
on hardly anything.

Rates, batch, guidance and schedule are those of arXiv:2603.25730 and of Self-Forcing, as far as
they say; `warmup_blocks`, `train_sink_blocks`, `context_noise`, `teacher_model` and
`critic_learning_rate` are what the paper leaves open.

Command:
  python -m launch.prepare --config=configs/wan/dmd_1_3b.py --prompts=prompts.txt
  python -m launch.train --config=configs/wan/dmd_1_3b.py --workdir=runs/dmd_1_3b --dry_run
  python -m launch.train --config=configs/wan/dmd_1_3b.py --workdir=runs/dmd_1_3b
On eight cards add --config.train.accumulate=1. Not run yet: compiled for one and for eight H200
(README.md has the bytes).
Variant `tiny` is for tests.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import arguments
from configs.wan import model


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.train.dmd_stage.DmdStage`, the stage's name, and `TrainConfig`."""
  tiny = arguments.parse(arg, tiny=False)['tiny']
  config = ConfigDict()
  config.stage = 'dmd'
  config.start = 'Wan2.1-T2V-1.3B'
  config.transformer = placeholder(str)
  config.compressor = placeholder(str)
  config.teacher = 'Wan2.1-T2V-1.3B'
  config.model = model.get_config('size=1_3b' + ',tiny' * tiny)
  # Trained weights in full precision, products in half; the teacher's are frozen in half.
  config.model.transformer.dtypes.params = 'float32'
  config.frozen_dtype = 'bfloat16'
  config.prompts = 'runs/prompts'
  config.videos = 2 if tiny else 8
  config.cache = ConfigDict(
      dict(sink_blocks=1, recent_blocks=1, top_k=1, mid_capacity=2) if tiny else
      dict(sink_blocks=2, recent_blocks=1, top_k=16, mid_capacity=128))
  config.train_sink_blocks = placeholder(int)  # those of `cache`
  config.sampler = ConfigDict(dict(
      solver='renoise', shift=5.0,
      steps=(1000.0, 500.0) if tiny else (1000.0, 750.0, 500.0, 250.0)))
  config.self_forcing = ConfigDict(dict(
      window_blocks=3 if tiny else 5, warmup_blocks=1 if tiny else 20, beginnings=0.0,
      context_noise=0.0))
  config.objective = ConfigDict(dict(
      guidance=3.0, generator_every=1 if tiny else 5, levels=1, shift=5.0, lowest=20.0,
      highest=980.0))
  config.critic_learning_rate = 1e-6
  config.lora = ConfigDict(dict(rank=0))
  config.critic_lora = ConfigDict(dict(rank=0))
  config.remat = not tiny
  config.negative_prompt = ''
  config.eval_blocks = (2,) if tiny else (5, 120)
  config.eval_videos = 2
  config.train = ConfigDict(dict(
      steps=2 if tiny else 3000, seed=0, log_every=1 if tiny else 10, save_every=2 if tiny else 100,
      keep=2, eval_every=2 if tiny else 500, ema_decay=0.99, accumulate=1 if tiny else 8,
      devices=0, max_skipped_in_a_row=10))
  config.train.optimizer = ConfigDict(dict(
      name='adamw', learning_rate=2e-6, schedule='constant', warmup_steps=0, weight_decay=0.01,
      clip_norm=10.0, b1=0.0, b2=0.999))
  config.lock()
  return config
