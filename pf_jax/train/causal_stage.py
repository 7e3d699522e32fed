"""Stage "causal": trains on clips by teacher forcing and leaves a model to sample.

Every evaluation samples a few blocks for one prompt of each class, or for some captions of real
videos, with the very programs that sampling uses, and writes `samples.png`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pf_jax.models.bundle import Models
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec, SamplerSpec
from pf_jax.train import clips, evaluation, loop, plan, sharding
from pf_jax.train.clips import ClipStage
from pf_jax.train.config import TrainConfig
from pf_jax.train.teacher_forcing import CausalObjective, TeacherForcingSpec
from pf_jax.types import PyTree
from pf_jax.weights import package


@dataclasses.dataclass(frozen=True)
class CausalStage(ClipStage):
  """Settings of the stage "causal", beside those of `ClipStage`.

  Attributes:
    teacher_forcing: choices of the objective.
    cache: fields of `CacheSpec` that are not the model's sizes; training and sampling share them.
    sampler: how evaluations sample, and the model's default.
    eval_blocks: blocks sampled in an evaluation.

  Raises:
    ValueError: sizes that do not fit each other.
  """

  name: ClassVar[str] = 'causal'
  teacher_forcing: TeacherForcingSpec = TeacherForcingSpec()
  cache: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  sampler: SamplerSpec = SamplerSpec()
  eval_blocks: int = 6

  def __post_init__(self):
    super().__post_init__()
    if self.eval_blocks < 1:
      raise ValueError(f'eval_blocks={self.eval_blocks} must be at least 1.')
    cache = self.cache_spec
    if self.clip_blocks <= cache.sink_blocks + cache.recent_blocks:
      raise ValueError(
          f'clip_blocks={self.clip_blocks} leave the mid partition empty with sink_blocks='
          f'{cache.sink_blocks} and recent_blocks={cache.recent_blocks}; use at least '
          f'{cache.sink_blocks + cache.recent_blocks + 1}.')

  @property
  def cache_spec(self):
    """The cache's sizes while sampling."""
    return block_lib.cache_spec(self.model, **self.cache).trainable()


def sample_evaluation(stage: CausalStage, objective: CausalObjective, tokenizer: Tokenizer,
                      workdir: str | os.PathLike) -> Callable[[PyTree, int], dict[str, float]]:
  """Samples a few prompts and judges the last block; saves the model it judged.

  Args:
    stage: settings.
    objective: puts trained parts and the rest together.
    tokenizer: of the prompts.
    workdir: receives `model/` and `samples.png`.

  Returns:
    (trained parts, step) -> metrics.
  """
  world, prompts = clips.evaluation_prompts(stage)
  sampler = evaluation.Sampler(world, RolloutSpec(stage.cache_spec, stage.sampler), texts=prompts,
                               clip_blocks=stage.clip_blocks)

  def evaluate(params: PyTree, step: int) -> dict[str, float]:
    models = sharding.on_one_card(objective.assemble(params))
    save(stage, models, step, workdir)
    encode = PromptEncoder(tokenizer, models.spec.text, lambda: models.text)
    return sampler.judge(models.without_text(), encode, (stage.eval_blocks,), step, workdir)

  return evaluate


def save(stage: CausalStage, models: Models, step: int, workdir: str | os.PathLike) -> None:
  """Writes `WORKDIR/model`, which `launch.sample --checkpoint=WORKDIR` finds."""
  package.save_model(pathlib.Path(workdir) / 'model', models, choices={
      'cache': dict(stage.cache), 'sampler': dataclasses.asdict(stage.sampler),
  }, about={'stage': stage.name, 'step': step})


def sketch(stage: CausalStage, config: TrainConfig) -> plan.Sketch:
  """The stage as shapes, for a memory plan."""
  return clips.sketch(stage, config, lambda models: CausalObjective(
      models, stage.cache_spec, stage.teacher_forcing))


def train_causal(stage: CausalStage, config: TrainConfig,
                 workdir: str | os.PathLike) -> loop.FitResult:
  """Trains transformer, compressor and text encoder; see `fit` and the module's docstring.

  Raises:
    PackageError: there is no usable VAE at `stage.vae`.
    StoreError: a store of other content is in the way, or no usable one at `stage.dataset`.
  """
  stage, models, tokenizer = clips.load_networks(stage, config.seed)
  store = clips.open_store(stage, models, tokenizer)
  objective = CausalObjective(models, stage.cache_spec, stage.teacher_forcing)
  evaluate = sample_evaluation(stage, objective, tokenizer, workdir)
  return loop.fit(objective, clips.clip_batches(stage, store, config.seed), config, workdir,
                  evaluate=evaluate, about=clips.about(store))
