"""What sampling takes in memory and on disk, from specs alone: nothing is loaded or compiled.

Two phases never overlap. First the text encoder encodes the prompts and is let go; then
transformer, VAE and compressor stay for the whole video, beside a state that does not grow with it.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from pf_jax.models.bundle import Models, ModelSpec
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec
from pf_jax.types import PyTree, tree_bytes


class DoesNotFit(ValueError):
  """More memory is needed than there is."""


@dataclasses.dataclass(frozen=True)
class Budget:
  """Bytes, in the precision of the specs.

  Attributes:
    parameters: number of parameters of each network.
    networks: bytes of each network.
    cache: bytes of each partition of the cache.
    context: packed history of one layer, working memory.
    decoder: the VAE decoder's temporal state.
    kept: latents of the recent blocks, kept for a change of prompt.
    text: cross-attention keys and values of all prompts of a video.
    scratch: temporary memory of the largest program; None if it was not compiled.
    latents_file: on disk, all latents and selections of the videos while they are made.
  """

  parameters: Mapping[str, int]
  networks: Mapping[str, int]
  cache: Mapping[str, int]
  context: int
  decoder: int
  kept: int
  text: int
  scratch: int | None
  latents_file: int

  @property
  def text_phase(self) -> int:
    """While prompts are encoded."""
    return self.networks['text']

  @property
  def video_phase(self) -> int:
    """While blocks are made; the packed context is part of a program's scratch, if known."""
    networks = sum(size for name, size in self.networks.items() if name != 'text')
    working = self.context if self.scratch is None else self.scratch
    return networks + sum(self.cache.values()) + self.decoder + self.kept + self.text + working

  @property
  def peak(self) -> int:
    """The larger phase."""
    return max(self.text_phase, self.video_phase)

  def lines(self) -> list[str]:
    """A plan to read."""
    rows = [(f'{name} ({self.parameters[name]:,} parameters)', size)
            for name, size in self.networks.items()]
    rows += [(f'cache: {name}', size) for name, size in self.cache.items()]
    rows += [('cache, all partitions', sum(self.cache.values())),
             ('packed context of one layer', self.context), ('VAE decoder state', self.decoder),
             ('kept latents', self.kept), ('text keys/values of all prompts', self.text)]
    if self.scratch is not None:
      rows.append(('scratch of the largest program, packed context included', self.scratch))
    rows += [('peak while prompts are encoded', self.text_phase),
             ('peak while blocks are made' + (', scratch not counted' if self.scratch is None
                                              else ''), self.video_phase),
             ('on disk: latents while they are needed', self.latents_file)]
    width = max(len(name) for name, _ in rows)
    return [f'{name:<{width}}  {size / 1e9:10.4f} GB' for name, size in rows]

  def check(self, available: int, where: str) -> None:
    """Refuses what cannot fit.

    Args:
      available: bytes.
      where: whose memory it is, for the message.

    Raises:
      DoesNotFit: got, wanted, and what to change.
    """
    if self.peak <= available:
      return
    remedy = ('use bfloat16 for the text encoder, or fewer videos at once'
              if self.text_phase > self.video_phase else
              'lower cache.mid_capacity, cache.sink_blocks or batch_size, or the picture\'s size')
    raise DoesNotFit(f'{self.peak / 1e9:.1f} GB are needed, {where} has {available / 1e9:.1f} GB; '
                     f'{remedy}.')


def budget(model: ModelSpec, spec: RolloutSpec, *, batch: int, blocks: int, texts: int = 1,
           scratch: int | None = None) -> Budget:
  """Adds up what a run takes.

  Args:
    model: networks.
    spec: cache and sampler.
    batch: videos that advance in lockstep.
    blocks: length of all videos together, for the latents on disk.
    texts: most texts of a video; their keys and values stay until it is finished.
    scratch: of the largest program, where it was compiled.
  """
  models = jax.eval_shape(lambda: Models(model, rngs=nnx.Rngs(0)))
  state = jax.eval_shape(lambda m: block_lib.init(m, batch, spec), models)
  rows = jax.ShapeDtypeStruct((batch, model.text.max_tokens, model.text.width), jnp.float32)
  text = jax.eval_shape(lambda m, r: m.transformer.text_keys_values(r), models, rows)
  networks = {name: getattr(models, name) for name in ('text', 'transformer', 'vae', 'compressor')}
  selected = 4 * spec.cache.num_layers * spec.cache.top_k
  latents = 4 * math.prod(model.video.block_latent_shape)
  return Budget(
      parameters={name: _count(module) for name, module in networks.items()},
      networks={name: tree_bytes(module) for name, module in networks.items()},
      cache=spec.cache.partition_bytes(batch), context=spec.cache.context_bytes(batch),
      decoder=tree_bytes(state.decoder),
      kept=tree_bytes((state.recent_latents, state.recent_lr)), text=texts * tree_bytes(text),
      scratch=scratch, latents_file=blocks * (latents + selected))


def _count(tree: PyTree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def device_memory() -> tuple[int, str]:
  """Bytes that JAX's default device offers, and its name; a CPU offers what is free right now."""
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit'], device.device_kind
  with open('/proc/meminfo', encoding='ascii') as file:
    fields = dict(line.split(':', 1) for line in file)
  return int(fields['MemAvailable'].split()[0]) * 1024, 'this machine'
