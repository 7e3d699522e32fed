"""Decoding saved latents into the very frames that were sampled.

The frames come out of the same compiled programs at the same batch size, fed with the recorded
latents, so they are equal bit for bit to those of the run (same versions and machine).
"""

import contextlib
import itertools
import os
import pathlib

import numpy as np

from pf_jax import outputs
from pf_jax.progress import Progress
from pf_jax.request import Request
from pf_jax.sampling import files
from pf_jax.sampling.config import SampleSpec
from pf_jax.sampling.job import say_at_once
from pf_jax.sampling.plan import (
  FINISHED,
  UNFINISHED,
  Plan,
  SampleError,
  Say,
  check_same,
  read_run,
)
from pf_jax.sampling.source import ModelSource


def decode(latents: str | os.PathLike, output: str | os.PathLike, *,
           source: ModelSource | None = None, overwrite: bool = False, say: Say = say_at_once
           ) -> tuple[pathlib.Path, ...]:
  """Writes the videos of a run again, from its latents.

  Args:
    latents: directory of the run, sampled with saved latents or cut short.
    output: directory for the videos, their sidecars and contact sheets.
    source: the model that sampled them, if it is not where it was.
    overwrite: replace files of the same names.
    say: receives notices.

  Returns:
    The videos.

  Raises:
    SampleError: no run or no latents there, or another model.
    NotWritable, OutputExists, DirectoryInUse: the output directory cannot be used.
  """
  folder = pathlib.Path(latents)
  run = read_run(folder)
  if not (folder / files.LATENTS_FOLDER).is_dir():
    raise SampleError(f'{folder} holds no latents; sample with --save_latents to keep them.')
  identity = run['identity']
  try:
    request = Request(tuple(identity['prompts']), identity['seconds'], identity['seed'])
    batches, spec = tuple(map(tuple, identity['batches'])), SampleSpec(**run['settings'])
    choices = identity['cache'], identity['sampler']
    source = source or ModelSource.from_json(run['source'])
  except (KeyError, TypeError, ValueError) as error:
    raise SampleError(f'{folder / files.RUN_FILE} is damaged ({error!r}).') from error
  with outputs.claim_directory(output, say=say) as root:
    files.check_free(root, files.video_names(request), len(batches), overwrite=overwrite,
                     decoding=True)
    try:
      pipeline = source.load(*choices, texts=[t for s in request.schedules for t in s.texts],
                             say=say)
    except (ValueError, TypeError) as error:
      raise SampleError(str(error)) from error
    plan = Plan(request, spec, pipeline, source, root, batches, identity.get('beginning'))
    check_same(run, plan, 'Give --checkpoint of the model that sampled the latents.', say)
    return tuple(video for index in range(len(batches))
                 for video in _decode_batch(plan, index, folder, say))


def _decode_batch(plan: Plan, index: int, folder: pathlib.Path, say: Say) -> list[pathlib.Path]:
  if not files.record_path(folder, index).is_dir():
    say(f'note: batch {index + 1} of {len(plan.batches)} has no latents yet.')
    return []
  record = plan.record(index, folder)
  if len(record) < plan.blocks:
    say(f'note: {len(record)} of {plan.blocks} blocks are there.')
  if not len(record):
    return []
  progress = Progress(len(record), unit='block', every_s=10)
  with contextlib.closing(progress), plan.open_files(index) as output:
    for block in itertools.islice(plan.sample(index, record), len(record)):
      output.add(np.asarray(block.frames)[:len(plan.batches[index])])
      progress.update()
  plan.write_sidecars(index, len(record),
                      FINISHED if len(record) == plan.blocks else UNFINISHED,
                      decoded_from=str(folder.resolve()))
  return [plan.root / f'{plan.names[video]}.mp4' for video in plan.batches[index]]
