"""A checkpoint with one bit flipped is refused, or loads as what was saved."""

import collections
import contextlib
import dataclasses
import io
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pf_jax.train import checkpoint, state
from tests.reliability.kills import fingerprint
from tests.train import toy

# Parts of a checkpoint, by a part of the file's path; what fits none is Orbax's account of a step.
KINDS = {'arrays': '/d/', 'index of arrays': 'manifest.ocdbt', 'tree': '_METADATA',
         'placement': '_sharding', 'array metadata': 'array_metadatas', 'meta': 'meta/metadata',
         'checksums': 'manifests/'}


def kind_of(name):
  return next((kind for kind, part in KINDS.items()
               if part in name and '_CHECKPOINT_METADATA' not in name), 'step')


def make_state(step):
  params = jax.tree.map(lambda leaf: leaf + step, toy.Toy().init(0))
  made = state.init_state(params, optax.adam(1e-3), seed=step, ema=True)
  average = jax.tree.map(lambda leaf: leaf + 1, made.ema)
  return dataclasses.replace(made, step=jnp.int32(step), ema=average)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Two steps."""
  workdir = tmp_path_factory.mktemp('saved')
  with checkpoint.Checkpoints(workdir) as checkpoints:
    for step in (1, 2):
      checkpoints.save(make_state(step), meta={'data_position': step})
  return workdir


def flip(workdir, step, kind, draw):
  """Flips a bit of a file of this kind; returns its name."""
  root = workdir / 'checkpoints'
  files = [path for path in sorted([*(root / f'{step:08d}').rglob('*'),
                                    root / 'manifests' / f'{step:08d}.json'])
           if path.is_file() and path.stat().st_size and kind_of(str(path)) == kind]
  path = draw.choice(files)
  data, bit = bytearray(path.read_bytes()), draw.randrange(path.stat().st_size * 8)
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)
  return f'{path.relative_to(root)}, bit {bit}'


def same(tree, other):
  return all(np.asarray(a).tobytes() == np.asarray(b).tobytes()
             for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))


def outcome(workdir, alone):
  """What a resumed run and the next stage make of a checkpoint whose step 2 is damaged."""
  said = io.StringIO()
  with contextlib.redirect_stderr(said):
    try:
      average = checkpoint.load_params(workdir, make_state(0).ema)
      with checkpoint.Checkpoints(workdir) as checkpoints:
        restored, meta = checkpoints.restore(make_state(0))
    except checkpoint.CheckpointDamaged as error:
      if not alone or 'no restorable checkpoint' not in str(error):
        raise
      return 'refused'
  step = meta['data_position']
  wanted = make_state(step)
  assert fingerprint(restored) == fingerprint(wanted), 'SILENT'
  assert same(average, wanted.ema), 'SILENT'
  assert meta['step'] == step
  if step == 2:
    return 'harmless'
  assert not alone
  assert said.getvalue().count('step 2 is damaged') == 2
  return 'fell back'


@pytest.mark.parametrize('alone', [False, True])
@pytest.mark.parametrize(
    'flips', [8, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_no_flipped_bit_is_silent(flips, alone, saved, tmp_path):
  draw, table = random.Random(flips + alone), collections.Counter()
  kinds = [*KINDS, 'step']
  for index in range(flips):
    workdir, kind = tmp_path / str(index), kinds[index % len(kinds)]
    shutil.copytree(saved, workdir)
    if alone:
      shutil.rmtree(workdir / 'checkpoints' / '00000001')
    where = flip(workdir, 2, kind, draw)
    try:
      table[kind, outcome(workdir, alone)] += 1
    except Exception as error:
      raise AssertionError(f'{where}: {error}') from error
    shutil.rmtree(workdir)
  print(f'\n{flips} flipped bits in {"the only step" if alone else "the newest of two steps"}')
  for (kind, result), count in sorted(table.items()):
    print(f'  {kind:16s} {result:10s} {count}')
  results = {result for _, result in table}
  assert results - {'harmless'} == {'refused' if alone else 'fell back'}
  # Only the checksums' file holds what nobody reads.
  assert {kind for kind, result in table if result == 'harmless'} <= {'checksums'}
