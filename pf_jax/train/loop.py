"""The training loop every stage uses: lock, resume, step, log, save, stop cleanly."""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pf_jax import outputs
from pf_jax.interrupts import Stop, stop_on_signal
from pf_jax.progress import Progress
from pf_jax.train import flops, sharding
from pf_jax.train.checkpoint import CheckpointMismatch, Checkpoints
from pf_jax.train.config import OptimizerConfig, TrainConfig
from pf_jax.train.metrics import MetricWriter
from pf_jax.train.state import (
  Objective,
  TrainState,
  init_state,
  make_optimizer,
  moving_parts,
  take_turns,
)
from pf_jax.train.step import TrainStep, split

PyTree = Any


class NonFiniteTraining(RuntimeError):
  """Too many steps in a row had a loss or gradient that is not finite."""


@dataclasses.dataclass(frozen=True)
class FitResult:
  """How a run ended.

  Attributes:
    state: the last state.
    step: steps done.
    interrupted: a signal ended the run before `config.steps`; it can be resumed.
    metrics: the last logged training metrics.
    compile_seconds: wall time of the first step, which compiles.
  """

  state: TrainState
  step: int
  interrupted: bool
  metrics: dict[str, float]
  compile_seconds: float


class _Window:
  """Metrics of the steps since the last record, still on the device."""

  def __init__(self) -> None:
    self.steps: list[dict[str, jax.Array]] = []
    self.flops = 0
    self.untimed = 0
    self.since = time.monotonic()

  def restart(self) -> None:
    """The steps so far took what compiling takes: they do not count as work and time."""
    self.untimed, self.flops, self.since = len(self.steps), 0, time.monotonic()

  def fetch(self, peak: float) -> dict[str, float]:
    """Waits for the device; means over finite steps, counters as they are now.

    Args:
      peak: FLOP/s of all devices; 0 if FLOPs are not counted.
    """
    rows = jax.device_get(self.steps)
    seconds = max(time.monotonic() - self.since, 1e-9)
    values: dict[str, float] = {}
    for name in dict.fromkeys(name for row in rows for name in row):  # players differ in theirs
      column = np.array([row[name] for row in rows if name in row], np.float64)
      if name == 'skipped':
        values[name] = float(column[-1])
      elif name == 'skipped_in_a_row':
        values[name] = float(column.max())
      else:
        finite = column[np.isfinite(column)]
        values[name] = float(finite.mean()) if finite.size else float('nan')
    if len(rows) == self.untimed:
      seconds = float('nan')
    values['steps_per_second'] = (len(rows) - self.untimed) / seconds
    if peak:
      values['tflops_per_second'] = self.flops / seconds / 1e12
      values['mfu'] = values['tflops_per_second'] * 1e12 / peak
    self.steps = []
    self.restart()
    return values


@dataclasses.dataclass
class _Run:
  """The parts of a run in progress; `fit` assembles them, `_train` drives them."""

  config: TrainConfig
  objective: Objective
  state: TrainState
  train_step: TrainStep
  checkpoints: Checkpoints
  writer: MetricWriter
  progress: Progress
  stop: Stop
  mesh: Mesh
  about: Mapping[str, Any]
  counter: flops.StepFlops | None
  peak: float
  evaluate: Callable[[PyTree, int], Mapping[str, float]] | None = None
  window: _Window = dataclasses.field(default_factory=_Window)
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  compile_seconds: float = 0.0

  def step(self, batch: PyTree, step: int) -> dict[str, jax.Array]:
    """Advances the state; returns metrics that are still on the device."""
    players = getattr(self.objective, 'players', None)
    moving = None if players is None else moving_parts(players, step)
    parts = (self.complete(part, step, moving) for part in split(batch, self.config.accumulate))
    if self.config.accumulate == 1:
      self.state, metrics = self.train_step(self.state, next(parts), moving)
    else:
      self.state, metrics = self.train_step.in_parts(self.state, parts, moving)
    return metrics

  def complete(self, batch: PyTree, step: int, moving: frozenset[str] | None) -> PyTree:
    """A part of a batch with what the objective makes of it beforehand."""
    if self.mesh.size > 1:
      batch = sharding.place_batch(batch, self.mesh)
    params = self.state.params
    if self.counter is not None and hasattr(self.objective, 'generation_flops'):
      self.window.flops += self.objective.generation_flops(params, batch, step)
    if hasattr(self.objective, 'generate'):
      batch = self.objective.generate(params, batch, step)
    if self.counter is not None:
      self.window.flops += self.counter(params, batch, self.state.rng, moving)
    return batch

  def save(self, step: int) -> None:
    """Starts a checkpoint."""
    self.checkpoints.save(self.state, meta={'data_position': step, 'about': dict(self.about)})

  def log(self, step: int) -> None:
    """Writes and shows what the steps since the last record measured; stops a run gone wrong."""
    self.metrics = self.window.fetch(self.peak)
    self.writer.write(step, self.metrics)
    shown = ('loss', 'grad_norm', 'steps_per_second', 'mfu')
    self.progress.show({n: self.metrics[n] for n in shown if n in self.metrics})
    in_a_row = self.metrics['skipped_in_a_row']
    if in_a_row >= self.config.max_skipped_in_a_row:
      raise NonFiniteTraining(
          f'{in_a_row:.0f} steps in a row up to step {step} had a loss or gradient that is not '
          f'finite (limit {self.config.max_skipped_in_a_row}); the parameters are those before '
          'them. Lower the learning rate or look at the data of these steps.')
    if in_a_row:
      self.progress.say(f'step {step}: {self.metrics["skipped"]:.0f} steps skipped so far '
                        '(loss or gradient not finite).')

  def run_evaluation(self, step: int) -> None:
    """Judges the averaged parameters, if somebody is to."""
    if self.evaluate is None:
      return
    params = self.state.params if self.state.ema is None else self.state.ema
    values = {name: float(value) for name, value in self.evaluate(params, step).items()}
    self.writer.write(step, values, kind='eval')
    self.progress.say(f'step {step}: ' + ' '.join(f'{n}={v:.4g}' for n, v in values.items()))


def _train(run: _Run, batches: Callable[[int], Iterator[PyTree]], start: int) -> int:
  """Steps until the end or a signal; returns the steps done."""
  config, step = run.config, start
  stream = iter(batches(start)) if start < config.steps else iter(())
  window = run.window
  while step < config.steps and not run.stop:
    began = time.monotonic()
    batch = next(stream, None)
    if batch is None:
      raise ValueError(f'the batches ended at {step=} of {config.steps}; a source must go on for '
                       'ever, or lower steps.')
    metrics = run.step(batch, step)
    window.steps.append(metrics)
    if step == start:
      jax.block_until_ready(metrics['loss'])
      run.compile_seconds = time.monotonic() - began
      window.restart()
    step += 1
    if step % config.log_every == 0 or step == config.steps:
      run.log(step)
    run.progress.update()
    if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
      began = time.monotonic()
      run.run_evaluation(step)
      window.since += time.monotonic() - began  # steps per second leave evaluations out
    if step % config.save_every == 0:
      run.save(step)
  if window.steps:
    run.log(step)
  return step


def labels_of(objective: Objective, params: PyTree) -> PyTree:
  """The group of each parameter."""
  if hasattr(objective, 'param_groups'):
    return objective.param_groups(params)
  return jax.tree.map(lambda leaf: 'all', params)


def make_run_optimizer(objective: Objective, config: TrainConfig, params: PyTree, labels: PyTree,
                       own: Mapping[str, OptimizerConfig] | None = None) -> Any:
  """One optimizer, or one for each player with a schedule over its own steps; see `fit`."""
  players = getattr(objective, 'players', None)
  axes = objective.muon_axes(params) if hasattr(objective, 'muon_axes') else None
  if players is None:
    return make_optimizer(config.optimizer, config.steps, params, labels, axes)
  scale, groups = config.optimizer.group_scale, set(jax.tree.leaves(labels))
  if unknown := sorted(set(scale) - groups):
    raise ValueError(f'group_scale names {unknown}; the groups here are {sorted(groups)}.')
  optimizers = {}
  for name, period in players.items():
    mine = set(jax.tree.leaves(labels[name]))
    part = dataclasses.replace((own or {}).get(name, config.optimizer), group_scale={
        group: factor for group, factor in scale.items() if group in mine})
    optimizers[name] = make_optimizer(part, -(-config.steps // period), params[name], labels[name],
                                      None if axes is None else axes[name])
  return take_turns(optimizers)


def fit(objective: Objective, batches: Callable[[int], Iterator[PyTree]], config: TrainConfig,
        workdir: str | os.PathLike, *,
        evaluate: Callable[[PyTree, int], Mapping[str, float]] | None = None,
        optimizers: Mapping[str, OptimizerConfig] | None = None,
        about: Mapping[str, Any] | None = None,
        say: Callable[[str], None] | None = None) -> FitResult:
  """Trains to `config.steps`, resuming from the directory's newest good checkpoint.

  A killed and resumed run ends in the same bits as an uninterrupted one, on the same machine
  with the same library versions: batches and randomness are functions of the step alone.

  Args:
    objective: parameters and loss; see `Objective`.
    batches: batches(step) iterates the batches of steps step, step + 1, ...; the batch of a step
      may depend on nothing else.
    config: length, logging, optimizer.
    workdir: run directory, locked while the run lasts.
    evaluate: evaluate(params, step) -> scalars, on the averaged parameters if there are any.
    optimizers: of the objective's players; default: `config.optimizer` for each.
    about: what the run depends on beside its configuration, JSON-able: digests of frozen weights
      and of data. A checkpoint that was made with something else is refused.
    say: receives notices; default: the progress display.

  Returns:
    The final state, and whether a signal cut the run short (saved, resumable).

  Raises:
    DirectoryInUse: another run holds `workdir`.
    CheckpointMismatch, CheckpointDamaged: the directory's checkpoints cannot be used.
    CheckpointNotSaved: a save failed, for want of space perhaps.
    NonFiniteTraining: see `TrainConfig.max_skipped_in_a_row`; the last state is saved first.
  """
  with contextlib.ExitStack() as stack:
    notices = say or print
    workdir = stack.enter_context(outputs.claim_directory(workdir, say=notices))
    stop = stack.enter_context(stop_on_signal('saving, then exiting.', patient=True))
    checkpoints = stack.enter_context(Checkpoints(workdir, keep=config.keep))
    mesh = stack.enter_context(_cards(config))
    run = _prepare(objective, config, workdir, checkpoints, stop, stack, mesh, optimizers or {},
                   dict(about or {}), notices)
    run.evaluate = evaluate
    start = int(run.state.step)
    try:
      step = _train(run, batches, start)
    finally:
      # Also after NonFiniteTraining: a not-finite step leaves the parameters as they were.
      # An error inside the compiled step may have consumed its donated input.
      if not checkpoints.failed and not run.state.step.is_deleted():
        run.save(int(run.state.step))
    checkpoints.wait()
    interrupted = step < config.steps
    if interrupted:
      run.progress.say(f'stopped at step {step} of {config.steps}; the same command resumes.')
    return FitResult(run.state, step, interrupted, run.metrics, run.compile_seconds)


def _prepare(objective: Objective, config: TrainConfig, workdir: pathlib.Path,
             checkpoints: Checkpoints, stop: Stop, stack: contextlib.ExitStack, mesh: Mesh,
             optimizers: Mapping[str, OptimizerConfig], about: Mapping[str, Any],
             notices: Callable[[str], None]) -> _Run:
  """Builds or restores the state and opens the writers."""
  state, optimizer, labels = initial_state(objective, config, optimizers)
  if mesh.size > 1:
    state = sharding.place(state, mesh)
    if hasattr(objective, 'place'):
      objective.place(lambda tree: sharding.place(tree, mesh))
  if (restored := checkpoints.restore(state)) is not None:
    state, saved = restored
    _check_same_run(workdir, saved.get('about', {}), about)
    notices(f'resuming {workdir} at step {int(state.step)} of {config.steps}.')
  start = int(state.step)
  writer = MetricWriter(workdir, start_step=start)
  stack.callback(writer.close)
  progress = Progress(config.steps, min(start, config.steps))
  stack.callback(progress.close)
  train_step = TrainStep(objective, optimizer, labels, config.ema_decay)
  counter = flops.StepFlops(objective.loss) if config.mfu else None
  peak = mesh.size * flops.peak_flops(jax.local_devices()[0])[0] if config.mfu else 0.0
  return _Run(config, objective, state, train_step, checkpoints, writer, progress, stop, mesh,
              about, counter, peak)


def initial_state(objective: Objective, config: TrainConfig,
                  optimizers: Mapping[str, OptimizerConfig] | None = None
                  ) -> tuple[TrainState, Any, PyTree]:
  """The state before the first step, its optimizer, and the group of each parameter."""
  params = objective.init(config.seed)
  labels = labels_of(objective, params)
  optimizer = make_run_optimizer(objective, config, params, labels, optimizers)
  state = init_state(params, optimizer, config.seed, ema=config.ema_decay > 0,
                     averaged=getattr(objective, 'averaged', None))
  return state, optimizer, labels


@contextlib.contextmanager
def _cards(config: TrainConfig) -> Iterator[Mesh]:
  """The devices of the run; programs are traced under their mesh if there are several."""
  devices = jax.local_devices()
  if config.devices > len(devices):
    raise ValueError(f'devices={config.devices} are wanted, {len(devices)} are here '
                     f'({devices[0].device_kind}); lower it, or 0 for all.')
  mesh = sharding.mesh(devices[:config.devices or None])
  with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
    yield mesh


def _check_same_run(workdir: pathlib.Path, saved: Mapping[str, Any], about: Mapping[str, Any]
                    ) -> None:
  """Refuses a checkpoint that was trained beside other weights or data.

  Raises:
    CheckpointMismatch: names what differs.
  """
  wanted = json.loads(json.dumps(about))
  if differing := sorted(name for name in saved if saved[name] != wanted.get(name)):
    lines = [f'{name}: {saved[name]} then, {wanted.get(name)} now' for name in differing]
    raise CheckpointMismatch(f'{workdir} was trained with other files:\n  ' + '\n  '.join(lines)
                             + '\nGive it these again, or another workdir.')
