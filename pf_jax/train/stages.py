"""The stages of training by name: settings, and the function that runs them."""

from collections.abc import Callable

from pf_jax.train import loop
from pf_jax.train.causal_stage import CausalStage, train_causal
from pf_jax.train.dmd_stage import DmdStage, train_dmd
from pf_jax.train.ode_stage import OdeStage, train_ode
from pf_jax.train.teacher_stage import TeacherStage, train_teacher
from pf_jax.train.vae_stage import VaeStage, train_vae

STAGES: dict[str, tuple[type, Callable[..., loop.FitResult]]] = {
    'vae': (VaeStage, train_vae),
    'causal': (CausalStage, train_causal),
    'teacher': (TeacherStage, train_teacher),
    'ode': (OdeStage, train_ode),
    'dmd': (DmdStage, train_dmd),
}
