"""Suite block: one layer of the transformer, and a block from noise to cache."""

from typing import NamedTuple

import jax
import numpy as np

from pf_jax.bench import counts, torch_peer
from pf_jax.bench.case import Bench, Case
from pf_jax.bench.kernels import array, decode, encode, jitted
from pf_jax.bench.subject import Subject
from pf_jax.bench.timing import Call
from pf_jax.kernels import rope
from pf_jax.kernels.attention import Segment
from pf_jax.models.bundle import VideoModels
from pf_jax.models.transformer import Layer, Stream
from pf_jax.rollout import block as block_lib
from pf_jax.types import Array, KeyValues, tree_bytes


class LayerInputs(NamedTuple):
  """What one layer's pass takes.

  Attributes:
    x: [1, T, D] float32, residual stream.
    modulation: [1, F, 6, D] float32.
    table: rotations of the tokens.
    text: keys/values [1, rows, N, H].
    history: keys/values [1, S, N, H] of what is attended besides.
  """

  x: Array
  modulation: Array
  table: rope.RopeTable
  text: KeyValues
  history: KeyValues


def layer_inputs(subject: Subject) -> LayerInputs:
  """Random ones, of a block in the steady state."""
  model, cache = subject.models.spec, subject.spec.cache
  dit, heads = model.transformer, (cache.num_heads, cache.head_dim)

  def keys_values(rows: int, seed: int) -> KeyValues:
    return KeyValues(*(array(1, rows, *heads, dtype=subject.dtype, seed=seed + i)
                       for i in range(2)))

  return LayerInputs(
      array(1, cache.block_tokens, dit.width, dtype='float32'),
      array(1, cache.frames_per_block, 6, dit.width, dtype='float32', seed=1),
      rope.rope_table(rope.block_positions(cache.grid), cache.head_dim),
      keys_values(model.text.max_tokens, 2), keys_values(cache.context_tokens, 4))


def layer_pass(layer: Layer, inputs: LayerInputs) -> Array:
  """One layer over a history that is ready: the new residual stream [1, T, D]."""
  stream = Stream(inputs.x, inputs.modulation, inputs.table)
  return layer(stream, inputs.text, lambda q: ((Segment(*inputs.history),), None))[0]


def first_layer(models: VideoModels) -> Layer:
  """The first of the stacked layers."""
  return jax.tree.map(lambda x: x[0], models.transformer.layers)


def _layer(bench: Bench) -> Case:
  subject = bench.subject
  dit, cache = subject.models.spec.transformer, subject.spec.cache
  layer, inputs = first_layer(subject.models), layer_inputs(subject)
  peer = torch_peer.layer(layer, inputs, dit)
  present, absent = torch_peer.sorted_out('torch, eager', peer)
  return Case(
      'one layer', {'ours': jitted(layer_pass, layer, inputs), **present}, subject.dtype,
      flops=counts.layer(dit, cache.block_tokens, cache.attention_tokens, inputs.text.k.shape[1]),
      bytes=counts.moved(layer_pass, layer, inputs),
      traced_flops=counts.traced(layer_pass, layer, inputs),
      shapes={'x': inputs.x.shape, 'history': inputs.history.k.shape, 'text': inputs.text.k.shape},
      absent=absent)


class Chain:
  """A rollout in the steady state; every `finish` moves it on by a block."""

  def __init__(self, subject: Subject):
    """Fills a state with random numbers."""
    self._programs, self._text = subject.programs, subject.text
    self._keys = jax.random.split(jax.random.key(0), 1)
    self.state = subject.state()
    self._block = self.denoise()

  def denoise(self) -> tuple[Array, Array]:
    """Latents and selection of the next block."""
    self._block = self._programs.denoise(self.state, self._text, self._keys)
    return self._block

  def finish(self):
    """Decodes and remembers the latest block: state and frames."""
    self.state, frames = self._programs.finish(1, self.state, *self._block, self._text)
    return self.state, frames

  def whole(self):
    """One after the other."""
    self.denoise()
    return self.finish()


class Work(NamedTuple):
  """Operations by formula and by trace, and bytes."""

  flops: int
  traced_flops: int
  bytes: int


def work(subject: Subject) -> dict[str, Work]:
  """Of 'denoise', 'finish' and 'whole'.

  The VAE has no formula: its part of 'finish' is traced by itself. Bytes are the weights and each
  layer's history once a pass, for 'finish' also the VAE's weights and its state, in and out.
  """
  models, spec = subject.models, subject.spec
  cache, passes = spec.cache, len(spec.sampler.steps)
  shapes = block_lib.input_shapes(models, 1, spec)
  state, block = shapes.state, (shapes.latents, shapes.selected)
  video = models.spec.video
  pixels = jax.ShapeDtypeStruct((1, video.block_frames, video.height, video.width, 3), np.float32)
  a_pass = tree_bytes(models.transformer) + cache.num_layers * cache.attended_bytes()
  denoise = Work(
      counts.denoise(models.spec, cache, passes),
      counts.traced(lambda *given: block_lib.denoise_block(*given, spec=spec), models, state.cache,
                    shapes.text, shapes.keys),
      passes * a_pass)
  finish = Work(
      counts.transformer_pass(models.spec, cache, clean=True) + counts.compress(models)
      + counts.traced(decode, models, state.decoder, shapes.latents)
      + counts.traced(encode, models, pixels),
      counts.traced(lambda *given: block_lib.finish_block(*given, first=False, spec=spec), models,
                    state, *block, shapes.text),
      a_pass + tree_bytes((models.vae, models.compressor)) + 2 * tree_bytes(state.decoder))
  whole = Work(*(a + b for a, b in zip(denoise, finish, strict=True)))
  return {'denoise': denoise, 'finish': finish, 'whole': whole}


def block(bench: Bench) -> list[Case]:
  """A layer beside PyTorch's, and a block beside nobody's."""
  subject, cases = bench.subject, [_layer(bench)]
  chain = Chain(subject)
  calls = {'denoise': chain.denoise, 'finish': chain.finish, 'whole': chain.whole}
  for name, counted in work(subject).items():
    cases.append(Case(
        name, {'ours': Call(calls[name])}, subject.dtype, counted.flops, counted.bytes,
        {'latents': (1, *subject.models.spec.video.block_latent_shape)}, counted.traced_flops,
        notes=lambda: {'passes': len(subject.spec.sampler.steps)}))
  return cases
