"""Stage "vae": the miniature's autoencoder, 4x8x8 with 8 latent channels, on drifting digits.

Purpose: latents for everything else. Batches are small boxes of many clips, a fifth of them pooled
clips as the compressor's LR branch sees them; boxes grow towards the end. Held-out PSNR at both
resolutions is logged and `reconstruction.png` shows three clips. A finished run leaves `vae/`.

Command:
  python -m launch.train --config=configs/digits/vae.py --workdir=runs/vae
Cost: 20 minutes of two cores. Result (seed 0, n=1): held-out PSNR 30.6 dB at full resolution,
21.1 dB at the LR branch's.
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
  def boxes(count: int, size: tuple[int, int, int], pooled: float = 0.0) -> dict:
    crop = dict(size=size, glyph_share=0.75, pooled_share=pooled, temporal_stride=4)
    return dict(batch_size=count, crop=crop)

  config.phases = (
      dict(until=2, batches=(boxes(2, (5, 16, 16), 0.5),)),
      dict(until=4, batches=(boxes(1, (9, 16, 16)),)),
  ) if tiny else (
      dict(until=500, batches=(boxes(32, (5, 16, 16), 0.2),)),
      dict(until=1500, batches=(boxes(2, (17, 32, 32)), boxes(8, (17, 16, 16)),
                                boxes(32, (5, 16, 16), 0.4))),
      dict(until=2000, batches=(boxes(1, (33, 64, 64)), boxes(2, (33, 32, 32)),
                                boxes(32, (5, 16, 16), 0.4))))
  config.eval_clips = 1 if tiny else 8
  config.eval_frames = 33 if tiny else 77
  config.world = ConfigDict(dict(
      height=64, width=64, fps=16, glyph_size=32, speed=1, row_step=8))
  config.loss = ConfigDict(dict(l1=1.0, l2=1.0, kl=1e-5))
  config.train = ConfigDict(dict(
      steps=4 if tiny else 2000, seed=0, log_every=2 if tiny else 25,
      save_every=2 if tiny else 100, keep=3, eval_every=4 if tiny else 500, ema_decay=0.99,
      max_skipped_in_a_row=20, accumulate=1, devices=0))
  config.train.optimizer = ConfigDict(dict(
      name='muon', learning_rate=2e-2, adam_learning_rate=1e-2, schedule='cosine', warmup_steps=20,
      final_fraction=0.01, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.99))
  config.lock()
  return config
