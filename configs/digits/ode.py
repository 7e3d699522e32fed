"""Stage "ode": the causal student learns where the teacher's trajectories end, in its four passes.

Purpose: a student whose four steps are jumps before the stage "dmd" begins. Needs the models of
configs/digits/causal.py (the start) and configs/digits/teacher.py; `clips` trajectories of 48 Euler
steps with guidance are computed once into `store`.

Command:
  python -m launch.train --config=configs/digits/ode.py --workdir=runs/ode
Cost of two cores, beside other work: 16 minutes of trajectories, 20 of training (n=1).
Result (seed 0, n=1): loss .041; ten videos of six blocks in four steps, one for each class: class
accuracy 1.00 and .99 in blocks 1 and 6, colours 1.00, drift .024. It ships as digits/ode.
Variant `tiny` trains a few thousand parameters for a few steps (tests).
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.digits import causal


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.train.ode_stage.OdeStage`, the stage's name, and `TrainConfig`."""
  tiny = arguments.parse(arg, tiny=False)['tiny']
  config = causal.get_config(arg)
  config.unlock()
  config.stage = 'ode'
  config.start = 'runs/causal'
  config.teacher = 'runs/teacher'
  config.store = 'runs/trajectories'
  config.clips = 2 if tiny else 224
  config.encode_batch = 2 if tiny else 16
  config.clips_per_shard = 32
  config.trajectory = ConfigDict(dict(
      solver='euler', steps=4 if tiny else 48, shift=5.0, guidance=2.0, batched=False))
  config.phases = ((dict(until=1, clips=2, first_blocks=0),) if tiny else
                   (dict(until=350, clips=4, first_blocks=0),))
  config.train.steps = 2 if tiny else 350
  config.train.optimizer.update(dict(
      learning_rate=3e-3, adam_learning_rate=5e-4, decay_steps=250, group_scale=dict(text=0.0)))
  config.lock()
  return config
