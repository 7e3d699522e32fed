"""Stage "dmd": self-forcing distillation of the four-step student, the last stage of the miniature.

Purpose: a student that is trained on its own rollouts through the cache it samples with, and a
compressor trained end to end. Starts from the models of configs/digits/ode.py and
configs/digits/teacher.py that ship with the package.

Command:
  python -m launch.train --config=configs/digits/dmd.py --workdir=runs/dmd
From one's own: --config.start=runs/ode --config.teacher=runs/teacher
Cost: 13 minutes of one core (3 s a step).
Result (seed 0, n=1): ten videos of 30 blocks, one for each class: class accuracy .96/1.00/1.00 in
blocks 1/5/30, colours 1.00, drift .018. It ships as the default; the README compares it with the
models before it. Windows begin with the video: a warm-up of up to five blocks was worse in two
seeds of two, though it gives the compressor twice the gradient (EVIDENCE.md, "Context in
training"). Where the sampler's context is never full in training otherwise, as at full size, that
may be different.
Variant `tiny` trains a few thousand parameters for a few steps (tests).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import arguments
from configs.digits import causal


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.train.dmd_stage.DmdStage`, the stage's name, and `TrainConfig`."""
  tiny = arguments.parse(arg, tiny=False)['tiny']
  base = causal.get_config(arg)
  config = ConfigDict()
  config.stage = 'dmd'
  config.start = 'digits/ode'
  config.teacher = 'digits/teacher'
  config.prompts = ''  # those of `world`; or a store of launch.prepare
  config.videos = 2 if tiny else 4
  config.cache = base.cache.copy_and_resolve_references()
  config.train_sink_blocks = placeholder(int)  # those of `cache`
  config.sampler = base.sampler.copy_and_resolve_references()
  config.self_forcing = ConfigDict(dict(
      window_blocks=3 if tiny else 5, warmup_blocks=1 if tiny else 0, beginnings=0.25,
      context_noise=0.0))
  config.objective = ConfigDict(dict(
      guidance=1.0, generator_every=1 if tiny else 3, levels=1 if tiny else 4, shift=5.0,
      lowest=20.0, highest=980.0))
  config.critic_learning_rate = 2e-4
  config.lora = ConfigDict(dict(rank=0))
  config.critic_lora = ConfigDict(dict(rank=0))
  config.remat = False
  config.world = base.world.copy_and_resolve_references()
  config.eval_blocks = (2,) if tiny else (5, 30)
  config.tokenizer = ''
  config.train = base.train.copy_and_resolve_references()
  config.train.steps = 2 if tiny else 240
  config.train.log_every = 1 if tiny else 5
  config.train.save_every = 2 if tiny else 20
  config.train.eval_every = 2 if tiny else 120
  config.train.optimizer.update(dict(
      name='adamw', learning_rate=1e-4, b1=0.0, b2=0.999, schedule='constant', warmup_steps=10,
      decay_steps=0, weight_decay=0.01, clip_norm=10.0))
  config.lock()
  return config
