"""What a run would take, printed; nothing is loaded, compiled or written."""

import pathlib
from collections.abc import Sequence

from pf_jax import pipeline as pipeline_lib
from pf_jax.models.bundle import ModelSpec
from pf_jax.request import Request, plan_batches
from pf_jax.sampling import budget as budget_lib
from pf_jax.sampling import meter
from pf_jax.sampling.config import SampleSpec
from pf_jax.sampling.plan import SampleError, Say
from pf_jax.sampling.source import ModelSource


def dry_run(request: Request, spec: SampleSpec, source: ModelSource, *,
            model: ModelSpec | None = None, memory: int | None = None,
            say: Say = print) -> budget_lib.Budget:
  """Prints the plan of a run.

  Args:
    request: prompts, length, seed.
    spec: settings.
    source: the model; its weights need not be there if `model` is given.
    model: sizes, for weights that are yet to be downloaded.
    memory: bytes to fit into; None: what this machine's device has.
    say: receives the lines.

  Returns:
    The budget.

  Raises:
    SampleError: choices that cannot be used, or weights that are not where they should be.
    DoesNotFit: more memory is needed than there is; the plan is printed first.
  """
  cache, sampler = spec.chosen('cache'), spec.chosen('sampler')
  try:
    if model is not None and source.weights is None:
      rollout = pipeline_lib.rollout_spec(model, {'cache': cache, 'sampler': sampler})
    else:
      model, rollout = source.specs(cache, sampler)
      _say_files(source.weights.files() if source.weights else (), say)
  except (ValueError, TypeError) as error:
    raise SampleError(str(error)) from error
  batches = plan_batches(request.schedules, spec.batch_size)
  blocks, batch = model.video.blocks_for_seconds(request.seconds), max(map(len, batches))
  plan = budget_lib.budget(model, rollout, batch=batch, blocks=blocks * len(request.prompts))
  video = model.video
  say(f'{len(request.prompts)} video(s) of {blocks} blocks, {video.pixel_frames(blocks)} frames of '
      f'{video.width}x{video.height} at {video.fps} fps, {batch} at a time')
  say(f'{rollout.cache.attention_tokens:,} keys per query from block {rollout.cache.steady_block} '
      f'on; {rollout.cache.block_tokens:,} queries a block, {rollout.cache.mid_tokens} tokens a '
      'compressed block')
  for line in plan.lines():
    say(line)
  available, where = budget_lib.device_memory() if memory is None else (memory, 'the device')
  plan.check(available, where)
  say(f'fits into the {available / 1e9:.1f} GB of {where}.')
  return plan


def _say_files(paths: Sequence[pathlib.Path], say: Say) -> None:
  for path in paths:
    say(f'reads {path} ({meter.megabytes(path.stat().st_size)})')
