"""Training on the cards of one host: videos and state are split over them, as in ZeRO-3 and FSDP.

One mesh axis holds all cards. A batch is split along its videos. What belongs to parameters
(themselves, gradients, moments, averages) is split along one of its own axes, so that each card
keeps and updates its share; a layer's weights are gathered where they are used and dropped again.
Shardings say where arrays lie, and XLA derives the collectives: no loss knows of this module.

Of an array's axes the last but one is split: the inputs of a product. Split outputs would tempt XLA
to keep activations split along their width as well, and to exchange those. If the number of cards
does not divide it, the longest axis that it divides. The axis of stacked layers is the last resort:
a scan slices it, and would gather all layers at once. Small arrays stay whole.

Programs are to be traced under the mesh, `with jax.set_mesh(mesh(...))`: attention then stays on
its card (`pf_jax.kernels.partition`), and `constrain` knows where results belong.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pf_jax.train.state import STACKED, map_with_names
from pf_jax.types import PyTree

AXIS = 'data'

# Below this many numbers (in each layer) an exchange costs more than the memory it saves. Numbers,
# not bytes: moments and averages of any dtype lie like their parameters.
SMALLEST = 2**16


def mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """All devices (default: those of this process) along one axis."""
  return Mesh(np.asarray(jax.local_devices() if devices is None else devices), (AXIS,))


def _spec(names: Sequence[str], shape: Sequence[int], cards: int) -> PartitionSpec:
  """How one array is split."""
  stacked = STACKED in names and len(shape) > 1
  fitting = [axis for axis, size in enumerate(shape) if size % cards == 0]
  if cards == 1 or not fitting or math.prod(shape[1:] if stacked else shape) < SMALLEST:
    return PartitionSpec()
  inputs = len(shape) - 2
  split = max(fitting, key=lambda axis: (not (stacked and axis == 0), axis == inputs, shape[axis]))
  return PartitionSpec(*[None] * split, AXIS)


def state_shardings(shapes: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
  """Where the arrays of a training state lie.

  Args:
    shapes: arrays or `jax.ShapeDtypeStruct`s: a `TrainState`, parameters, anything that holds some.
      Layers are stacked under the name 'layers'.
    mesh: from `mesh`.

  Returns:
    A tree like `shapes` of `NamedSharding`s.
  """
  return map_with_names(
      lambda names, leaf: NamedSharding(mesh, _spec(names, leaf.shape, mesh.size)), shapes)


def place(tree: PyTree, mesh: Mesh) -> PyTree:
  """Puts a training state, or parts of one, where `state_shardings` says."""
  return jax.device_put(tree, state_shardings(tree, mesh))


def on_one_card(tree: PyTree) -> PyTree:
  """The arrays whole on the first device, for sampling beside a training on several."""
  return jax.device_put(tree, jax.local_devices()[0]) if jax.local_device_count() > 1 else tree


def constrain(tree: PyTree) -> PyTree:
  """Inside a jitted function: keeps a state or gradients where `place` puts them.

  Without it XLA is free to return whole arrays. The mesh is the one that the function is traced
  under (`jax.set_mesh`); without one nothing happens.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return tree
  return jax.lax.with_sharding_constraint(tree, state_shardings(tree, mesh))


def place_batch(batch: PyTree, mesh: Mesh) -> PyTree:
  """Puts a batch on the cards, split along the leading axis of every array.

  Args:
    batch: arrays, each with a video per entry of its leading axis.
    mesh: from `mesh`.

  Raises:
    ValueError: an array does not divide.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    if not leaf.shape or leaf.shape[0] % mesh.size:
      raise ValueError(
          f'batch{jax.tree_util.keystr(path)} has shape {list(leaf.shape)}, wanted a leading axis '
          f'that {mesh.size} devices divide; change the number of videos of a batch.')
  return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(AXIS)))


def video_shardings(tree: PyTree, axes: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
  """Splits arrays along their videos.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s.
    axes: the axis of the videos in each of them, -1 where there is none.
    mesh: from `mesh`.

  Returns:
    A tree like `tree` of `NamedSharding`s.
  """
  def one(leaf: jax.Array, axis: int) -> NamedSharding:
    del leaf
    return NamedSharding(mesh, PartitionSpec() if axis < 0 else PartitionSpec(*[None] * axis, AXIS))

  return jax.tree.map(one, tree, axes)


def constrain_videos(tree: PyTree, axes: PyTree) -> PyTree:
  """Inside a jitted function: keeps each video's arrays on its card; see `constrain`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return tree
  return jax.lax.with_sharding_constraint(tree, video_shardings(tree, axes, mesh))
