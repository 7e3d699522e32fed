"""A model as a directory: `model.json` (specs, in words) and `model.safetensors` (weights).

What ships with pf_jax, what training leaves behind and what sampling loads are all of this form.
Weights are stored in float16 (11 bits of mantissa are more than training noise needs) and come back
in the dtype of the module they fill; everything that sizes or normalises is in the JSON.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pf_jax import outputs
from pf_jax.models import bundle
from pf_jax.models.bundle import Models, ModelSpec
from pf_jax.models.vae import VaeSpec, WanVae
from pf_jax.weights.rules import dotted
from pf_jax.weights.tensors import WeightsError, shown_name

M = TypeVar('M', bound=nnx.Module)
D = TypeVar('D')

ROOT = pathlib.Path(__file__).parent
SPEC_FILE = 'model.json'
WEIGHTS_FILE = 'model.safetensors'
TOKENIZER_FILE = 'tokenizer.json'
FORMAT_VERSION = 1
_MOST_STRANGE = 20


class PackageError(ValueError):
  """A directory that does not hold a usable model."""


class Package(NamedTuple):
  """A loaded model.

  Attributes:
    models: the networks.
    choices: how it is meant to be sampled: {'cache': {...}, 'sampler': {...}}, fields of
      `CacheSpec` and `SamplerSpec`.
    about: recipe and measurements, free form.
    directory: where it came from.
  """

  models: Models
  choices: Mapping[str, Mapping[str, Any]]
  about: Mapping[str, Any]
  directory: pathlib.Path


def _serialise(module: nnx.Module, dtype: str) -> bytes:
  """A module's parameters as the bytes of a safetensors file, under their dotted paths."""
  from safetensors.numpy import save

  with np.errstate(over='ignore'):  # too large for float16 is found just below
    tensors = {dotted(p): np.ascontiguousarray(np.asarray(leaf).astype(dtype))
               for p, leaf in jax.tree_util.tree_leaves_with_path(module)}
  broken = _not_finite(tensors)
  if broken:
    raise PackageError(f'{len(broken)} tensors are not finite in {dtype}, first {broken[0]!r}; '
                       'nothing was written.')
  return save(tensors)


def _not_finite(tensors: Mapping[str, np.ndarray]) -> list[str]:
  return [name for name, value in tensors.items() if not np.isfinite(value).all()]


def save_module(path: str | os.PathLike, module: nnx.Module, *, dtype: str = 'float16') -> None:
  """Writes a module's parameters as safetensors under their dotted paths, whole or not at all.

  Args:
    path: the file.
    module: any module.
    dtype: of the stored values.

  Raises:
    PackageError: values that are not finite in `dtype`; nothing was written.
  """
  outputs.write_bytes(path, _serialise(module, dtype))


def load_module(path: str | os.PathLike, shapes: M) -> M:
  """Fills a module from `save_module`'s file.

  Args:
    path: the file.
    shapes: the module, with arrays or `jax.ShapeDtypeStruct` leaves (from `jax.eval_shape`).

  Returns:
    The module with the file's values in the dtypes of `shapes`.

  Raises:
    PackageError: no such file, not safetensors, values that are not finite, or tensors that are
      missing, unexpected or of another shape or kind (all of them named).
  """
  return _fill(shapes, _read(path), path)


def check_module(path: str | os.PathLike, shapes: nnx.Module) -> None:
  """Refuses a file that `load_module` would refuse for its header, without reading values.

  Raises:
    PackageError: no such file, not safetensors, or tensors that do not fit (all of them named).
  """
  from pf_jax.weights.safetensors_file import read_safetensors

  try:
    tensors, _ = read_safetensors(pathlib.Path(path))
  except (OSError, WeightsError) as error:
    raise PackageError(f'cannot read weights from {path} ({error}).') from error
  if problems := _problems(shapes, tensors):
    raise PackageError(f'{path} does not fit the model: ' + '; '.join(problems) + '.')


def _read(path: str | os.PathLike) -> bytes:
  try:
    return pathlib.Path(path).read_bytes()
  except OSError as error:
    raise PackageError(f'cannot read weights from {path} ({error}).') from error


def _fill(shapes: M, data: bytes, path: str | os.PathLike) -> M:
  """The tensors in a safetensors file's bytes, put into a module."""
  from safetensors import SafetensorError
  from safetensors.numpy import load

  try:
    tensors = load(data)
  except (SafetensorError, KeyError) as error:  # a KeyError names a dtype that NumPy lacks
    raise PackageError(f'{path} is not a whole safetensors file of known dtypes '
                       f'({error}).') from error
  floats = {name: x for name, x in tensors.items() if jnp.issubdtype(x.dtype, jnp.floating)}
  if problems := _problems(shapes, tensors) + [f'{n} is not finite' for n in _not_finite(floats)]:
    raise PackageError(f'{path} does not fit the model: ' + '; '.join(problems) + '.')
  # Cast on the host: JAX would compile a program for every shape.
  return jax.tree_util.tree_map_with_path(
      lambda p, leaf: jnp.asarray(tensors[dotted(p)].astype(leaf.dtype)), shapes)


def _problems(shapes: nnx.Module, tensors: Mapping[str, Any]) -> list[str]:
  """What keeps tensors, by names, shapes and dtypes, from filling a module."""
  leaves = {dotted(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
  problems = [f'{name} is missing' for name in sorted(set(leaves) - set(tensors))]
  strange = sorted(set(tensors) - set(leaves))  # names that a file makes up, any number of them
  problems += [f'{shown_name(name)} is unexpected' for name in strange[:_MOST_STRANGE]]
  if len(strange) > _MOST_STRANGE:
    problems.append(f'{len(strange) - _MOST_STRANGE} more are unexpected')
  shared = {name: tensors[name] for name in leaves if name in tensors}
  problems += [f'{name} has shape {tuple(tensor.shape)}, wanted {leaves[name].shape}'
               for name, tensor in shared.items() if tuple(tensor.shape) != leaves[name].shape]
  return problems + [f'{name} is {tensor.dtype}, wanted floating point'
                     for name, tensor in shared.items()
                     if not jnp.issubdtype(tensor.dtype, jnp.floating)]


def save_vae(directory: str | os.PathLike, vae: WanVae, spec: VaeSpec) -> None:
  """Writes a VAE alone, `vae.json` and `vae.safetensors`; `spec` holds its latent statistics."""
  root = outputs.prepare_directory(directory)
  save_module(root / 'vae.safetensors', vae)
  outputs.write_json(root / 'vae.json', dataclasses.asdict(spec))


def load_vae(directory: str | os.PathLike) -> WanVae:
  """Loads what `save_vae` wrote.

  Raises:
    PackageError: there is no VAE, or it is not usable.
  """
  path = pathlib.Path(directory) / 'vae.json'
  try:
    spec = from_dict(VaeSpec, json.loads(path.read_text(encoding='utf-8')))
  except (OSError, TypeError, ValueError) as error:
    raise PackageError(f'cannot read a VAE from {path} ({error}); train one with '
                       'configs/digits/vae.py.') from error
  shapes = jax.eval_shape(lambda: WanVae(spec, rngs=nnx.Rngs(0)))
  return load_module(path.with_suffix('.safetensors'), shapes)


def save_model(directory: str | os.PathLike, models: Models, *,
               choices: Mapping[str, Mapping[str, Any]] | None = None,
               about: Mapping[str, Any] | None = None) -> pathlib.Path:
  """Writes a model directory.

  Everything is checked before anything is written. Over an existing model, a kill between the two
  files leaves a pair that `load_model` refuses, never a mixture that it takes.

  Args:
    directory: created if needed.
    models: all networks.
    choices: see `Package`.
    about: see `Package`.

  Returns:
    The directory.

  Raises:
    PackageError: weights that are not finite in float16; nothing was written.
    TypeError: `choices` or `about` do not fit into JSON; nothing was written.
    NotWritable: see `outputs.prepare_directory`.
  """
  weights = _serialise(models, 'float16')
  text = outputs.json_text({
      'version': FORMAT_VERSION, 'weights_sha256': hashlib.sha256(weights).hexdigest(),
      'spec': dataclasses.asdict(models.spec),
      'choices': {name: dict(values) for name, values in (choices or {}).items()},
      'about': dict(about or {})})
  root = outputs.prepare_directory(directory)
  outputs.write_bytes(root / WEIGHTS_FILE, weights)
  outputs.write_text(root / SPEC_FILE, text)
  return root


def load_model(directory: str | os.PathLike) -> Package:
  """Loads a model directory.

  Raises:
    PackageError: not a model directory, another version, or weights that are damaged, of another
      model or do not fit.
  """
  root = pathlib.Path(directory)
  data = read_spec(root)
  spec = data['spec']
  weights = _read(root / WEIGHTS_FILE)
  if data.get('weights_sha256', '') not in ('', hashlib.sha256(weights).hexdigest()):
    raise PackageError(f'{root / WEIGHTS_FILE} is damaged or belongs to another {SPEC_FILE}: its '
                       'checksum differs. Export or copy the model again.')
  shapes = bundle.shapes(spec)
  models = _fill(shapes, weights, root / WEIGHTS_FILE)
  return Package(models, data['choices'], data['about'], root)


def read_spec(directory: str | os.PathLike) -> dict[str, Any]:
  """What `model.json` says, without loading weights; 'spec' is a `ModelSpec`.

  Raises:
    PackageError: missing, unreadable, another version, or sizes that contradict each other.
  """
  path = pathlib.Path(directory) / SPEC_FILE
  try:
    data = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise PackageError(f'{directory} is not a model directory: it has no {SPEC_FILE}.') from error
  except (OSError, ValueError) as error:
    raise PackageError(f'{path} is unreadable ({error}).') from error
  if not isinstance(data, dict) or data.get('version') != FORMAT_VERSION:
    raise PackageError(f'{path} is not of version {FORMAT_VERSION}; export the model again.')
  try:
    spec = from_dict(ModelSpec, data['spec'])
  except (KeyError, TypeError, ValueError) as error:
    raise PackageError(f'{path}: the spec is not usable ({error}).') from error
  return {'choices': {}, 'about': {}, **data, 'spec': spec}


def from_dict(cls: type[D], data: Mapping[str, Any]) -> D:
  """Rebuilds a frozen dataclass from `dataclasses.asdict` that went through JSON.

  Raises:
    TypeError: unknown or missing fields, or values of another type.
    ValueError: values that the dataclass refuses.
  """
  if not isinstance(data, Mapping):
    raise TypeError(f'{cls.__name__} is {data!r}; wanted an object with its fields.')
  hints = typing.get_type_hints(cls)
  return cls(**{name: _value(hints.get(name), item, f'{cls.__name__}.{name}')
                for name, item in data.items()})


def _value(hint: Any, item: Any, name: str) -> Any:
  if dataclasses.is_dataclass(hint):
    return from_dict(typing.cast(type, hint), item)
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    options = [o for o in typing.get_args(hint) if o is not type(None)]
    return _value(options[0], item, name) if item is not None and len(options) == 1 else item
  if isinstance(item, list):  # JSON has no tuples
    return tuple(_value(None, part, name) for part in item)
  if hint in (int, float, str, bool):
    wanted = (int, float) if hint is float else hint  # 2 is a good float
    if not isinstance(item, wanted) or (isinstance(item, bool) and hint is not bool):
      raise TypeError(f'{name}={item!r} is not {hint.__name__}')
  return item
