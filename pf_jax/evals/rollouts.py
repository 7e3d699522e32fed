"""Videos to judge: the sampler's own stream over held-out prompts, from text or from a true clip.

A video may begin with true blocks: a held-out clip is encoded and its latents take the place of
the first blocks' denoising; they are decoded, compressed and committed like any other. Everything
after them is generated, so the sampler is asked to go on with an instance it has never seen.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pf_jax.data import digits
from pf_jax.evals import evaluator
from pf_jax.models.bundle import VideoModels
from pf_jax.models.compressor import Compressor
from pf_jax.models.vae import WanVae
from pf_jax.pipeline import Pipeline
from pf_jax.rollout.beginning import given_selection
from pf_jax.rollout.stream import Block
from pf_jax.types import Array, VideoSpec


@dataclasses.dataclass(frozen=True)
class Run:
  """Videos made one way.

  Attributes:
    name: of its files.
    start_blocks: true blocks at the beginning; 0 starts from text alone.
    blocks: length.
    judged: judged blocks, from 1.
    cache: fields of `CacheSpec` that differ from the model's own.
    sampler: fields of `SamplerSpec`, likewise.
    checkpoint: another model than the evaluated one; None for that.
    branches: of the compressor; None leaves the model as it is.
    swapped: every video gets the prompt of another one, its noise stays.
  """

  name: str
  start_blocks: int
  blocks: int
  judged: tuple[int, ...]
  cache: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  checkpoint: str | None = None
  branches: str | None = None
  swapped: bool = False


def variant(pipeline: Pipeline, run: Run) -> Pipeline:
  """The pipeline that makes a run's videos: other choices, other branches, same weights.

  Args:
    pipeline: of the run's model.
    run: what to make.

  Raises:
    ValueError: an unknown choice, or values that contradict each other.
  """
  models = pipeline.models
  if run.branches is not None and run.branches != models.spec.compressor.branches:
    models = with_branches(models, run.branches)
  choices = {'cache': {**pipeline.choices['cache'], **run.cache},
             'sampler': {**pipeline.choices['sampler'], **run.sampler}}
  try:
    return Pipeline(models, pipeline.prompts, choices=choices, directory=pipeline.directory)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{run.name}: {error}') from error


def with_branches(models: VideoModels, branches: str) -> VideoModels:
  """The same parameters with other compressor branches switched on; nothing is copied."""
  spec = dataclasses.replace(models.spec, compressor=dataclasses.replace(
      models.spec.compressor, branches=branches))
  shapes = jax.eval_shape(lambda: Compressor(spec.compressor, rngs=nnx.Rngs(0)))
  compressor = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(models.compressor))
  return VideoModels(spec, models.vae, models.transformer, compressor)


def held_out(world: digits.DigitsWorld, videos: int, seed: int) -> list[digits.ClipAttributes]:
  """Draws of split 'test', one per video; classes take turns so that all count alike."""
  return [world.describe(i, seed, 'test', digit=i % len(digits.DIGIT_NAMES))
          for i in range(videos)]


def swap_prompts(prompts: Sequence[str]) -> list[str]:
  """Gives every video another one's prompt: the rotation in which least stays the same.

  Raises:
    ValueError: fewer than two prompts.
  """
  if len(prompts) < 2:
    raise ValueError(f'{len(prompts)} prompts cannot be swapped; evaluate at least 2 videos.')
  words = [prompt.split() for prompt in prompts]

  def in_common(shift: int) -> int:
    return sum(a == b for i, own in enumerate(words)
               for a, b in zip(own, words[(i + shift) % len(words)], strict=False))

  best = min(range(1, len(prompts)), key=in_common)
  return [*prompts[best:], *prompts[:best]]


@jax.jit
def _encode(vae: WanVae, frames: Array) -> Array:
  return vae.encode(frames.astype(jnp.float32)[None] / 127.5 - 1)[0]


def encode_clips(models: VideoModels, world: digits.DigitsWorld,
                 draws: Sequence[digits.ClipAttributes], blocks: int) -> np.ndarray:
  """Latents of true clips, one clip at a time.

  Args:
    models: gives the VAE.
    world: renders the clips.
    draws: which clips.
    blocks: their length.

  Returns:
    [B, blocks, F, h, w, C] float32.
  """
  video = models.spec.video
  latents = [np.asarray(_encode(models.vae, world.render(draw, video.pixel_frames(blocks)).pixels))
             for draw in draws]
  return np.stack(latents).reshape(len(draws), blocks, *video.block_latent_shape)


def sample(pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], *, blocks: int,
           beginning: np.ndarray | None = None) -> Iterator[Block]:
  """Streams a batch of videos that may begin with true blocks.

  Args:
    pipeline: the policy's.
    prompts: one per video.
    seeds: one per video.
    blocks: length of the videos.
    beginning: latents [B, n, F, h, w, C] of their first blocks, if given.

  Returns:
    Blocks, the given ones first.
  """
  replay = []
  if beginning is not None:
    replay = [(jnp.asarray(beginning[:, i]),
               jnp.asarray(given_selection(pipeline.spec.cache, i, len(prompts))))
              for i in range(beginning.shape[1])]
  return pipeline.blocks(prompts, blocks, seeds, replay=replay)


def block_of(video: VideoSpec) -> Callable[[int], int]:
  """Frame number, from 0, to block, from 1."""
  def function(frame: int) -> int:
    return 1 + (frame + video.block_frames - video.first_block_frames) // video.block_frames
  return function


class Outcome(NamedTuple):
  """A finished run.

  Attributes:
    report: judged by the prompts the videos were made from.
    unswapped: judged by the prompts they had before swapping; None where none were swapped.
    seconds: wall time of sampling and judging.
  """

  report: evaluator.Report
  unswapped: evaluator.Report | None
  seconds: float


def execute(run: Run, pipeline: Pipeline, draws: Sequence[digits.ClipAttributes], *, seed: int,
            batch: int, make_judge: Callable[..., evaluator.Judge],
            beginnings: np.ndarray | None = None,
            watch: Callable[[int, np.ndarray], None] | None = None) -> Outcome:
  """Makes and judges all videos of a run, `batch` at a time.

  Args:
    run: what to make.
    pipeline: its policy's, see `variant`.
    draws: what the videos should show; a multiple of the batch.
    seed: of the first video's noise; the others count up.
    batch: videos that advance in lockstep.
    make_judge: (run, prompts, image_ids) -> `Judge`.
    beginnings: [videos, >= run.start_blocks, F, h, w, C], for runs with a true beginning.
    watch: is handed (first video, frames [B, T, H, W, 3]) after every block.
  """
  own = [draw.prompt for draw in draws]
  prompts = swap_prompts(own) if run.swapped else own
  judge = make_judge(run, prompts, [draw.image_id for draw in draws] if run.start_blocks else None)
  before = make_judge(run, own, None) if run.swapped else None
  begun = time.monotonic()
  for first in range(0, len(draws), batch):
    rows = slice(first, first + batch)
    beginning = None
    if run.start_blocks:
      assert beginnings is not None  # the caller encodes them for all runs at once
      beginning = beginnings[rows, :run.start_blocks]
    for block in sample(pipeline, prompts[rows], range(seed + first, seed + first + batch),
                        blocks=run.blocks, beginning=beginning):
      frames = np.asarray(block.frames)
      for listener in filter(None, (judge, before)):
        listener.add(frames, first_video=first)
      if watch is not None:
        watch(first, frames)
  return Outcome(judge.report(), None if before is None else before.report(),
                 time.monotonic() - begun)
