"""Grain sources and batches whose content is a pure function of the training step.

Resuming needs no saved iterator: the batch of step s is always the same, so a run that restarts at
step s continues with `start_step=s`. Work is shared by threads, not processes: rendering and
reading release the interpreter's lock where it matters, nothing is pickled and there is no state
per worker.

Any object with `__len__` and `__getitem__(index) -> dict of arrays` is a source: `ClipSource`
here, `LatentStore` in latents.py.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from pf_jax.data import digits

Record = dict[str, np.ndarray]


class Source(Protocol):
  """Random access to records of equal structure and shapes."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


class ClipSource:
  """Clips of the miniature's world, rendered when asked for.

  Every record holds `pixels` uint8 [T, H, W, 3] and the scalars of `attribute_arrays`; with
  `encode_prompt` also whatever that returns for the clip's prompt.
  """

  def __init__(self, world: digits.DigitsWorld, frames: int, *, seed: int = 0,
               split: str = 'train', length: int = 2**31 - 1,
               encode_prompt: Callable[[str], Record] | None = None):
    """Describes the source; nothing is rendered yet.

    Args:
      world: what clips look like.
      frames: pixel frames per clip.
      seed: seed of the data set.
      split: 'train' or 'test'.
      length: number of distinct clips, before they repeat.
      encode_prompt: prompt to arrays, e.g. token ids and mask; must be thread-safe.

    Raises:
      ValueError: a size is not positive, or the split is unknown.
    """
    if frames < 1 or length < 1:
      raise ValueError(f'{frames=} and {length=} must be at least 1.')
    world.images(split)  # an unknown split or a missing scikit-learn shows now, not in a thread
    self._world, self._frames, self._seed, self._split = world, frames, seed, split
    self._length, self._encode_prompt = length, encode_prompt

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < self._length:
      raise IndexError(f'{index=} is outside 0..{self._length - 1}.')
    clip = self._world.clip(int(index), self._seed, self._frames, self._split)
    record = {'pixels': clip.pixels, **attribute_arrays(clip.attributes, self._world)}
    if self._encode_prompt is not None:
      record |= self._encode_prompt(clip.prompt)
    return record


def attribute_arrays(attributes: digits.ClipAttributes, world: digits.DigitsWorld) -> Record:
  """A clip's ground truth as arrays that batch.

  Args:
    attributes: from `DigitsWorld.describe`.
    world: gives the order of colours.

  Returns:
    int32 scalars `index`, `digit`, `image_id`, `direction` (0 left, 1 right), `colour` (index
    into `world.colours`), `x`, `y`, and `rgb` float32 [3] in [0, 1].
  """
  numbers = {
      'index': attributes.index,
      'digit': attributes.digit,
      'image_id': attributes.image_id,
      'direction': digits.DIRECTIONS.index(attributes.direction),
      'colour': world.colours.index(world.colour(attributes.colour)),
      'x': attributes.x,
      'y': attributes.y,
  }
  return ({name: np.asarray(value, np.int32) for name, value in numbers.items()}
          | {'rgb': np.asarray(attributes.rgb, np.float32)})


def batch_dataset(source: Source, batch_size: int, *, shuffle_seed: int | None = None,
                  process: tuple[int, int] = (0, 1)) -> Any:
  """An endless `grain.MapDataset` of batches; `dataset[step]` is the batch of that step.

  Args:
    source: where records come from.
    batch_size: records per batch and process.
    shuffle_seed: reshuffles every pass over the source; None keeps the source's order, as
      suits a source whose records are random anyway.
    process: (index, count) of this process; processes share each pass without overlap.

  Returns:
    The data set; records are stacked along a leading axis.

  Raises:
    ValueError: a size is not positive, the process does not exist or the source is empty.
  """
  import grain

  index, count = process
  if batch_size < 1 or not 0 <= index < count:
    raise ValueError(f'{batch_size=} must be at least 1 and {process=} (index, count) with '
                     'index < count.')
  if len(source) < 1:
    raise ValueError('The source is empty; generate or encode some clips first.')
  dataset = grain.MapDataset.source(source)
  if shuffle_seed is not None:
    dataset = dataset.shuffle(seed=shuffle_seed)
  # drop_remainder: grain otherwise rounds the length up in floating point, beyond 2**63 - 1.
  return dataset.repeat(None)[index::count].batch(batch_size, drop_remainder=True)


def batches(source: Source, batch_size: int, *, start_step: int = 0,
            shuffle_seed: int | None = None, process: tuple[int, int] = (0, 1),
            num_threads: int = 2, prefetch: int = 4) -> Iterator[Record]:
  """Iterates over batches from a step on, prepared ahead by threads.

  Args:
    source: where records come from.
    batch_size: records per batch and process.
    start_step: the first step, e.g. the one a checkpoint was taken at.
    shuffle_seed: see `batch_dataset`.
    process: (index, count) of this process.
    num_threads: threads that fetch records; 0 fetches in the caller.
    prefetch: batches prepared ahead, at most.

  Returns:
    An endless iterator of dicts of arrays [batch_size, ...].

  Raises:
    ValueError: as `batch_dataset`, or `start_step` is negative.
  """
  import grain

  if start_step < 0:
    raise ValueError(f'{start_step=} must not be negative.')
  dataset = batch_dataset(source, batch_size, shuffle_seed=shuffle_seed, process=process)
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(prefetch, 1))
  iterator = iter(dataset.to_iter_dataset(options))
  iterator.set_state({'next_index': start_step})
  return iterator
