"""The stages of training by name: their settings, what runs them, what sketches them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pf_jax.train import causal_stage, dmd_stage, loop, ode_stage, plan, teacher_stage, vae_stage


class Stage(NamedTuple):
  """One stage.

  Attributes:
    settings: type of its settings.
    train: (settings, `TrainConfig`, workdir) -> `FitResult`.
    sketch: (settings, `TrainConfig`) -> what a memory plan is made of; None if it has none.
  """

  settings: type
  train: Callable[..., loop.FitResult]
  sketch: Callable[[Any, Any], plan.Sketch] | None = None


STAGES: dict[str, Stage] = {
    'vae': Stage(vae_stage.VaeStage, vae_stage.train_vae),
    'causal': Stage(causal_stage.CausalStage, causal_stage.train_causal, causal_stage.sketch),
    'teacher': Stage(teacher_stage.TeacherStage, teacher_stage.train_teacher, teacher_stage.sketch),
    'ode': Stage(ode_stage.OdeStage, ode_stage.train_ode, ode_stage.sketch),
    'dmd': Stage(dmd_stage.DmdStage, dmd_stage.train_dmd, dmd_stage.sketch),
}
