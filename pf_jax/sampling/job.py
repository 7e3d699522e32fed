"""Sampling as a job: one directory, one run, resumable bit for bit at any block.

Every block is stored (latents and selection) before its frames are written. A resumed run replays
the stored blocks through the very programs that would have made them, so state, frames and all
that follows are the same bits, given the same versions and machine.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pf_jax import outputs
from pf_jax.interrupts import Stop, stop_on_signal
from pf_jax.pipeline import Pipeline
from pf_jax.progress import Progress
from pf_jax.request import Request, plan_batches
from pf_jax.sampling import budget, files, meter
from pf_jax.sampling.beginning import Beginning, blocks_of, given_blocks
from pf_jax.sampling.config import SampleSpec
from pf_jax.sampling.plan import (
  FINISHED,
  ROLLOUT,
  UNFINISHED,
  Plan,
  SampleError,
  Say,
  check_same,
  read_run,
  warn_about_prompts,
  write_run,
)
from pf_jax.sampling.record import Record
from pf_jax.sampling.source import ModelSource

say_at_once = functools.partial(print, flush=True)


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended.

  Attributes:
    directory: with all files.
    videos: the MP4 files.
    interrupted: number of the signal that ended it early, None if it is complete.
    metrics: as in metrics.json; empty if there was nothing to do.
  """

  directory: pathlib.Path
  videos: tuple[pathlib.Path, ...]
  interrupted: int | None
  metrics: Mapping[str, Any]


def run(request: Request, spec: SampleSpec, output: str | os.PathLike, *,
        source: ModelSource | None = None, beginning: Beginning | None = None,
        overwrite: bool = False, resume: bool = False, save_latents: bool = False,
        say: Say = say_at_once) -> Result:
  """Samples all videos of a request into a directory.

  Args:
    request: prompts, length, seed.
    spec: settings.
    output: the directory; created if needed.
    source: the model; None is the packaged one.
    beginning: a picture or video whose frames are the first blocks of every video.
    overwrite: replace files of the same names.
    resume: go on with a run that was cut short; the request must be the same.
    save_latents: keep the records, for `decode`.
    say: receives notices.

  Raises:
    SampleError: the request does not fit the model or the run to resume, or no usable model.
    NotWritable, OutputExists, DirectoryInUse: the directory cannot be used.
    OSError: something could not be written.
  """
  with outputs.claim_directory(output, say=say) as root, meter.CompileCounter() as compilations:
    batches = tuple(plan_batches(request.schedules, spec.batch_size))
    resume = resume and (root / files.RUN_FILE).exists()
    if not resume:
      files.check_free(root, files.video_names(request), len(batches), overwrite=overwrite)
    source = source or ModelSource()
    pipeline, given = _load(request, spec, source, beginning, batches, say)
    plan = Plan(request, spec, pipeline, source, root, batches,
                beginning.describe() if beginning else None)
    if resume:
      check_same(read_run(root), plan, 'Give the same command again with --resume, or --overwrite '
                 'to start again.', say)
    todo = [i for i in range(len(batches)) if not (resume and plan.is_finished(i))]
    if not todo:
      say(f'{root}: this run is finished already; nothing to do.')
      return Result(root, _videos(plan), None, {})
    expected = _prepare(plan, len(todo), given, say)
    if not resume:
      files.clear(root, plan.names, len(batches))
      write_run(plan)
    return _Job(plan, expected, compilations, given, save_latents, say).run(todo)


def _load(request: Request, spec: SampleSpec, source: ModelSource, beginning: Beginning | None,
          batches: Sequence[Sequence[int]], say: Say) -> tuple[Pipeline, np.ndarray | None]:
  """The pipeline and the frames of the beginning; what cannot work is refused before loading."""
  texts = [text for schedule in request.schedules for text in schedule.texts]
  cache, sampler = spec.chosen('cache'), spec.chosen('sampler')
  try:
    model, rollout = source.specs(cache, sampler)
    blocks = model.video.blocks_for_seconds(request.seconds)
    budget.budget(model, rollout, batch=max(map(len, batches)),
                  blocks=blocks * len(request.prompts),
                  texts=max(len(s.texts) for s in request.schedules),
                  ).check(*budget.device_memory())
    given = None if beginning is None else beginning.read(model.video, blocks, say)
    pipeline = source.load(cache, sampler, texts=texts, say=say)
  except (ValueError, TypeError) as error:  # TypeError: a choice of the wrong type
    raise SampleError(str(error)) from error
  warn_about_prompts(pipeline, texts, say)
  return pipeline, given


def _prepare(plan: Plan, batches: int, given: np.ndarray | None, say: Say) -> meter.Estimate:
  """Compiles everything and says what the run will take."""
  say(f'{_count(plan)} of {plan.blocks} blocks, {plan.pipeline.video.pixel_frames(plan.blocks)} '
      'frames; compiling ...')
  programs = plan.pipeline.programs(plan.batch)
  if given is not None and len(given) == 1:
    programs.prepare_picture()
  say(f'compiled in {sum(programs.compile_seconds.values()):.1f} s.')
  expected = meter.estimate(plan.pipeline, programs, plan.blocks * batches)
  say(str(expected))
  return expected


def _count(plan: Plan) -> str:
  return f'{len(plan.names)} video{"s" * (len(plan.names) > 1)}'


def _videos(plan: Plan) -> tuple[pathlib.Path, ...]:
  paths = [plan.root / f'{name}.mp4' for name in plan.names]
  return tuple(path for path in paths if path.exists())


class _Job:
  """The batches of a run, one after the other."""

  def __init__(self, plan: Plan, expected: meter.Estimate, compilations: meter.CompileCounter,
               given: np.ndarray | None, keep: bool, say: Say):
    self._plan, self._expected, self._keep, self._say = plan, expected, keep, say
    self._given = given
    self._meter = meter.Meter(compilations)

  def run(self, todo: list[int]) -> Result:
    plan, metrics = self._plan, {}
    progress = Progress(plan.blocks * len(todo), unit='block', every_s=10)
    with contextlib.closing(progress), stop_on_signal('finishing this block.') as stop:
      for index in todo:
        done = self._sample_batch(index, progress, stop)
        complete = done == plan.blocks
        last = complete and index == todo[-1]
        metrics = self._metrics(done, FINISHED if last else UNFINISHED)
        outputs.write_json(plan.root / files.METRICS_FILE, metrics)
        # The sidecars come last: they say that nothing is left to do for this batch.
        plan.write_sidecars(index, done, FINISHED if complete else UNFINISHED)
        if complete and not self._keep:
          files.remove_record(plan.root, index)
        if stop and not last:
          self._say(f'stopped by {stop.name} after block {done} of {plan.blocks} of batch '
                    f'{index + 1} of {len(plan.batches)}. What is finished plays, in {plan.root}; '
                    'the same command with --resume continues bit for bit.')
          return Result(plan.root, _videos(plan), stop.number, metrics)
    self._say(f'wrote {_count(plan)}, contact sheet and {files.METRICS_FILE} to {plan.root}.')
    return Result(plan.root, _videos(plan), None, metrics)

  def _sample_batch(self, index: int, progress: Progress, stop: Stop) -> int:
    """Samples what the record lacks; returns the finished blocks."""
    plan, record = self._plan, self._plan.record(index)
    _report(record, progress.say)
    plan.write_sidecars(index, len(record), UNFINISHED)
    self._meter.start_batch()
    try:
      return self._write_blocks(index, record, progress, stop)
    except OSError as error:  # a full disk, mostly
      raise SampleError(f'{error}. {len(record)} blocks are stored; when the cause is gone, the '
                        'same command with --resume continues.') from error

  def _write_blocks(self, index: int, record: Record, progress: Progress, stop: Stop) -> int:
    plan, known = self._plan, len(record)
    with plan.open_files(index, replayed=known) as output:
      if self._given is not None:
        self._store_given(index, record)
      done = known
      start = time.perf_counter()
      # The record grows with every block, so it never holds the one that is asked for next.
      for block in plan.sample(index, record):
        if not block.replayed:
          record.append(np.asarray(block.latents), np.asarray(block.selected))
        output.add(np.asarray(block.frames)[:len(plan.batches[index])])
        now = time.perf_counter()
        self._meter.add(block.number, now - start, block.state, replayed=block.replayed)
        start, done = now, max(known, block.number + 1)
        progress.show({'video_seconds': plan.pipeline.video.pixel_frames(block.number + 1)
                       / plan.pipeline.video.fps})
        progress.update()
        if stop:
          break
    return done

  def _store_given(self, index: int, record: Record) -> None:
    """Puts the given blocks into the record, from where they are replayed like any others."""
    assert self._given is not None
    plan, known = self._plan, len(record)
    if known >= blocks_of(self._given, plan.pipeline.video):
      return
    rows, request = plan.rows(index), plan.request
    texts = [request.schedules[row].texts[0] for row in rows]
    seeds = [request.seeds[row] for row in rows]
    for number, block in enumerate(given_blocks(plan.pipeline, self._given, texts, seeds)):
      if number >= known:
        record.append(*block)

  def _metrics(self, done: int, status: str) -> dict[str, Any]:
    plan, expected = self._plan, self._expected
    video, seconds = plan.pipeline.video, plan.pipeline.programs(plan.batch).compile_seconds
    return {
        'status': status, 'rollout': ROLLOUT, 'videos': len(plan.names), 'batch': plan.batch,
        'given_blocks': 0 if self._given is None else blocks_of(self._given, video),
        'blocks': done, 'planned_blocks': plan.blocks, 'frames': video.pixel_frames(done),
        'seconds_of_video': video.pixel_frames(done) / video.fps,
        'compile_seconds': sum(seconds.values()), 'compile_seconds_of': seconds,
        **self._meter.to_json(),
        'predicted_cache_bytes': expected.cache_bytes, 'context_bytes': expected.context_bytes,
        'scratch_bytes': expected.scratch_bytes, 'parameter_bytes': expected.parameter_bytes,
        'estimate': expected.to_json(), 'versions': meter.versions()}


def _report(record: Record, say: Say) -> None:
  if record.damaged():
    say(f'note: block {len(record)} of {record.path} is damaged; sampling goes on from there.')
  if len(record):
    say(f'resuming: {len(record)} blocks are replayed, not sampled again.')
