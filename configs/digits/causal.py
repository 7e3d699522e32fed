"""Stage "causal": teacher-forced block-causal flow matching on drifting digits, 5-second clips.

Purpose: the miniature that ships. Needs the VAE of configs/digits/vae.py; encodes `clips` clips
once into `store`, then trains transformer, compressor and text encoder: first blocks alone until
text is turned into glyphs, then whole clips until the history is used (EVIDENCE.md says why).
`samples.png` shows one prompt of each class; `model/` is what sampling loads.

Command:
  python -m launch.train --config=configs/digits/causal.py --workdir=runs/causal
On a CPU these settings of the allocator save a quarter of the time:
  export GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=20000000000:\
glibc.malloc.top_pad=268435456:glibc.malloc.hugetlb=1
Cost of two cores: 6 minutes of encoding, 41 of first blocks (0.8 s a step), 35 of whole clips
(2.1 s a step).
Result (seed 0, n=1): loss .189; the tables of README.md.
Variant `tiny` trains a few thousand parameters for a few steps (tests).
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.digits import model


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.train.causal_stage.CausalStage`, the name of the stage, and `TrainConfig`."""
  tiny = arguments.parse(arg, tiny=False)['tiny']
  config = ConfigDict()
  config.stage = 'causal'
  config.model = model.get_config('tiny' if tiny else None)
  config.vae = 'runs/vae/vae'
  config.store = 'runs/latents'
  config.dataset = ''  # clips of `world`, in `store`; or a store of launch.prepare --videos=DIR
  config.clips = 4 if tiny else 2000
  config.clip_blocks = 5
  config.encode_batch = 2 if tiny else 4
  config.phases = (
      dict(until=1, clips=0, first_blocks=2),
      dict(until=2, clips=2, first_blocks=2),
  ) if tiny else (
      dict(until=3000, clips=0, first_blocks=64),
      dict(until=4000, clips=4, first_blocks=32))
  config.start = ''
  config.eval_blocks = 2 if tiny else 6
  config.world = ConfigDict(dict(height=64, width=64, fps=16, glyph_size=32, speed=1))
  config.cache = ConfigDict(dict(sink_blocks=1, recent_blocks=1, top_k=16, mid_capacity=128))
  config.sampler = ConfigDict(dict(
      solver='renoise', steps=(1000.0, 750.0, 500.0, 250.0), shift=5.0))
  config.teacher_forcing = ConfigDict(dict(
      noise_levels=4, first_levels=1, first_weight=1.0, shift=5.0, uniform_share=0.2, loss='x0',
      context_noise=0.1, drop_sink=0.1, drop_mid=0.1, sink_blocks=(1,), scatter_mid=0.8,
      crowd_mid=0.6))
  config.train = ConfigDict(dict(
      steps=2 if tiny else 4000, seed=0, log_every=1 if tiny else 25,
      save_every=2 if tiny else 100, keep=3, eval_every=2 if tiny else 500, ema_decay=0.99,
      max_skipped_in_a_row=20, accumulate=1, devices=0))
  config.train.optimizer = ConfigDict(dict(
      name='muon', learning_rate=1e-2, adam_learning_rate=2e-3, schedule='wsd',
      warmup_steps=30, decay_steps=600, final_fraction=0.02, weight_decay=0.01, clip_norm=1.0,
      b1=0.9, b2=0.99))
  config.lock()
  return config
