"""Decoding saved latents into the very frames that were sampled.

The frames come out of the same compiled programs at the same batch size, fed with the recorded
latents, so they are equal bit for bit to those of the run (same versions and machine).
"""

import contextlib
import itertools
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from pf_jax import outputs
from pf_jax.pipeline import Pipeline
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
  make_plan,
  read_run,
)
from pf_jax.sampling.source import ModelSource


def decode(latents: str | os.PathLike, output: str | os.PathLike, *,
           moved: Mapping[str, str] | None = None, overwrite: bool = False, say: Say = say_at_once
           ) -> tuple[pathlib.Path, ...]:
  """Writes the videos of a run again, from its latents.

  Args:
    latents: directory of the run, sampled with saved latents or cut short.
    output: directory for the videos, their sidecars and contact sheets.
    moved: where the model is that sampled them, if not where it was; see `ModelSource.moved`.
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
    spec = SampleSpec(**{**run['settings'], 'cache': identity['cache'],
                         'sampler': identity['sampler']})
    source = ModelSource.from_json(run['source'])
  except (KeyError, TypeError, ValueError) as error:
    raise SampleError(f'{folder / files.RUN_FILE} is damaged ({error!r}).') from error
  with outputs.claim_directory(output, say=say) as root:
    try:
      source = source.moved(moved or {})
    except ValueError as error:
      raise SampleError(str(error)) from error
    plan = make_plan(request, spec, source, root, identity.get('beginning'))
    check_same(run, plan, 'Say where the model is that sampled the latents, with --checkpoint or '
               '--weights.', say)
    files.check_free(root, plan.names, len(plan.batches), overwrite=overwrite, decoding=True)
    try:
      pipeline = source.load(identity['cache'], identity['sampler'], say=say,
                             texts=[t for s in request.schedules for t in s.texts])
    except ValueError as error:
      raise SampleError(str(error)) from error
    return tuple(video for index in range(len(plan.batches))
                 for video in _decode_batch(plan, pipeline, index, folder, say))


def _decode_batch(plan: Plan, pipeline: Pipeline, index: int, folder: pathlib.Path, say: Say
                  ) -> list[pathlib.Path]:
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
    for block in itertools.islice(plan.sample(pipeline, index, record), len(record)):
      output.add(np.asarray(block.frames)[:len(plan.batches[index])])
      progress.update()
  plan.write_sidecars(index, len(record),
                      FINISHED if len(record) == plan.blocks else UNFINISHED,
                      decoded_from=str(folder.resolve()))
  return [plan.root / f'{plan.names[video]}.mp4' for video in plan.batches[index]]
