"""Stage "vae": the miniature's autoencoder, 4x8x8 with 8 latent channels, on drifting digits.

Purpose: latents for everything else; full clips and the pooled clips of the LR branch are trained
together. Held-out PSNR at both resolutions is logged and `reconstruction.png` shows three clips.

Command:
  python -m launch.train --config=configs/digits/vae.py --workdir=runs/vae
Variant `tiny` trains a model of a few thousand parameters for a few steps (tests).
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.digits import model


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.train.stages.VaeStage`, the name of the stage, and `TrainConfig`."""
  tiny = arguments.parse(arg, tiny=False)['tiny']
  config = ConfigDict()
  config.stage = 'vae'
  config.model = model.get_config('tiny' if tiny else None)
  config.frames = 17
  config.batch_size = 1 if tiny else 4
  config.eval_clips = 1 if tiny else 8
  config.eval_frames = 33 if tiny else 77
  config.world = ConfigDict(dict(height=64, width=64, fps=16, glyph_size=32, speed=1))
  config.loss = ConfigDict(dict(
      crop=(17, 32, 32), l1=1.0, l2=0.0, kl=1e-5, pooled=0.1, pool_time=2, pool_space=4,
      pooled_latent_frames=2))
  config.train = ConfigDict(dict(
      steps=4 if tiny else 20_000, seed=0, log_every=2 if tiny else 100,
      save_every=2 if tiny else 1000, keep=3, eval_every=4 if tiny else 2000, ema_decay=0.999,
      max_skipped_in_a_row=20))
  config.train.optimizer = ConfigDict(dict(
      name='adamw', learning_rate=2e-3, schedule='cosine', warmup_steps=200, final_fraction=0.01,
      weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.99))
  config.lock()
  return config
