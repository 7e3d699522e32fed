"""The files of a run: their names, which must not be there yet, and those of a batch in progress.

run.json           what was asked for and with which model; `--resume` and decoding read it
NAME.mp4, .json    a video and its sidecar; NAME is index, slug and hash of the prompt
contact_sheet.png  moments of all videos; contact_sheet-000.png and so on if there are batches
metrics.json       measurements
latents/BATCH/     the record of a batch, removed when it is finished unless it was asked for
"""

import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pf_jax import outputs
from pf_jax.request import Request
from pf_jax.sampling import record as record_lib
from pf_jax.types import VideoSpec
from pf_jax.viz.sheet import ContactSheet, spread
from pf_jax.viz.video import BatchVideoWriter

RUN_FILE, METRICS_FILE, SHEET = 'run.json', 'metrics.json', 'contact_sheet'
LATENTS_FOLDER = 'latents'
_CATCHING_UP = '.resumed.mp4'


def video_names(request: Request) -> list[str]:
  """One name per video, without an ending."""
  return [outputs.output_name(i, prompt) for i, prompt in enumerate(request.prompts)]


def sheet_name(batch: int, batches: int) -> str:
  """File name of a batch's contact sheet."""
  return f'{SHEET}.png' if batches == 1 else f'{SHEET}-{batch:03d}.png'


def record_path(root: pathlib.Path, batch: int) -> pathlib.Path:
  """Where the record of a batch lies."""
  return root / LATENTS_FOLDER / f'{batch:03d}'


def check_free(root: pathlib.Path, names: Sequence[str], batches: int, *, overwrite: bool,
               decoding: bool = False) -> None:
  """Refuses to replace files unasked.

  Args:
    root: the directory.
    names: of the videos.
    batches: how many.
    overwrite: whether files may be replaced.
    decoding: only the files of decoding will be written.

  Raises:
    OutputExists: a file that the run would write is there.
    NotWritable: a directory or a link is in its place.
  """
  if (root / RUN_FILE).exists() and not overwrite and not decoding:
    raise outputs.OutputExists(f'{root} holds a run already; --resume continues one that was cut '
                               'short, --overwrite starts again, or choose another directory.')
  for name in all_names(names, batches)[:-2 if decoding else None]:
    try:
      outputs.output_path(root, name, overwrite=overwrite)
    except outputs.OutputExists:
      raise
    except ValueError as error:
      raise outputs.NotWritable(str(error)) from error
  if record_lib.find(root / LATENTS_FOLDER) and not overwrite and not decoding:
    raise outputs.OutputExists(f'{root / LATENTS_FOLDER} holds latents already; pass --overwrite '
                               'or choose another directory.')


def all_names(names: Sequence[str], batches: int) -> list[str]:
  """Every file that a run writes: videos, sidecars, sheets, metrics, run.json."""
  return [*(f'{name}.mp4' for name in names), *(f'{name}.json' for name in names),
          *(sheet_name(i, batches) for i in range(batches)), METRICS_FILE, RUN_FILE]


def clear(root: pathlib.Path, names: Sequence[str], batches: int) -> None:
  """Removes what an earlier run left under the same names, videos apart (writers replace them).

  run.json goes first: without it there is nothing to resume, whatever else is still there.
  """
  for name in [RUN_FILE, *(n for n in all_names(names, batches) if not n.endswith('.mp4'))]:
    (root / name).unlink(missing_ok=True)
  for path in record_lib.find(root / LATENTS_FOLDER):
    record_lib.remove(path)


def remove_record(root: pathlib.Path, batch: int) -> None:
  """Removes the record of a batch, and the folder of records after the last one."""
  record_lib.remove(record_path(root, batch))
  with contextlib.suppress(OSError):  # not empty yet
    (root / LATENTS_FOLDER).rmdir()


class BatchFiles:
  """The videos and the contact sheet of one batch while its blocks arrive. A context manager.

  A resumed batch is written beside the videos that the killed run left, and takes their place once
  it holds more than they do: at any moment the longest video so far bears the name.
  """

  def __init__(self, root: pathlib.Path, names: Sequence[str], labels: Sequence[str],
               video: VideoSpec, *, blocks: int, replayed: int, quality: int, columns: int,
               sheet: str):
    """Opens all files.

    Args:
      root: the directory.
      names: of the videos, without an ending.
      labels: of the sheet's rows.
      video: geometry.
      blocks: that will be written.
      replayed: how many of them an earlier run may have written.
      quality: of the MP4.
      columns: of the contact sheet.
      sheet: its file name.

    Raises:
      ValueError: a file cannot be created.
    """
    self._replayed, self._blocks = replayed, 0
    self._targets = [root / f'{name}.mp4' for name in names]
    self._sheet_path = root / sheet
    ending = _CATCHING_UP if replayed else '.mp4'
    self.writer = BatchVideoWriter([root / f'{name}{ending}' for name in names], video.height,
                                   video.width, video.fps, quality=quality, overwrite=True)
    self._sheet = ContactSheet(
        spread(video.pixel_frames(blocks), columns), fps=video.fps, labels=labels,
        block_of=lambda frame: max(frame - video.first_block_frames, -1) // video.block_frames + 1)

  def __enter__(self) -> 'BatchFiles':
    self.writer.__enter__()
    return self

  def __exit__(self, *details: Any) -> None:
    self.writer.__exit__(*details)
    if not self._blocks:
      return
    if self._blocks >= self._replayed:
      self._take_place()
      self._sheet.save(self._sheet_path)
    else:  # what the killed run left is longer
      for writer in self.writer.writers:
        writer.path.unlink(missing_ok=True)

  def add(self, frames: np.ndarray) -> None:
    """Takes the next block of all videos, uint8 [B, T, H, W, 3]."""
    self.writer.write(frames)
    self._sheet.add(frames)
    self._blocks += 1
    # One block later than needed: the newest one may not have reached the disk yet.
    if self._replayed and self._blocks == self._replayed + 1:
      self._take_place()

  def _take_place(self) -> None:
    for writer, target in zip(self.writer.writers, self._targets, strict=True):
      if writer.path != target:
        os.replace(writer.path, target)
        writer.path = target
