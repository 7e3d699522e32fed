"""A model as a directory that diffusers and transformers load.

  model_index.json, scheduler/     what `WanPipeline.from_pretrained` asks for
  transformer/, vae/, text_encoder/   config.json and safetensors under their names and layouts
  tokenizer/                       tokenizer.json and its configuration
  compressor/                      ours alone: the HR branch's weights under their dotted paths, and
                                   its sizes with the video's geometry and the sampler's choices

diffusers has no PackForcing cache, so what it samples with these files is the bidirectional model.
The compressor's folder is ignored there and read back by `launch.sample --compressor`.

Readers take whatever shards and indices they find, so that an export shares its directory with
nothing, and appears in it as a whole (`outputs.atomic_directory`) or not at all.
"""

import dataclasses
import errno
import functools
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from pf_jax import outputs
from pf_jax.models.bundle import Models, VideoModels
from pf_jax.models.text import TextSpec
from pf_jax.models.transformer import EPS, TransformerSpec
from pf_jax.models.vae import VaeSpec
from pf_jax.types import tree_bytes
from pf_jax.weights import networks
from pf_jax.weights.rules import dotted
from pf_jax.weights.safetensors_file import SafetensorsWriter
from pf_jax.weights.tensors import WeightsError

# Folder and file of each network, as the libraries name them.
_PLACES = {'transformer': ('transformer', 'diffusion_pytorch_model.safetensors'),
           'vae': ('vae', 'diffusion_pytorch_model.safetensors'),
           'text': ('text_encoder', 'model.safetensors')}
_DIFFUSERS_VERSION = '0.35.0'  # the first whose Wan classes have every field written here
# It reads tokenizer.json as it is; T5's own class would add a hundred tokens to it.
_TOKENIZER = 'PreTrainedTokenizerFast'
COMPRESSOR = pathlib.PurePath('compressor', 'compressor.safetensors')
_INDEX_FILE = 'model_index.json'
_ABOUT_FILE = 'about.json'
_INDEX = {
    '_class_name': 'WanPipeline', '_diffusers_version': _DIFFUSERS_VERSION,
    'scheduler': ['diffusers', 'UniPCMultistepScheduler'],
    'text_encoder': ['transformers', 'UMT5EncoderModel'],
    'tokenizer': ['transformers', _TOKENIZER],
    'transformer': ['diffusers', 'WanTransformer3DModel'],
    'vae': ['diffusers', 'AutoencoderKLWan']}
_SCHEDULER = {
    '_class_name': 'UniPCMultistepScheduler', '_diffusers_version': _DIFFUSERS_VERSION,
    'num_train_timesteps': 1000, 'prediction_type': 'flow_prediction', 'predict_x0': True,
    'solver_order': 2, 'solver_type': 'bh2', 'lower_order_final': True, 'use_flow_sigmas': True}
# Every file of an export: a directory with anything else in it is not one, and is not replaced.
_FILES = frozenset([
    _INDEX_FILE, str(COMPRESSOR), 'compressor/config.json', 'scheduler/scheduler_config.json',
    'tokenizer/tokenizer.json', 'tokenizer/tokenizer_config.json',
    *(f'{folder}/{name}' for folder, file in _PLACES.values() for name in (file, 'config.json')),
    outputs.LOCK_NAME])  # of exports that were written in place
_FOLDERS = frozenset(name.split('/')[0] for name in _FILES if '/' in name)
_SHOWN = 3
_SMALL_BYTES = 4 << 20  # headers and configurations
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def transformer_config(spec: TransformerSpec) -> dict[str, Any]:
  """Fields of diffusers' `WanTransformer3DModel`."""
  return {
      '_class_name': 'WanTransformer3DModel', '_diffusers_version': _DIFFUSERS_VERSION,
      'patch_size': spec.patch, 'num_attention_heads': spec.num_heads,
      'attention_head_dim': spec.head_dim, 'in_channels': spec.in_channels,
      'out_channels': spec.out_channels, 'text_dim': spec.text_width, 'freq_dim': spec.time_width,
      'ffn_dim': spec.ffn_width, 'num_layers': spec.num_layers, 'cross_attn_norm': True,
      'qk_norm': 'rms_norm_across_heads', 'eps': EPS, 'image_dim': None,
      'added_kv_proj_dim': None, 'rope_max_seq_len': 1024}


def vae_config(spec: VaeSpec) -> dict[str, Any]:
  """Fields of diffusers' `AutoencoderKLWan`."""
  channels = spec.latent_channels
  return {
      '_class_name': 'AutoencoderKLWan', '_diffusers_version': _DIFFUSERS_VERSION,
      'base_dim': spec.base_width, 'z_dim': channels, 'dim_mult': spec.width_multipliers,
      'num_res_blocks': spec.num_res_blocks, 'attn_scales': [],
      'temperal_downsample': spec.temporal_downsample, 'dropout': 0.0,
      'latents_mean': spec.latent_mean or (0.0,) * channels,
      'latents_std': spec.latent_std or (1.0,) * channels}


def text_config(spec: TextSpec) -> dict[str, Any]:
  """Fields of transformers' `UMT5Config`."""
  return {
      'architectures': ['UMT5EncoderModel'], 'model_type': 'umt5', 'vocab_size': spec.vocab_size,
      'd_model': spec.width, 'd_kv': spec.head_dim, 'd_ff': spec.ffn_width,
      'num_layers': spec.num_layers, 'num_heads': spec.num_heads,
      'relative_attention_num_buckets': spec.num_buckets,
      'relative_attention_max_distance': spec.max_distance, 'dropout_rate': 0.0,
      'layer_norm_epsilon': 1e-6, 'feed_forward_proj': 'gated-gelu', 'is_encoder_decoder': True,
      'use_cache': True, 'pad_token_id': 0, 'eos_token_id': 1, 'decoder_start_token_id': 0,
      'tie_word_embeddings': False, 'scalable_attention': True}


_CONFIGS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    'transformer': transformer_config, 'vae': vae_config, 'text': text_config}


def check_output(output: str | os.PathLike, *, overwrite: bool = False) -> None:
  """Refuses a directory that `export_diffusers` would not replace, so that it can be known early.

  Args:
    output: nothing, an empty directory, or an earlier export.
    overwrite: whether an earlier export may be replaced.

  Raises:
    NotWritable: it holds something that no export wrote; up to three names.
    OutputExists: it holds an export, and `overwrite` is false.
  """
  root = pathlib.Path(output)
  names = sorted(os.listdir(root)) if root.is_dir() else []
  if not names:
    return
  strange = [*itertools.islice(_strange(root), _SHOWN)] or (
      [] if _is_export(root) else names[:_SHOWN])
  if strange:
    raise outputs.NotWritable(
        f'{root} holds {", ".join(strange)}; wanted a new or empty directory, or an earlier export '
        'and nothing else. Move that away or choose another directory.')
  if not overwrite:
    raise outputs.OutputExists(f'{root} exists already; pass --overwrite to replace that export or '
                               'choose another directory.')


def _is_export(root: pathlib.Path) -> bool:
  """Whether the index is of our kind, and the folder is there that only exports from here have."""
  try:
    index = json.loads((root / _INDEX_FILE).read_bytes())
  except (OSError, ValueError):
    return False
  return (isinstance(index, dict) and index.get('_class_name') == _INDEX['_class_name']
          and (root / COMPRESSOR).is_file())


def _strange(root: pathlib.Path, folder: str = '') -> Iterator[str]:
  """Names in a directory that no export has; lazily, as it may be somebody's home."""
  for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
    name = folder + entry.name
    if entry.is_dir(follow_symlinks=False) and name in _FOLDERS:
      yield from _strange(root, f'{name}/')
    elif not entry.is_file(follow_symlinks=False) or name not in _FILES:
      yield name


def export_diffusers(models: Models, tokenizer: str | os.PathLike, output: str | os.PathLike, *,
                     choices: Mapping[str, Any] | None = None, overwrite: bool = False,
                     progress: Callable[[str], None] | None = None,
                     say: Callable[[str], None] = print) -> pathlib.Path:
  """Writes all networks of a model.

  Whatever happens meanwhile, a kill included, `output` is what it was or the whole export; see
  `outputs.atomic_directory`. An earlier export keeps its room on disk until then.

  Args:
    models: the networks; values are written as they are, in their own dtypes.
    tokenizer: its tokenizer.json.
    output: directory; created if needed.
    choices: how the model is meant to be sampled, see `package.Package`.
    overwrite: replace an earlier export.
    progress: told every file that is finished.
    say: receives notices.

  Returns:
    The directory.

  Raises:
    OutputExists, NotWritable: see `check_output`; nothing was written.
    DirectoryInUse: another process is exporting to it.
    WeightsError: too little disk; nothing was replaced.
  """
  check = functools.partial(check_output, overwrite=overwrite)
  try:
    with outputs.atomic_directory(output, check, say=say) as root:
      _check_space(root, tree_bytes(models) + os.path.getsize(tokenizer), output)
      _write(root, models, tokenizer, choices or {}, progress or (lambda name: None))
  except OSError as error:
    if error.errno not in _DISK_FULL:
      raise
    raise WeightsError(f'the disk of {output} is full ({error.strerror}); nothing was replaced. '
                       'Make room or choose another disk.') from error
  return pathlib.Path(output)


def export_trained(models: VideoModels, output: str | os.PathLike, *,
                   choices: Mapping[str, Any] | None = None,
                   about: Mapping[str, Any] | None = None) -> pathlib.Path:
  """Writes transformer and compressor alone: what a training on released weights changes.

  `launch.sample --weights=... --transformer=OUTPUT --compressor=OUTPUT/compressor/...` reads them.
  `output` is what it was or the whole export, see `outputs.atomic_directory`.

  Args:
    models: the networks.
    output: directory; an earlier one of this kind is replaced.
    choices: how the model is meant to be sampled, see `package.Package`.
    about: recipe and measurements.

  Raises:
    NotWritable: the directory holds something else.
    DirectoryInUse: another process is writing it.
  """
  own = {'transformer', COMPRESSOR.parts[0], _ABOUT_FILE}

  def check(root: pathlib.Path) -> None:
    if strange := sorted(set(os.listdir(root)) - own):
      raise outputs.NotWritable(f'{root} holds {", ".join(strange[:_SHOWN])}; wanted a new '
                                'directory, or an earlier result of training.')

  with outputs.atomic_directory(output, check) as root:
    folder, file = _PLACES['transformer']
    transformer = models.transformer
    _write_network(root / folder / file, transformer, transformer_config(transformer.spec))
    _write_compressor(root, models, choices or {})
    outputs.write_json(root / _ABOUT_FILE, dict(about or {}))
  return pathlib.Path(output)


def _check_space(root: pathlib.Path, values: int, output: str | os.PathLike) -> None:
  needed, free = values + _SMALL_BYTES, shutil.disk_usage(root).free
  if free < needed:
    raise WeightsError(f'{output} takes {needed / 1e9:.3f} GB, and its disk has {free / 1e9:.3f} '
                       'GB free (an earlier export stays until the new one is whole); nothing was '
                       'written. Make room or choose another disk.')


def _write(root: pathlib.Path, models: Models, tokenizer: str | os.PathLike,
           choices: Mapping[str, Any], progress: Callable[[str], None]) -> None:
  """All files, into an empty directory."""
  for kind, (folder, file) in _PLACES.items():
    module = getattr(models, kind)
    _write_network(root / folder / file, module, _CONFIGS[kind](module.spec))
    progress(f'{folder}/{file}')
  _write_compressor(root, models, choices)
  (root / 'tokenizer').mkdir()
  shutil.copyfile(tokenizer, root / 'tokenizer' / 'tokenizer.json')
  outputs.write_json(root / 'tokenizer' / 'tokenizer_config.json', {
      'tokenizer_class': _TOKENIZER, 'model_max_length': models.spec.text.max_tokens,
      'pad_token': '<pad>', 'eos_token': '</s>', 'bos_token': '<s>', 'unk_token': '<unk>'})
  (root / 'scheduler').mkdir()
  shift = choices.get('sampler', {}).get('shift', 5.0)
  outputs.write_json(root / 'scheduler' / 'scheduler_config.json',
                     {**_SCHEDULER, 'flow_shift': shift})
  outputs.write_json(root / _INDEX_FILE, _INDEX)


def _write_network(path: pathlib.Path, module: Any, config: dict[str, Any]) -> None:
  """config.json and the weights of one network, tensor by tensor."""
  target = networks.network(module.spec)
  values = {dotted(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(module)}
  pieces = list(target.pieces())
  path.parent.mkdir()
  writer = SafetensorsWriter(
      path, {target.diffusers(piece.name): (piece.shape, np.dtype(values[piece.path].dtype))
             for piece in pieces}, {'format': 'pt'})
  for piece in pieces:
    value = values[piece.path] if piece.layer is None else values[piece.path][piece.layer]
    with writer.piece(target.diffusers(piece.name)) as array:
      array[...] = piece.rule.write(np.asarray(value))
  writer.finish()
  outputs.write_json(path.parent / 'config.json', config)


def _write_compressor(root: pathlib.Path, models: VideoModels, choices: Mapping[str, Any]) -> None:
  from safetensors.numpy import save

  spec = models.spec
  path = root / COMPRESSOR
  path.parent.mkdir()
  outputs.write_bytes(path, save({
      dotted(p): np.ascontiguousarray(leaf)
      for p, leaf in jax.tree_util.tree_leaves_with_path(models.compressor)}))
  outputs.write_json(path.parent / 'config.json', {
      'compressor': dataclasses.asdict(spec.compressor), 'video': dataclasses.asdict(spec.video),
      'mid_offsets': spec.mid_offsets, 'choices': {k: dict(v) for k, v in choices.items()}})
