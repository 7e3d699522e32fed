"""A small model's weights in the forms that released weights have, written without torch."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from pf_jax.models.bundle import Models
from pf_jax.pipeline import PACKAGED
from pf_jax.weights.networks import to_released
from pf_jax.weights.safetensors_file import SafetensorsWriter
from tests.weights import hostile

KINDS = {'Float': np.float32, 'BFloat16': 'bfloat16', 'Half': np.float16}


def write_torch(path: pathlib.Path, tree: Mapping[str, Any]) -> None:
  """Saves a tree of dicts and float32 arrays as torch.save would."""
  storages: dict[str, bytes] = {}

  def encode(value: Any) -> Any:
    if isinstance(value, Mapping):
      return {name: encode(inner) for name, inner in value.items()}
    if not isinstance(value, np.ndarray):
      return value
    key, data = str(len(storages)), np.ascontiguousarray(value, np.float32)
    storages[key] = data.tobytes()
    strides = tuple(step // data.itemsize for step in data.strides)
    return hostile.tensor(key, data.size, data.shape, strides)

  hostile.write_zip(path, hostile.pickled(encode(tree)), storages)


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  path.parent.mkdir(exist_ok=True, parents=True)
  writer = SafetensorsWriter(path, {n: (t.shape, t.dtype) for n, t in tensors.items()})
  for name, tensor in tensors.items():
    with writer.piece(name) as array:
      array[...] = tensor
  writer.finish()


def write_sharded(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], shards: int) -> None:
  """Shards and their index, as large checkpoints are published."""
  names = [f'diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors'
           for i in range(shards)]
  for i, name in enumerate(names):
    write_safetensors(folder / name, dict(list(tensors.items())[i::shards]))
  where = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
  (folder / 'diffusion_pytorch_model.safetensors.index.json').write_text(
      json.dumps({'metadata': {}, 'weight_map': where}))


def write_wan(folder: pathlib.Path, models: Models) -> pathlib.Path:
  """Wan2.1's own layout: shards, two .pth files and the tokenizer."""
  write_sharded(folder, to_released(models.transformer), 2)
  write_torch(folder / 'Wan2.1_VAE.pth', to_released(models.vae))
  write_torch(folder / 'models_t5_umt5-xxl-enc-bf16.pth', to_released(models.text))
  (folder / 'google' / 'umt5-xxl').mkdir(parents=True)
  (folder / 'google' / 'umt5-xxl' / 'tokenizer.json').write_bytes(
      (PACKAGED / 'tokenizer.json').read_bytes())
  return folder


def write_self_forcing(path: pathlib.Path, models: Models, ema: Models) -> pathlib.Path:
  """A training checkpoint: generator, its average under FSDP's prefixes, critic, a step."""
  plain, average = to_released(models.transformer), to_released(ema.transformer)
  write_torch(path, {
      'generator': {f'model.{name}': value for name, value in plain.items()},
      'generator_ema': {f'model._fsdp_wrapped_module.{name}': v for name, v in average.items()},
      'critic': {f'model.{name}': 0 * value for name, value in plain.items()}, 'step': 600})
  return path


def assert_same(module, wanted):
  jax.tree.map(np.testing.assert_array_equal, module, wanted)
