"""Wan2.1's VAE checkpoint (`Wan2.1_VAE.pth`) <-> `WanVae`."""

import re

import numpy as np

from pf_jax.models.vae import VaeSpec
from pf_jax.weights.rules import Rule, rename

# Ours -> Wan2.1's, part by part; the flat lists of layers keep their numbers.
_PARTS = {
    'quant_conv': 'conv1', 'post_quant_conv': 'conv2', 'conv_in': 'conv1', 'down': 'downsamples',
    'up': 'upsamples', 'middle.res1': 'middle.0', 'middle.attention': 'middle.1',
    'middle.res2': 'middle.2', 'norm_out': 'head.0', 'conv_out': 'head.2'}
_RES_BLOCK = {'norm1': 'residual.0', 'conv1': 'residual.2', 'norm2': 'residual.3',
              'conv2': 'residual.6'}

# Wan2.1's names -> diffusers', after `diffusers_name` has grouped the decoder's layers.
_DIFFUSERS = (
    (r'^conv1\.', 'quant_conv.'),
    (r'^conv2\.', 'post_quant_conv.'),
    (r'coder\.conv1\.', 'coder.conv_in.'),
    (r'\.head\.0\.', '.norm_out.'),
    (r'\.head\.2\.', '.conv_out.'),
    (r'\.middle\.1\.', '.mid_block.attentions.0.'),
    (r'\.middle\.0\.', '.mid_block.resnets.0.'),
    (r'\.middle\.2\.', '.mid_block.resnets.1.'),
    (r'\.downsamples\.', '.down_blocks.'),
    (r'\.residual\.0\.', '.norm1.'),
    (r'\.residual\.2\.', '.conv1.'),
    (r'\.residual\.3\.', '.norm2.'),
    (r'\.residual\.6\.', '.conv2.'),
    (r'\.shortcut\.', '.conv_shortcut.'),
)


def _kernel(name: str) -> Rule:
  """Released as [O, C, ...]; ours is [..., C, O]."""
  return Rule(f'{name}.weight', lambda w: np.moveaxis(w, (0, 1), (-1, -2)),
              lambda w: np.moveaxis(w, (-1, -2), (0, 1)))


def _gamma(name: str, ndim: int) -> Rule:
  """Released with singleton axes behind the channels."""
  return Rule(f'{name}.gamma', lambda w: w.reshape(-1),
              lambda w: w.reshape(-1, *[1] * (ndim - 1)))


def rule_of(path: str) -> Rule:
  """The released tensor behind a parameter such as 'encoder.down.0.conv1.kernel'."""
  module, leaf = path.rsplit('.', 1)
  coder, dot, inner = module.partition('.')
  if not dot:
    name = _PARTS[coder]
  else:
    head, _, layer = inner.partition('.')
    parts = layer.split('.')
    # The number of a layer, or res1 / attention / res2 of the middle.
    if head == 'middle':
      stem, rest = _PARTS[f'middle.{parts[0]}'], parts[1:]
    elif head in ('down', 'up'):
      stem, rest = f'{_PARTS[head]}.{parts[0]}', parts[1:]
    else:
      stem, rest = _PARTS[head], []
    # Inside an attention the names agree; a resampling convolution is the only plain `conv`.
    last = {**_RES_BLOCK, 'conv': 'resample.1'}.get(rest[0], rest[0]) if rest else ''
    name = '.'.join(part for part in (coder, stem, last) if part)
  if leaf == 'kernel':
    return _kernel(name)
  if leaf == 'gamma':
    return _gamma(name, 3 if '.attention.' in path else 4)
  return Rule(f'{name}.bias')


def diffusers_name(name: str, spec: VaeSpec) -> str:
  """A tensor's name in diffusers' `AutoencoderKLWan`.

  The encoder's layers are one flat list there as well; the decoder's are grouped by resolution,
  each group `num_res_blocks + 1` residual blocks and, but for the last, an upsampler.
  """
  if match := re.match(r'decoder\.upsamples\.(\d+)\.', name):
    group, layer = divmod(int(match[1]), spec.num_res_blocks + 2)
    part = 'upsamplers.0' if layer > spec.num_res_blocks else f'resnets.{layer}'
    name = f'decoder.up_blocks.{group}.{part}.{name[match.end():]}'
  return rename(name, _DIFFUSERS)
