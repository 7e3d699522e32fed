"""Stage "teacher": bidirectional flow matching of whole clips, what few-step students distil.

Purpose: the real score of the stage "dmd" and the trajectories of the stage "ode". Needs the VAE of
configs/digits/vae.py and starts from the causal model, which draws glyphs from text already: what
is left to learn is a whole clip without a cache, and guidance (a tenth of the clips have no text).
`samples.png` shows one clip of each class.

Command:
  python -m launch.train --config=configs/digits/teacher.py --workdir=runs/teacher
Cost of two cores: 37 minutes beside other work (0.45 steps/s, n=1); clips are encoded in 13.
Result (seed 0, n=1): loss of whole clips .170; ten clips of 24 Euler steps with guidance 2, one for
each class: class accuracy 1.00 and .94 in blocks 1 and 5, colours 1.00, drift .016. It ships as
digits/teacher. Guidance: EVIDENCE.md.
Variant `tiny` trains a few thousand parameters for a few steps (tests).
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.digits import causal


def get_config(arg: str | None = None) -> ConfigDict:
  """Fields of `pf_jax.train.teacher_stage.TeacherStage`, the stage's name, and `TrainConfig`."""
  tiny = arguments.parse(arg, tiny=False)['tiny']
  config = causal.get_config(arg)
  config.unlock()
  config.stage = 'teacher'
  for name in ('teacher_forcing', 'cache', 'sampler', 'eval_blocks'):
    del config[name]
  config.start = '' if tiny else 'runs/causal'
  config.phases = ((dict(until=1, clips=2, first_blocks=2),) if tiny else
                   (dict(until=1000, clips=8, first_blocks=8),))
  config.objective = ConfigDict(dict(
      noise_levels=1 if tiny else 2, first_levels=1, first_weight=0.5, shift=5.0,
      uniform_share=0.2, loss='x0', drop_text=0.1))
  config.sampler = ConfigDict(dict(
      solver='euler', steps=2 if tiny else 24, shift=5.0, guidance=2.0, batched=False))
  config.train.steps = 2 if tiny else 1000
  config.train.optimizer.update(dict(
      learning_rate=5e-3, adam_learning_rate=1e-3, decay_steps=400,
      # Teacher, student and critic must read the same text rows.
      group_scale=dict(text=1.0 if tiny else 0.0)))
  config.lock()
  return config
