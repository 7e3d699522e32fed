"""Finds a network's released tensors on disk, whatever form the files have.

What is understood, for each of transformer, VAE and text encoder:

  Wan2.1's own directory   diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth, models_t5_*.pth
  a diffusers directory    transformer/, vae/, text_encoder/ with *.safetensors, sharded or not
  a single file            .safetensors, .pth, .pt, among them Self-Forcing's and compatible ones:
                           entries `generator_ema` or `generator`, names with FSDP's prefixes

Nothing is read but headers; tensors come back lazy and under Wan2.1's names. Whether they fit a
network is for `networks.check` to say.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pf_jax.weights import hub
from pf_jax.weights.networks import Network, compare
from pf_jax.weights.safetensors_file import read_safetensors
from pf_jax.weights.tensors import LazyTensor, OpenedFile, WeightsError, brief, reason
from pf_jax.weights.torch_file import read_torch

# Where each network lies in a directory, first match first; a pattern ending in / is a folder.
PLACES: Mapping[str, tuple[str, ...]] = {
    'transformer': ('transformer/', 'diffusion_pytorch_model*.safetensors'),
    'vae': ('vae/', 'Wan2.1_VAE.*'),
    'text': ('text_encoder/', 'models_t5_*'),
}
SAFETENSORS, TORCH = ('.safetensors',), ('.pth', '.pt', '.bin', '.ckpt')
# Which entry of a training checkpoint is the network, first match first: the averaged weights are
# what its authors sample with.
ENTRIES = ('generator_ema', 'generator', 'model', 'state_dict', 'module')
_WRAPPERS = re.compile(r'(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.')
_PREFIXES = ('model.', 'module.', 'diffusion_model.')
_MAX_PREFIXES = 8  # three are known to occur; a name may be nothing but prefixes
# The index of Wan2.1 14B takes 0.1 MB.
_MAX_INDEX_BYTES = 4 * 2**20
_MOST_SHOWN = 10
_TIED = ('encoder.embed_tokens.weight', 'shared.weight')  # transformers stores one matrix twice


class Source(NamedTuple):
  """A network's tensors, and where they are from.

  Attributes:
    tensors: under Wan2.1's names.
    files: that they lie in.
    notes: what was chosen on the way, in words.
  """

  tensors: dict[str, LazyTensor]
  files: tuple[pathlib.Path, ...]
  notes: tuple[str, ...]


def open_source(path: pathlib.Path, target: Network, *, entry: str | None = None) -> Source:
  """Opens the tensors of one network.

  Args:
    path: a directory or a file, see the module's docstring.
    target: the network that is wanted.
    entry: of a training checkpoint that holds several; None takes the first of `ENTRIES`.

  Returns:
    The tensors; they may still not fit.

  Raises:
    WeightsError: there is no such network, or a file is damaged or refused.
  """
  files = find_files(path, target.kind)
  notes: list[str] = []
  tensors: dict[str, LazyTensor] = {}
  for file in files:
    for name, tensor in _read(file, entry, notes).items():
      if name in tensors:
        raise WeightsError(f'{brief(name)} is in {file} and in another of {len(files)} files '
                           'beside it; keep one checkpoint in the directory.')
      tensors[name] = tensor
  return Source(_wan_names(tensors, target, path, notes), files, tuple(notes))


def find_files(path: pathlib.Path, kind: str) -> tuple[pathlib.Path, ...]:
  """The files that hold a network.

  Raises:
    WeightsError: nothing there, or an index that names files that are not.
  """
  if path.is_file():
    return (path,)
  if not path.is_dir():
    if os.path.lexists(path):
      raise WeightsError(f'{path} is a pipe, a device or a link to nothing; wanted a file or a '
                         'directory.')
    raise WeightsError(f'there is no file or directory {str(path)!r}.')
  for place in PLACES[kind]:
    if place.endswith('/'):
      files = _shards(path / place) if (path / place).is_dir() else ()
    else:
      files = _complete(path, sorted(path.glob(place)))
    if files:
      return files
  if files := _shards(path):  # the folder of one network, given directly
    return files
  raise WeightsError(f'{path} holds no {kind}; wanted one of {", ".join(PLACES[kind])} there, or '
                     'a file of its own.')


def patterns(kind: str) -> tuple[str, ...]:
  """Of the files that a network may lie in, to ask the hub for no others."""
  stems = [place.split('*')[0].rstrip('.') for place in (*PLACES[kind], kind)]
  return tuple(stem + allowed for stem in stems for allowed in hub.ALLOWED)


def _shards(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
  # Converted networks bear the names of all kinds; the one that is wanted was looked for before.
  own = {f'{kind}.safetensors' for kind in (*PLACES, 'compressor')}
  return _complete(folder, sorted(f for f in folder.glob('*.safetensors') if f.name not in own))


def _complete(folder: pathlib.Path, found: Sequence[pathlib.Path]) -> tuple[pathlib.Path, ...]:
  """The files found, or those of the index beside them, all of which must be there."""
  found = [file for file in found if file.suffix in (*SAFETENSORS, *TORCH)]
  indices = sorted(folder.glob('*.safetensors.index.json'))
  if not indices or not found or found[0].suffix not in SAFETENSORS:
    return tuple(found)
  if len(indices) > 1:
    raise WeightsError(f'{folder} has {len(indices)} indices ({", ".join(i.name for i in indices)}'
                       '); keep one checkpoint in the directory.')
  names = _indexed(indices[0])
  there = set(os.listdir(folder))  # of which any number of names can be asked at once
  if missing := [name for name in names if name not in there or not (folder / name).is_file()]:
    raise WeightsError(f'{folder} lacks {len(missing)} of {len(names)} shards: '
                       f'{_listed(missing)}; finish the download.')
  return tuple(folder / name for name in names)


def _indexed(index: pathlib.Path) -> list[str]:
  """The files that an index names, all of which would lie beside it."""
  file = OpenedFile.of(index)
  if file.size > _MAX_INDEX_BYTES:
    raise WeightsError(f'{index} has {file.size} bytes, wanted an index of shards with at most '
                       f'{_MAX_INDEX_BYTES}; download it again.')
  try:
    text = file.map(0, file.size).tobytes().decode()
    names = sorted(set(json.loads(text)['weight_map'].values()))
  except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
    raise WeightsError(f'{index} is not an index of shards ({type(error).__name__}: '
                       f'{reason(error)}); download it again.') from error
  for name in names:
    if not isinstance(name, str) or pathlib.PurePath(name).name != name:
      raise WeightsError(f'{index} names {brief(str(name))}, which is not a file beside it.')
  return names


def _listed(names: Sequence[Any]) -> str:
  """Names from a file, which may be many and long."""
  more = f' and {len(names) - _MOST_SHOWN} more' if len(names) > _MOST_SHOWN else ''
  return ', '.join(brief(str(name)) for name in names[:_MOST_SHOWN]) + more


def _read(file: pathlib.Path, entry: str | None, notes: list[str]) -> Mapping[str, LazyTensor]:
  """A file's flat dict of tensors."""
  if file.suffix in SAFETENSORS:
    if entry is not None:
      raise WeightsError(f'{file} has no entries; leave out {entry=}.')
    return read_safetensors(file)[0]
  if file.suffix not in TORCH:
    raise WeightsError(f'{file} is not a checkpoint; wanted one of '
                       f'{", ".join((*SAFETENSORS, *TORCH))}.')
  return _state_dict(read_torch(file), file, entry, notes)


def _state_dict(tree: Any, file: pathlib.Path, entry: str | None, notes: list[str]
                ) -> Mapping[str, LazyTensor]:
  """The flat dict of tensors inside what a training script saved."""
  if not isinstance(tree, Mapping):
    raise WeightsError(f'{file} holds {type(tree).__name__}, wanted a dict of tensors.')
  if entry is None and _is_flat(tree):
    return tree
  inner = [name for name, value in tree.items() if _is_flat(value)]
  chosen = [entry] if entry is not None else [name for name in ENTRIES if name in inner]
  if not chosen or chosen[0] not in inner:
    there = _listed(inner) or 'none'
    raise WeightsError(f'{file} has no entry {entry or " or ".join(ENTRIES)!r} of tensors; it has '
                       f'{there}. Choose one with --entry.')
  if others := [name for name in inner if name != chosen[0]]:
    notes.append(f'{file.name}: entry {chosen[0]!r} is used; {_listed(others)} left.')
  return tree[chosen[0]]


def _is_flat(value: Any) -> bool:
  return (isinstance(value, Mapping) and bool(value)
          and all(isinstance(tensor, LazyTensor) for tensor in value.values())
          and all(isinstance(name, str) for name in value))


def plain_names(names: Iterable[str]) -> dict[str, str]:
  """Name -> the name without what training wrappers put around it."""
  plain = {name: _WRAPPERS.sub('', name) for name in names}
  for _ in range(_MAX_PREFIXES):
    shared = (p for p in _PREFIXES if all(name.startswith(p) for name in plain.values()))
    prefix = next(shared, '')
    plain = {name: inner.removeprefix(prefix) for name, inner in plain.items()}
  return plain


def _wan_names(tensors: Mapping[str, LazyTensor], target: Network, path: pathlib.Path,
               notes: list[str]) -> dict[str, LazyTensor]:
  """The tensors under Wan2.1's names; names that belong to no scheme stay, to be reported."""
  plain = plain_names(tensors)
  by_name = {plain[name]: tensor for name, tensor in tensors.items()}
  if len(by_name) < len(tensors):
    raise WeightsError(f'{path} holds two tensors whose names differ in their wrappers\' prefixes '
                       'only; choose one of them with --entry.')
  copy, original = _TIED
  if target.kind == 'text' and copy in by_name:
    tied = by_name.pop(copy)
    by_name.setdefault(original, tied)
  wan = {piece.name for piece in target.pieces()}
  foreign = {target.diffusers(name): name for name in wan}
  # Most of them: networks share a few names with others.
  known = sum(name in foreign for name in by_name)
  if known <= max(sum(name in wan for name in by_name), len(by_name) / 2):
    return by_name
  notes.append('names are those of diffusers and transformers.')
  return {foreign.get(name, name): tensor for name, tensor in by_name.items()}


def guess(tensors: Mapping[str, LazyTensor]) -> str:
  """What tensors seem to be, for the message that they are something else."""
  plain = {plain: tensors[name].shape for name, plain in plain_names(tensors).items()}
  if shape := plain.get('patch_embedding.weight'):
    layers = {match[1] for name in plain if (match := re.match(r'blocks\.(\d+)\.', name))}
    return f'a transformer of width {shape[0]} and {len(layers)} layers'
  if shape := plain.get('token_embedding.weight') or plain.get('shared.weight'):
    return f'a text encoder of width {shape[-1]}'
  if any(name.startswith('decoder.') for name in plain):
    return 'a VAE'
  return f'tensors of no known network ({_listed(list(tensors)[:3]) or "none"})'


def check(source: Source, target: Network, path: pathlib.Path) -> None:
  """Refuses tensors that are not the network: another one in one line, a near miss in full.

  Raises:
    WeightsError: says everything that does not fit.
  """
  mismatch = compare(source.tensors, target)
  if not mismatch:
    return
  most = sum(1 for _ in target.pieces()) / 2
  if len(mismatch.missing) + len(mismatch.shapes) > most:
    wanted = ', '.join(f'{name}={getattr(target.spec, name)}' for name in
                       ('width', 'num_layers', 'base_width') if hasattr(target.spec, name))
    raise WeightsError(f'{path} holds {guess(source.tensors)}; wanted a {target.kind} with '
                       f'{wanted}. Give the weights of that model, or the config of these.')
  if len(mismatch.dtypes) > most:
    name, dtype = mismatch.dtypes[0]
    raise WeightsError(f'{path} holds {len(mismatch.dtypes)} tensors that are not floating point, '
                       f'first {name} ({dtype}); quantised weights cannot be used, give the '
                       'original ones.')
  raise WeightsError(f'{path} does not fit the {target.kind}: {mismatch}')
