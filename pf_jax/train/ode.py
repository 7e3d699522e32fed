"""Trajectories of the teacher, for the stage "ode": a student's start before distillation.

The teacher's sampler is a deterministic way from noise to a clip. A student that is shown the way
at the levels of its own few passes, and is asked where it ends, learns to jump there. With 48 Euler
steps and equal shifts the student's levels fall exactly on the teacher's.

Source: CausVid and Self-Forcing (ODE initialisation).
"""

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.diffusion import multistep
from pf_jax.models.transformer import CausalTransformer
from pf_jax.rollout import bidirectional
from pf_jax.rollout.bidirectional import ClipSamplerSpec
from pf_jax.rollout.block import SamplerSpec
from pf_jax.types import Array, KeyValues

_CLOSE = 1e-9  # of two levels that are the same


def snapshot_steps(teacher: ClipSamplerSpec, student: SamplerSpec) -> tuple[int, ...]:
  """The teacher's steps that begin at the levels of the student's passes.

  Raises:
    ValueError: they begin elsewhere.
  """
  levels, wanted = teacher.levels.sigmas[:-1], student.sigmas[:-1]
  distance = np.abs(levels[None] - wanted[:, None])
  if distance.min(axis=1).max() > _CLOSE:
    missing = wanted[distance.min(axis=1) > _CLOSE]
    raise ValueError(
        f'levels {np.round(missing, 4).tolist()} of the student are none of the teacher\'s '
        f'{teacher.steps} at shift {teacher.shift:g}; give both one shift and the solver euler, '
        f'and the teacher a multiple of the student\'s {len(wanted)} steps, such as 48.')
  return tuple(int(index) for index in distance.argmin(axis=1))


def trajectory(transformer: CausalTransformer, noise: Array, text: KeyValues,
               negative_text: KeyValues | None, *, spec: ClipSamplerSpec,
               steps: tuple[int, ...]) -> tuple[Array, Array]:
  """A teacher's way from noise to clips; wrap it in `jax.jit` (with `spec` and `steps` static).

  Args:
    transformer: bidirectional.
    noise: [B, F, h, w, C], standard normal.
    text: cross-attention keys/values [L, B, rows, N, H].
    negative_text: of the unconditional prompt; its batch may be 1.
    spec: the teacher's sampler.
    steps: before which the way is kept, from `snapshot_steps`.

  Returns:
    The way [B, S, F, h, w, C] and its end x0 [B, F, h, w, C].
  """

  batch, *shape = noise.shape
  wanted = np.asarray(steps).reshape(1, -1, *[1 for _ in shape])

  def body(carry: tuple[multistep.SolverState, Array], inputs: tuple[Array, bidirectional.StepRow]):
    (state, way), (number, row) = carry, inputs
    way = jnp.where(number == wanted, state.x[:, None], way)
    return (bidirectional.denoise_step(transformer, state, row, text, negative_text, spec=spec),
            way), None

  start = (multistep.init(noise.astype(jnp.float32)), jnp.zeros((batch, len(steps), *shape)))
  rows = jnp.arange(spec.steps), bidirectional.step_rows(spec)
  (state, way), _ = jax.lax.scan(body, start, rows)
  return way, state.x
