"""One short clip from the bidirectional base model: what the causal rollout is compared with.

The base model denoises the whole clip at once, in some 50 steps with guidance. Memory and time grow
with its length, so it is meant for the lengths it was trained on (5 s).
"""

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax import outputs, released
from pf_jax.pipeline import Pipeline
from pf_jax.released import ReleasedWeights
from pf_jax.rollout.bidirectional import ClipSamplerSpec, sample_clip
from pf_jax.rollout.rollout import to_frames
from pf_jax.sampling import meter
from pf_jax.sampling.source import ModelSource
from pf_jax.types import Array
from pf_jax.viz import sheet
from pf_jax.viz.video import VideoWriter


@dataclasses.dataclass(frozen=True)
class ClipSpec:
  """How a clip is made.

  Attributes:
    sampler: solver and guidance.
    latent_frames: length; 21 latent frames are 81 pixel frames, what Wan2.1 was trained on.
    quality: x264's constant rate factor.
    sheet_columns: moments on the contact sheet.

  Raises:
    ValueError: a value out of range.
  """

  sampler: ClipSamplerSpec = ClipSamplerSpec()
  latent_frames: int = 21
  quality: int = 18
  sheet_columns: int = 8

  def __post_init__(self):
    for name in ('latent_frames', 'sheet_columns'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if not 0 <= self.quality <= 51:
      raise ValueError(f'quality={self.quality} must be within 0..51; 18 is visually lossless.')


def sample(pipeline: Pipeline, prompt: str, negative_prompt: str, seed: int, spec: ClipSpec
           ) -> Array:
  """The latents of one clip, [1, F, h, w, C].

  Args:
    pipeline: its transformer is a bidirectional model.
    prompt: what the clip shows.
    negative_prompt: what it should not be like; may be empty.
    seed: of its noise.
    spec: settings.
  """
  transformer = pipeline.models.transformer
  text_of = jax.jit(lambda model, rows: model.text_keys_values(rows))
  positive, negative = (text_of(transformer, jnp.asarray(pipeline.prompts([text],
                                                                          allow_empty=True)))
                        for text in (prompt, negative_prompt))
  _, height, width, channels = pipeline.video.block_latent_shape
  noise = jax.random.normal(jax.random.key(seed),
                            (1, spec.latent_frames, height, width, channels))
  program = jax.jit(functools.partial(sample_clip, spec=spec.sampler), donate_argnums=1)
  return program(transformer, noise, positive, negative)


def run(weights: ReleasedWeights, prompt: str, seed: int, spec: ClipSpec,
        output: str | os.PathLike, *, negative_prompt: str = '', overwrite: bool = False,
        say: Callable[[str], None] = print) -> pathlib.Path:
  """Samples one clip into a directory: an MP4, its JSON and a contact sheet.

  Args:
    weights: where they are; no compressor is needed.
    prompt: what the clip shows.
    seed: of its noise.
    spec: settings.
    output: the directory; created if needed.
    negative_prompt: what it should not be like.
    overwrite: replace files of the same names.
    say: receives notices.

  Returns:
    The MP4.

  Raises:
    ValueError: no usable weights, or a prompt that cannot be used.
    NotWritable, OutputExists, DirectoryInUse: the directory cannot be used.
  """
  with outputs.claim_directory(output, say=say) as root:
    name = outputs.output_name(0, prompt)
    path = outputs.output_path(root, f'{name}.mp4', overwrite=overwrite)
    outputs.output_path(root, f'{name}.png', overwrite=overwrite)
    pipeline = released.load(weights, texts=(prompt, negative_prompt), say=say)
    begun = time.perf_counter()
    latents = jax.block_until_ready(sample(pipeline, prompt, negative_prompt, seed, spec))
    seconds = time.perf_counter() - begun
    say(f'{spec.sampler.steps} steps took {seconds:.0f} s, compilation included.')
    frames = _write(pipeline, latents, prompt, path, spec)
    outputs.write_json(root / f'{name}.json', {
        'file': path.name, 'prompt': prompt, 'negative_prompt': negative_prompt, 'seed': seed,
        'frames': frames, 'sampling_seconds': seconds, 'config': dataclasses.asdict(spec),
        'model': ModelSource(weights=weights).digests(), 'versions': meter.versions()})
    return path


def _write(pipeline: Pipeline, latents: Array, prompt: str, path: pathlib.Path, spec: ClipSpec
           ) -> int:
  """Decodes block by block, in memory that does not grow with the clip; returns its frames."""
  video, vae = pipeline.video, pipeline.models.vae
  first = jax.jit(lambda vae, z: _shown(*vae.decode_first(z)))
  following = jax.jit(lambda vae, state, z: _shown(*vae.decode_next(state, z)), donate_argnums=1)
  total = 1 + video.temporal_stride * (latents.shape[1] - 1)
  pictures = sheet.ContactSheet(sheet.spread(total, spec.sheet_columns), fps=video.fps,
                                labels=[prompt])
  state = None
  with VideoWriter(path, video.height, video.width, video.fps, quality=spec.quality,
                   overwrite=True) as writer:
    for start in range(0, latents.shape[1], video.frames_per_block):
      piece = latents[:, start:start + video.frames_per_block]
      frames, state = first(vae, piece) if state is None else following(vae, state, piece)
      writer.write(np.asarray(frames)[0])
      pictures.add(np.asarray(frames))
  pictures.save(path.with_suffix('.png'))
  return total


def _shown(pixels: Array, state):
  return to_frames(pixels), state
