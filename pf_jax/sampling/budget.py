"""What sampling takes in memory and on disk, from specs alone: nothing is loaded or compiled.

Three phases never overlap. First the text encoder encodes the prompts and is let go. Then
transformer, VAE and compressor are loaded; frames that a video begins with are encoded. Then blocks
are made, beside a state that does not grow with the video.
"""

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import jax

from pf_jax.models import bundle
from pf_jax.models.bundle import ModelSpec
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec
from pf_jax.types import PyTree, tree_bytes

# Bits a pixel that x264 took at quality 18, and the step of quality that doubles them: see
# EVIDENCE.md, "Size of MP4 files". Content decides; this is for planning.
MP4_BITS = 0.3
_QUALITY, _DOUBLES = 18, 6


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
    encoder: the VAE encoder's temporal state, while given frames are encoded.
    scratch: temporary memory of the largest program; None if it was not compiled.
    latents_file: on disk, all latents and selections of the videos.
    videos_file: on disk, expected size of all videos; content decides.
  """

  parameters: Mapping[str, int]
  networks: Mapping[str, int]
  cache: Mapping[str, int]
  context: int
  decoder: int
  kept: int
  text: int
  encoder: int
  scratch: int | None
  latents_file: int
  videos_file: int

  @property
  def text_phase(self) -> int:
    """While prompts are encoded."""
    return self.networks['text']

  @property
  def video_networks(self) -> int:
    """All but the text encoder."""
    return sum(size for name, size in self.networks.items() if name != 'text')

  @property
  def begin_phase(self) -> int:
    """While given frames are encoded; the encoder's scratch is not counted."""
    return self.video_networks + self.encoder

  @property
  def video_phase(self) -> int:
    """While blocks are made; the packed context is part of a program's scratch, if known."""
    working = self.context if self.scratch is None else self.scratch
    return (self.video_networks + sum(self.cache.values()) + self.decoder + self.kept + self.text
            + working)

  @property
  def peak(self) -> int:
    """The largest phase."""
    return max(self.text_phase, self.begin_phase, self.video_phase)

  @property
  def disk(self) -> int:
    """Expected size of all files."""
    return self.latents_file + self.videos_file

  def lines(self) -> list[str]:
    """A plan to read."""
    rows = [(f'{name} ({self.parameters[name]:,} parameters)', size)
            for name, size in self.networks.items()]
    rows += [(f'cache: {name}', size) for name, size in self.cache.items()]
    rows += [('cache, all partitions', sum(self.cache.values())),
             ('packed context of one layer', self.context), ('VAE decoder state', self.decoder),
             ('VAE encoder state, while given frames are read', self.encoder),
             ('kept latents', self.kept), ('text keys/values of all prompts', self.text)]
    if self.scratch is not None:
      rows.append(('scratch of the largest program, packed context included', self.scratch))
    rows += [('peak while prompts are encoded', self.text_phase),
             ('peak while given frames are encoded, scratch not counted', self.begin_phase),
             ('peak while blocks are made' + (', scratch not counted' if self.scratch is None
                                              else ''), self.video_phase),
             ('on disk: latents', self.latents_file),
             ('on disk: videos, about (content decides)', self.videos_file)]
    return table(rows)

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
    raise DoesNotFit(f'{self.peak / 1e9:.1f} GB are needed, {where} has {available / 1e9:.1f} GB; '
                     f'{self._remedy()}.')

  def _remedy(self) -> str:
    """What makes the largest part of the largest phase smaller."""
    if self.text_phase == self.peak:
      return 'use bfloat16 for the text encoder (config.model.text.dtypes)'
    parts = {'use bfloat16 for the networks (config.model.*.dtypes) or a smaller model':
                 self.video_networks,
             'lower cache.mid_capacity, cache.sink_blocks, the picture\'s size or batch_size':
                 sum(self.cache.values()),
             'lower the picture\'s size or batch_size': self.decoder + (self.scratch or 0),
             'use fewer prompt switches': self.text}
    return max(parts, key=lambda remedy: parts[remedy])

  def check_disk(self, directory: pathlib.Path) -> None:
    """Refuses a run whose files would not fit beside what is there.

    Args:
      directory: of the files; it or one of its parents exists.

    Raises:
      DoesNotFit: got, wanted, and what to change.
    """
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if self.disk > free:
      raise DoesNotFit(
          f'about {self.disk / 1e9:.2f} GB of files are expected (latents '
          f'{self.latents_file / 1e9:.2f}), {there} has {free / 1e9:.2f} GB free; make room, '
          'choose another --output, or ask for fewer seconds or videos.')


def budget(model: ModelSpec, spec: RolloutSpec, *, batch: int, blocks: int, videos: int,
           texts: int = 1, quality: int = _QUALITY, scratch: int | None = None) -> Budget:
  """Adds up what a run takes.

  Args:
    model: networks.
    spec: cache and sampler.
    batch: videos that advance in lockstep.
    blocks: length of every video.
    videos: how many, all batches together.
    texts: most texts of a video; their keys and values stay until it is finished.
    quality: of the MP4, see `SampleSpec`.
    scratch: of the largest program, where it was compiled.
  """
  models = bundle.shapes(model)
  shapes = block_lib.input_shapes(models, batch, spec)
  video, state = model.video, shapes.state
  networks = {name: getattr(models, name) for name in ('text', 'transformer', 'vae', 'compressor')}
  frames = jax.ShapeDtypeStruct((1, 1, video.height, video.width, 3), 'float32')
  encoder = jax.eval_shape(lambda vae, pixels: vae.encode_first(pixels)[1], models.vae, frames)
  selected = 4 * spec.cache.num_layers * spec.cache.top_k
  latents = 4 * math.prod(video.block_latent_shape)
  pixels = videos * video.pixel_frames(blocks) * video.height * video.width
  return Budget(
      parameters={name: _count(module) for name, module in networks.items()},
      networks={name: tree_bytes(module) for name, module in networks.items()},
      cache=spec.cache.partition_bytes(batch), context=spec.cache.context_bytes(batch),
      decoder=tree_bytes(state.decoder),
      kept=tree_bytes((state.recent_latents, state.recent_lr)),
      text=texts * tree_bytes(shapes.text), encoder=tree_bytes(encoder), scratch=scratch,
      latents_file=videos * blocks * (latents + selected),
      videos_file=mp4_bytes(pixels, quality))


def mp4_bytes(pixels: int, quality: int) -> int:
  """Expected size of videos of so many pixels, all frames together; content decides."""
  return round(pixels * MP4_BITS / 8 * 2 ** ((_QUALITY - quality) / _DOUBLES))


def table(rows: Sequence[tuple[str, int]]) -> list[str]:
  """Lines of names and bytes to read."""
  width = max(len(name) for name, _ in rows)
  return [f'{name:<{width}}  {size / 1e9:10.4f} GB' for name, size in rows]


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
