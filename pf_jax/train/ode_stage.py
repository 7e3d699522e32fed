"""Stage "ode": the causal student learns where the teacher's trajectories end.

The trajectories are computed once into a store (resumable, checksummed), so that the teacher is not
in memory while the student trains. Training is that of the stage "causal", through the same cache,
with the teacher's way in place of drawn noise.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax import outputs, pipeline
from pf_jax.data import latents
from pf_jax.models.bundle import Models
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.models.transformer import CausalTransformer
from pf_jax.rollout.bidirectional import ClipSamplerSpec
from pf_jax.train import causal_stage, clips, loop, networks, ode, plan
from pf_jax.train.causal_stage import CausalStage
from pf_jax.train.config import TrainConfig
from pf_jax.train.teacher_forcing import CausalObjective
from pf_jax.types import Array, KeyValues
from pf_jax.weights import package


@dataclasses.dataclass(frozen=True)
class OdeStage(CausalStage):
  """Settings of the stage "ode", beside those of `CausalStage`.

  `store` holds the trajectories, `clips` says how many, `encode_batch` how many at once. Their
  prompts are those of `world`, or with `dataset` its captions.

  Attributes:
    teacher: model directory or workdir of the bidirectional teacher; it reads the student's text
      rows, so both have the same text encoder.
    trajectory: the teacher's sampler.
    clips_per_shard: trajectories a file of the store, the unit that a killed run redoes.

  Raises:
    ValueError: sizes that do not fit each other, or passes of the student that the teacher's way
      does not meet.
  """

  name: ClassVar[str] = 'ode'
  teacher: str = ''
  trajectory: ClipSamplerSpec = ClipSamplerSpec(solver='euler', steps=48, guidance=3.0)
  clips_per_shard: int = 32

  def __post_init__(self):
    super().__post_init__()
    if not self.start or not self.teacher:
      raise ValueError(f'start={self.start!r} and teacher={self.teacher!r} must both name a model '
                       'directory or workdir.')
    ode.snapshot_steps(self.trajectory, self.sampler)


def load_teacher(stage: OdeStage, models: Models) -> CausalTransformer:
  """The transformer of a teacher that reads and draws what a student does.

  Raises:
    PackageError: there is no model, or one that does not belong to the student.
  """
  teacher = networks.PackagedOrigin(stage.teacher, clips.tokenizer_file(stage.tokenizer))
  networks.check_teacher(models, teacher, stage.clip_blocks)
  return teacher.transformer()


def prompts(stage: OdeStage, seed: int) -> Callable[[int], str]:
  """The prompt of every trajectory.

  Raises:
    StoreError: there is no store at `stage.dataset`.
  """
  if not stage.dataset:
    return lambda index: stage.world.describe(index, seed).prompt
  store = latents.LatentStore(stage.dataset)
  return lambda index: store.prompt(index % len(store))


class TrajectoryMaker:
  """What `latents.write_store` calls: indices to the fields of a `ClipBatch`.

  Args:
    stage: settings.
    models: the student's networks; VAE, text encoder and patches are used.
    teacher: bidirectional.
    tokenizer: of the prompts.
    seed: of prompts and noise.
  """

  def __init__(self, stage: OdeStage, models: Models, teacher: CausalTransformer,
               tokenizer: Tokenizer, seed: int):
    self._stage, self._models, self._teacher, self._seed = stage, models, teacher, seed
    self._tokenizer, self._prompt = tokenizer, prompts(stage, seed)
    self._encode = PromptEncoder(tokenizer, models.spec.text, lambda: models.text)
    frames, *rest = stage.model.video.block_latent_shape
    shape = (stage.clip_blocks * frames, *rest)
    steps = ode.snapshot_steps(stage.trajectory, stage.sampler)
    self._keys_values = jax.jit(lambda teacher, rows: teacher.text_keys_values(rows))

    @jax.jit
    def run(models: Models, teacher: CausalTransformer, keys: Array, text: KeyValues,
            empty: KeyValues) -> tuple[Array, Array, Array]:
      noise = jax.vmap(functools.partial(jax.random.normal, shape=shape))(keys)
      way, x0 = ode.trajectory(teacher, noise, text, empty, spec=stage.trajectory, steps=steps)
      return way, x0, clips.encode_low(models, models.vae.decode(x0))

    self._run = run

  def __call__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
    size = self._stage.encode_batch
    parts = [self._batch(list(indices[i:i + size])) for i in range(0, len(indices), size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  def _batch(self, indices: list[int]) -> dict[str, np.ndarray]:
    count = len(indices)
    filled = indices + indices[-1:] * (self._stage.encode_batch - count)
    texts = [self._prompt(index) for index in filled]
    text, empty = (self._keys_values(self._teacher, jnp.asarray(self._encode(given,
                                                                            allow_empty=True)))
                   for given in (texts, ['']))
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(self._seed)))(
        jnp.asarray(filled))
    way, x0, low = map(np.asarray, self._run(self._models, self._teacher, keys, text, empty))
    tokens = self._tokenizer(texts)
    fields = {'latents': latents.storable('latents', x0),
              'trajectory': latents.storable('trajectory', way),
              'lr_latents': latents.storable('lr_latents', low),
              'ids': tokens.ids, 'mask': tokens.mask}
    return {name: value[:count] for name, value in fields.items()}


def open_trajectories(stage: OdeStage, models: Models, tokenizer: Tokenizer, seed: int
                      ) -> latents.LatentStore:
  """Computes the trajectories, or opens the store of an earlier run.

  Raises:
    StoreError: a store of other content is in the way.
    PackageError: there is no usable teacher.
  """
  directory = pipeline.find_model(stage.teacher)
  texts = ({'captions_crc32': latents.LatentStore(stage.dataset).crc32} if stage.dataset else
           {'world': dataclasses.asdict(stage.world)})
  facts = json.loads(json.dumps({
      'teacher': outputs.file_digest(directory / package.WEIGHTS_FILE), 'clips': stage.clips,
      'tokenizer': outputs.file_digest(clips.tokenizer_file(stage.tokenizer)),
      'blocks': stage.clip_blocks, 'sampler': dataclasses.asdict(stage.trajectory),
      'student_steps': stage.sampler.steps, 'shift': stage.sampler.shift,
      **texts, 'seed': seed}))
  teacher = load_teacher(stage, models)
  return latents.write_store(TrajectoryMaker(stage, models, teacher, tokenizer, seed),
                             range(stage.clips), stage.store, facts=facts,
                             clips_per_shard=stage.clips_per_shard)


def sketch(stage: OdeStage, config: TrainConfig) -> plan.Sketch:
  """The stage as shapes, for a memory plan."""
  sigmas = stage.sampler.sigmas[:-1].tolist()
  return clips.sketch(stage, config, lambda models: CausalObjective(
      models, stage.cache_spec, stage.teacher_forcing, sigmas=sigmas), passes=len(sigmas))


def train_ode(stage: OdeStage, config: TrainConfig, workdir: str | os.PathLike) -> loop.FitResult:
  """Trains transformer and compressor on the teacher's trajectories; see `fit`.

  Raises:
    PackageError: there is no usable VAE, student or teacher.
    StoreError: a store of other content is in the way.
  """
  stage, models, tokenizer = clips.load_networks(stage, config.seed)
  store = open_trajectories(stage, models, tokenizer, config.seed)
  objective = CausalObjective(models, stage.cache_spec, stage.teacher_forcing,
                              sigmas=stage.sampler.sigmas[:-1].tolist())
  evaluate = causal_stage.sample_evaluation(stage, objective, tokenizer, workdir)
  return loop.fit(objective, clips.clip_batches(stage, store, config.seed), config, workdir,
                  evaluate=evaluate, about=clips.about(store))
