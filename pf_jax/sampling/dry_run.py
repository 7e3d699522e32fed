"""What a run would take, printed; nothing is loaded, run or written.

With a target the steady block is compiled ahead for that card, which need not be there, and the
scratch that the compiler plans is part of the sum.
"""

import pathlib

from pf_jax.aot.targets import TARGETS
from pf_jax.released import ReleasedWeights
from pf_jax.request import Request
from pf_jax.sampling import budget as budget_lib
from pf_jax.sampling import meter
from pf_jax.sampling.beginning import Beginning
from pf_jax.sampling.config import SampleSpec
from pf_jax.sampling.plan import Plan, SampleError, Say, make_plan
from pf_jax.sampling.source import ModelSource
from pf_jax.weights.hub import NotDownloaded


def dry_run(request: Request, spec: SampleSpec, source: ModelSource, *,
            output: pathlib.Path = pathlib.Path(), beginning: Beginning | None = None,
            memory: int | None = None, target: str | None = None, say: Say = print
            ) -> budget_lib.Budget:
  """Prints the plan of a run, and refuses what the run would refuse.

  Args:
    request: prompts, length, seed.
    spec: settings.
    source: the model; sizes are enough. Weights that are there are compared with them.
    output: where the files would go; need not be there.
    beginning: what the videos begin with; it is read.
    memory: bytes to fit into; None: what the target or this machine's device has.
    target: a name in `aot.TARGETS`; None leaves scratch out.
    say: receives the lines.

  Returns:
    The budget.

  Raises:
    SampleError: choices that cannot be used, weights or a beginning that are missing, damaged or
      do not fit, an unknown target or no compiler for it.
    DoesNotFit: more memory or disk is needed than there is; the plan is printed first.
  """
  if target is not None and target not in TARGETS:
    raise SampleError(f'{target=} is unknown; use one of {", ".join(TARGETS)}.')
  plan = make_plan(request, spec, source, output)
  try:
    if source.weights is not None:
      say_files(source.weights, say)
    if beginning is not None:
      beginning.read(plan.video, plan.blocks, say)
  except (ValueError, OSError) as error:
    raise SampleError(str(error)) from error
  budget = plan.budget(None if target is None else planned_scratch(plan, target, say))
  _say_lengths(plan, say)
  for line in budget.lines():
    say(line)
  available, where = _memory(memory, target)
  budget.check(available, where)
  budget.check_disk(output)
  if budget.scratch is None:
    say(f'fits into the {available / 1e9:.1f} GB of {where} if the programs\' scratch stays below '
        f'{(available - budget.video_phase) / 1e9:.1f} GB; --target=h200 compiles to say.')
  else:
    say(f'fits into the {available / 1e9:.1f} GB of {where}.')
  return budget


def _say_lengths(plan: Plan, say: Say) -> None:
  video, cache = plan.video, plan.rollout.cache
  say(f'{len(plan.names)} video(s) of {plan.blocks} blocks, {video.pixel_frames(plan.blocks)} '
      f'frames of {video.width}x{video.height} at {video.fps} fps, {plan.batch} at a time')
  say(f'{cache.attention_tokens:,} keys per query from block {cache.steady_block} on; '
      f'{cache.block_tokens:,} queries a block, {cache.mid_tokens} tokens a compressed block')


def _memory(memory: int | None, target: str | None) -> tuple[int, str]:
  if memory is not None:
    return memory, 'the device'
  if target is not None:
    return TARGETS[target].info.device_memory_size, TARGETS[target].name
  return budget_lib.device_memory()


def planned_scratch(plan: Plan, target: str, say: Say) -> int:
  """Temporary memory of a steady block on a card that need not be there, bytes.

  Raises:
    SampleError: its compiler is not installed.
  """
  from pf_jax.aot.compile import compile_for
  from pf_jax.sampling import ahead

  block = ahead.programs(plan.model, plan.rollout, plan.batch)['block']
  say(f'compiling a block for {TARGETS[target].name} ...')
  try:
    report = compile_for(block.function, block.arguments, TARGETS[target], donate=block.donate)
  except ModuleNotFoundError as error:
    raise SampleError(str(error)) from error
  say(f'compiled in {report.trace_seconds + report.compile_seconds:.0f} s: '
      f'{report.total_bytes / 1e9:.2f} GB in all, {report.scratch_bytes / 1e9:.2f} GB scratch.')
  return report.scratch_bytes


def say_files(weights: ReleasedWeights, say: Say) -> None:
  """Names the released files, which must fit; nothing is downloaded.

  Raises:
    WeightsError, PackageError: they are missing, damaged, or of another model.
  """
  try:
    opened = weights.open(download=False, say=say)
  except NotDownloaded as error:
    say(f'{error} Sizes are those of the config.')
    return
  for path in opened.files:
    say(f'reads {path} ({meter.megabytes(_size(path))})')


def _size(path: pathlib.Path) -> int:
  if path.is_file():
    return path.stat().st_size
  return sum(inside.stat().st_size for inside in path.rglob('*') if inside.is_file())
