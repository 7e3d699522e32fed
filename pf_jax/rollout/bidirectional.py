"""A whole clip from the bidirectional base model: the quality baseline beside the causal rollout.

The clip is a single block without history, denoised from noise to latents in some 50 steps of a
multistep solver. Classifier-free guidance moves the prediction away from a negative prompt:

  flow = flow_n + g (flow_p - flow_n)

The steps are a scan of `denoise_step` over the solver's coefficients (`step_rows`); neither its
length nor its body depends on which solver it is. `ClipPrograms` runs the same step from Python,
call by call, and decodes what comes out piece by piece:

  state = programs.start(seed)
  for index in range(steps): state = programs.step(index, transformer, state, text, negative_text)
  frames, decoder = programs.decode(vae, None, state.x[:, :pieces[0]])

Source: Wan2.1 (text to video).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pf_jax.diffusion import multistep, schedule
from pf_jax.diffusion.multistep import SolverState
from pf_jax.models.bundle import ModelSpec
from pf_jax.models.transformer import CausalTransformer
from pf_jax.models.vae import WanVae
from pf_jax.rollout.programs import compile_ahead
from pf_jax.rollout.rollout import to_frames
from pf_jax.types import Array, KeyValues, PyTree, check_shape

DENOISE, DECODE = 'denoise', 'decode'  # phases of a clip, see `ClipPrograms`


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

  @property
  def prompts(self) -> int:
    """That a step runs the network for: with guidance two, the second one negative."""
    return 1 if self.guidance == 1 else 2


class StepRow(NamedTuple):
  """What one step needs besides networks and text; a table has [steps] in front.

  Attributes:
    coefficients: of the solver, float32.
    timestep: [], what the network is told, float32.
  """

  coefficients: multistep.Coefficients
  timestep: Array | np.ndarray


def step_rows(spec: ClipSamplerSpec) -> StepRow:
  """The table of all steps, NumPy: its leaves are [steps, ...]."""
  levels = spec.levels
  table = StepRow(multistep.coefficients(multistep.SOLVERS[spec.solver], levels.sigmas),
                  levels.timesteps)
  return jax.tree.map(lambda x: np.asarray(x, np.float32), table)


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

  def body(state: SolverState, row: StepRow):
    return denoise_step(transformer, state, row, text, negative_text, spec=spec), None

  state, _ = jax.lax.scan(body, multistep.init(noise.astype(jnp.float32)), step_rows(spec))
  return state.x


def denoise_step(transformer: CausalTransformer, state: SolverState, row: StepRow,
                 text: KeyValues, negative_text: KeyValues | None = None, *, spec: ClipSamplerSpec
                 ) -> SolverState:
  """Moves whole clips to the next noise level: one pass of the network, two with guidance.

  Args:
    transformer: a bidirectional model.
    state: before the step; its arrays are [B, F, h, w, C] float32.
    row: of `step_rows`.
    text: as in `sample_clip`.
    negative_text: likewise.
    spec: static choices.

  Raises:
    ValueError: guidance without a negative prompt, or one that does not fit (at trace time).
  """
  timesteps = jnp.broadcast_to(row.timestep, state.x.shape[:2])
  flow = guided_flow(transformer, state.x, timesteps, text, negative_text, spec=spec)
  return multistep.step(state, flow, row.coefficients)


def guided_flow(transformer: CausalTransformer, x_t: Array, timesteps: Array, text: KeyValues,
                negative_text: KeyValues | None, *, spec: ClipSamplerSpec) -> Array:
  """The flow under classifier-free guidance.

  Args:
    transformer: a bidirectional model.
    x_t: [B, F, h, w, C].
    timesteps: [B, F] in [0, 1000].
    text: cross-attention keys/values [L, B, rows, N, H].
    negative_text: like `text`, or of batch 1; unused if the guidance is 1.
    spec: its `guidance` and `batched`.

  Returns:
    [B, F, h, w, C].

  Raises:
    ValueError: guidance without a negative prompt, or one that does not fit (at trace time).
  """
  if spec.prompts == 1:
    return transformer(x_t, timesteps, text).flow
  negative_text = _like(text, negative_text)
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


def pieces(latent_frames: int, longest: int) -> tuple[int, ...]:
  """Latent frames of the pieces that a clip is decoded in.

  All are `longest` but the first, which may be shorter: it has a program of its own anyway, so two
  programs decode clips of any length.
  """
  first = (latent_frames - 1) % longest + 1
  return first, *[longest] * ((latent_frames - first) // longest)


class ClipShapes(NamedTuple):
  """Everything that the programs of a clip take and give, as `jax.ShapeDtypeStruct`.

  Attributes:
    transformer, vae: the networks.
    rows: text rows [1, rows, D] of a prompt.
    texts: cross-attention keys/values of each prompt.
    key: a random key.
    state: of the solver.
    pieces: latents of each decoded piece, [1, F, h, w, C].
    decoder: the VAE decoder's temporal state.
    frames: of the last piece, uint8 [1, T, H, W, 3].
  """

  transformer: PyTree
  vae: PyTree
  rows: PyTree
  texts: tuple[PyTree, ...]
  key: PyTree
  state: PyTree
  pieces: tuple[PyTree, ...]
  decoder: PyTree
  frames: PyTree


@functools.cache
def clip_shapes(model: ModelSpec, spec: ClipSamplerSpec, latent_frames: int) -> ClipShapes:
  """Shapes for one clip; nothing is loaded or compiled, but tracing the networks takes a second."""
  float32, size = jnp.float32, model.video.block_latent_shape[1:]
  transformer = jax.eval_shape(lambda: CausalTransformer(model.transformer, rngs=nnx.Rngs(0)))
  vae = jax.eval_shape(lambda: WanVae(model.vae, rngs=nnx.Rngs(0)))
  rows = jax.ShapeDtypeStruct((1, model.text.max_tokens, model.text.width), float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  latents = tuple(jax.ShapeDtypeStruct((1, length, *size), float32)
                  for length in pieces(latent_frames, model.video.frames_per_block))
  frames, decoder = jax.eval_shape(_decode_first, vae, latents[0])
  if len(latents) > 1:
    frames, decoder = jax.eval_shape(_decode_next, vae, decoder, latents[-1])
  texts = (jax.eval_shape(_text_keys_values, transformer, rows),) * spec.prompts
  state = jax.eval_shape(functools.partial(_start, shape=(1, latent_frames, *size)), key)
  return ClipShapes(transformer, vae, rows, texts, key, state, latents, decoder, frames)


def _text_keys_values(transformer: CausalTransformer, rows: Array) -> KeyValues:
  return transformer.text_keys_values(rows)


def _start(key: Array, *, shape: tuple[int, ...]) -> SolverState:
  return multistep.init(jax.random.normal(key, shape))


def _decode_first(vae: WanVae, latents: Array) -> tuple[Array, PyTree]:
  pixels, state = vae.decode_first(latents)
  return to_frames(pixels), state


def _decode_next(vae: WanVae, state: PyTree, latents: Array) -> tuple[Array, PyTree]:
  pixels, state = vae.decode_next(state, latents)
  return to_frames(pixels), state


class ClipPrograms:
  """The compiled programs of one clip. Networks are arguments, so none has to be loaded before.

  Attributes:
    compile_seconds: wall time spent compiling, per program.
    scratch_bytes: temporary memory of the largest program of each phase, `DENOISE` and `DECODE`, as
      the compiler planned it.
  """

  def __init__(self, model: ModelSpec, spec: ClipSamplerSpec, latent_frames: int):
    """Compiles everything.

    Args:
      model: sizes.
      spec: static choices.
      latent_frames: of the clip.
    """
    shapes = clip_shapes(model, spec, latent_frames)
    self.compile_seconds: dict[str, float] = {}
    self.scratch_bytes = {DENOISE: 0, DECODE: 0}
    self._rows = step_rows(spec)
    start = functools.partial(_start, shape=shapes.state.x.shape)
    step = functools.partial(denoise_step, spec=spec)
    transformer, vae = shapes.transformer, shapes.vae
    self._text = self._compile('text', DENOISE, _text_keys_values, transformer, shapes.rows)
    self._start = self._compile('start', DENOISE, start, shapes.key)
    self._step = self._compile('step', DENOISE, step, transformer, shapes.state, self._row(0),
                               *shapes.texts, donate=1)
    self._first = self._compile('first', DECODE, _decode_first, vae, shapes.pieces[0])
    self._next = None if len(shapes.pieces) == 1 else self._compile(
        'next', DECODE, _decode_next, vae, shapes.decoder, shapes.pieces[-1], donate=1)

  def _compile(self, name: str, phase: str, function: Callable, *inputs: PyTree,
               donate: int | None = None) -> Callable:
    program = compile_ahead(function, inputs, donate)
    self.compile_seconds[name] = program.seconds
    self.scratch_bytes[phase] = max(self.scratch_bytes[phase], program.scratch_bytes)
    return program.call

  def _row(self, index: int) -> StepRow:
    return jax.tree.map(lambda column: column[index], self._rows)

  def text_keys_values(self, transformer: CausalTransformer, rows: Array | np.ndarray) -> KeyValues:
    """Cross-attention keys/values [L, 1, rows, N, H] of the rows [1, rows, D] of one prompt."""
    return self._text(transformer, rows)

  def start(self, seed: int) -> SolverState:
    """The solver's state at pure noise."""
    return self._start(jax.random.key(seed))

  def step(self, index: int, transformer: CausalTransformer, state: SolverState,
           *texts: KeyValues) -> SolverState:
    """The state after step `index`; consumes `state`. See `denoise_step`."""
    return self._step(transformer, state, self._row(index), *texts)

  def decode(self, vae: WanVae, state: PyTree, latents: Array | np.ndarray
             ) -> tuple[Array, PyTree]:
    """Decodes the next of `pieces`.

    Args:
      vae: the VAE.
      state: of the decoder, None before the first piece; it is consumed.
      latents: [1, F, h, w, C].

    Returns:
      Frames uint8 [1, T, H, W, 3], and the next state.
    """
    if state is None:
      return self._first(vae, latents)
    assert self._next is not None
    return self._next(vae, state, latents)
