"""A whole clip from the bidirectional base model: the quality baseline beside the causal rollout.

The clip is a single block without history, denoised from noise to latents in some 50 steps of a
multistep solver. Classifier-free guidance moves the prediction away from a negative prompt:

  flow = flow_n + g (flow_p - flow_n)

The steps are one scan over the solver's coefficients; neither its length nor its body depends on
which solver it is.

Source: Wan2.1 (text to video).
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from pf_jax.diffusion import multistep, schedule
from pf_jax.models.transformer import CausalTransformer
from pf_jax.types import Array, KeyValues, check_shape


@dataclasses.dataclass(frozen=True)
class ClipSamplerSpec:
  """How a clip is sampled; defaults are Wan2.1's own for text to video. See also `wan_1_3b`.

  Attributes:
    solver: 'unipc', 'dpm++' or 'euler'.
    steps: passes of the network (twice as many with guidance).
    shift: timestep shift.
    guidance: g; 1 is none and costs nothing.
    batched: run both prompts as one doubled batch. Faster where the batch leaves the device idle;
      two passes need half the memory.

  Raises:
    ValueError: an unknown solver or a value out of range.
  """

  solver: Literal['unipc', 'dpm++', 'euler'] = 'unipc'
  steps: int = 50
  shift: float = 5.0
  guidance: float = 5.0
  batched: bool = False

  def __post_init__(self):
    if self.solver not in multistep.SOLVERS:
      raise ValueError(f'solver={self.solver!r} is unknown; use one of '
                       f'{", ".join(multistep.SOLVERS)}.')
    if self.steps < 1:
      raise ValueError(f'steps={self.steps} cannot denoise; Wan2.1 uses 50.')
    if not (math.isfinite(self.shift) and self.shift > 0):
      raise ValueError(f'shift={self.shift} must be positive; Wan2.1 uses 5.')
    if not (math.isfinite(self.guidance) and self.guidance >= 0):
      raise ValueError(f'guidance={self.guidance} must not be negative; use 1 for none, Wan2.1 '
                       f'uses 5.')

  @classmethod
  def wan_1_3b(cls, **choices) -> 'ClipSamplerSpec':
    """What Wan2.1 advises for its 1.3B model: guidance 6, shift 8; `choices` are other fields."""
    return cls(**{'guidance': 6.0, 'shift': 8.0} | choices)

  @property
  def levels(self) -> schedule.Levels:
    """Noise levels [steps + 1] and the network's timesteps [steps], float64."""
    return multistep.SOLVERS[self.solver].levels(self.steps, self.shift)


def sample_clip(transformer: CausalTransformer, noise: Array, text: KeyValues,
                negative_text: KeyValues | None = None, *, spec: ClipSamplerSpec) -> Array:
  """Samples the latents of whole clips; wrap it in `jax.jit` (with `spec` static).

  Args:
    transformer: a bidirectional model; its input and output channels are the same.
    noise: [B, F, h, w, C], standard normal.
    text: cross-attention keys/values [L, B, rows, N, H].
    negative_text: the same of what the clips should not be like; its batch may be 1. Not needed
      without guidance.
    spec: static choices.

  Returns:
    Latents x0 [B, F, h, w, C], float32.

  Raises:
    ValueError: shapes that do not fit (at trace time), or guidance without a negative prompt.
  """
  check_shape('noise', noise, 'b f h w c', c=transformer.spec.in_channels)
  if transformer.spec.out_channels != transformer.spec.in_channels:
    raise ValueError(f'a transformer from {transformer.spec.in_channels} to '
                     f'{transformer.spec.out_channels} channels cannot sample; wanted one that '
                     f'predicts the flow of its own input.')
  if spec.guidance != 1:
    negative_text = _like(text, negative_text)
  table = multistep.coefficients(multistep.SOLVERS[spec.solver], spec.levels.sigmas)

  def body(state: multistep.SolverState, inputs: tuple[multistep.Coefficients, Array]):
    row, timestep = inputs
    timesteps = jnp.broadcast_to(timestep, state.x.shape[:2])
    flow = guided_flow(transformer, state.x, timesteps, text, negative_text, spec=spec)
    return multistep.step(state, flow, row), None

  rows = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (table, spec.levels.timesteps))
  state, _ = jax.lax.scan(body, multistep.init(noise.astype(jnp.float32)), rows)
  return state.x


def guided_flow(transformer: CausalTransformer, x_t: Array, timesteps: Array, text: KeyValues,
                negative_text: KeyValues | None, *, spec: ClipSamplerSpec) -> Array:
  """The flow under classifier-free guidance.

  Args:
    transformer: a bidirectional model.
    x_t: [B, F, h, w, C].
    timesteps: [B, F] in [0, 1000].
    text: cross-attention keys/values [L, B, rows, N, H].
    negative_text: like `text`; unused if the guidance is 1.
    spec: its `guidance` and `batched`.

  Returns:
    [B, F, h, w, C].
  """
  if spec.guidance == 1:
    return transformer(x_t, timesteps, text).flow
  assert negative_text is not None  # `sample_clip` refuses guidance without one
  if spec.batched:
    both = jax.tree.map(lambda p, n: jnp.concatenate([p, n], axis=1), text, negative_text)
    x_t, timesteps = (jnp.concatenate([a, a]) for a in (x_t, timesteps))
    positive, negative = jnp.split(transformer(x_t, timesteps, both).flow, 2)
  else:
    positive, negative = (transformer(x_t, timesteps, prompt).flow
                          for prompt in (text, negative_text))
  return negative + spec.guidance * (positive - negative)


def _like(text: KeyValues, negative_text: KeyValues | None) -> KeyValues:
  """The negative prompt with as many samples as the prompt.

  Raises:
    ValueError: there is none, or it has another shape.
  """
  if negative_text is None:
    raise ValueError('guidance needs a negative prompt, got none; give the keys/values of one (the '
                     'empty prompt will do) or set guidance=1.')
  layers, batch, *rest = text.k.shape
  got = negative_text.k.shape
  if got not in ((layers, batch, *rest), (layers, 1, *rest)):
    raise ValueError(f'negative_text has keys {got}, wanted {text.k.shape} or a batch of 1; pad '
                     f'both prompts to the same rows.')
  return jax.tree.map(lambda n, p: jnp.broadcast_to(n, p.shape), negative_text, text)
