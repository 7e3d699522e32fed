"""A pipeline from released weights: Wan2.1, Self-Forcing and what is compatible with them.

The networks are loaded one after the other and cast on the way, straight from the released files
or from what `launch.convert` made of them. The text encoder goes first: it encodes the prompts and
is let go before anything else is loaded, so the peak is the larger of the two, not their sum.

Released weights hold no compressor. Without one its HR branch starts at zero, which leaves the LR
branch alone: the transformer sees the past through its own VAE and patch embedding, untrained
("zero-shot", arXiv:2603.25730).
"""

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from pf_jax.models.bundle import ModelSpec, VideoModels
from pf_jax.models.compressor import Compressor
from pf_jax.models.initialise import init_module
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.pipeline import Pipeline
from pf_jax.weights import hub, package, sources
from pf_jax.weights.load import StoredNetwork, network_files, open_network
from pf_jax.weights.tensors import WeightsError

TOKENIZER_FILE = 'tokenizer.json'
# Where it lies in diffusers' directories, Wan2.1's own, and beside converted networks.
_TOKENIZER_PLACES = ('tokenizer', 'google/umt5-xxl', '.')


@dataclasses.dataclass(frozen=True)
class ReleasedWeights:
  """Where released weights are and what they should be.

  Attributes:
    directory: Wan2.1's own layout, diffusers', or converted networks; like the others a path or an
      address of the hub (`pf_jax.weights.hub`).
    model: sizes and precision of all networks.
    transformer: another file or directory for the transformer, e.g. Self-Forcing's .pt.
    entry: of that file, if it holds several; see `weights.sources`.
    compressor: a trained compressor (`compressor.safetensors`); None is zero-shot.
  """

  directory: str
  model: ModelSpec
  transformer: str | None = None
  entry: str | None = None
  compressor: str | None = None

  def open(self, *, download: bool = True, say: Callable[[str], None] = print) -> 'OpenedWeights':
    """Finds everything and compares names, shapes and types; values are not read.

    Args:
      download: whether weights of the hub may be fetched.
      say: receives what was chosen on the way.

    Raises:
      NotDownloaded: they are on the hub, and must not be fetched.
      WeightsError: something is missing, damaged, or of another model.
      PackageError: the compressor is.
    """
    model, (root, transformer, compressor) = self.model, self._places(download)
    if compressor is not None:
      package.check_module(compressor, _compressor_shapes(model))
    return OpenedWeights(
        text=open_network(root, model.text, say=say), vae=open_network(root, model.vae, say=say),
        transformer=open_network(transformer, model.transformer, entry=self.entry, say=say),
        compressor=compressor, tokenizer=find_tokenizer(root))

  def files(self) -> dict[str, tuple[pathlib.Path, ...]]:
    """The files of each network, by its name; what lies in them is not looked at.

    Raises:
      WeightsError: one is not there.
    """
    root, transformer, compressor = self._places(download=True)
    found = {'text': network_files(root, self.model.text),
             'vae': network_files(root, self.model.vae),
             'transformer': network_files(transformer, self.model.transformer),
             'tokenizer': (find_tokenizer(root),)}
    return found | ({} if compressor is None else {'compressor': (compressor,)})

  def _places(self, download: bool) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path | None]:
    """Where text encoder, VAE and tokenizer lie, the transformer, and the compressor."""
    get = functools.partial(hub.local, download=download)
    kinds = ('text', 'vae') if self.transformer is not None else ('text', 'vae', 'transformer')
    wanted = [pattern for kind in kinds for pattern in sources.patterns(kind)]
    root = get(self.directory, wanted=[*wanted, *(str(pathlib.PurePath(place, TOKENIZER_FILE))
                                                  for place in _TOKENIZER_PLACES)])
    transformer = root if self.transformer is None else get(
        self.transformer, wanted=sources.patterns('transformer'))
    return root, transformer, None if self.compressor is None else get(self.compressor)


@dataclasses.dataclass(frozen=True)
class OpenedWeights:
  """Released weights that fit, ready to be loaded one network after the other.

  Attributes:
    text, vae, transformer: the networks.
    compressor: a file, or None for a fresh one.
    tokenizer: its tokenizer.json.
  """

  text: StoredNetwork
  vae: StoredNetwork
  transformer: StoredNetwork
  compressor: pathlib.Path | None
  tokenizer: pathlib.Path

  def prompt_encoder(self, model: ModelSpec) -> PromptEncoder:
    """Of the text encoder and its tokenizer; loads the network when a prompt is new."""
    tokenizer = Tokenizer.from_file(self.tokenizer, max_tokens=model.text.max_tokens)
    return PromptEncoder(tokenizer, model.text, self.text.load)

  @property
  def files(self) -> tuple[pathlib.Path, ...]:
    """All of them."""
    own = () if self.compressor is None else (self.compressor,)
    return (*self.text.files, *self.vae.files, *self.transformer.files, self.tokenizer, *own)


def find_tokenizer(directory: str | os.PathLike) -> pathlib.Path:
  """The tokenizer.json of a directory of weights.

  Raises:
    WeightsError: there is none.
  """
  root = pathlib.Path(directory)
  for place in _TOKENIZER_PLACES:
    if (path := root / place / TOKENIZER_FILE).is_file():
      return path
  wanted = ', '.join(str(pathlib.PurePath(place) / TOKENIZER_FILE) for place in _TOKENIZER_PLACES)
  raise WeightsError(f'{root} has no tokenizer; wanted one of {wanted}. Copy UMT5\'s '
                     f'{TOKENIZER_FILE} there.')


def load(weights: ReleasedWeights, *, cache: Mapping[str, Any] | None = None,
         sampler: Mapping[str, Any] | None = None, texts: Sequence[str] = (),
         say: Callable[[str], None] = print) -> Pipeline:
  """Loads released weights for sampling.

  Args:
    weights: where they are.
    cache: fields of `CacheSpec`.
    sampler: fields of `SamplerSpec`.
    texts: that will be asked for; they are encoded before the other networks are loaded. Any other
      text later on loads the text encoder beside them.
    say: receives notices.

  Raises:
    WeightsError: missing, damaged, or of another model.
    ValueError: choices that do not exist or contradict each other, or texts that cannot be used.
  """
  model = weights.model
  opened = weights.open(say=say)  # everything is there and fits, before anything large is read
  prompts = opened.prompt_encoder(model)
  if texts:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', UserWarning)  # said by `plan.warn_about_prompts`
      prompts(texts, allow_empty=True)  # empty ones are refused where they may not be
  video = VideoModels(
      model, opened.vae.load(), opened.transformer.load(),
      load_compressor(model, opened.compressor, say))
  return Pipeline(video, prompts, choices={'cache': dict(cache or {}),
                                           'sampler': dict(sampler or {})})


def load_compressor(model: ModelSpec, path: pathlib.Path | None, say: Callable[[str], None]
                    ) -> Compressor:
  """A trained compressor, or a fresh one whose HR branch adds nothing.

  Raises:
    PackageError: the file does not fit.
  """
  if path is None:
    say('no compressor is given: the LR branch works alone (zero-shot).')
    return init_module(lambda rngs: Compressor(model.compressor, rngs=rngs), 0)
  return package.load_module(path, _compressor_shapes(model))


def _compressor_shapes(model: ModelSpec) -> Compressor:
  return jax.eval_shape(lambda: Compressor(model.compressor, rngs=nnx.Rngs(0)))
