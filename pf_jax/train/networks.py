"""Where the stage "dmd" takes its networks from, and where it leaves what it trained.

A model directory (the miniature, or anything trained here) or released weights (Wan2.1,
Self-Forcing). Each network is read when it is needed and not kept here: a text encoder is the
largest of all and must not sit beside a training.
"""

import abc
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax import outputs, pipeline, released
from pf_jax.models.bundle import Models, ModelSpec, VideoModels
from pf_jax.models.compressor import Compressor
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.models.transformer import CausalTransformer
from pf_jax.models.vae import WanVae
from pf_jax.released import OpenedWeights, ReleasedWeights
from pf_jax.types import PyTree
from pf_jax.weights import export, package


class Origin(abc.ABC):
  """Networks on disk. Nothing is read before a method is called."""

  @property
  @abc.abstractmethod
  def spec(self) -> ModelSpec:
    """Sizes of all networks."""

  @abc.abstractmethod
  def vae(self) -> WanVae:
    """The VAE."""

  @abc.abstractmethod
  def transformer(self) -> CausalTransformer:
    """The transformer."""

  @abc.abstractmethod
  def compressor(self) -> Compressor:
    """The compressor."""

  @abc.abstractmethod
  def prompt_encoder(self) -> PromptEncoder:
    """Tokenizer and text encoder; the latter is loaded when a prompt is new, and let go."""

  def text_rows(self, texts: Sequence[str]) -> np.ndarray:
    """Text rows [B, rows, D]; empty texts are allowed."""
    return self.prompt_encoder()(texts, allow_empty=True)

  @abc.abstractmethod
  def digests(self) -> dict[str, str]:
    """What tells other weights apart, by file; those of the text encoder apart."""

  @abc.abstractmethod
  def text_digests(self) -> dict[str, str]:
    """The same of text encoder and tokenizer."""

  @abc.abstractmethod
  def save(self, directory: str | os.PathLike, trained: VideoModels,
           choices: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Writes the transformer and compressor of `trained` so that `launch.sample` finds them."""


class PackagedOrigin(Origin):
  """A model directory, or the workdir of a training."""

  def __init__(self, path: str, tokenizer: str | os.PathLike):
    """Finds the directory.

    Args:
      path: see `pipeline.find_model`.
      tokenizer: a tokenizer.json.

    Raises:
      PackageError: there is none.
    """
    self.directory, self._tokenizer = pipeline.find_model(path), tokenizer

  @functools.cached_property
  def spec(self) -> ModelSpec:
    return package.read_spec(self.directory)['spec']

  @functools.cached_property
  def about(self) -> Mapping[str, Any]:
    """Recipe and measurements."""
    return package.read_spec(self.directory)['about']

  def models(self) -> Models:
    """All networks."""
    return package.load_model(self.directory).models

  def vae(self) -> WanVae:
    return self.models().vae

  def transformer(self) -> CausalTransformer:
    return self.models().transformer

  def compressor(self) -> Compressor:
    return self.models().compressor

  def prompt_encoder(self) -> PromptEncoder:
    tokenizer = Tokenizer.from_file(self._tokenizer, max_tokens=self.spec.text.max_tokens)
    return PromptEncoder(tokenizer, self.spec.text, lambda: self.models().text)

  def digests(self) -> dict[str, str]:
    return {package.WEIGHTS_FILE: outputs.file_digest(self.directory / package.WEIGHTS_FILE)}

  def text_digests(self) -> dict[str, str]:
    return {**self.digests(), 'tokenizer.json': outputs.file_digest(self._tokenizer)}

  def save(self, directory: str | os.PathLike, trained: VideoModels,
           choices: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Writes a whole model directory; what was not trained is copied."""
    models = self.models().replaced(transformer=trained.transformer, compressor=trained.compressor)
    package.save_model(directory, models, choices=choices, about=about)


class ReleasedOrigin(Origin):
  """Released weights, perhaps with another file for the transformer and a trained compressor."""

  _TEXT = ('text', 'tokenizer')

  def __init__(self, weights: ReleasedWeights):
    """Nothing is opened yet."""
    self._weights = weights

  @property
  def spec(self) -> ModelSpec:
    return self._weights.model

  def _open(self) -> OpenedWeights:
    return self._weights.open(say=lambda note: None)

  def vae(self) -> WanVae:
    return self._open().vae.load()

  def transformer(self) -> CausalTransformer:
    return self._open().transformer.load()

  def compressor(self) -> Compressor:
    return released.load_compressor(self.spec, self._open().compressor, print)

  def prompt_encoder(self) -> PromptEncoder:
    return self._open().prompt_encoder(self.spec)

  def digests(self) -> dict[str, str]:
    return self._digests(lambda network: network not in self._TEXT)

  def text_digests(self) -> dict[str, str]:
    return self._digests(lambda network: network in self._TEXT)

  def _digests(self, wanted: Callable[[str], bool]) -> dict[str, str]:
    return {f'{network}/{path.name}': outputs.file_digest(path)
            for network, paths in self._weights.files().items() if wanted(network)
            for path in paths}

  def save(self, directory: str | os.PathLike, trained: VideoModels,
           choices: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Writes transformer/ and compressor/, for `launch.sample --transformer --compressor`."""
    export.export_trained(trained, directory, choices=choices, about=about)


def check_teacher(student: Models, teacher: PackagedOrigin, blocks: int) -> None:
  """Refuses a teacher that reads or draws something else than a student.

  Args:
    student: the student.
    teacher: the teacher.
    blocks: length of the clips that the teacher is shown.

  Raises:
    PackageError: another text encoder or VAE, or a teacher of clips of another length.
  """
  other = teacher.models()
  for name, remedy in (('text', 'train it with the text encoder frozen (group_scale.text=0)'),
                       ('vae', 'train both on one VAE')):
    if (getattr(student.spec, name) != getattr(other.spec, name)
        or not _same_values(getattr(student, name), getattr(other, name))):
      raise package.PackageError(f'the teacher {teacher.directory} has other weights of the part '
                                 f'{name!r} than the student; {remedy}.')
  trained = teacher.about.get('clip_blocks', blocks)
  if trained != blocks:
    raise package.PackageError(f'the teacher {teacher.directory} was trained on clips of {trained} '
                               f'blocks and is shown {blocks}; give it clips of its length.')


def cast(tree: PyTree, dtype: str) -> PyTree:
  """The tree with its floating-point numbers in another precision."""
  wanted = jnp.dtype(dtype)
  return jax.tree.map(
      lambda x: x.astype(wanted) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _same_values(a: PyTree, b: PyTree) -> bool:
  same = jax.tree.map(lambda x, y: x.shape == y.shape and bool(jnp.all(x == y)), a, b)
  return jax.tree.all(same)


def with_remat(transformer: CausalTransformer, remat: bool) -> CausalTransformer:
  """The same weights; whether layers are computed again in the backward pass."""
  transformer = jax.tree.map(lambda x: x, transformer)
  transformer.spec = dataclasses.replace(transformer.spec, remat=remat)
  return transformer
