"""The settings of a training run.

Standard library only: launchers check a whole command line against these before they import JAX.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """How gradients become updates.

  Attributes:
    name: 'adamw', or 'muon' (matrices by Muon, everything else by Adam).
    learning_rate: peak rate; with 'muon' the rate of the matrices.
    adam_learning_rate: rate of what Muon leaves to Adam; 0 means `learning_rate`.
    schedule: after a linear warm-up 'cosine' (to `final_fraction` of the peak), 'constant', or
      'wsd' (warm-up, stable, decay: constant, then linear to `final_fraction`).
    warmup_steps: steps of linear warm-up from 0.
    final_fraction: where the decay ends, as a fraction of the peak.
    decay_steps: the last steps, in which 'wsd' decays.
    weight_decay: decoupled decay of matrices and convolution kernels (not biases and gains).
    clip_norm: gradients are scaled down to this global norm; 0 switches clipping off.
    b1: Adam's first-moment decay.
    b2: Adam's second-moment decay.
    muon_momentum: Muon's momentum.
    group_scale: factor on the rate of each named parameter group; 0 freezes it.

  Raises:
    ValueError: a value out of range.
  """

  name: str = 'adamw'
  learning_rate: float = 1e-3
  adam_learning_rate: float = 0.0
  schedule: str = 'cosine'
  warmup_steps: int = 100
  final_fraction: float = 0.0
  decay_steps: int = 0
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  b1: float = 0.9
  b2: float = 0.99
  muon_momentum: float = 0.95
  group_scale: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.name not in ('adamw', 'muon'):
      raise ValueError(f'optimizer name={self.name!r} is unknown; use adamw or muon.')
    if self.schedule not in ('cosine', 'constant', 'wsd'):
      raise ValueError(f'schedule={self.schedule!r} is unknown; use cosine, constant or wsd.')
    for name in ('learning_rate', 'adam_learning_rate', 'warmup_steps', 'final_fraction',
                 'decay_steps', 'weight_decay', 'clip_norm'):
      value = getattr(self, name)
      if not 0 <= value < float('inf'):
        raise ValueError(f'{name}={value} must be finite and not negative.')
    for name in ('b1', 'b2', 'muon_momentum'):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must lie in [0, 1).')


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length, logging and saving of a run.

  Attributes:
    steps: optimizer steps in all.
    seed: parameters and per-step randomness.
    log_every: steps between metric records (the only moments the host waits for the device).
    save_every: steps between checkpoints.
    keep: newest checkpoints to keep.
    eval_every: steps between evaluations; 0 for none.
    ema_decay: decay of the parameter average; 0 for none.
    accumulate: parts that a batch is computed in, one after the other. A step then needs the memory
      of a part, and computes the same mean gradient.
    devices: cards of this host that share batches and state; 0 for all.
    mfu: counts each kind of step's FLOPs, which takes a second trace of it, and reports model FLOPs
      utilisation.
    max_skipped_in_a_row: abort after this many steps in a row that were not finite.
    optimizer: see `OptimizerConfig`.

  Raises:
    ValueError: a value out of range.
  """

  steps: int = 1000
  seed: int = 0
  log_every: int = 50
  save_every: int = 500
  keep: int = 3
  eval_every: int = 0
  ema_decay: float = 0.999
  accumulate: int = 1
  devices: int = 0
  mfu: bool = True
  max_skipped_in_a_row: int = 20
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

  def __post_init__(self):
    for name in ('steps', 'log_every', 'save_every', 'accumulate', 'max_skipped_in_a_row'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.keep < 2:
      raise ValueError(f'keep={self.keep} must be at least 2 (a damaged one needs a predecessor).')
    for name in ('eval_every', 'seed', 'devices'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} must not be negative.')
    if not 0 <= self.ema_decay < 1:
      raise ValueError(f'ema_decay={self.ema_decay} must lie in [0, 1).')
