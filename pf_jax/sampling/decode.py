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
  load_pipeline,
  read_run,
)


def decode(latents: str | os.PathLike, output: str | os.PathLike, *,
           checkpoint: str | os.PathLike | None = None, overwrite: bool = False,
           say: Say = say_at_once) -> tuple[pathlib.Path, ...]:
  """Writes the videos of a run again, from its latents.

  Args:
    latents: directory of the run, sampled with saved latents or cut short.
    output: directory for the videos, their sidecars and contact sheets.
    checkpoint: the model that sampled them, if it is not where it was.
    overwrite: replace files of the same names.
    say: receives notices.

  Returns:
    The videos.

  Raises:
    SampleError: no run or no latents there, or another model.
    NotWritable, OutputExists, DirectoryInUse: the output directory cannot be used.
  """
  source = pathlib.Path(latents)
  run = read_run(source)
  if not (source / files.LATENTS_FOLDER).is_dir():
    raise SampleError(f'{source} holds no latents; sample with --save_latents to keep them.')
  identity = run['identity']
  try:
    request = Request(tuple(identity['prompts']), identity['seconds'], identity['seed'])
    batches, spec = tuple(map(tuple, identity['batches'])), SampleSpec(**run['settings'])
    choices = identity['cache'], identity['sampler']
  except (KeyError, TypeError, ValueError) as error:
    raise SampleError(f'{source / files.RUN_FILE} is damaged ({error!r}).') from error
  with outputs.claim_directory(output, say=say) as root:
    files.check_free(root, files.video_names(request), len(batches), overwrite=overwrite,
                     decoding=True)
    pipeline = load_pipeline(checkpoint or run.get('checkpoint'), *choices)
    plan = Plan(request, spec, pipeline, root, batches)
    check_same(run, plan, 'Give --checkpoint of the model that sampled the latents.', say)
    return tuple(video for index in range(len(batches))
                 for video in _decode_batch(plan, index, source, say))


def _decode_batch(plan: Plan, index: int, source: pathlib.Path, say: Say) -> list[pathlib.Path]:
  if not files.record_path(source, index).is_dir():
    say(f'note: batch {index + 1} of {len(plan.batches)} has no latents yet.')
    return []
  record = plan.record(index, source)
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
                      decoded_from=str(source.resolve()))
  return [plan.root / f'{plan.names[video]}.mp4' for video in plan.batches[index]]
