"""Compiles a config's programs for a machine that one does not have; says what they would take.

  python -m launch.aot --config=configs/wan/t2v_1_3b.py --target=h200 --output=runs/aot

For each program: memory of each card, time to trace and to compile, FLOPs and bytes of its products
and the time that they take at least, registers of Pallas kernels, exchanges between cards. Writes
aot.json and aot.md into --output and prints the tables; both files grow with every program that is
finished. Configs of sampling have the programs denoise, finish, block, switch, and with --blocks=N
a whole rollout; configs of training have their steps and what runs between them.
--program=NAME,... chooses some. Nothing is loaded or run, and no GPU or TPU is used.
"""

import dataclasses
import os
import sys
from typing import Any

from absl import flags

from launch import config_flags
from launch.build import ConfigError, build, nearest

config_flags.define_config()
flags.DEFINE_string('target', 'h200', 'The machine: h200, h100, h200x8 for eight in one host, or '
                    'v5e, a TPU chip.')
flags.DEFINE_string('output', None, 'Directory of aot.json and aot.md.')
flags.DEFINE_list('program', [], 'Names of programs; default: all.')
flags.DEFINE_integer('blocks', 0, 'Of sampling: also compile a rollout of so many blocks.')
flags.DEFINE_bool('overwrite', False, 'Replace an earlier report.')

SAMPLING = ('denoise', 'finish', 'block', 'switch', 'rollout')
_FILES = ('aot.json', 'aot.md')


def _aot() -> int:
  from pf_jax.aot.targets import MACHINES  # no JAX inside

  args = flags.FLAGS
  if args.target not in MACHINES:
    names = ', '.join(MACHINES)
    raise ConfigError(f'--target={args.target} is unknown{nearest(args.target, MACHINES)}; use one '
                      f'of {names}.')
  trains = _trains(args.config)
  if not trains:
    _check_names(args.program, SAMPLING)
  _check_blocks(args, trains)
  machine, settings = MACHINES[args.target], _settings(args.config, trains)
  # No device is used; what the assembler says of Pallas kernels is read, see `pf_jax.aot.ptxas`.
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ['MOSAIC_GPU_DUMP_PTXAS'] = '1'
  return _run(args, trains, settings, machine)


def _trains(config: Any) -> bool:
  """Whether it is a config of training; the other kind is sampling."""
  if 'stage' in config:
    return True
  if missing := [name for name in ('cache', 'sampler', 'batch_size') if name not in config]:
    raise ConfigError(
        f'this config has no {" and no ".join(missing)}: wanted one of training, with a stage, or '
        'one of sampling, such as configs/wan/t2v_1_3b.py or configs/digits/sample.py.')
  return False


def _check_names(chosen: list[str], names: Any) -> None:
  problems = [f'--program={name} is unknown{nearest(name, names)}; this config has '
              f'{", ".join(names)}.' for name in chosen if name not in names]
  if problems:
    raise ConfigError('\n'.join(problems))


def _check_blocks(args: Any, trains: bool) -> None:
  if args.blocks and trains:
    raise ConfigError('--blocks is the length of a rollout; configs of training have none.')
  if args.blocks < 0 or args.blocks == 1:
    raise ConfigError(f'--blocks={args.blocks} must be at least 2: the first block is apart.')
  if 'rollout' in args.program and not args.blocks and not trains:
    raise ConfigError('--program=rollout needs --blocks=N, its length.')


def _settings(config: Any, trains: bool) -> Any:
  """`TrainConfig` or `SampleSpec`; no JAX inside."""
  if trains:
    from pf_jax.train.config import TrainConfig
    return build(TrainConfig, config.train, 'config.train')
  from pf_jax.sampling.config import SampleSpec
  return build(SampleSpec, {name: config[name] for name in config if name != 'model'}, 'config')


def _run(args: Any, trains: bool, settings: Any, machine: Any) -> int:
  import jax

  from pf_jax import outputs
  from pf_jax.aot.compile import device_mesh
  from pf_jax.weights.package import PackageError

  try:
    device_mesh(machine.target, machine.devices)  # before anything expensive: is there a compiler?
    with outputs.claim_directory(args.output) as root:
      for name in _FILES:
        outputs.output_path(root, name, overwrite=args.overwrite)
      print('reading sizes ...', file=sys.stderr)
      chosen = _chosen(args, trains, settings, machine)
      print(_report_all(chosen, machine, root, _about(args)))
  except jax.errors.JaxRuntimeError as error:
    print(f'error: {str(error).splitlines()[0]}', file=sys.stderr)
    return 1
  except (ModuleNotFoundError, outputs.DirectoryInUse, outputs.NotWritable, PackageError,
          OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(f'\ninterrupted: {args.output} has the programs that were finished.', file=sys.stderr)
    return 130
  return 0


def _chosen(args: Any, trains: bool, settings: Any, machine: Any) -> list[Any]:
  """The programs to compile, in the order in which they were asked for.

  Raises:
    ConfigError: there are none of such names, or choices that do not fit each other.
    PackageError: a model whose sizes are needed is not there.
  """
  from pf_jax.weights.package import PackageError

  make = _training_programs if trains else _sampling_programs
  try:
    programs = {program.name: program for program in make(args, settings, machine)}
  except PackageError:
    raise
  except ValueError as error:
    raise ConfigError(str(error)) from error
  _check_names(args.program, programs)
  return [programs[name] for name in dict.fromkeys(args.program or programs)]


def _about(args: Any) -> dict[str, Any]:
  import jax

  flag: Any = flags.FLAGS[config_flags.NAME]
  return {'config': flag.config_filename, 'choices': args.config.to_dict(),
          'jax': jax.__version__}


def _sampling_programs(args: Any, spec: Any, machine: Any) -> list[Any]:
  from pf_jax.aot.compile import device_mesh
  from pf_jax.models.bundle import ModelSpec
  from pf_jax.sampling import ahead
  from pf_jax.sampling.source import ModelSource

  model = build(ModelSpec, args.config.model, 'config.model') if 'model' in args.config else None
  sizes, rollout = ModelSource(model=model).specs(spec.chosen('cache'), spec.chosen('sampler'))
  mesh = device_mesh(machine.target, machine.devices)
  return [*ahead.programs(sizes, rollout, spec.batch_size, mesh=mesh, blocks=args.blocks).values()]


def _training_programs(args: Any, train: Any, machine: Any) -> list[Any]:
  """Equal work for each card, as in `launch.train --dry_run`."""
  from pf_jax.train import plan, stages

  config = args.config
  kind = stages.STAGES.get(config.stage)
  able = [name for name, stage in stages.STAGES.items() if stage.sketch is not None]
  if kind is None or kind.sketch is None:
    reason = (f'is unknown{nearest(config.stage, stages.STAGES)}' if kind is None
              else 'has no programs to compile ahead')
    raise ConfigError(f'config.stage={config.stage!r} {reason}; use {" or ".join(able)}.')
  fields = {name: config[name] for name in config if name not in ('stage', 'train')}
  stage: Any = build(kind.settings, fields, 'config')
  train = dataclasses.replace(train, accumulate=max(train.accumulate // machine.devices, 1))
  return plan.make_programs(kind.sketch(stage, train), train, machine.target, machine.devices)


def _report_all(programs: list[Any], machine: Any, root: Any, about: dict[str, Any]) -> str:
  """Compiles all, writes after each, and returns the tables."""
  from pf_jax import outputs
  from pf_jax.aot import ptxas
  from pf_jax.aot import report as report_lib
  from pf_jax.progress import Progress

  reports: list[Any] = []
  kernels, progress = ptxas.Kernels(), Progress(len(programs), unit='program')
  try:
    for program in programs:
      progress.say(f'compiling {program.title} for {machine.devices} x {machine.target.name} ...')
      reports.append(_report(program, machine, kernels))
      left = [other.name for other in programs[len(reports):]]
      outputs.write_json(root / _FILES[0], {
          **about, 'unfinished': left, **report_lib.to_json(reports, machine)})
      outputs.write_text(root / _FILES[1], report_lib.markdown(reports, machine))
      progress.show({'GB': reports[-1].total_bytes / 1e9})
      progress.update()
  finally:
    progress.close()
  return report_lib.markdown(reports, machine)


def _report(program: Any, machine: Any, kernels: Any) -> Any:
  """Compiles one program and counts what it does.

  Args:
    program: `pf_jax.aot.compile.Program`.
    machine: `Machine`.
    kernels: `ptxas.Kernels` of this process.

  Returns:
    `ProgramReport`.
  """
  from pf_jax.aot import hlo, ptxas
  from pf_jax.aot.compile import compile_for
  from pf_jax.aot.report import ProgramReport
  from pf_jax.train import flops

  with ptxas.captured() as lines:
    made = compile_for(program.function, program.arguments, machine.target,
                       devices=machine.devices, donate=program.donate, options=program.options)
  operations, moved, uncounted = None, None, None
  try:
    operations = flops.count_jaxpr(made.jaxpr, trips=program.trips)
    moved = flops.traffic_of_jaxpr(made.jaxpr, trips=program.trips)
  except ValueError as error:  # a kernel that hides its work
    uncounted = str(error)
  if moved == 0:  # nothing but elementwise work: it is read and written once
    moved = machine.devices * (made.argument_bytes + made.output_bytes)
  text = (made.executable.as_text() or '') if made.executable else ''
  return ProgramReport(
      program.name, program.title, made.argument_bytes, made.output_bytes, made.alias_bytes,
      made.scratch_bytes, made.trace_seconds, made.compile_seconds, operations, moved, uncounted,
      kernels.of(text, '\n'.join(lines)),
      hlo.collectives(text) if made.executable else hlo.Collectives({}, True), made.refused)


if __name__ == '__main__':
  config_flags.run(_aot, required=('config', 'output'))
