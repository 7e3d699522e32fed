"""Wan2.1-T2V-1.3B or Self-Forcing with the PackForcing cache: two minutes at 832x480, 16 fps.

Purpose: a 120 s video from released weights, yours to download (Wan2.1 and Self-Forcing are
Apache-2.0). A block is 4 latent frames, 1 s: 6,240 tokens that attend 27,872 keys from block 19 on,
whatever the length of the video. `--dry_run` prints the memory plan, 17 GB and the programs'
scratch. Four steps expect a distilled student such as Self-Forcing's, which was trained with blocks
of 3 latent frames: variant `frames=3`. Variant `tiny` is for tests.

Cost, counted and not yet measured: 297 TFLOP a block, at best 0.38 s of an H200.

Command:
  python -m launch.sample --config=configs/wan/t2v_1_3b.py --weights=Wan2.1-T2V-1.3B \\
    --transformer=self_forcing_dmd.pt --prompt="..." --seconds=120 --output=runs/wan
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.wan import sampling


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.sampling.config.SampleSpec`, and `model`."""
  return sampling.get_config('1_3b', **arguments.parse(arg, frames=4, tiny=False))
