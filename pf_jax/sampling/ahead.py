"""The programs of a sampling run as shapes, to be compiled for a machine that is not there."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pf_jax.aot.compile import Program
from pf_jax.models import bundle
from pf_jax.models.bundle import ModelSpec, VideoModels
from pf_jax.rollout import block as block_lib
from pf_jax.rollout import rollout as rollout_lib
from pf_jax.rollout.block import InputShapes, RolloutSpec
from pf_jax.types import PyTree


def programs(model: ModelSpec, spec: RolloutSpec, batch: int, *, mesh: Mesh | None = None,
             blocks: int = 0) -> dict[str, Program]:
  """What sampling runs for every block, by name; nothing is computed.

  Args:
    model: sizes.
    spec: cache and sampler.
    batch: videos that advance in lockstep.
    mesh: cards that the videos are split over, each with all weights; None: one card.
    blocks: length of a whole rollout; 0 leaves it out.

  Returns:
    denoise, finish, block (both in one), switch (of the prompt) and rollout.

  Raises:
    ValueError: the cards do not divide the videos.
  """
  models = bundle.shapes(model).without_text()
  shapes = _split(models, batch, spec, mesh)

  def program(name: str, title: str, function: Callable, *arguments: PyTree,
              donate: tuple[int, ...] = ()) -> Program:
    return Program(name, title, functools.partial(function, spec=spec), (models, *arguments),
                   donate)

  state, text, keys = shapes.state, shapes.text, shapes.keys
  finish = functools.partial(block_lib.finish_block, first=False)
  sample = functools.partial(block_lib.sample_block, first=False)
  steps = len(spec.sampler.steps)
  made = [program('denoise', f'denoise a block, {steps} steps', block_lib.denoise_block,
                  state.cache, text, keys),
          program('finish', 'decode, compress, clean pass, commit', finish, state, shapes.latents,
                  shapes.selected, text, donate=(1,)),
          program('block', 'the whole steady block', sample, state, text, keys, donate=(1,)),
          program('switch', 'change of prompt', block_lib.switch_prompt, state, text, donate=(1,))]
  if blocks:
    made.append(program(
        'rollout', f'rollout of {blocks} blocks, counted with a change of prompt before each',
        rollout_lib.rollout, jax.tree.map(_one_of, text),
        jax.ShapeDtypeStruct((blocks,), jnp.int32), keys))
  return {program.name: program for program in made}


def _split(models: VideoModels, batch: int, spec: RolloutSpec, mesh: Mesh | None) -> InputShapes:
  """Shapes of the arguments, with shardings along their videos."""
  shapes = block_lib.input_shapes(models, batch, spec)
  if mesh is None or mesh.size == 1:
    return shapes
  if batch % mesh.size:
    raise ValueError(f'{batch} videos at a time do not divide over {mesh.size} cards; make '
                     f'batch_size a multiple of {mesh.size} or choose one card.')

  def one(leaf: Any, twice: Any) -> jax.ShapeDtypeStruct:
    # The axis of the videos is the one that is longer with more of them.
    axes = [axis for axis, size in enumerate(leaf.shape) if size != twice.shape[axis]]
    where = PartitionSpec(*[None] * axes[0], *mesh.axis_names) if axes else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, where))

  return jax.tree.map(one, shapes, block_lib.input_shapes(models, 2 * batch, spec))


def _one_of(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Shape of a table of one such array."""
  where = leaf.sharding
  if isinstance(where, NamedSharding):
    where = NamedSharding(where.mesh, PartitionSpec(None, *where.spec))
  return jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype, sharding=where)
