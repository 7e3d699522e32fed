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
from collections.abc import Mapping
from typing import Any

import numpy as np

from pf_jax import outputs, profile
from pf_jax.interrupts import Stop, stop_on_signal
from pf_jax.pipeline import Pipeline
from pf_jax.progress import Progress
from pf_jax.request import Request
from pf_jax.sampling import budget, files, meter
from pf_jax.sampling.beginning import Beginning, blocks_of, given_blocks
from pf_jax.sampling.config import SampleSpec, TraceSpec
from pf_jax.sampling.plan import (
  FINISHED,
  ROLLOUT,
  UNFINISHED,
  Plan,
  SampleError,
  Say,
  check_same,
  make_plan,
  read_run,
  warn_about_prompts,
  write_run,
)
from pf_jax.sampling.record import Record
from pf_jax.sampling.source import ModelSource
from pf_jax.sampling.tracer import BlockTracer

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
        trace: TraceSpec | None = None, say: Say = say_at_once) -> Result:
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
    trace: blocks to trace, of the first batch that has them; None: none.
    say: receives notices.

  Raises:
    SampleError: the request does not fit the model or the run to resume, no usable model, or a
      video that ends before the blocks to trace.
    DoesNotFit: more memory or disk is needed than there is.
    NotWritable, OutputExists, DirectoryInUse: the directory cannot be used.
    OSError: something could not be written.
  """
  with outputs.claim_directory(output, say=say) as root, meter.CompileCounter() as compilations:
    plan = make_plan(request, spec, source or ModelSource(), root,
                     _described(beginning))
    resume = resume and (root / files.RUN_FILE).exists()
    if resume:
      check_same(read_run(root), plan, 'Give the same command again with --resume, or --overwrite '
                 'to start again.', say)
    else:
      files.check_free(root, plan.names, len(plan.batches), overwrite=overwrite)
    todo = [i for i in range(len(plan.batches)) if not (resume and plan.is_finished(i))]
    if not todo:
      say(f'{root}: this run is finished already; nothing to do.')
      return Result(root, _videos(plan), None, {})
    memory = budget.device_memory()  # before anything is loaded
    expected = plan.budget()
    expected.check(*memory)
    if not resume:
      expected.check_disk(root)
    tracer = BlockTracer(trace, plan.blocks, say)
    pipeline, given = _load(plan, beginning, say)
    with profile.own_names() if trace else contextlib.nullcontext():
      estimate = _prepare(plan, pipeline, expected, len(todo), given, memory, say)
    if not resume:
      files.clear(root, plan.names, len(plan.batches))
      write_run(plan)
    job = _Job(plan, pipeline, estimate, compilations, given, save_latents, tracer, say)
    result = job.run(todo)
    tracer.say_where()
    return result


def _described(beginning: Beginning | None) -> dict[str, Any] | None:
  if beginning is None:
    return None
  try:
    return beginning.describe()
  except (OSError, ValueError) as error:
    raise SampleError(str(error)) from error


def _load(plan: Plan, beginning: Beginning | None, say: Say) -> tuple[Pipeline, np.ndarray | None]:
  """The pipeline and the frames of the beginning, which are looked at first."""
  texts = [text for schedule in plan.request.schedules for text in schedule.texts]
  try:
    given = None if beginning is None else beginning.read(plan.video, plan.blocks, say)
    pipeline = plan.source.load(plan.spec.chosen('cache'), plan.spec.chosen('sampler'),
                                texts=texts, say=say)
  except ValueError as error:
    raise SampleError(str(error)) from error
  warn_about_prompts(pipeline.tokenizer, texts, say)
  return pipeline, given


def _prepare(plan: Plan, pipeline: Pipeline, expected: budget.Budget, batches: int,
             given: np.ndarray | None, memory: tuple[int, str], say: Say) -> meter.Estimate:
  """Compiles everything, checks the memory that the programs plan, says what the run will take."""
  say(f'{_count(plan)} of {plan.blocks} blocks, {plan.video.pixel_frames(plan.blocks)} frames; '
      'compiling ...')
  programs = pipeline.programs(plan.batch)
  if given is not None and len(given) == 1:
    programs.prepare_picture()
  say(f'compiled in {sum(programs.compile_seconds.values()):.1f} s.')
  dataclasses.replace(expected, scratch=programs.scratch_bytes).check(*memory)
  estimate = meter.estimate(pipeline, programs, plan.blocks * batches)
  say(str(estimate))
  return estimate


def _count(plan: Plan) -> str:
  return f'{len(plan.names)} video{"s" * (len(plan.names) > 1)}'


def _videos(plan: Plan) -> tuple[pathlib.Path, ...]:
  paths = [plan.root / f'{name}.mp4' for name in plan.names]
  return tuple(path for path in paths if path.exists())


class _Job:
  """The batches of a run, one after the other."""

  def __init__(self, plan: Plan, pipeline: Pipeline, expected: meter.Estimate,
               compilations: meter.CompileCounter, given: np.ndarray | None, keep: bool,
               tracer: BlockTracer, say: Say):
    self._plan, self._pipeline, self._given = plan, pipeline, given
    self._expected, self._keep, self._tracer, self._say = expected, keep, tracer, say
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
    with contextlib.ExitStack() as stack:
      output = stack.enter_context(plan.open_files(index, replayed=known))
      if self._given is not None:
        self._store_given(index, record)
      done = known
      start = time.perf_counter()
      # The record grows with every block, so it never holds the one that is asked for next.
      blocks = stack.enter_context(contextlib.closing(
          self._tracer.over(plan.sample(self._pipeline, index, record), replayed=len(record))))
      for block in blocks:
        if not block.replayed:
          record.append(np.asarray(block.latents), np.asarray(block.selected))
        output.add(np.asarray(block.frames)[:len(plan.batches[index])])
        now = time.perf_counter()
        self._meter.add(block.number, now - start, block.state, replayed=block.replayed)
        start, done = now, max(known, block.number + 1)
        progress.show({'video_seconds': plan.video.pixel_frames(block.number + 1) / plan.video.fps})
        progress.update()
        if stop:
          break
    return done

  def _store_given(self, index: int, record: Record) -> None:
    """Puts the given blocks into the record, from where they are replayed like any others."""
    assert self._given is not None
    plan, known = self._plan, len(record)
    if known >= blocks_of(self._given, plan.video):
      return
    rows, request = plan.rows(index), plan.request
    texts = [request.schedules[row].texts[0] for row in rows]
    seeds = [request.seeds[row] for row in rows]
    for number, block in enumerate(given_blocks(self._pipeline, self._given, texts, seeds)):
      if number >= known:
        record.append(*block)

  def _metrics(self, done: int, status: str) -> dict[str, Any]:
    plan, expected = self._plan, self._expected
    video, seconds = plan.video, self._pipeline.programs(plan.batch).compile_seconds
    return {
        'status': status, 'rollout': ROLLOUT, 'videos': len(plan.names), 'batch': plan.batch,
        'given_blocks': 0 if self._given is None else blocks_of(self._given, video),
        'blocks': done, 'planned_blocks': plan.blocks, 'frames': video.pixel_frames(done),
        'seconds_of_video': video.pixel_frames(done) / video.fps,
        'traced_blocks': self._tracer.numbers,  # they, and the next one, took longer for it
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
