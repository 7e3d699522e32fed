"""Wan2.1's VAE checkpoint (`Wan2.1_VAE.pth`) <-> `WanVae`."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from pf_jax.models.vae import VaeSpec, WanVae
from pf_jax.weights.rules import Rule, dotted

# Ours -> Wan2.1's, part by part; the flat lists of layers keep their numbers.
_PARTS = {
    'quant_conv': 'conv1', 'post_quant_conv': 'conv2', 'conv_in': 'conv1', 'down': 'downsamples',
    'up': 'upsamples', 'middle.res1': 'middle.0', 'middle.attention': 'middle.1',
    'middle.res2': 'middle.2', 'norm_out': 'head.0', 'conv_out': 'head.2'}
_RES_BLOCK = {'norm1': 'residual.0', 'conv1': 'residual.2', 'norm2': 'residual.3',
              'conv2': 'residual.6'}


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


def vae_from_wan(tensors: Mapping[str, np.ndarray], spec: VaeSpec) -> WanVae:
  """Builds a VAE from a checkpoint's tensors.

  Args:
    tensors: the flat dict, under Wan2.1's original names.
    spec: sizes; they must be the checkpoint's.

  Returns:
    The VAE.

  Raises:
    ValueError: tensors are missing, left over or of another shape.
  """
  shapes = jax.eval_shape(lambda: WanVae(spec, rngs=nnx.Rngs(0)))
  left = set(tensors)

  def fill(path, leaf):
    rule = rule_of(dotted(path))
    if rule.name not in tensors:
      raise ValueError(f'{rule.name!r} is missing; is the spec the checkpoint\'s, and are these '
                       'the original names?')
    left.discard(rule.name)
    array = rule.read(np.asarray(tensors[rule.name]))
    if array.shape != leaf.shape:
      raise ValueError(f'{rule.name} makes {dotted(path)} {array.shape}, wanted {leaf.shape}; '
                       'check the spec.')
    return jax.numpy.asarray(array, leaf.dtype)

  vae = jax.tree_util.tree_map_with_path(fill, shapes)
  if left:
    raise ValueError(f'{len(left)} tensors belong to no parameter, first {min(left)!r}; is the '
                     'spec the checkpoint\'s?')
  return vae


def vae_to_wan(vae: WanVae) -> dict[str, np.ndarray]:
  """The inverse of `vae_from_wan`: every parameter under its original name and layout."""
  tensors = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(vae):
    rule = rule_of(dotted(path))
    tensors[rule.name] = rule.write(np.asarray(leaf))
  return tensors
