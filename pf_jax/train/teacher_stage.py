"""Stage "teacher": trains the bidirectional model on clips and leaves it to distil from.

Every evaluation samples one clip for each class, or for some captions of real videos, with the very
sampler of the bidirectional baseline (`rollout.bidirectional`) and writes `samples.png`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.models.bundle import Models
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.rollout.bidirectional import ClipSamplerSpec, sample_clip
from pf_jax.rollout.rollout import to_frames
from pf_jax.train import clips, evaluation, loop, plan, sharding
from pf_jax.train.clips import ClipStage
from pf_jax.train.config import TrainConfig
from pf_jax.train.teacher import TeacherObjective, TeacherSpec
from pf_jax.types import Array, KeyValues, PyTree
from pf_jax.weights import package


@dataclasses.dataclass(frozen=True)
class TeacherStage(ClipStage):
  """Settings of the stage "teacher", beside those of `ClipStage`.

  Attributes:
    objective: choices of the objective.
    sampler: how evaluations sample.
  """

  objective: TeacherSpec = TeacherSpec()
  sampler: ClipSamplerSpec = ClipSamplerSpec(solver='euler', steps=24, guidance=3.0)


def sample_evaluation(stage: TeacherStage, objective: TeacherObjective, tokenizer: Tokenizer,
                      workdir: str | os.PathLike) -> Callable[[PyTree, int], dict[str, float]]:
  """Samples one clip per prompt and judges first and last block; saves the model it judged.

  Args:
    stage: settings.
    objective: puts trained parts and the rest together.
    tokenizer: of the prompts.
    workdir: receives `model/` and `samples.png`.

  Returns:
    (trained parts, step) -> metrics.
  """
  world, prompts = clips.evaluation_prompts(stage)
  frames, height, width, channels = stage.model.video.block_latent_shape
  shape = (len(prompts), stage.clip_blocks * frames, height, width, channels)

  @jax.jit
  def sample(models: Models, text: KeyValues, negative: KeyValues) -> Array:
    noise = jax.random.normal(jax.random.key(evaluation.SEED), shape)
    latents = sample_clip(models.transformer, noise, text, negative, spec=stage.sampler)
    return to_frames(models.vae.decode(latents))

  keys_values = jax.jit(lambda models, rows: models.transformer.text_keys_values(rows))

  def evaluate(params: PyTree, step: int) -> dict[str, float]:
    models = sharding.on_one_card(objective.assemble(params))
    save(models, stage.clip_blocks, step, workdir)
    encode = PromptEncoder(tokenizer, models.spec.text, lambda: models.text)
    text, negative = (keys_values(models, jnp.asarray(encode(texts, allow_empty=True)))
                      for texts in (prompts, ['']))
    videos = np.asarray(sample(models, text, negative))
    return evaluation.judge(videos, prompts, world, stage.model.video,
                            (1, stage.clip_blocks), step, workdir)

  return evaluate


def save(models: Models, blocks: int, step: int, workdir: str | os.PathLike) -> None:
  """Writes `WORKDIR/model`, which the stages that distil find."""
  package.save_model(pathlib.Path(workdir) / 'model', models,
                     about={'stage': 'teacher', 'step': step, 'clip_blocks': blocks})


def sketch(stage: TeacherStage, config: TrainConfig) -> plan.Sketch:
  """The stage as shapes, for a memory plan."""
  empty = clips.load_tokenizer(stage)([''], allow_empty=True)
  return clips.sketch(stage, config,
                      lambda models: TeacherObjective(models, empty, stage.objective))


def train_teacher(stage: TeacherStage, config: TrainConfig, workdir: str | os.PathLike
                  ) -> loop.FitResult:
  """Trains transformer and text encoder; see `fit` and the module's docstring.

  Raises:
    PackageError: there is no usable VAE at `stage.vae`, or no model at `stage.start`.
    StoreError: a store of other content is in the way, or no usable one at `stage.dataset`.
  """
  stage, models, tokenizer = clips.load_networks(stage, config.seed)
  store = clips.open_store(stage, models, tokenizer)
  empty = tokenizer([''], allow_empty=True)
  objective = TeacherObjective(models, empty, stage.objective)
  evaluate = sample_evaluation(stage, objective, tokenizer, workdir)
  return loop.fit(objective, clips.clip_batches(stage, store, config.seed), config, workdir,
                  evaluate=evaluate, about=clips.about(store))
