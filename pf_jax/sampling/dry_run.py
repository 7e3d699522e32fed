"""What a run would take, printed; nothing is loaded, run or written.

With a target the steady block is compiled ahead for that card, which need not be there, and the
scratch that the compiler plans is part of the sum.
"""

import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from pf_jax import pipeline as pipeline_lib
from pf_jax.aot.targets import TARGETS
from pf_jax.models.bundle import Models, ModelSpec
from pf_jax.models.transformer import CausalTransformer
from pf_jax.request import Request, plan_batches
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.block import RolloutSpec
from pf_jax.sampling import budget as budget_lib
from pf_jax.sampling import meter
from pf_jax.sampling.config import SampleSpec
from pf_jax.sampling.plan import SampleError, Say
from pf_jax.sampling.source import ModelSource


def dry_run(request: Request, spec: SampleSpec, source: ModelSource, *,
            model: ModelSpec | None = None, memory: int | None = None, target: str | None = None,
            say: Say = print) -> budget_lib.Budget:
  """Prints the plan of a run.

  Args:
    request: prompts, length, seed.
    spec: settings.
    source: the model; its weights need not be there if `model` is given.
    model: sizes, for weights that are yet to be downloaded.
    memory: bytes to fit into; None: what the target or this machine's device has.
    target: a name in `aot.TARGETS`; None leaves scratch out.
    say: receives the lines.

  Returns:
    The budget.

  Raises:
    SampleError: choices that cannot be used, weights that are not where they should be, an unknown
      target or no compiler for it.
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
  scratch = None if target is None else planned_scratch(model, rollout, batch, target, say)
  plan = budget_lib.budget(model, rollout, batch=batch, blocks=blocks * len(request.prompts),
                           texts=max(len(s.texts) for s in request.schedules), scratch=scratch)
  video = model.video
  say(f'{len(request.prompts)} video(s) of {blocks} blocks, {video.pixel_frames(blocks)} frames of '
      f'{video.width}x{video.height} at {video.fps} fps, {batch} at a time')
  say(f'{rollout.cache.attention_tokens:,} keys per query from block {rollout.cache.steady_block} '
      f'on; {rollout.cache.block_tokens:,} queries a block, {rollout.cache.mid_tokens} tokens a '
      'compressed block')
  for line in plan.lines():
    say(line)
  if memory is not None:
    available, where = memory, 'the device'
  elif target is not None:
    available, where = TARGETS[target].info.device_memory_size, TARGETS[target].name
  else:
    available, where = budget_lib.device_memory()
  plan.check(available, where)
  if scratch is None:
    say(f'fits into the {available / 1e9:.1f} GB of {where} if the programs\' scratch stays below '
        f'{(available - plan.video_phase) / 1e9:.1f} GB; --target=h200 compiles to say.')
  else:
    say(f'fits into the {available / 1e9:.1f} GB of {where}.')
  return plan


def planned_scratch(model: ModelSpec, rollout: RolloutSpec, batch: int, target: str, say: Say
                    ) -> int:
  """Temporary memory of a steady block on a card that need not be there, bytes.

  Raises:
    SampleError: an unknown target, or its compiler is not installed.
  """
  from pf_jax.aot.compile import compile_for

  if target not in TARGETS:
    raise SampleError(f'{target=} is unknown; use one of {", ".join(TARGETS)}.')
  models = jax.eval_shape(lambda: Models(model, rngs=nnx.Rngs(0)).without_text())
  state = jax.eval_shape(functools.partial(block_lib.init, batch=batch, spec=rollout), models)
  rows = jax.ShapeDtypeStruct((batch, model.text.max_tokens, model.text.width), jnp.float32)
  text = jax.eval_shape(CausalTransformer.text_keys_values, models.transformer, rows)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
  say(f'compiling a block for {TARGETS[target].name} ...')
  try:
    report = compile_for(functools.partial(block_lib.sample_block, first=False, spec=rollout),
                         (models, state, text, keys), TARGETS[target], donate=(1,))
  except ModuleNotFoundError as error:
    raise SampleError(str(error)) from error
  say(f'compiled in {report.trace_seconds + report.compile_seconds:.0f} s: '
      f'{report.total_bytes / 1e9:.2f} GB in all, {report.scratch_bytes / 1e9:.2f} GB scratch.')
  return report.scratch_bytes


def _say_files(paths: Sequence[pathlib.Path], say: Say) -> None:
  for path in paths:
    say(f'reads {path} ({meter.megabytes(path.stat().st_size)})')
