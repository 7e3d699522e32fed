"""Wan2.1-T2V-14B with the PackForcing cache: two minutes at 832x480, 16 fps.

Purpose: as t2v_1_3b.py, with the large transformer: 84 GB and the programs' scratch, of which the
cache takes 35. No few-step student of it is public that was trained block by block; weights of your
own training go into --transformer.

Cost, counted and not yet measured: 1,530 TFLOP a block, at best 1.9 s of an H200.

Command:
  python -m launch.sample --config=configs/wan/t2v_14b.py --weights=Wan2.1-T2V-14B \\
    --prompt="..." --seconds=120 --output=runs/wan
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.wan import sampling


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.sampling.config.SampleSpec`, and `model`."""
  return sampling.get_config('14b', **arguments.parse(arg, frames=4, tiny=False))
