"""What a training takes of a card's memory, before anything is loaded.

Counted from shapes: what is resident (trained parameters, moments, average, frozen networks) and
what a step is given. Compiled for the card, where its compiler is installed: what each program
takes besides (activations, gradients, workspaces that the compiler plans).
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from pf_jax.aot import compile as aot
from pf_jax.aot.targets import GpuTarget, Target
from pf_jax.outputs import slug
from pf_jax.train import loop, sharding
from pf_jax.train.config import OptimizerConfig, TrainConfig
from pf_jax.train.state import TrainState, init_state, moving_parts
from pf_jax.train.step import Sums, TrainStep
from pf_jax.types import PyTree

GB = 1e9

COMPILER = (f'pip install --no-deps {aot.PLUGIN.replace("_", "-")}=={jax.__version__} '
            f'jax-cuda13-pjrt=={jax.__version__}')

# Without a card to tune on, XLA's own choice of tiles for the compressor's last product (910 x 2048
# x 1536, float32) does not compile. Products by cuBLAS take no more memory.
OPTIONS = {'xla_gpu_enable_triton_gemm': False}


class Call(NamedTuple):
  """A program that runs between steps, such as a rollout's.

  Attributes:
    name: for the table.
    function: anything that `jax.jit` takes.
    arguments: shapes, with shardings.
    resident: which of them are resident, so that only the rest counts.
    donate: positions of arguments whose memory the results take over.
    beside: bytes that lie there meanwhile, of each card.
    trips: turns, at most, of a loop whose length is known only when it runs.
  """

  name: str
  function: Callable
  arguments: tuple[PyTree, ...]
  resident: tuple[int, ...] = ()
  donate: tuple[int, ...] = ()
  beside: int = 0
  trips: int | None = None


class Sketch(NamedTuple):
  """A stage as shapes.

  Attributes:
    objective: what `fit` would train; its networks may be shapes.
    params: shapes of what it trains.
    frozen: networks that are resident besides, by name.
    batch: mesh -> what the compiled step sees of one part of a batch, with shardings; frozen
      networks in it are those of `frozen`.
    calls: (mesh, state) -> programs besides the step.
    optimizers: of players, see `fit`.
  """

  objective: Any
  params: PyTree
  frozen: dict[str, PyTree]
  batch: Callable[[Mesh | AbstractMesh], PyTree]
  calls: Callable[[Mesh | AbstractMesh, TrainState], Sequence[Call]] = lambda mesh, state: ()
  optimizers: dict[str, OptimizerConfig] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
  """Bytes of each card.

  Attributes:
    card: its name.
    devices: how many cards.
    capacity: bytes of a card.
    resident: what lies there all the time, by name.
    batch: what a step is given besides.
    programs: what each program takes on top of what is resident, arguments included; empty where
      the card's compiler is not installed.
  """

  card: str
  devices: int
  capacity: int
  resident: dict[str, int]
  batch: int
  programs: dict[str, int]

  @property
  def peak(self) -> int:
    """Most bytes at once; without programs what is known of them."""
    return sum(self.resident.values()) + max(self.programs.values(), default=self.batch)

  def lines(self) -> list[str]:
    """The plan as a table for people."""
    rows = [*self.resident.items(), ('what a step is given', self.batch)]
    rows += [(f'{name}, on top of what is resident', size) for name, size in self.programs.items()]
    rows += [('peak' if self.programs else 'at least', self.peak)]
    share = 100 * self.peak / self.capacity
    return [f'memory of each of {self.devices} x {self.card} ({self.capacity / GB:.1f} GB):',
            *(f'  {size / GB:8.2f} GB  {name}' for name, size in rows),
            f'  {share:7.0f}% of the card']


def bytes_of(tree: PyTree) -> int:
  """Bytes that a tree takes on each card; shapes without sharding lie whole on every card."""
  def one(leaf: Any) -> int:
    placed = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
    shape = leaf.shape if placed is None else placed.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize

  return sum(map(one, jax.tree.leaves(tree)))


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
  """Shapes with shardings."""
  return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                                               sharding=where), tree, shardings)


def resident(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
  """Shapes as a training state lies on the cards."""
  return placed(tree, sharding.state_shardings(tree, mesh))


def by_videos(tree: PyTree, axes: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
  """Shapes split along their videos.

  Raises:
    ValueError: the cards do not divide them.
  """
  for leaf, axis in zip(jax.tree.leaves(tree), jax.tree.leaves(axes), strict=True):
    if axis >= 0 and leaf.shape[axis] % mesh.size:
      raise ValueError(f'{leaf.shape[axis]} videos of a part do not divide over {mesh.size} cards; '
                       'change their number or accumulate.')
  return placed(tree, sharding.video_shardings(tree, axes, mesh))


def make_plan(sketch: Sketch, config: TrainConfig, target: GpuTarget, devices: int, *,
              say: Callable[[str], None] = print) -> Plan:
  """Counts, and compiles where the card's compiler is installed.

  Args:
    sketch: the stage.
    config: of the run.
    target: the card.
    devices: how many of them, in one host.
    say: told what is being compiled.

  Raises:
    ValueError: a batch that does not divide into parts and cards.
  """
  mesh, compiles = _mesh(target, devices)
  step, state = _state(sketch, config, mesh)
  batch = sketch.batch(mesh)
  networks = {name: resident(tree, mesh) for name, tree in sketch.frozen.items()}
  parts = {'trained parameters': state.params, 'optimizer': state.opt_state,
           'average': state.ema, **{f'{name} (frozen)': tree for name, tree in networks.items()}}
  sizes = {name: bytes_of(tree) for name, tree in parts.items() if tree is not None}
  if config.accumulate > 1:
    sizes['gradients of earlier parts'] = bytes_of(state.params)
  frozen = bytes_of(getattr(batch, 'frozen', None))
  given = bytes_of(batch) - frozen
  programs = {}
  if compiles:
    # What is frozen is resident, and among the arguments of steps that see a batch.
    steps = [call._replace(beside=-frozen if any(x is batch for x in call.arguments) else 0)
             for call in _steps(sketch, config, step, state, batch)]
    calls = [*steps, *sketch.calls(mesh, state)]
    for call in calls:
      say(f'compiling {call.name} for {devices} x {target.name} ...')
      report = aot.compile_for(call.function, call.arguments, target, devices=devices,
                               donate=call.donate, options=OPTIONS)
      known = sum(bytes_of(call.arguments[i]) for i in call.resident)
      # Arguments that a program does not use are not among its bytes, but do lie there.
      unused = sum(map(bytes_of, call.arguments)) - report.argument_bytes
      programs[call.name] = report.total_bytes + max(unused, 0) - known + call.beside
  return Plan(target.name, devices, target.info.device_memory_size, sizes, given, programs)


def make_programs(sketch: Sketch, config: TrainConfig, target: Target, devices: int
                  ) -> list[aot.Program]:
  """The programs of a training, to be compiled for a machine that is not there.

  Args:
    sketch: the stage.
    config: of the run.
    target: the card.
    devices: how many of them, in one host.

  Raises:
    ModuleNotFoundError: the card's compiler is not installed; says how to add it.
    ValueError: a batch that does not divide into parts and cards.
  """
  mesh = aot.device_mesh(target, devices)
  step, state = _state(sketch, config, mesh)
  calls = [*_steps(sketch, config, step, state, sketch.batch(mesh)), *sketch.calls(mesh, state)]
  options = OPTIONS if isinstance(target, GpuTarget) else None
  return [aot.Program(slug(call.name), call.name, call.function, call.arguments, call.donate,
                      options, call.trips) for call in calls]


def _mesh(target: GpuTarget, devices: int) -> tuple[Mesh | AbstractMesh, bool]:
  """The cards, and whether programs can be compiled for them here."""
  with contextlib.suppress(ModuleNotFoundError):
    return aot.device_mesh(target, devices), True
  return AbstractMesh((devices,), (sharding.AXIS,), (AxisType.Auto,)), False


def _state(sketch: Sketch, config: TrainConfig, mesh: Mesh | AbstractMesh
           ) -> tuple[TrainStep, TrainState]:
  objective, params = sketch.objective, sketch.params
  labels = loop.labels_of(objective, params)
  optimizer = loop.make_run_optimizer(objective, config, params, labels, sketch.optimizers)
  state = jax.eval_shape(functools.partial(
      init_state, optimizer=optimizer, seed=config.seed, ema=config.ema_decay > 0,
      averaged=getattr(objective, 'averaged', None)), params)
  return TrainStep(objective, optimizer, labels, config.ema_decay), resident(state, mesh)


def _steps(sketch: Sketch, config: TrainConfig, step: TrainStep, state: TrainState, batch: PyTree
           ) -> list[Call]:
  """The step, for every set of players that move together."""
  players = getattr(sketch.objective, 'players', None)
  turns: list[frozenset[str] | None] = [None]
  if players is not None:
    together = {moving_parts(players, i) for i in range(math.prod(players.values()))}
    turns = [*sorted(together, key=len)]
  calls = []
  for moving in turns:
    name = 'step' if moving is None else f'step of {" and ".join(sorted(moving))}'
    if config.accumulate == 1:
      calls.append(Call(name, functools.partial(step.whole, moving=moving),
                        (state, batch), resident=(0,), donate=(0,)))
      continue
    sums = _sums(step, state, batch, moving)
    part = jax.ShapeDtypeStruct((), jnp.int32)
    # The sums are resident already, as 'gradients of earlier parts'.
    calls.append(Call(f'{name}, one part', functools.partial(step.add, moving=moving),
                      (sums, state, batch, part), resident=(0, 1), donate=(0,)))
  if config.accumulate > 1:  # what moves most comes last
    apply = functools.partial(step.apply, moving=moving, parts=config.accumulate)
    calls.append(Call('its update', apply, (state, sums), resident=(0, 1), donate=(0,)))
  return calls


def _sums(step: TrainStep, state: TrainState, batch: PyTree, moving: frozenset[str] | None) -> Sums:
  shapes = jax.eval_shape(functools.partial(step.gradients, moving=moving), state, batch)
  params = state.params if moving is None else {name: state.params[name] for name in sorted(moving)}
  where = jax.tree.map(lambda leaf: leaf.sharding, params)
  return shapes._replace(gradients=placed(shapes.gradients, where))
