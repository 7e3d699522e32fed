"""One short clip from the bidirectional base model: what the causal rollout is compared with.

The base model denoises the whole clip at once, in some 50 steps with guidance. Memory and time grow
with its length, so it is meant for the lengths it was trained on (5 s).

Three phases follow each other, and what only one of them needs is let go at its end: the text
encoder encodes the prompts, the transformer denoises, the VAE decodes piece by piece. Sizes,
weights' headers and programs are all looked at before the first weight is read; files appear
together once all of them are whole.
"""

import contextlib
import dataclasses
import os
import pathlib
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax import outputs
from pf_jax.models.bundle import ModelSpec
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.models.tokenizer import Tokenizer, clean_prompt
from pf_jax.models.vae import WanVae
from pf_jax.progress import Progress
from pf_jax.released import OpenedWeights, ReleasedWeights
from pf_jax.rollout.bidirectional import (
  DECODE,
  DENOISE,
  ClipPrograms,
  ClipSamplerSpec,
  clip_shapes,
  pieces,
)
from pf_jax.sampling import budget as budget_lib
from pf_jax.sampling import meter
from pf_jax.sampling.budget import DoesNotFit
from pf_jax.sampling.dry_run import say_files
from pf_jax.sampling.job import say_at_once
from pf_jax.sampling.plan import SampleError, Say, warn_about_prompts
from pf_jax.sampling.source import ModelSource
from pf_jax.types import VideoSpec, tree_bytes
from pf_jax.viz import sheet
from pf_jax.viz.video import VideoWriter, check_video_size
from pf_jax.weights import networks
from pf_jax.weights.load import StoredNetwork


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

  def pixel_frames(self, video: VideoSpec) -> int:
    """Length of the video; its first latent frame is a single picture."""
    return 1 + video.temporal_stride * (self.latent_frames - 1)


@dataclasses.dataclass(frozen=True)
class ClipBudget:
  """Bytes that a clip takes, in the precision of the specs.

  Of the activations only what every implementation has to hold is counted: the tokens of the whole
  clip in one layer. Logits are not (fused attention never stores them), nor is what the VAE's
  convolutions hold; the compiler knows both, see `scratch`.

  Attributes:
    parameters: number of parameters of each network.
    networks: bytes of each network.
    text: cross-attention keys and values of the prompts.
    solver: the solver's state.
    residual: the residual stream between two layers.
    attention: queries, keys and values of one layer.
    feed_forward: hidden activations of one layer.
    decoder: the VAE decoder's temporal state.
    frames: of one decoded piece.
    scratch: temporary memory of the largest program of each phase, `DENOISE` and `DECODE`; the
      layer's activations are part of it. None if they were not compiled.
    video_file: on disk, expected size of the MP4; content decides.
  """

  parameters: Mapping[str, int]
  networks: Mapping[str, int]
  text: int
  solver: int
  residual: int
  attention: int
  feed_forward: int
  decoder: int
  frames: int
  scratch: Mapping[str, int] | None
  video_file: int

  @property
  def text_phase(self) -> int:
    """While prompts are encoded; the text encoder's scratch is not counted."""
    return self.networks['text']

  @property
  def denoise_held(self) -> int:
    """What stays from step to step."""
    return self.networks['transformer'] + self.networks['vae'] + self.text + self.solver

  @property
  def denoise_working(self) -> int:
    """What comes and goes within a step."""
    if self.scratch is not None:
      return self.scratch[DENOISE]
    return self.residual + max(self.attention, self.feed_forward)

  @property
  def denoise_phase(self) -> int:
    """While the clip is denoised."""
    return self.denoise_held + self.denoise_working

  @property
  def decode_phase(self) -> int:
    """While it is decoded; the transformer is gone by then."""
    scratch = 0 if self.scratch is None else self.scratch[DECODE]
    return self.networks['vae'] + self.decoder + self.frames + scratch

  @property
  def peak(self) -> int:
    """The largest phase."""
    return max(self.text_phase, self.denoise_phase, self.decode_phase)

  def lines(self) -> list[str]:
    """A plan to read."""
    rows = [(f'{name} ({self.parameters[name]:,} parameters)', size)
            for name, size in self.networks.items()]
    rows += [('text keys/values of all prompts', self.text), ('solver state', self.solver),
             ('one layer: residual stream', self.residual),
             ('one layer: queries, keys, values', self.attention),
             ('one layer: feed-forward', self.feed_forward),
             ('VAE decoder state', self.decoder), ('frames of one piece', self.frames)]
    for phase, size in (self.scratch or {}).items():
      rows.append((f'scratch to {phase}', size))
    denoising, decoding = (
        ('', '') if self.scratch is not None else
        (', scratch beyond one layer not counted', ', scratch not counted'))
    rows += [('peak while prompts are encoded', self.text_phase),
             (f'peak while the clip is denoised{denoising}', self.denoise_phase),
             (f'peak while it is decoded{decoding}', self.decode_phase),
             ('on disk: video, about (content decides)', self.video_file)]
    return budget_lib.table(rows)

  def check(self, available: int, where: str) -> None:
    """Refuses what cannot fit.

    Args:
      available: bytes.
      where: whose memory it is, for the message.

    Raises:
      DoesNotFit: got, wanted, and what to change.
    """
    if self.peak > available:
      raise DoesNotFit(f'{self.peak / 1e9:.1f} GB are needed, {where} has {available / 1e9:.1f} '
                       f'GB; {self._remedy()}.')

  def _remedy(self) -> str:
    """What makes the largest part of the largest phase smaller."""
    if self.text_phase == self.peak:
      return ('use bfloat16 for the text encoder (config.model.text.dtypes) or a device with more '
              'memory')
    if self.decode_phase == self.peak:
      return 'lower config.model.video.height and width, or frames_per_block'
    if self.denoise_working > self.denoise_held:
      return ('lower config.latent_frames or config.model.video.height and width, and leave '
              'config.sampler.batched off')
    return 'use bfloat16 for the networks (config.model.*.dtypes) or a smaller model'


def clip_budget(model: ModelSpec, spec: ClipSpec) -> ClipBudget:
  """Adds up what a clip takes, before anything is compiled."""
  shapes = clip_shapes(model, spec.sampler, spec.latent_frames)
  video, transformer = model.video, model.transformer
  parts = {'text': networks.network(model.text).shapes, 'transformer': shapes.transformer,
           'vae': shapes.vae}
  batch = spec.sampler.prompts if spec.sampler.batched else 1
  tokens = batch * spec.latent_frames * video.tokens_per_frame
  bytes_each = jnp.dtype(transformer.dtypes.compute).itemsize
  return ClipBudget(
      parameters={kind: sum(leaf.size for leaf in jax.tree.leaves(part))
                  for kind, part in parts.items()},
      networks={kind: tree_bytes(part) for kind, part in parts.items()},
      text=tree_bytes(shapes.texts), solver=tree_bytes(shapes.state),
      residual=4 * tokens * transformer.width,
      attention=3 * bytes_each * tokens * transformer.width,
      feed_forward=bytes_each * tokens * transformer.ffn_width,
      decoder=tree_bytes(shapes.decoder), frames=tree_bytes(shapes.frames), scratch=None,
      video_file=budget_lib.mp4_bytes(
          spec.pixel_frames(video) * video.height * video.width, spec.quality))


def dry_run(model: ModelSpec, spec: ClipSpec, *, weights: ReleasedWeights | None = None,
            memory: int | None = None, say: Say = print) -> ClipBudget:
  """Prints what a clip would take, and refuses what the run would refuse.

  Args:
    model: sizes.
    spec: settings.
    weights: if they are there already, they are compared with the sizes; nothing is downloaded.
    memory: bytes to fit into; None: what this machine's device has.
    say: receives the lines.

  Raises:
    SampleError: a picture that a video cannot store, or weights that do not fit.
    DoesNotFit: more memory is needed than there is; the plan is printed first.
  """
  _check_picture(model)
  if weights is not None:
    with _as_sample_error():
      say_files(weights, say)
  video, sampler = model.video, spec.sampler
  say(f'{spec.pixel_frames(video)} frames of {video.width}x{video.height} at {video.fps} fps; '
      f'{sampler.steps} steps of {sampler.solver}, '
      + ('no guidance' if sampler.prompts == 1 else f'guidance {sampler.guidance:g}'))
  say(f'{spec.latent_frames * video.tokens_per_frame:,} tokens that attend each other')
  budget = clip_budget(model, spec)
  for line in budget.lines():
    say(line)
  available, where = (memory, 'the device') if memory is not None else budget_lib.device_memory()
  budget.check(available, where)
  say(f'fits into the {available / 1e9:.1f} GB of {where} if the programs\' scratch stays below '
      f'{(available - budget.denoise_held) / 1e9:.1f} GB; a run compiles them first and looks.')
  return budget


def _check_picture(model: ModelSpec) -> None:
  with _as_sample_error():
    check_video_size(model.video.height, model.video.width, model.video.fps)


@contextlib.contextmanager
def _as_sample_error() -> Iterator[None]:
  """What is wrong with weights, tokenizer or sizes is told to the person who asked."""
  try:
    yield
  except ValueError as error:
    raise SampleError(str(error)) from error


def run(weights: ReleasedWeights, prompt: str, seed: int, spec: ClipSpec,
        output: str | os.PathLike, *, negative_prompt: str = '', overwrite: bool = False,
        say: Say = say_at_once) -> pathlib.Path:
  """Samples one clip into a directory: an MP4, its JSON and a contact sheet.

  All three appear when all are finished; a run that fails or is interrupted leaves nothing.

  Args:
    weights: where they are; no compressor takes part.
    prompt: what the clip shows.
    seed: of its noise.
    spec: settings.
    output: the directory; created if needed.
    negative_prompt: what it should not be like; may be empty. Unused without guidance.
    overwrite: replace files of the same names.
    say: receives notices.

  Returns:
    The MP4.

  Raises:
    SampleError: no usable weights, or a picture that a video cannot store.
    DoesNotFit: more memory is needed than there is.
    NotWritable, OutputExists, DirectoryInUse: the directory cannot be used.
    OSError: something could not be written.
  """
  model = weights.model
  _check_picture(model)
  texts = [prompt, negative_prompt][:spec.sampler.prompts]
  with outputs.claim_directory(output, say=say) as root:
    targets = _free_paths(root, prompt, overwrite=overwrite)
    memory = budget_lib.device_memory()  # before anything is loaded
    budget = clip_budget(model, spec)
    budget.check(*memory)
    with _as_sample_error():
      opened = weights.open(say=say)
      digests = ModelSource(weights=weights).digests()
      prompts = _prompt_encoder(model, opened, texts, say)
    programs = _prepare(model, spec, budget, memory, say)
    rows, vae = _encode(prompts, texts), _load(opened.vae)
    latents, step_seconds = _denoise(programs, opened.transformer, rows, seed, spec.sampler)
    with contextlib.ExitStack() as stack:
      # Left in reverse: the sidecar, which says that all is there, takes its place last.
      sidecar, picture, video = (stack.enter_context(outputs.atomic_path(target))
                                 for target in reversed(targets))
      begun = time.perf_counter()
      _write_pictures(programs, vae, latents, prompt, video, picture, model.video, spec)
      metrics = _metrics(programs, step_seconds, time.perf_counter() - begun)
      sidecar.write_text(outputs.json_text({
          'file': targets[0].name, 'prompt': prompt, 'negative_prompt': negative_prompt,
          'seed': seed, 'frames': spec.pixel_frames(model.video), 'fps': model.video.fps,
          'height': model.video.height, 'width': model.video.width,
          'config': dataclasses.asdict(spec), 'model': digests, 'metrics': metrics,
          'versions': meter.versions()}), encoding='utf-8')
  say(f'wrote {targets[0]}, contact sheet and sidecar.')
  return targets[0]


def _free_paths(root: pathlib.Path, prompt: str, *, overwrite: bool) -> list[pathlib.Path]:
  """Where the video, its contact sheet and its sidecar go.

  Raises:
    OutputExists: one is there and may not be replaced.
    NotWritable: a directory or a link is in its place.
  """
  try:
    return [outputs.output_path(root, outputs.output_name(0, prompt, ending), overwrite=overwrite)
            for ending in ('.mp4', '.png', '.json')]
  except ValueError as error:
    raise outputs.NotWritable(str(error)) from error


def _prompt_encoder(model: ModelSpec, opened: OpenedWeights, texts: Sequence[str], say: Say
                    ) -> PromptEncoder:
  """Says what of the prompts the network will not see; the text encoder is not loaded yet."""
  tokenizer = Tokenizer.from_file(opened.tokenizer, max_tokens=model.text.max_tokens)
  prompts = PromptEncoder(tokenizer, model.text, lambda: _load(opened.text))
  warn_about_prompts(tokenizer, [text for text in texts if clean_prompt(text)], say)
  return prompts


def _encode(prompts: PromptEncoder, texts: Sequence[str]) -> np.ndarray:
  """Text rows [P, rows, D]; the text encoder is let go at the end."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)  # said before, by `warn_about_prompts`
    return prompts(texts, allow_empty=True)


def _load(network: StoredNetwork) -> Any:
  with _as_sample_error():
    return network.load()


def _prepare(model: ModelSpec, spec: ClipSpec, budget: ClipBudget, memory: tuple[int, str],
             say: Say) -> ClipPrograms:
  """Compiles everything and checks the memory that the programs plan, before anything runs."""
  say(f'{spec.pixel_frames(model.video)} frames, {spec.sampler.steps} steps; compiling ...')
  programs = ClipPrograms(model, spec.sampler, spec.latent_frames)
  say(f'compiled in {sum(programs.compile_seconds.values()):.1f} s.')
  budget = dataclasses.replace(budget, scratch=programs.scratch_bytes)
  budget.check(*memory)
  say(f'estimate: memory {meter.megabytes(budget.text_phase)} while prompts are encoded, '
      f'{meter.megabytes(budget.denoise_phase)} while the clip is denoised, '
      f'{meter.megabytes(budget.decode_phase)} while it is decoded')
  return programs


def _denoise(programs: ClipPrograms, stored: StoredNetwork, rows: np.ndarray, seed: int,
             sampler: ClipSamplerSpec) -> tuple[np.ndarray, list[float]]:
  """Latents [1, F, h, w, C] and the seconds of each step; the transformer is let go at the end."""
  transformer = _load(stored)
  texts = [programs.text_keys_values(transformer, row[None]) for row in rows]
  state, seconds = programs.start(seed), []
  with contextlib.closing(Progress(sampler.steps, unit='step', every_s=10)) as progress:
    for index, level in enumerate(sampler.levels.sigmas[1:]):
      begun = time.perf_counter()
      state = jax.block_until_ready(programs.step(index, transformer, state, *texts))
      seconds.append(time.perf_counter() - begun)
      if index == 1:  # the first execution of a program costs more than all others
        progress.say(f'estimate: time {meter.duration(sampler.steps * seconds[1])} for '
                     f'{sampler.steps} steps ({seconds[1]:.3g} s a step), then decoding')
      progress.show({'noise': level})
      progress.update()
  return np.asarray(state.x), seconds


def _write_pictures(programs: ClipPrograms, vae: WanVae, latents: np.ndarray, prompt: str,
                    path: pathlib.Path, sheet_path: pathlib.Path, video: VideoSpec, spec: ClipSpec
                    ) -> None:
  """Decodes piece by piece, in memory that does not grow with the clip; writes MP4 and sheet."""
  with _as_sample_error():
    writer = VideoWriter(path, video.height, video.width, video.fps, quality=spec.quality,
                         overwrite=True)
  total = spec.pixel_frames(video)
  pictures = sheet.ContactSheet(sheet.spread(total, spec.sheet_columns), fps=video.fps,
                                labels=[prompt])
  state, start = None, 0
  with writer, contextlib.closing(Progress(total, unit='frame', every_s=10)) as progress:
    for length in pieces(spec.latent_frames, video.frames_per_block):
      frames, state = programs.decode(vae, state, latents[:, start:start + length])
      start += length
      writer.write(np.asarray(frames)[0])
      pictures.add(np.asarray(frames))
      progress.show({'video_seconds': writer.frames / video.fps})
      progress.update(frames.shape[1])
  pictures.save(sheet_path)


def _metrics(programs: ClipPrograms, step_seconds: Sequence[float], decoding_seconds: float
             ) -> dict[str, Any]:
  device = jax.devices()[0].memory_stats() or {}
  return {
      'compile_seconds': sum(programs.compile_seconds.values()),
      'compile_seconds_of': programs.compile_seconds,
      'sampling_seconds': sum(step_seconds),
      'seconds_per_step': {
          'first': step_seconds[0],
          'median': statistics.median(step_seconds[1:]) if len(step_seconds) > 1 else None},
      'decoding_seconds': decoding_seconds,
      'scratch_bytes': programs.scratch_bytes,
      'peak_memory_bytes': meter.peak_memory_bytes(),
      'peak_device_memory_bytes': device.get('peak_bytes_in_use')}
