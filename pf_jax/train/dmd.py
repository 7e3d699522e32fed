"""Stage "dmd": distribution matching distillation of self-forced rollouts.

The student's videos should be as likely as the teacher's. The direction in which a video x must
move is the difference of two scores at a random noise level, told as clean predictions:

  g = (f(x_t) - r(x_t)) / mean |x - r(x_t)|      f: critic, that follows the student
                                                 r: teacher, with guidance
  generator loss   1/2 mean (x - stop(x - g))^2, whose gradient is g / number of elements
  critic loss      flow matching on the student's videos

Both score networks see whole windows as clips, bidirectionally. Gradients reach the generator
through `self_forcing.replay`, the compressor included.

Source: arXiv:2603.25730 and Self-Forcing (recipe), arXiv:2405.14867 (DMD2).
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from pf_jax.diffusion import flow as flow_lib
from pf_jax.diffusion import schedule
from pf_jax.models.bundle import ModelSpec, VideoModels
from pf_jax.models.compressor import Compressor
from pf_jax.models.transformer import CausalTransformer
from pf_jax.models.vae import WanVae
from pf_jax.rollout.block import RolloutSpec
from pf_jax.train import flops, self_forcing, sharding
from pf_jax.train import lora as lora_lib
from pf_jax.train.lora import LoraSpec
from pf_jax.train.self_forcing import SelfForcingSpec, Window
from pf_jax.types import Array, KeyValues, PyTree

GENERATOR, CRITIC = 'generator', 'critic'


@dataclasses.dataclass(frozen=True)
class DmdSpec:
  """Choices of the stage.

  Attributes:
    guidance: w of the teacher's score, cond + w (cond - uncond). Samplers of clips say g, with
      uncond + g (cond - uncond): w = g - 1.
    generator_every: steps of the critic for one of the generator.
    levels: noise levels that each rollout is judged at, by either player. The paper has 1; more are
      cheap where rollouts are what costs.
    shift: timestep shift of the noise levels that scores are compared at.
    lowest, highest: timesteps that levels are clamped to.

  Raises:
    ValueError: a value out of range.
  """

  guidance: float = 3.0
  generator_every: int = 5
  levels: int = 1
  shift: float = 5.0
  lowest: float = 20.0
  highest: float = 980.0

  def __post_init__(self):
    for name in ('generator_every', 'levels'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if not 0 < self.shift < float('inf'):
      raise ValueError(f'shift={self.shift} must be positive; Wan2.1 uses 5.')
    if not 0 < self.lowest < self.highest <= schedule.TIMESTEPS:
      raise ValueError(f'lowest={self.lowest} and highest={self.highest} must rise within 0..1000.')
    if not 0 <= self.guidance < float('inf'):
      raise ValueError(f'guidance={self.guidance} must not be negative.')


def draw_levels(key: Array, batch: int, spec: DmdSpec) -> Array:
  """A noise level for each video, [B, 1, 1, 1, 1]: uniform, shifted, clamped."""
  level = schedule.shift_sigma(jax.random.uniform(key, (batch, 1, 1, 1, 1)), spec.shift)
  return jnp.clip(level, spec.lowest / schedule.TIMESTEPS, spec.highest / schedule.TIMESTEPS)


def predict(transformer: CausalTransformer, x_t: Array, sigma: Array, text: KeyValues) -> Array:
  """The flow that a model of whole clips sees at one level for all frames: like x_t.

  The batch of `text` may be smaller by a whole factor: several levels of a clip in a row.
  """
  timesteps = jnp.broadcast_to(schedule.timestep(sigma[:, :, 0, 0, 0]), x_t.shape[:2])
  return transformer(x_t, timesteps, text).flow


def direction(x: Array, fake: Array, real: Array) -> Array:
  """Where x must not go: g of the module's docstring, per video; 0 where it is not finite.

  Args:
    x: the student's videos [B, ...].
    fake: what the critic takes them for, x0.
    real: what the teacher does.
  """
  axes = tuple(range(1, x.ndim))
  scale = jnp.mean(jnp.abs(x - real), axis=axes, keepdims=True)
  return jnp.nan_to_num((fake - real) / scale, nan=0.0, posinf=0.0, neginf=0.0)


def generator_loss(x: Array, own: Array, fake: Array, real: Array) -> Array:
  """A loss whose gradient in x is `direction`, over the elements that are the student's own.

  Args:
    x: [B, F, h, w, C], differentiable.
    own: [B, F, 1, 1, 1], 0 for frames that were replaced.
    fake, real: as in `direction`.
  """
  wanted = jax.lax.stop_gradient(x - direction(x, fake, real))
  weight = jnp.broadcast_to(own, x.shape)
  return 0.5 * jnp.sum(weight * (x - wanted)**2) / jnp.sum(weight)


class Frozen(NamedTuple):
  """Networks that do not move: inputs of the compiled step, or they would be its constants.

  Attributes:
    teacher: bidirectional; what rollouts are judged by.
    empty: text rows [1, rows, D] of the unconditional prompt.
    student: what the generator's adapters belong to; None if all weights are trained. Those of the
      critic belong to the teacher.
  """

  teacher: CausalTransformer
  empty: Array
  student: CausalTransformer | None = None


def teacher_x0(frozen: Frozen, x_t: Array, sigma: Array, rows: Array, guidance: float) -> Array:
  """The teacher's guided prediction of x0; `rows` [B, rows, D] are the prompts'."""
  teacher = frozen.teacher
  flow = predict(teacher, x_t, sigma, teacher.text_keys_values(rows))
  if guidance:
    empty = teacher.text_keys_values(jnp.broadcast_to(frozen.empty, rows.shape))
    flow = flow + guidance * (flow - predict(teacher, x_t, sigma, empty))
  return flow_lib.predict_x0(x_t, flow, sigma)


class DmdBatch(NamedTuple):
  """What a step sees: the prompts, and what the student made of them.

  Attributes:
    rows: text rows [B, rows, D].
    keys: [B] typed random keys, of each rollout's noise.
    window: of the student's rollout; None before `generate`, like `frozen`.
    frozen: the networks that do not move.
  """

  rows: Array
  keys: Array
  window: Window | None = None
  frozen: Frozen | None = None


class Lora(NamedTuple):
  """Adapters of the two players' transformers; rank 0 trains all weights."""

  generator: LoraSpec = LoraSpec()
  critic: LoraSpec = LoraSpec()


class DmdObjective:
  """`fit`'s view of the stage: the generator (transformer, compressor) and its critic.

  Args:
    spec: sizes of the student.
    vae: decodes rollouts; frozen.
    start: gives transformer and compressor of the student, and the critic's transformer. Called
      once; what it returns is not kept here.
    frozen: networks that do not move.
    rollout: the sampler's cache and passes.
    self_forcing: choices of the rollout.
    dmd: choices of the stage.
    seed: of the rollouts' lengths and exits, and of adapters.
    lora: adapters.
  """

  averaged = (GENERATOR,)

  def __init__(self, spec: ModelSpec, vae: WanVae,
               start: Callable[[], tuple[CausalTransformer, Compressor, CausalTransformer]],
               frozen: Frozen, rollout: RolloutSpec, self_forcing: SelfForcingSpec, dmd: DmdSpec,
               seed: int, lora: Lora | None = None):
    self._model, self._vae, self._start, self._frozen = spec, vae, start, frozen
    self.rollout = dataclasses.replace(rollout, cache=self_forcing.cache(rollout.cache))
    self._self_forcing, self._spec, self._seed = self_forcing, dmd, seed
    self._lora = lora or Lora()
    self.players = {GENERATOR: dmd.generator_every, CRITIC: 1}
    self._flops: dict[tuple[int, int], int] = {}

  def init(self, seed: int) -> dict[str, Any]:
    """The trained parts: whole networks, or adapters of them; the networks come trained."""
    transformer, compressor, critic = self._start()
    return {GENERATOR: {'transformer': self._trained(transformer, self._lora.generator, seed),
                        'compressor': compressor},
            CRITIC: {'transformer': self._trained(critic, self._lora.critic, seed + 1)}}

  def place(self, put: Callable[[PyTree], PyTree]) -> None:
    """Moves the networks that do not move by themselves."""
    self._frozen, self._vae = put(self._frozen), put(self._vae)

  def _trained(self, transformer: CausalTransformer, spec: LoraSpec, seed: int) -> PyTree:
    return lora_lib.init(transformer, spec, seed) if spec.rank else transformer

  def param_groups(self, params: PyTree) -> PyTree:
    """Gradient norms are reported for generator, compressor and critic."""
    names = {(GENERATOR, 'transformer'): GENERATOR, (GENERATOR, 'compressor'): 'compressor',
             (CRITIC, 'transformer'): CRITIC}
    return {player: {part: jax.tree.map(lambda _, label=names[player, part]: label, module)
                     for part, module in parts.items()} for player, parts in params.items()}

  def student(self, generator: dict[str, PyTree], frozen: Frozen | None = None, *,
              merge: bool = True) -> VideoModels:
    """The student's networks.

    Args:
      generator: its trained parts.
      frozen: where adapters find their base; default: what the objective was made with.
      merge: adds adapters to the weights, for sampling; losses compute beside them.
    """
    base = (frozen or self._frozen).student
    transformer = _adapted(base, generator['transformer'], self._lora.generator, merge)
    return VideoModels(self._model, self._vae, transformer, generator['compressor'])

  def _critic(self, params: PyTree, frozen: Frozen) -> CausalTransformer:
    return _adapted(frozen.teacher, params[CRITIC]['transformer'], self._lora.critic, merge=False)

  def plan(self, step: int) -> tuple[int, int]:
    """Warm-up blocks and exit pass of a step's rollout; its blocks share them.

    Both are uniform, but for the share of rollouts that begin with the video.
    """
    draw = np.random.default_rng((self._seed, step, 1))  # prompts are drawn without the 1
    warmup = int(draw.integers(self._self_forcing.warmup_blocks + 1))
    exit_step = int(draw.integers(len(self.rollout.sampler.steps)))
    return 0 if draw.random() < self._self_forcing.beginnings else warmup, exit_step

  def generate(self, params: PyTree, batch: DmdBatch, step: int) -> DmdBatch:
    """The student rolls out its prompts."""
    models = self.student(params[GENERATOR])
    warmup, exit_step = self.plan(step)
    window = self_forcing.generate(
        models, self_forcing.text_keys_values(models, batch.rows), batch.keys, warmup=warmup,
        exit_step=exit_step, rollout=self.rollout, spec=self._self_forcing)
    return batch._replace(window=window, frozen=self._frozen)

  def generation_flops(self, params: PyTree, batch: DmdBatch, step: int) -> int:
    """FLOPs of `generate`."""
    warmup, exit_step = self.plan(step)
    passes, window = len(self.rollout.sampler.steps), self._self_forcing.window_blocks
    count = functools.partial(self._block_flops, params, batch.rows)
    return warmup * count(passes) + window * count(exit_step + 1)

  def _block_flops(self, params: PyTree, rows: Array, passes: int) -> int:
    """FLOPs of one block of a rollout; rows and parameters have one shape in a run."""
    kind = len(rows), passes
    if kind not in self._flops:
      models = jax.eval_shape(self.student, params[GENERATOR], self._frozen)
      abstract = AbstractMesh((1,), (sharding.AXIS,), (AxisType.Auto,))
      self._flops[kind] = sum(
          flops.count(function, models, *arguments, trips=passes - 1)
          for _, function, arguments, _ in self_forcing.programs(
              models, len(rows), abstract, rollout=self.rollout, spec=self._self_forcing))
    return self._flops[kind]

  def loss(self, params: PyTree, batch: DmdBatch, key: Array,
           moving: Collection[str] = (GENERATOR, CRITIC)) -> tuple[Array, dict[str, Array]]:
    """The losses of the parts that move; neither has a gradient in the other's parameters."""
    assert batch.window is not None, 'comes from `generate`'
    assert batch.frozen is not None
    generator_key, critic_key = jax.random.split(key)
    loss, metrics = jnp.zeros(()), {}
    if GENERATOR in moving:
      value, about = self._generator_loss(params, batch.rows, batch.window, batch.frozen,
                                          generator_key)
      loss, metrics = loss + value, about
    clip, _ = self_forcing.clips_of(batch.window.blocks.latents, batch.window)
    metrics['critic'] = self._critic_loss(self._critic(params, batch.frozen), clip, batch.rows,
                                          critic_key)
    return loss + metrics['critic'], metrics

  def _generator_loss(self, params: PyTree, rows: Array, window: Window, frozen: Frozen,
                      key: Array) -> tuple[Array, dict[str, Array]]:
    models = self.student(params[GENERATOR], frozen, merge=False)
    text = models.transformer.text_keys_values(rows)
    x0 = self_forcing.replay(models, text, window, rollout=self.rollout)
    clip, own = (jnp.repeat(x, self._spec.levels, axis=0)
                 for x in self_forcing.clips_of(x0, window))
    fixed, critic = jax.lax.stop_gradient((clip, self._critic(params, frozen)))
    level_key, noise_key = jax.random.split(key)
    sigma = draw_levels(level_key, len(clip), self._spec)
    x_t = flow_lib.add_noise(fixed, jax.random.normal(noise_key, clip.shape), sigma)
    fake = flow_lib.predict_x0(
        x_t, predict(critic, x_t, sigma, critic.text_keys_values(rows)), sigma)
    real = teacher_x0(frozen, x_t, sigma, rows, self._spec.guidance)
    metrics = {'fake_minus_real': jnp.sqrt(jnp.mean((fake - real)**2)),
               'student_minus_real': jnp.sqrt(jnp.mean((fixed - real)**2))}
    return generator_loss(clip, own, fake, real), metrics

  def _critic_loss(self, critic: CausalTransformer, clip: Array, rows: Array, key: Array) -> Array:
    level_key, noise_key = jax.random.split(key)
    clip = jnp.repeat(clip, self._spec.levels, axis=0)
    sigma = draw_levels(level_key, len(clip), self._spec)
    noise = jax.random.normal(noise_key, clip.shape)
    flow = predict(critic, flow_lib.add_noise(clip, noise, sigma), sigma,
                   critic.text_keys_values(rows))
    return jnp.mean((flow - flow_lib.flow_target(clip, noise))**2)


def _adapted(base: CausalTransformer | None, trained: PyTree, spec: LoraSpec, merge: bool
             ) -> CausalTransformer:
  """A transformer from its trained part: itself, or adapters of a frozen one."""
  if not spec.rank:
    return trained
  assert base is not None, 'adapters need the network that they belong to'
  return (lora_lib.merge if merge else lora_lib.attach)(base, trained, spec)
