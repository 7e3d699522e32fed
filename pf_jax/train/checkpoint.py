"""Checkpoints that are either whole and verified, or not used.

Orbax writes asynchronously and commits by an atomic rename, so a kill never leaves a torn step.
It does not notice flipped bits in array files, though: after each commit a manifest with the
CRC-32 of every file is written, and checked before a restore. A damaged step is reported loudly
and the one before it is used.

Layout: `<workdir>/checkpoints/<step>/{params,ema,opt_state,counters,meta}` and
`<workdir>/checkpoints/manifests/<step>.json`.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pf_jax import outputs
from pf_jax.train.state import TrainState, path_names
from pf_jax.types import tree_bytes

PyTree = Any

_CHUNK = 1 << 20
_FOLLOW_SECONDS = 0.01
_METADATA_BYTES = 1 << 20  # of a step, beside its arrays
_ITEMS = ('params', 'ema', 'opt_state', 'counters')
_SHOWN_MISMATCHES = 20


class CheckpointMismatch(ValueError):
  """The checkpoint holds other arrays than the run asks for."""


class CheckpointDamaged(RuntimeError):
  """No step of the directory can be restored."""


class CheckpointNotSaved(RuntimeError):
  """A save failed; earlier steps are intact."""


def _warn(message: str) -> None:
  print(f'CHECKPOINT WARNING: {message}', file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
  """What the system said, out of TensorStore's account of every layer it came through."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  lines = str(error).strip().splitlines() or [repr(error)]
  found = re.search(r'([^:\[\]]+) \[os_error_code', lines[-1])
  return found[1].strip() if found else lines[-1].rstrip('.')


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """Leaves by slash-separated path; leaves without elements (Orbax refuses them) left out."""
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if leaf.size:
      leaves['/'.join(path_names(path))] = leaf
  return leaves


def _fill(template: PyTree, leaves: Mapping[str, Any]) -> PyTree:
  def pick(path: tuple[Any, ...], leaf: Any) -> Any:
    return leaves['/'.join(path_names(path))] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)

  return jax.tree_util.tree_map_with_path(pick, template)


def _shapes(leaves: Mapping[str, Any]) -> dict[str, list]:
  return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}


def crc32_of(path: pathlib.Path) -> int:
  """CRC-32 of a file's bytes."""
  value = 0
  with open(path, 'rb') as stream:
    while chunk := stream.read(_CHUNK):
      value = zlib.crc32(chunk, value)
  return value


def _files(step_dir: pathlib.Path) -> dict[str, pathlib.Path]:
  return {str(p.relative_to(step_dir)): p for p in sorted(step_dir.rglob('*')) if p.is_file()}


def compare_shapes(saved: Mapping[str, list], wanted: Mapping[str, list]) -> list[str]:
  """One line per array that is missing, unexpected, or of another shape or dtype."""
  lines = [f'{name}: missing in the checkpoint (wanted {wanted[name][1]}{wanted[name][0]})'
           for name in sorted(set(wanted) - set(saved))]
  lines += [f'{name}: in the checkpoint ({saved[name][1]}{saved[name][0]}), not in this run'
            for name in sorted(set(saved) - set(wanted))]
  lines += [f'{name}: checkpoint has {saved[name][1]}{saved[name][0]}, '
            f'this run wants {wanted[name][1]}{wanted[name][0]}'
            for name in sorted(set(saved) & set(wanted)) if list(saved[name]) != list(wanted[name])]
  return lines


def _to_items(state: TrainState) -> dict[str, dict[str, Any]]:
  items = {
      'params': named_leaves(state.params), 'ema': named_leaves(state.ema),
      'opt_state': named_leaves(state.opt_state),
      'counters': {'step': state.step, 'rng': jax.random.key_data(state.rng),
                   'skipped': state.skipped, 'skipped_in_a_row': state.skipped_in_a_row}}
  return {name: leaves for name, leaves in items.items() if leaves}


def _from_items(template: TrainState, items: Mapping[str, Mapping[str, Any]]) -> TrainState:
  counters = items['counters']
  return TrainState(
      step=counters['step'], params=_fill(template.params, items['params']),
      opt_state=_fill(template.opt_state, items.get('opt_state', {})),
      ema=_fill(template.ema, items.get('ema', {})),
      rng=jax.random.wrap_key_data(counters['rng'], impl=jax.random.key_impl(template.rng)),
      skipped=counters['skipped'], skipped_in_a_row=counters['skipped_in_a_row'])


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, 'sharding', None))


class Checkpoints:
  """The checkpoints of one run directory. Use as a context manager."""

  def __init__(self, workdir: str | os.PathLike, *, keep: int = 3, read_only: bool = False,
               warn: Callable[[str], None] = _warn):
    """Opens (and creates) the directory; leftovers of killed saves are removed.

    Args:
      workdir: the run's directory.
      keep: newest steps to keep; at least 2, so that a damaged one can be survived.
      read_only: change nothing: the directory may belong to a run in progress.
      warn: receives messages about damaged or unverified steps.

    Raises:
      ValueError: `keep` is below 2.
    """
    if keep < 2:
      raise ValueError(f'{keep=} is too few; keep at least 2, so that a damaged step has a '
                       'predecessor to fall back to.')
    import orbax.checkpoint as ocp  # imported late: it costs more than a second
    self._ocp = ocp
    self._warn = warn
    self.directory = pathlib.Path(workdir).resolve() / 'checkpoints'
    self._manifests = self.directory / 'manifests'
    self._read_only = read_only
    self.failed = False
    if not read_only:
      self._manifests.mkdir(parents=True, exist_ok=True)
      self._remove_leftovers()
    self._follower: threading.Thread | None = None
    self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, step_format_fixed_length=8, create=not read_only))

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  @contextlib.contextmanager
  def _explaining(self) -> Iterator[None]:
    """Turns what Orbax's threads raise (a full disk, mostly) into one message, and cleans up."""
    try:
      yield
    except Exception as error:
      self.failed = True
      with contextlib.suppress(Exception):
        self._settle()  # the save before this one may still succeed
      with contextlib.suppress(OSError):  # a disk may be too full even for these
        self._write_manifests()
      self._remove_leftovers()  # an unfinished step would keep a full disk full
      steps = self._committed()
      kept = f'Step {steps[-1]} is intact' if steps else 'No earlier step exists'
      raise CheckpointNotSaved(f'cannot save into {self.directory}: {_reason(error)}. {kept}; free '
                               'some space and give the same command again.') from error

  def _check_space(self, items: PyTree) -> None:
    """Refuses a save that cannot fit before Orbax's threads each meet the full disk."""
    self._settle()  # Orbax would wait, too
    wanted, free = tree_bytes(items) + _METADATA_BYTES, shutil.disk_usage(self.directory).free
    if free < wanted:
      raise OSError(f'No space left: {wanted / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB free')

  def _remove_leftovers(self) -> None:
    """Deletes what killed saves and deletions left behind.

    Not by Orbax's `cleanup_tmp_directories`: that runs in the background, where it can meet the
    save that is just redoing the same step.
    """
    for path in self.directory.glob('*.orbax-checkpoint-tmp*'):
      shutil.rmtree(path, ignore_errors=True)  # a failed save may still be writing
    for path in self._manifests.glob('.*.tmp.json'):
      path.unlink(missing_ok=True)
    self._forget_manifests()

  def _step_dir(self, step: int) -> pathlib.Path:
    return self.directory / f'{step:08d}'

  def _manifest(self, step: int) -> pathlib.Path:
    return self._manifests / f'{step:08d}.json'

  def _committed(self) -> list[int]:
    return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit())

  def _forget_manifests(self) -> None:
    """Of steps that are gone: one saved again under the number would look damaged."""
    steps = self._committed()
    for path in self._manifests.glob('*.json'):
      if path.stem.isdigit() and int(path.stem) not in steps:
        path.unlink(missing_ok=True)

  def _follow(self) -> None:
    """Writes the manifest as soon as a save is committed, on a thread of its own.

    Orbax calls back before it renames the step, when there is nothing to write a manifest of.
    """

    def follow() -> None:
      while self._manager.is_saving_in_progress():
        time.sleep(_FOLLOW_SECONDS)
      with contextlib.suppress(OSError):  # a full disk is told by the next save, or by `wait`
        self._write_manifests()

    self._follower = threading.Thread(target=follow, name='checkpoint manifests', daemon=True)
    self._follower.start()

  def _settle(self) -> None:
    """Waits for the save on its way, and for its manifest; raises what Orbax's threads raised."""
    try:
      self._manager.wait_until_finished()
    finally:
      if self._follower is not None:
        self._follower.join()
        self._follower = None

  def _write_manifests(self) -> None:
    """Writes those that are missing, and forgets those of deleted steps."""
    for step in self._committed():
      if not self._manifest(step).exists():
        files = _files(self._step_dir(step))
        sums = {name: [path.stat().st_size, crc32_of(path)] for name, path in files.items()}
        outputs.write_json(self._manifest(step), {'algorithm': 'crc32', 'files': sums})
    self._forget_manifests()

  def steps(self) -> list[int]:
    """Committed steps, oldest first."""
    return self._committed()

  def save(self, state: TrainState, *, meta: Mapping[str, Any] | None = None) -> None:
    """Starts an asynchronous save; the arrays are copied first, so the state may be donated.

    Args:
      state: the state after `state.step` steps.
      meta: JSON-able extras kept beside the arrays (the data position, say).

    Raises:
      CheckpointNotSaved: this save, or the one before it in the background, failed.
    """
    step = int(state.step)
    if step in self._manager.all_steps():  # counts a save in flight, too
      return
    items = _to_items(state)
    about = {**(meta or {}), 'step': step,
             'shapes': {name: _shapes(leaves) for name, leaves in items.items()}}
    save = self._ocp.args
    with self._explaining():
      self._check_space(items)
      self._manager.save(step, force=True, args=save.Composite(
          meta=save.JsonSave(about), **{n: save.StandardSave(v) for n, v in items.items()}))
      self._follow()

  def wait(self) -> None:
    """Blocks until the last save is committed and its manifest written.

    Raises:
      CheckpointNotSaved: it failed.
    """
    if self.failed or self._read_only:
      return  # nothing is on its way, or it has been reported
    with self._explaining():
      self._settle()
      self._write_manifests()

  def damage(self, step: int) -> str:
    """Compares a step's files with its manifest; '' when they agree, else what is wrong."""
    manifest = self._manifest(step)
    if not manifest.exists():
      self._warn(f'step {step} has no manifest (the run ended between commit and manifest); '
                 'its bytes cannot be verified.')
      return ''
    try:
      expected = json.loads(manifest.read_text())['files']
      sums = {name: (size, crc) for name, (size, crc) in expected.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
      return f'manifest unreadable ({error})'
    found = _files(self._step_dir(step))
    for name, (size, crc) in sums.items():
      if name not in found:
        return f'{name} is missing'
      try:
        if found[name].stat().st_size != size or crc32_of(found[name]) != crc:
          return f'{name} differs from its checksum'
      except OSError as error:  # a bad sector
        return f'{name} is unreadable ({error.strerror})'
    return ''

  def _load(self, step: int, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Restores the wanted items of one step onto the placement of the given leaves."""
    args = self._ocp.args
    meta = dict(self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))['meta'])
    saved = meta['shapes']
    lines = [f'{item}/{line}' for item, leaves in wanted.items()
             for line in compare_shapes(saved.get(item, {}), _shapes(leaves))]
    if lines:
      more = f'\n  ... and {len(lines) - _SHOWN_MISMATCHES} more' * (
          len(lines) > _SHOWN_MISMATCHES)
      raise CheckpointMismatch(
          f'{self._step_dir(step)} does not fit this configuration:\n  '
          + '\n  '.join(lines[:_SHOWN_MISMATCHES]) + more
          + '\nUse the configuration it was made with, or another workdir.')
    restored = self._manager.restore(step, args=args.Composite(**{
        item: args.StandardRestore({n: _abstract(leaf) for n, leaf in leaves.items()})
        for item, leaves in wanted.items()}))
    return {**{item: restored[item] for item in wanted}, 'meta': meta}

  def _newest_good(self, wanted: Mapping[str, Mapping[str, Any]],
                   step: int | None) -> dict[str, Any] | None:
    steps = [step] if step is not None else self._committed()[::-1]
    problems = []
    for candidate in steps:
      problem = self.damage(candidate)
      if not problem:
        try:
          return self._load(candidate, wanted)
        except CheckpointMismatch:
          raise
        except Exception as error:  # Orbax raises many kinds on a damaged step
          problem = f'{type(error).__name__}: {error}'
      problems.append(f'step {candidate}: {problem}')
      self._warn(f'step {candidate} is damaged ({problem}); falling back to the step before it.')
    if problems:
      raise CheckpointDamaged(
          f'no restorable checkpoint in {self.directory}: ' + '; '.join(problems)
          + '. Start again in another workdir.')
    return None

  def restore(self, template: TrainState, *,
              step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
    """Restores the newest undamaged step, or None when there is no checkpoint yet.

    Args:
      template: a state of the wanted structure, dtypes and placement (values are ignored).
      step: this step only.

    Returns:
      The state and the `meta` it was saved with. Steps newer than it are deleted (they are
      damaged, and the run is about to write them again).

    Raises:
      CheckpointMismatch: shapes, dtypes or names differ; all differences are listed.
      CheckpointDamaged: steps exist but none can be restored.
    """
    found = self._newest_good(_to_items(template), step)
    if found is None:
      return None
    for newer in [s for s in self._committed() if s > found['meta']['step']]:
      self._manager.delete(newer)
      self._manifest(newer).unlink(missing_ok=True)
    if not self._read_only:
      self._write_manifests()  # of a step that was used without one, so that it stays as it is
    return _from_items(template, found), found['meta']

  def close(self) -> None:
    """Finishes pending saves and releases Orbax's threads."""
    try:
      self.wait()
    finally:
      with contextlib.suppress(Exception) if self.failed else contextlib.nullcontext():
        self._manager.close()


def load_params(workdir: str | os.PathLike, template: PyTree, *, ema: bool = True,
                step: int | None = None) -> PyTree:
  """Loads only the parameters of a finished or running training, for the next stage.

  Args:
    workdir: the training's directory.
    template: parameters of the wanted structure (values are ignored).
    ema: prefer the moving average where the run kept one.
    step: default newest.

  Raises:
    FileNotFoundError: there is no checkpoint.
    CheckpointMismatch: the arrays do not fit the template.
    CheckpointDamaged: steps exist but none can be restored.
  """
  if not (pathlib.Path(workdir) / 'checkpoints').is_dir():
    raise FileNotFoundError(f'{workdir} holds no checkpoints; train there first.')
  with Checkpoints(workdir, read_only=True) as checkpoints:
    steps = checkpoints.steps()
    if not steps:
      raise FileNotFoundError(f'{workdir} holds no finished checkpoint; train there first.')
    # Any step's: the newest may be damaged.
    averaged = any((checkpoints._step_dir(s) / 'ema').is_dir()
                   for s in (steps if step is None else [step]))
    item = 'ema' if ema and averaged else 'params'
    found = checkpoints._newest_good({item: named_leaves(template)}, step)
  return _fill(template, found[item]) if found else template
