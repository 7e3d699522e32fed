"""A model as a directory that diffusers and transformers load.

  model_index.json, scheduler/     what `WanPipeline.from_pretrained` asks for
  transformer/, vae/, text_encoder/   config.json and safetensors under their names and layouts
  tokenizer/                       tokenizer.json and its configuration
  compressor/                      ours alone: the HR branch's weights under their dotted paths, and
                                   its sizes with the video's geometry and the sampler's choices

diffusers has no PackForcing cache, so what it samples with these files is the bidirectional model.
The compressor's folder is ignored there and read back by `launch.sample --compressor`.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pf_jax import outputs
from pf_jax.models.bundle import Models
from pf_jax.models.text import TextSpec
from pf_jax.models.transformer import EPS, TransformerSpec
from pf_jax.models.vae import VaeSpec
from pf_jax.weights import networks
from pf_jax.weights.rules import dotted
from pf_jax.weights.safetensors_file import SafetensorsWriter

# Folder and file of each network, as the libraries name them.
_PLACES = {'transformer': ('transformer', 'diffusion_pytorch_model.safetensors'),
           'vae': ('vae', 'diffusion_pytorch_model.safetensors'),
           'text': ('text_encoder', 'model.safetensors')}
_DIFFUSERS_VERSION = '0.35.0'  # the first whose Wan classes have every field written here
# It reads tokenizer.json as it is; T5's own class would add a hundred tokens to it.
_TOKENIZER = 'PreTrainedTokenizerFast'
COMPRESSOR = pathlib.PurePath('compressor', 'compressor.safetensors')
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


def export_diffusers(models: Models, tokenizer: str | os.PathLike, output: str | os.PathLike, *,
                     choices: Mapping[str, Any] | None = None, overwrite: bool = False,
                     progress: Callable[[str], None] | None = None) -> pathlib.Path:
  """Writes all networks of a model.

  Args:
    models: the networks; values are written as they are, in their own dtypes.
    tokenizer: its tokenizer.json.
    output: directory; created if needed.
    choices: how the model is meant to be sampled, see `package.Package`.
    overwrite: replace an earlier export.
    progress: told every file that is finished.

  Returns:
    The directory.

  Raises:
    OutputExists, NotWritable, DirectoryInUse: the output cannot be used.
    WeightsError: too little disk.
  """
  spec = models.spec
  with outputs.claim_directory(output) as root:
    # The index is written last: without it nothing here is a model yet.
    index = outputs.output_path(root, 'model_index.json', overwrite=overwrite)
    index.unlink(missing_ok=True)
    for kind, (folder, file) in _PLACES.items():
      module = getattr(models, kind)
      _write_network(root / folder / file, module, _CONFIGS[kind](module.spec))
      if progress:
        progress(f'{folder}/{file}')
    _write_compressor(root, models, choices or {})
    (root / 'tokenizer').mkdir(exist_ok=True)
    shutil.copyfile(tokenizer, root / 'tokenizer' / 'tokenizer.json')
    outputs.write_json(root / 'tokenizer' / 'tokenizer_config.json', {
        'tokenizer_class': _TOKENIZER, 'model_max_length': spec.text.max_tokens,
        'pad_token': '<pad>', 'eos_token': '</s>', 'bos_token': '<s>', 'unk_token': '<unk>'})
    (root / 'scheduler').mkdir(exist_ok=True)
    shift = (choices or {}).get('sampler', {}).get('shift', 5.0)
    outputs.write_json(root / 'scheduler' / 'scheduler_config.json',
                       {**_SCHEDULER, 'flow_shift': shift})
    outputs.write_json(index, _INDEX)
    return root


def _write_network(path: pathlib.Path, module: Any, config: dict[str, Any]) -> None:
  """config.json and the weights of one network, tensor by tensor."""
  target = networks.network(module.spec)
  values = {dotted(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(module)}
  pieces = list(target.pieces())
  path.parent.mkdir(exist_ok=True)
  writer = SafetensorsWriter(
      path, {target.diffusers(piece.name): (piece.shape, np.dtype(values[piece.path].dtype))
             for piece in pieces}, {'format': 'pt'}, restart=True)
  for piece in pieces:
    value = values[piece.path] if piece.layer is None else values[piece.path][piece.layer]
    with writer.piece(target.diffusers(piece.name)) as array:
      array[...] = piece.rule.write(np.asarray(value))
  writer.finish()
  outputs.write_json(path.parent / 'config.json', config)


def _write_compressor(root: pathlib.Path, models: Models, choices: Mapping[str, Any]) -> None:
  from safetensors.numpy import save

  spec = models.spec
  path = root / COMPRESSOR
  path.parent.mkdir(exist_ok=True)
  outputs.write_bytes(path, save({
      dotted(p): np.ascontiguousarray(leaf)
      for p, leaf in jax.tree_util.tree_leaves_with_path(models.compressor)}))
  outputs.write_json(path.parent / 'config.json', {
      'compressor': dataclasses.asdict(spec.compressor), 'video': dataclasses.asdict(spec.video),
      'mid_offsets': spec.mid_offsets, 'choices': {k: dict(v) for k, v in choices.items()}})
