"""Stage "dmd": distils the causal student on its own rollouts, from prompts alone.

Every evaluation samples a few prompts with the sampler's own programs, a short video and, if asked
for, one many times as long as what is trained, and writes pictures and curves of them.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.data import digits, source, text_rows
from pf_jax.models import bundle
from pf_jax.models.bundle import ModelSpec, VideoModels
from pf_jax.models.transformer import CausalTransformer, TransformerSpec
from pf_jax.released import ReleasedWeights
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec, SamplerSpec
from pf_jax.train import checks, clips, evaluation, loop, networks, plan, self_forcing, sharding
from pf_jax.train.config import OptimizerConfig, TrainConfig
from pf_jax.train.dmd import CRITIC, GENERATOR, DmdBatch, DmdObjective, DmdSpec, Frozen, Lora
from pf_jax.train.lora import LoraSpec
from pf_jax.train.networks import Origin, PackagedOrigin, ReleasedOrigin
from pf_jax.train.self_forcing import SelfForcingSpec
from pf_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class DmdStage:
  """Settings of the stage "dmd".

  Attributes:
    start: model directory or workdir of the student, best that of the stage "ode". With `model`: a
      directory of released weights.
    teacher: the same of the bidirectional teacher. Any size that reads the same text rows and
      latents; the critic is as large.
    model: sizes of released weights; model directories have their own.
    teacher_model: sizes of a released teacher's transformer; None: the student's.
    transformer: another file for the student's transformer, with released weights.
    compressor: a trained compressor, with released weights; None starts zero-shot.
    frozen_dtype: precision of the teacher's weights, and of those that adapters belong to.
    prompts: store of text rows that `launch.prepare` made; '' encodes the prompts of `world`.
    videos: rollouts a step.
    cache: fields of `CacheSpec` that are not the model's sizes; training and sampling share them,
      but for the archive's capacity.
    train_sink_blocks: sink blocks while training; None: those of `cache`. With two of them a short
      window trains the compressor on hardly anything.
    sampler: the student's passes.
    self_forcing: window, warm-up, context noise.
    objective: guidance, noise levels, how often the generator moves.
    critic_learning_rate: of the critic; the generator's is the optimizer's.
    lora, critic_lora: adapters of generator and critic in place of all their weights.
    remat: computes layers again in the backward pass, which saves most of the activations.
    negative_prompt: what the teacher's guidance leads away from.
    world: its prompts are rolled out, and its truth measures evaluations; without `prompts` only.
    eval_blocks: lengths that are measured; the longest is sampled, and drawn.
    eval_videos: videos of an evaluation, with `prompts`; one of each class without.
    tokenizer: a tokenizer.json; '' for the packaged one.

  Raises:
    ValueError: a value out of range.
  """

  start: str
  teacher: str
  model: ModelSpec | None = None
  teacher_model: TransformerSpec | None = None
  transformer: str | None = None
  compressor: str | None = None
  frozen_dtype: str = 'float32'
  prompts: str = ''
  videos: int = 8
  cache: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  train_sink_blocks: int | None = None
  sampler: SamplerSpec = SamplerSpec(solver='renoise')
  self_forcing: SelfForcingSpec = SelfForcingSpec()
  objective: DmdSpec = DmdSpec()
  critic_learning_rate: float = 1e-6
  lora: LoraSpec = LoraSpec()
  critic_lora: LoraSpec = LoraSpec()
  remat: bool = False
  negative_prompt: str = ''
  world: digits.DigitsWorld = digits.DigitsWorld()
  eval_blocks: tuple[int, ...] = (6,)
  eval_videos: int = 2
  tokenizer: str = ''

  def __post_init__(self):
    for name in ('videos', 'eval_videos'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if not 0 <= self.critic_learning_rate < float('inf'):
      raise ValueError(f'critic_learning_rate={self.critic_learning_rate} must not be negative.')
    if not self.eval_blocks or min(self.eval_blocks) < 1:
      raise ValueError(f'eval_blocks={self.eval_blocks} must name lengths of at least 1.')
    if self.model is not None and not self.prompts:
      raise ValueError('prompts=\'\' must name a store of text rows for released weights; make one '
                       'with launch.prepare.')
    if self.model is None and (self.transformer or self.compressor or self.teacher_model):
      raise ValueError('transformer, compressor and teacher_model are for released weights; give '
                       'their sizes as `model`, or leave them out.')

  def student_origin(self) -> Origin:
    """Where the student's networks lie.

    Raises:
      PackageError: there is no model.
    """
    if self.model is None:
      return PackagedOrigin(self.start, clips.tokenizer_file(self.tokenizer))
    return ReleasedOrigin(ReleasedWeights(self.start, self.model, transformer=self.transformer,
                                          compressor=self.compressor))

  def teacher_origin(self) -> Origin:
    """Where the teacher's transformer lies.

    Raises:
      PackageError: there is no model.
    """
    if self.model is None:
      return PackagedOrigin(self.teacher, clips.tokenizer_file(self.tokenizer))
    transformer = self.teacher_model or self.model.transformer
    compressor = dataclasses.replace(self.model.compressor, width=transformer.width)
    return ReleasedOrigin(ReleasedWeights(self.teacher, dataclasses.replace(
        self.model, transformer=transformer, compressor=compressor)))

  def rollout(self, model: ModelSpec, *, training: bool) -> RolloutSpec:
    """Cache and passes while training or sampling.

    Raises:
      ValueError: choices that do not fit the model or each other.
    """
    choices = dict(self.cache)
    if training and self.train_sink_blocks is not None:
      choices['sink_blocks'] = self.train_sink_blocks
    return RolloutSpec(block_lib.cache_spec(model, **choices).trainable(), self.sampler)

  def optimizers(self, generator: OptimizerConfig) -> dict[str, OptimizerConfig]:
    """Those of both players; they differ in their rates."""
    critic = dataclasses.replace(generator, learning_rate=self.critic_learning_rate,
                                 adam_learning_rate=0.0)
    return {GENERATOR: generator, CRITIC: critic}


class PromptSource(source.Source, Protocol):
  """Records with text rows `rows` [rows, D], and the prompts that they are of."""

  @property
  def crc32(self) -> int: ...

  def prompt(self, index: int) -> str: ...


class PromptRows:
  """Text rows that are in memory: a few hundred prompts of the miniature's world.

  Args:
    prompts: N texts.
    rows: [N, rows, D].
  """

  def __init__(self, prompts: Sequence[str], rows: np.ndarray):
    self._prompts, self._rows = prompts, rows

  def prompt(self, index: int) -> str:
    """The text of a record."""
    return self._prompts[index]

  @property
  def crc32(self) -> int:
    """Of the prompts."""
    return zlib.crc32('\n'.join(self._prompts).encode())

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> source.Record:
    return {'rows': self._rows[index]}


def world_prompts(world: digits.DigitsWorld) -> list[str]:
  """Every prompt there is, once."""
  return [world.describe(0, digit=digit, direction=direction, colour=colour.name).prompt
          for digit, direction, colour in itertools.product(
              range(len(digits.DIGIT_NAMES)), digits.DIRECTIONS, world.colours)]


def prompt_batches(prompts: source.Source, videos: int, seed: int
                   ) -> Callable[[int], Iterator[PyTree]]:
  """`fit`'s batches: text rows and noise keys of a step's rollouts, a function of the step alone.

  Args:
    prompts: records with `rows` [rows, D].
    videos: rollouts a step.
    seed: of order and noise.
  """
  base = jax.random.fold_in(jax.random.key(seed), 1)  # not the key that losses draw from

  def batches(step: int) -> Iterator[PyTree]:
    for record in source.batches(prompts, videos, start_step=step, shuffle_seed=seed):
      keys = jax.random.split(jax.random.fold_in(base, step), videos)
      yield DmdBatch(jnp.asarray(record['rows'], jnp.float32), keys)
      step += 1

  return batches


def open_prompts(stage: DmdStage, origin: Origin) -> PromptSource:
  """The text rows to roll out.

  Raises:
    StoreError: there is no usable store.
  """
  if not stage.prompts:
    prompts = world_prompts(stage.world)
    return PromptRows(prompts, origin.text_rows(prompts))
  text = origin.spec.text
  return text_rows.TextStore(stage.prompts, text.max_tokens, text.width)


def make_objective(stage: DmdStage, origin: Origin, seed: int) -> DmdObjective:
  """The objective; what does not move is loaded, what is trained is loaded by `init`.

  Raises:
    PackageError: there is no usable teacher.
    ValueError: choices that do not fit the student.
  """
  rollout, teacher_origin = stage.rollout(origin.spec, training=True), stage.teacher_origin()
  if isinstance(origin, PackagedOrigin) and isinstance(teacher_origin, PackagedOrigin):
    # Released networks have one VAE and one text encoder.
    networks.check_teacher(origin.models(), teacher_origin, stage.self_forcing.window_blocks)

  def load(source: Origin) -> CausalTransformer:
    return networks.with_remat(source.transformer(), stage.remat)

  teacher = networks.cast(load(teacher_origin), stage.frozen_dtype)
  empty = jnp.asarray(origin.text_rows([stage.negative_prompt]))
  base = None
  if stage.lora.rank:
    base = networks.cast(load(origin), stage.frozen_dtype)

  def start():
    return load(origin), origin.compressor(), load(teacher_origin)

  return DmdObjective(origin.spec, origin.vae(), start, Frozen(teacher, empty, base), rollout,
                      stage.self_forcing, stage.objective, seed,
                      Lora(stage.lora, stage.critic_lora))


def sketch(stage: DmdStage, config: TrainConfig) -> plan.Sketch:
  """The stage as shapes, for a memory plan; reads nothing but sizes.

  Raises:
    PackageError: there is no model.
    ValueError: choices that do not fit each other.
  """
  spec, teacher_spec = stage.student_origin().spec, stage.teacher_origin().spec
  nets = bundle.shapes(spec).without_text()
  student, critic = (networks.with_remat(transformer, stage.remat) for transformer in (
      nets.transformer, bundle.shapes(teacher_spec).transformer))
  rollout, text = stage.rollout(spec, training=True), spec.text
  lower = functools.partial(networks.cast, dtype=stage.frozen_dtype)

  def rows(count: int) -> Any:
    return jax.ShapeDtypeStruct((count, text.max_tokens, text.width), jnp.float32)

  frozen = Frozen(jax.eval_shape(lower, critic), rows(1),
                  jax.eval_shape(lower, student) if stage.lora.rank else None)
  count = max(stage.videos // config.accumulate, 1)

  def objective(vae, frozen, start=None) -> DmdObjective:
    return DmdObjective(spec, vae, lambda: start, frozen, rollout, stage.self_forcing,
                        stage.objective, config.seed, Lora(stage.lora, stage.critic_lora))

  params = jax.eval_shape(lambda *start: objective(None, None, start).init(0), student,
                          nets.compressor, critic)

  def batch(mesh):
    given = DmdBatch(rows(count),
                     jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count)))
    window = jax.eval_shape(
        lambda params, vae, frozen, given: objective(vae, frozen).generate(params, given, 0).window,
        params, nets.vae, frozen, given)
    given = plan.by_videos(given, jax.tree.map(lambda _: 0, given), mesh)
    return given._replace(window=plan.by_videos(window, self_forcing.window_axes(window), mesh),
                          frozen=plan.resident(frozen, mesh))

  def calls(mesh, state):
    models = plan.resident(jax.eval_shape(
        lambda generator, vae, frozen: objective(vae, frozen).student(generator),
        state.params[GENERATOR], nets.vae, frozen), mesh)
    window = plan.bytes_of(batch(mesh).window)
    resident = () if stage.lora.rank else (0,)
    return [plan.Call(f'rollout: {name}', function, (models, *arguments), resident, donate, window,
                      trips=len(stage.sampler.steps) - 1)
            for name, function, arguments, donate in self_forcing.programs(
                models, count, mesh, rollout=objective(None, None).rollout,
                spec=stage.self_forcing)]

  held: dict[str, PyTree] = {'teacher': frozen.teacher, 'VAE': nets.vae}
  held |= {'weights under adapters': frozen.student} if stage.lora.rank else {}
  return plan.Sketch(objective(nets.vae, frozen), params, held, batch, calls,
                     stage.optimizers(config.optimizer))


def sample_evaluation(stage: DmdStage, objective: DmdObjective, origin: Origin,
                      prompts: PromptSource, workdir: str | os.PathLike
                      ) -> Callable[[PyTree, int], dict[str, float]]:
  """Samples every length and judges; saves the model it judged.

  Args:
    stage: settings.
    objective: puts the student together.
    origin: of the student, for what is not trained.
    prompts: of the training, the first of which are sampled unless they are the world's.
    workdir: receives `model/`, pictures and curves.

  Returns:
    (averaged parts, step) -> metrics.
  """
  if stage.prompts:
    count = min(stage.eval_videos, len(prompts))
    texts, world = [prompts.prompt(i) for i in range(count)], None
    rows = np.stack([np.asarray(prompts[i]['rows'], np.float32) for i in range(count)])
  else:
    texts, world = evaluation.prompts(stage.world), stage.world
    rows = origin.text_rows(texts)
  sampler = evaluation.Sampler(world, stage.rollout(origin.spec, training=False), texts=texts,
                               clip_blocks=stage.self_forcing.window_blocks)

  def evaluate(params: PyTree, step: int) -> dict[str, float]:
    student = sharding.on_one_card(objective.student(params[GENERATOR]))
    save(stage, origin, student, step, workdir)
    return sampler.judge(student, lambda _: rows, stage.eval_blocks, step, workdir)

  return evaluate


def save(stage: DmdStage, origin: Origin, student: VideoModels, step: int,
         workdir: str | os.PathLike) -> None:
  """Writes `WORKDIR/model`, which `launch.sample --checkpoint=WORKDIR` finds."""
  origin.save(pathlib.Path(workdir, 'model'), student, choices={
      'cache': dict(stage.cache), 'sampler': dataclasses.asdict(stage.sampler),
  }, about={'stage': 'dmd', 'step': step})


def train_dmd(stage: DmdStage, config: TrainConfig, workdir: str | os.PathLike) -> loop.FitResult:
  """Trains the student's transformer and compressor, and the critic; see `fit`.

  Raises:
    PackageError: there is no usable student or teacher, or they do not belong together.
    ValueError: choices that do not fit the student.
  """
  origin = stage.student_origin()
  if not stage.prompts:
    checks.check_world(stage.world, origin.spec)
  prompts = open_prompts(stage, origin)
  objective = make_objective(stage, origin, config.seed)
  evaluate = sample_evaluation(stage, objective, origin, prompts, workdir)
  about = {'student': origin.digests(), 'teacher': stage.teacher_origin().digests(),
           'prompts_crc32': prompts.crc32}
  return loop.fit(objective, prompt_batches(prompts, stage.videos, config.seed), config, workdir,
                  evaluate=evaluate, optimizers=stage.optimizers(config.optimizer), about=about)
