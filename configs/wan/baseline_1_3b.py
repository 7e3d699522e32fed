"""Wan2.1-T2V-1.3B as it was released: 5 s at 832x480 from 50 steps of UniPC with guidance.

Purpose: the quality that few-step, causal samples are compared with. Guidance 6 and shift 8 are
what Wan2.1 advises for this size. Variant `tiny` is for tests.

Cost, counted and not yet measured: 28 PFLOP a clip (100 passes of 283 TFLOP), at best 36 s of an
H200. Memory, from `--dry_run`: 11.4 GB while prompts are encoded, then 4.1 and 2.2 GB and what the
programs need beyond one layer's activations.

Command:
  python -m launch.sample_clip --config=configs/wan/baseline_1_3b.py --weights=Wan2.1-T2V-1.3B \\
    --prompt="..." --output=runs/baseline
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.wan import model


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.sampling.clip.ClipSpec`, and `model`."""
  tiny = arguments.parse(arg, tiny=False)['tiny']
  config = ConfigDict()
  config.model = model.get_config('size=1_3b' + ',tiny' * tiny)
  config.sampler = ConfigDict(dict(solver='unipc', steps=3 if tiny else 50, shift=8.0,
                                   guidance=6.0, batched=False))
  config.latent_frames = 6 if tiny else 21
  config.quality = 18
  config.sheet_columns = 3 if tiny else 8
  config.lock()
  return config
