"""Which model a run samples with, as the run's files remember it."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pf_jax import outputs, released
from pf_jax import pipeline as pipeline_lib
from pf_jax.models.bundle import ModelSpec
from pf_jax.pipeline import Pipeline
from pf_jax.released import ReleasedWeights
from pf_jax.rollout.block import RolloutSpec
from pf_jax.weights import hub, package

_PATHS = ('directory', 'transformer', 'compressor')


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """A model directory, or released weights.

  Attributes:
    checkpoint: see `pf_jax.load`; None is the packaged model.
    weights: see `pf_jax.released`; takes the place of `checkpoint`.
    model: sizes alone, of weights that are yet to be had: enough for a dry run.
  """

  checkpoint: str | os.PathLike | None = None
  weights: ReleasedWeights | None = None
  model: ModelSpec | None = None

  def specs(self, cache: Mapping[str, Any], sampler: Mapping[str, Any]
            ) -> tuple[ModelSpec, RolloutSpec]:
    """Sizes and static choices, without loading anything.

    Raises:
      ValueError: as `load`.
    """
    own: Mapping[str, Mapping[str, Any]] = {}
    model = self.model if self.weights is None else self.weights.model
    if model is None:
      data = package.read_spec(pipeline_lib.find_model(self.checkpoint))
      model, own = data['spec'], data['choices']
    return model, pipeline_lib.rollout_spec(model, {
        'cache': {**own.get('cache', {}), **cache},
        'sampler': {**own.get('sampler', {}), **sampler}})

  def load(self, cache: Mapping[str, Any], sampler: Mapping[str, Any], *,
           texts: Sequence[str] = (), say: Callable[[str], None] = print) -> Pipeline:
    """The pipeline.

    Args:
      cache: fields of `CacheSpec` that differ from the model's own choice.
      sampler: fields of `SamplerSpec`, likewise.
      texts: that will be asked for.
      say: receives notices.

    Raises:
      ValueError: no usable model there, or choices that do not exist or contradict each other.
    """
    if self.weights is None:
      return pipeline_lib.load(self.checkpoint, cache=cache, sampler=sampler)
    return released.load(self.weights, cache=cache, sampler=sampler, texts=texts, say=say)

  def digests(self) -> dict[str, str]:
    """What tells other weights apart, by network and file name; folders may move.

    Raises:
      ValueError, OSError: files that are not there.
    """
    if self.weights is not None:
      return {f'{network}/{path.name}': outputs.file_digest(path)
              for network, paths in self.weights.files().items() for path in paths}
    directory = pipeline_lib.find_model(self.checkpoint)
    return {name: outputs.file_digest(directory / name)
            for name in (package.SPEC_FILE, package.WEIGHTS_FILE)}

  def sizes(self) -> dict[str, Any] | None:
    """What a config says about released weights; model directories say it in their own files."""
    if self.weights is None:
      return None
    return {'entry': self.weights.entry, **dataclasses.asdict(self.weights.model)}

  def to_json(self) -> dict[str, Any]:
    """What `from_json` reads; paths are made absolute, the packaged model has none."""
    if self.weights is not None:
      paths = {name: str(pathlib.Path(value).resolve()) for name in _PATHS
               if (value := getattr(self.weights, name)) is not None
               and not value.startswith(hub.PREFIX)}
      return {'checkpoint': None, 'weights': {**dataclasses.asdict(self.weights), **paths}}
    directory = pipeline_lib.find_model(self.checkpoint)
    packaged = directory == pipeline_lib.PACKAGED
    return {'checkpoint': None if packaged else str(directory.resolve()), 'weights': None}

  def moved(self, places: Mapping[str, Any]) -> 'ModelSource':
    """The same model where it is now.

    Args:
      places: new paths: 'checkpoint' of a model directory; 'directory', 'transformer',
        'compressor' of released weights.

    Raises:
      ValueError: places that this model does not have.
    """
    own = ('checkpoint',) if self.weights is None else _PATHS
    if strange := [name for name in places if name not in own]:
      flags = {'checkpoint': '--checkpoint', 'directory': '--weights'}
      raise ValueError(
          f'{flags.get(strange[0], "--" + strange[0])} does not belong to the model that was used, '
          f'{"a model directory" if self.weights is None else "released weights"}; give '
          f'{" or ".join(flags.get(name, "--" + name) for name in own)}.')
    if self.weights is None:
      return dataclasses.replace(self, **places)
    return dataclasses.replace(self, weights=dataclasses.replace(self.weights, **places))

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> 'ModelSource':
    """Rebuilds a source.

    Raises:
      KeyError, TypeError, ValueError: not such a dict.
    """
    weights = data['weights']
    if weights is not None:
      weights = ReleasedWeights(
          **{**weights, 'model': package.from_dict(ModelSpec, weights['model'])})
    return cls(data['checkpoint'], weights)
