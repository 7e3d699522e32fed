"""The rollout from Python: the same block functions, one block at a time, in constant memory.

Four programs are compiled up front: denoise a block, finish the first block, finish a later one,
switch the prompt. After that nothing compiles and nothing waits except the reader of a block.

A block that was sampled before can be replayed: `finish` is the same program whether its latents
and selection were just denoised or come from disk, so a resumed rollout continues bit for bit.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.models.bundle import VideoModels
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec, RolloutState
from pf_jax.rollout.programs import compile_ahead
from pf_jax.rollout.rollout import to_frames
from pf_jax.types import Array, KeyValues, PyTree


class Block(NamedTuple):
  """One block as it leaves the stream.

  Attributes:
    number: of the block, from 0.
    frames: uint8 [B, T, H, W, 3].
    latents: [B, F, h, w, C].
    selected: [L, B, K] int32, archived blocks each layer attended, -1 for none.
    replayed: True where latents and selection came from `replay`.
    state: what the rollout remembers now; valid until the next block is asked for, which reuses
      its buffers.
  """

  number: int
  frames: Array
  latents: Array
  selected: Array
  replayed: bool
  state: RolloutState


def _finish(models: VideoModels, state: RolloutState, latents: Array, selected: Array,
            text: KeyValues, *, first: bool, spec: RolloutSpec) -> tuple[RolloutState, Array]:
  state, pixels = block_lib.finish_block(models, state, latents, selected, text, first=first,
                                         spec=spec)
  return state, to_frames(pixels)


def _text_keys_values(models: VideoModels, rows: Array) -> KeyValues:
  return models.transformer.text_keys_values(rows)


def _abstract(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


class Programs:
  """The compiled programs of a rollout at one batch size.

  Args:
    models: networks; kept and passed to every call, and may be replaced by others of the same
      spec.
    batch: videos that advance in lockstep.
    spec: static choices.

  Attributes:
    compile_seconds: wall time spent compiling, per program.
    scratch_bytes: largest temporary memory of any program, as the compiler planned it.
  """

  def __init__(self, models: VideoModels, batch: int, spec: RolloutSpec):
    self.models, self.batch, self.spec = models, batch, spec
    self.compile_seconds: dict[str, float] = {}
    self.scratch_bytes = 0
    self._abstract, self._shapes = _abstract(models), block_lib.input_shapes(models, batch, spec)
    self._denoise_block = functools.partial(block_lib.denoise_block, spec=spec)
    state, rows, text, keys, latents, selected, _ = self._shapes
    finish = functools.partial(_finish, spec=spec)
    block = (state, latents, selected, text)
    self._text = self._compile('text', _text_keys_values, rows)
    self._start = self._compile('init', functools.partial(block_lib.init, batch=batch, spec=spec))
    self._denoise = self._compile('denoise', self._denoise_block, state.cache, text, keys)
    self._first = self._compile('first', functools.partial(finish, first=True), *block, donate=1)
    self._steady = self._compile('steady', functools.partial(finish, first=False), *block, donate=1)
    self._switch = self._compile('switch', functools.partial(block_lib.switch_prompt, spec=spec),
                                 state, text, donate=1)
    self._given: Callable[..., tuple[Array, Array]] | None = None

  def _compile(self, name: str, function, *inputs: PyTree, donate: int | None = None):
    program = compile_ahead(function, (self._abstract, *inputs), donate)
    self.compile_seconds[name] = program.seconds
    self.scratch_bytes = max(self.scratch_bytes, program.scratch_bytes)
    return program.call

  def text_keys_values(self, rows: Array | np.ndarray) -> KeyValues:
    """Cross-attention keys/values [L, B, rows, N, H] of text rows, see `PromptEncoder`."""
    return self._text(self.models, jnp.asarray(rows, jnp.float32))

  def start(self) -> RolloutState:
    """The state before the first block."""
    return self._start(self.models)

  def denoise(self, state: RolloutState, text: KeyValues, keys: Array) -> tuple[Array, Array]:
    """Latents and selection of the next block; see `block.denoise_block`."""
    return self._denoise(self.models, state.cache, text, keys)

  def prepare_picture(self) -> None:
    """Compiles `denoise_after_picture`, which few rollouts need."""
    if self._given is None:
      shapes = self._shapes
      self._given = self._compile('picture', self._denoise_block, shapes.state.cache, shapes.text,
                                  shapes.keys, shapes.picture)

  def denoise_after_picture(self, state: RolloutState, text: KeyValues, keys: Array,
                            picture: Array) -> tuple[Array, Array]:
    """As `denoise`, for a block whose first latent frame is given: picture [B, 1, h, w, C]."""
    self.prepare_picture()
    assert self._given is not None
    return self._given(self.models, state.cache, text, keys, picture)

  def finish(self, index: int, state: RolloutState, latents: Array, selected: Array,
             text: KeyValues) -> tuple[RolloutState, Array]:
    """Next state and uint8 frames; consumes `state`. See `block.finish_block`."""
    program = self._steady if index else self._first
    return program(self.models, state, latents, selected, text)

  def switch(self, state: RolloutState, text: KeyValues) -> RolloutState:
    """Recomputes the recent blocks under another prompt; consumes `state`."""
    return self._switch(self.models, state, text)


def stream(programs: Programs, text: Sequence[KeyValues], prompt_index: Sequence[int],
           keys: Array, *, replay: Sequence[tuple[Array, Array]] = ()) -> Iterator[Block]:
  """Yields a video block by block; memory does not grow with its length.

  Args:
    programs: compiled for this batch.
    text: cross-attention keys/values of each prompt.
    prompt_index: the prompt of each block; its length is the length of the video.
    keys: [B] typed random keys, one per video.
    replay: (latents, selection) of the first blocks, if they were sampled before (or encoded from a
      clip, see `beginning.given_selection`); they are decoded and committed without denoising.

  Yields:
    `Block`, one by one.

  Raises:
    ValueError: more blocks to replay than the video has.
  """
  if len(replay) > len(prompt_index):
    raise ValueError(f'{len(replay)} blocks to replay do not fit into {len(prompt_index)} blocks; '
                     f'ask for a longer video.')
  state = programs.start()
  for index, prompt in enumerate(prompt_index):
    if index and prompt != prompt_index[index - 1]:
      state = programs.switch(state, text[prompt])
    replayed = index < len(replay)
    latents, selected = replay[index] if replayed else programs.denoise(state, text[prompt], keys)
    state, frames = programs.finish(index, state, latents, selected, text[prompt])
    yield Block(index, frames, latents, selected, replayed, state)
