"""Exports load in diffusers and transformers and compute there what they compute here; and back.

The networks are of the smallest sizes that leave no field of a configuration without effect.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, UMT5EncoderModel

from pf_jax.models.tokenizer import Tokenizer
from pf_jax.models.vae import WanVae
from pf_jax.pipeline import PACKAGED
from pf_jax.testing import random_models
from pf_jax.types import DTypes
from pf_jax.weights.export import export_diffusers
from pf_jax.weights.load import load_network
from pf_jax.weights.networks import to_released
from tests.parity import oracles, vae_oracle
from tests.rollout import few_step

# max|d| / max|ref|, float32
GATES = {'transformer': 2e-5, 'vae': 1e-5, 'text': 2e-5}
CLASSES = {'transformer': (WanTransformer3DModel, 'transformer'), 'vae': (AutoencoderKLWan, 'vae'),
           'text': (UMT5EncoderModel, 'text_encoder')}
SPEC = dataclasses.replace(
    few_step.MODEL,
    vae=dataclasses.replace(few_step.MODEL.vae, base_width=8, width_multipliers=(1, 2, 2, 4)),
    text=dataclasses.replace(few_step.MODEL.text, num_layers=2, max_tokens=40))
PROMPTS = ('a white seven drifts right', 'A "White" 7, (drifts); right!', 'zwölf 漢字 🙂 ﬁne',
           'two  spaces\nand a line', '7')
MAX_TOKENS = SPEC.text.max_tokens
LATENTS = (1, *SPEC.video.block_latent_shape)


@functools.cache
def _models():
  return random_models(SPEC, 41)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  return export_diffusers(_models(), PACKAGED / 'tokenizer.json',
                          tmp_path_factory.mktemp('export') / 'model')


def _load(directory, kind, **overrides):
  """A network as the libraries load it; `overrides` replace fields of its configuration."""
  library, folder = CLASSES[kind]
  if kind == 'text':  # transformers would else take one tensor's precision for that of all
    overrides['dtype'] = torch.float32
  loaded, report = library.from_pretrained(directory, subfolder=folder, output_loading_info=True,
                                           **overrides)
  assert not any(report.values()), report
  return loaded.eval()


def _tensors(kind, loaded):
  return vae_oracle.vae_tensors(loaded) if kind == 'vae' else oracles.wan_tensors(loaded)


def _assert_same(ours, theirs):
  assert set(ours) == set(theirs)
  for name, tensor in theirs.items():
    np.testing.assert_array_equal(np.asarray(ours[name], np.float32), tensor, err_msg=name)


@pytest.mark.parametrize('kind', CLASSES)
def test_every_tensor_arrives(kind, exported):
  _assert_same(to_released(getattr(_models(), kind)), _tensors(kind, _load(exported, kind)))


def test_every_tensor_arrives_in_bfloat16(tmp_path):
  low = DTypes('bfloat16', 'bfloat16', 'bfloat16')
  spec = dataclasses.replace(SPEC, **{
      kind: dataclasses.replace(getattr(SPEC, kind), dtypes=low) for kind in CLASSES})
  models = random_models(spec, 42)
  assert models.transformer.layers.self_attn.q.kernel.dtype == jnp.bfloat16
  export_diffusers(models, PACKAGED / 'tokenizer.json', tmp_path)
  for kind in CLASSES:
    _assert_same(to_released(getattr(models, kind)), _tensors(kind, _load(tmp_path, kind)))


@functools.cache
def _text_case():
  """Ids and mask [2, 40] and their encoding; the first prompt fills all rows."""
  ids = np.random.default_rng(43).integers(4, SPEC.text.vocab_size, (2, MAX_TOKENS))
  mask = np.arange(MAX_TOKENS) < np.array([[MAX_TOKENS], [9]])
  ids = np.where(mask, ids, 0)
  return ids, mask, np.asarray(jax.jit(lambda model, *args: model(*args))(
      _models().text, ids, mask))


@jax.jit
def _flow(model, latents, timesteps, text):
  each = jnp.repeat(jnp.asarray(timesteps, jnp.float32)[:, None], latents.shape[1], axis=1)
  return model(latents, each, model.text_keys_values(text)).flow


_encode, _decode = jax.jit(WanVae.encode), jax.jit(WanVae.decode)


def _draw(seed, shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def _transformer_case():
  """Latents [1, 4, 4, 10, 4], timesteps [1], text [1, 40, 20] and the flow."""
  inputs = (_draw(44, LATENTS), np.float32([937.5]), _draw(45, (1, MAX_TOKENS, SPEC.text.width)))
  return *inputs, np.asarray(_flow(_models().transformer, *inputs))


@functools.cache
def _vae_case():
  """Pixels [1, 9, 16, 24, 3], their latents; other latents [1, 4, 4, 10, 4], their pixels."""
  pixels, latents = np.tanh(_draw(46, (1, 9, 16, 24, 3))), _draw(47, LATENTS)
  vae = _models().vae
  return pixels, np.asarray(_encode(vae, pixels)), latents, np.asarray(_decode(vae, latents))


def _error(kind, loaded):
  """How far the library's network is from ours on the case of its kind."""
  if kind == 'text':
    ids, mask, ours = _text_case()
    return oracles.relative_error(ours * mask[..., None], oracles.umt5_oracle(loaded, ids, mask))
  if kind == 'transformer':
    *inputs, ours = _transformer_case()
    return oracles.relative_error(ours, oracles.wan_oracle(loaded, *inputs))
  pixels, means, latents, frames = _vae_case()
  mean, std = np.float32(loaded.config.latents_mean), np.float32(loaded.config.latents_std)
  return max(
      oracles.relative_error(means, (vae_oracle.encode(loaded, pixels)[0] - mean) / std),
      oracles.relative_error(frames, vae_oracle.decode(loaded, latents * std + mean)))


@pytest.mark.parametrize('kind', CLASSES)
def test_loaded_network_computes_the_same(kind, exported):
  assert _error(kind, _load(exported, kind)) <= GATES[kind]


# What no tensor's shape gives away.
@pytest.mark.parametrize(('kind', 'wrong'), [
    ('transformer', dict(num_attention_heads=2, attention_head_dim=24)),
    ('transformer', dict(eps=1e-3)),
    ('text', dict(relative_attention_max_distance=20)),
    ('text', dict(dense_act_fn='gelu')),
    ('text', dict(layer_norm_epsilon=1e-3)),
    ('vae', dict(latents_mean=4 * [0.0])),
    ('vae', dict(latents_std=4 * [1.0])),
], ids=str)
def test_gate_fails_a_wrong_configuration(kind, wrong, exported):
  assert _error(kind, _load(exported, kind, **wrong)) > 10 * GATES[kind]


def test_tokenizer_gives_the_same_ids(exported):
  """Capitals, punctuation, ligatures and characters that the vocabulary lacks included."""
  ours = Tokenizer.from_file(PACKAGED / 'tokenizer.json', max_tokens=MAX_TOKENS)(PROMPTS)
  theirs = AutoTokenizer.from_pretrained(exported / 'tokenizer')
  assert len(theirs) == SPEC.text.vocab_size
  assert any(3 in row for row in ours.ids), 'some prompt needs <unk>'
  for tokenizer in (theirs, WanPipeline.from_pretrained(exported).tokenizer):
    read = tokenizer([prompt_clean(prompt) for prompt in PROMPTS], padding='max_length',
                     max_length=MAX_TOKENS, truncation=True)
    np.testing.assert_array_equal(read.input_ids, ours.ids)
    np.testing.assert_array_equal(read.attention_mask, ours.mask)


def test_pipeline_makes_the_same_clip(exported):
  """One step of the loaded pipeline from prompt to pixels: all four parts and their scheduler."""
  pipeline = WanPipeline.from_pretrained(exported)
  pipeline.set_progress_bar_config(disable=True)
  noise = _draw(48, LATENTS)
  theirs = pipeline(
      PROMPTS[0], height=32, width=80, num_frames=13, num_inference_steps=1, guidance_scale=1.0,
      latents=torch.tensor(np.moveaxis(noise, -1, 1)), max_sequence_length=MAX_TOKENS,
      output_type='np').frames
  models, scheduler = _models(), pipeline.scheduler
  assert scheduler.config.flow_shift == 5
  batch = Tokenizer.from_file(PACKAGED / 'tokenizer.json', max_tokens=MAX_TOKENS)(PROMPTS[0])
  text = np.asarray(models.text(batch.ids, batch.mask)) * batch.mask[..., None]
  flow = _flow(models.transformer, noise, scheduler.timesteps[:1].numpy(), text)
  ours = np.asarray(_decode(models.vae, noise - float(scheduler.sigmas[0]) * flow))
  assert np.mean(np.abs(ours) < 1) > 0.5, 'clamping must not hide the picture'
  assert oracles.relative_error((ours + 1) / 2, theirs) <= GATES['transformer']


# The other way: what the libraries write, in shards with an index where they are large.
@pytest.mark.parametrize('kind', CLASSES)
def test_saved_networks_load_here(kind, tmp_path):
  spec = getattr(few_step.MODEL, kind)
  oracle = {
      'transformer': lambda: oracles.tiny_wan_transformer(49, out_channels=4),
      'text': lambda: oracles.tiny_umt5(50),
      'vae': lambda: vae_oracle.tiny_wan_vae(51, base=4, multipliers=(1, 1, 1, 1), res_blocks=1),
  }[kind]()
  if kind == 'text':
    spec = dataclasses.replace(spec, vocab_size=97, width=32, num_layers=3, num_heads=3,
                               head_dim=8, ffn_width=56)
  folder = tmp_path / CLASSES[kind][1]
  oracle.save_pretrained(folder, max_shard_size='50KB')
  assert len(list(folder.glob('*.safetensors'))) > 1
  assert list(folder.glob('*.safetensors.index.json'))
  _assert_same(to_released(load_network(tmp_path, spec, say=print)),
               _tensors(kind, oracle))
