"""Stage "dmd": distils the causal student on its own rollouts, from prompts alone.

Every evaluation samples one prompt of each class with the sampler's own programs, a short video
and, if asked for, one many times as long as what is trained, and writes `samples.png`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from pf_jax import pipeline
from pf_jax.data import digits
from pf_jax.models.bundle import Models, ModelSpec
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec, SamplerSpec
from pf_jax.train import checks, evaluation, loop
from pf_jax.train.config import TrainConfig
from pf_jax.train.dmd import DmdBatch, DmdObjective, DmdSpec, Teacher
from pf_jax.train.ode_stage import load_teacher
from pf_jax.train.self_forcing import SelfForcingSpec
from pf_jax.types import PyTree
from pf_jax.weights import package


@dataclasses.dataclass(frozen=True)
class DmdStage:
  """Settings of the stage "dmd".

  Attributes:
    start: model directory or workdir of the student, best that of the stage "ode".
    teacher: model directory or workdir of the bidirectional teacher. Any size that reads the same
      text rows and latents; the critic is as large.
    videos: rollouts a step.
    cache: fields of `CacheSpec` that are not the model's sizes; training and sampling share them,
      but for the archive's capacity.
    train_sink_blocks: sink blocks while training; None: those of `cache`. With two of them a short
      window trains the compressor on hardly anything.
    sampler: the student's passes.
    self_forcing: window, warm-up, context noise.
    objective: guidance, noise levels, how often the generator moves.
    critic_learning_rate: of the critic; the generator's is the optimizer's.
    world: its prompts are rolled out.
    eval_blocks: blocks sampled in an evaluation; the first and the last are measured.
    tokenizer: a tokenizer.json; '' for the packaged one.

  Raises:
    ValueError: a value out of range.
  """

  start: str
  teacher: str
  videos: int = 8
  cache: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  train_sink_blocks: int | None = None
  sampler: SamplerSpec = SamplerSpec(solver='renoise')
  self_forcing: SelfForcingSpec = SelfForcingSpec()
  objective: DmdSpec = DmdSpec()
  critic_learning_rate: float = 1e-6
  world: digits.DigitsWorld = digits.DigitsWorld()
  eval_blocks: tuple[int, ...] = (6,)
  tokenizer: str = ''

  def __post_init__(self):
    if self.videos < 1:
      raise ValueError(f'videos={self.videos} must be at least 1.')
    if not 0 < self.critic_learning_rate < float('inf'):
      raise ValueError(f'critic_learning_rate={self.critic_learning_rate} must be positive.')
    if not self.eval_blocks or min(self.eval_blocks) < 1:
      raise ValueError(f'eval_blocks={self.eval_blocks} must name lengths of at least 1.')

  def rollout(self, model: ModelSpec, *, training: bool) -> RolloutSpec:
    """Cache and passes while training or sampling.

    Raises:
      ValueError: choices that do not fit the model or each other.
    """
    choices = dict(self.cache)
    if training and self.train_sink_blocks is not None:
      choices['sink_blocks'] = self.train_sink_blocks
    return RolloutSpec(block_lib.cache_spec(model, **choices), self.sampler)


def prompt_batches(stage: DmdStage, encode: PromptEncoder, seed: int
                   ) -> Callable[[int], Iterator[PyTree]]:
  """`fit`'s batches: text rows of the prompts of a step, a function of the step alone.

  A prompt is encoded when it is drawn for the first time; its rows are kept.
  """
  count = len(digits.DIGIT_NAMES) * len(digits.DIRECTIONS) * len(stage.world.colours)

  def batches(step: int) -> Iterator[PyTree]:
    while True:
      draw = np.random.default_rng((seed, step)).integers(20 * count, size=stage.videos)
      yield DmdBatch(jnp.asarray(encode([stage.world.describe(int(i), seed).prompt
                                         for i in draw])))
      step += 1

  return batches


def sample_evaluation(stage: DmdStage, objective: DmdObjective, models: Models,
                      encode: PromptEncoder, workdir: str | os.PathLike
                      ) -> Callable[[PyTree, int], dict[str, float]]:
  """Samples one prompt per class at every length and judges; saves the model it judged.

  Args:
    stage: settings.
    objective: puts the student together.
    models: the student's networks, for its text encoder.
    encode: of the prompts.
    workdir: receives `model/` and `samples.png`.

  Returns:
    (averaged parts, step) -> metrics.
  """
  sampler = evaluation.Sampler(stage.world, stage.rollout(models.spec, training=False))

  def evaluate(params: PyTree, step: int) -> dict[str, float]:
    student = objective.assemble(params['generator'])
    save(stage, models.replaced(transformer=student.transformer, compressor=student.compressor),
         step, workdir)
    return sampler.judge(student, encode, stage.eval_blocks, step, workdir)

  return evaluate


def save(stage: DmdStage, models: Models, step: int, workdir: str | os.PathLike) -> None:
  """Writes `WORKDIR/model`, which `launch.sample --checkpoint=WORKDIR` finds."""
  package.save_model(f'{workdir}/model', models, choices={
      'cache': dict(stage.cache), 'sampler': dataclasses.asdict(stage.sampler),
  }, about={'stage': 'dmd', 'step': step})


def train_dmd(stage: DmdStage, config: TrainConfig, workdir: str | os.PathLike) -> loop.FitResult:
  """Trains the student's transformer and compressor, and the critic; see `fit`.

  Raises:
    PackageError: there is no usable student or teacher, or their text encoders differ.
    ValueError: choices that do not fit the student.
  """
  models = package.load_model(pipeline.find_model(stage.start)).models
  checks.check_world(stage.world, models.spec)
  tokenizer = Tokenizer.from_file(
      stage.tokenizer or package.ROOT / 'digits' / package.TOKENIZER_FILE,
      max_tokens=models.spec.text.max_tokens)
  encode = PromptEncoder(tokenizer, models.spec.text, lambda: models.text)
  teacher = Teacher(load_teacher(stage.teacher, models),
                    jnp.asarray(encode([''], allow_empty=True)))
  objective = DmdObjective(models.without_text(), teacher,
                           stage.rollout(models.spec, training=True), stage.self_forcing,
                           stage.objective, config.seed)
  optimizer = dataclasses.replace(config.optimizer, group_scale={
      **config.optimizer.group_scale,
      'critic': stage.critic_learning_rate / config.optimizer.learning_rate})
  evaluate = sample_evaluation(stage, objective, models, encode, workdir)
  return loop.fit(objective, prompt_batches(stage, encode, config.seed),
                  dataclasses.replace(config, optimizer=optimizer), workdir, evaluate=evaluate)
