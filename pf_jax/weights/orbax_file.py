"""A converted network as an Orbax checkpoint of {dotted path: array}, saved from a mapped file.

Orbax starts all writes of a checkpoint at once and copies NumPy arrays before: a whole network in
memory, twice. Here one parameter is written after the other, from views of the mapped file whose
pages are dropped behind it.
"""

import asyncio
import mmap
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


class _OneAtATime(ocp.type_handlers.NumpyHandler):
  """Writes mapped arrays one by one and forgets their pages."""

  def __init__(self) -> None:
    super().__init__(deepcopy_host_arrays=False)

  async def serialize(self, values, infos, args=None):
    """See the base class; everything is written when this returns."""
    args = args or [ocp.SaveArgs()] * len(values)
    for value, info, arg in zip(values, infos, args, strict=True):
      for written in await super().serialize([value], [info], [arg]):
        # In a thread: the write itself waits for this loop to create directories.
        await asyncio.to_thread(written.result)
      _drop_pages(value)
    return []


def _drop_pages(array: np.ndarray) -> None:
  base: Any = array
  while isinstance(base, np.ndarray | memoryview):
    base = base.obj if isinstance(base, memoryview) else base.base
  if isinstance(base, mmap.mmap):
    base.madvise(mmap.MADV_DONTNEED)


def save(path: pathlib.Path, tensors: Mapping[str, np.ndarray], *, overwrite: bool) -> None:
  """Writes a checkpoint; it appears whole or not at all.

  Args:
    path: its directory, absolute.
    tensors: views of a mapped file.
    overwrite: replace what is there.
  """
  registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, _OneAtATime()))
  handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(dict(tensors)), force=overwrite)


def shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Shapes of the parameters of a checkpoint."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    stored = checkpointer.metadata(path).item_metadata.tree
  return {name: tuple(leaf.shape) for name, leaf in stored.items()}


def load(path: pathlib.Path, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """The parameters of a checkpoint, in the dtypes of `leaves`, on the default device."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  arguments = {name: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=here)
               for name, leaf in leaves.items()}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    return checkpointer.restore(path, args=ocp.args.PyTreeRestore(
        item=dict.fromkeys(leaves, 0), restore_args=arguments))
