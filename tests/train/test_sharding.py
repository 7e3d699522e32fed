import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from pf_jax.train import sharding
from pf_jax.train.state import init_state, make_optimizer
from pf_jax.train.step import TrainStep
from tests.train import toy

EIGHT = AbstractMesh((8,), (sharding.AXIS,), (AxisType.Auto,))


def spec(*shape, name='w', mesh=EIGHT):
  tree = {name: {'w': jax.ShapeDtypeStruct(shape, jnp.float32)}}
  return tuple(sharding.state_shardings(tree, mesh)[name]['w'].spec)


def test_which_axis_is_split():
  assert spec(512, 1024) == ('data',)  # the inputs, though there are fewer
  assert spec(3, 3, 3, 64, 128) == (None, None, None, 'data')
  assert spec(513, 512) == (None, 'data')
  assert spec(512, 8, 63) == (None, 'data')
  assert spec(512, 4, 64) == ('data',)  # the longest of what is left
  assert spec(513, 513) == ()
  assert spec(2**16) == ('data',)
  assert spec(2**16 - 8) == ()  # too small
  assert spec() == ()


def test_stacked_layers_are_not_dealt_out_whole():
  assert spec(4096, 256, 512, name='layers') == (None, 'data')
  assert spec(4096, 255, 512, name='layers') == (None, None, 'data')
  assert spec(8, 511, 511, name='layers') == ('data',)
  assert spec(4096, 512, name='layers') == ()  # small in each layer, however many there are
  assert spec(2, 2**16, name='layers') == (None, 'data')


def test_one_device_changes_nothing():
  mesh = sharding.mesh(jax.devices()[:1])
  assert spec(512, 1024, mesh=mesh) == ()
  config, objective, batch = toy.settings(), toy.Toy(), toy.batch_of(0)
  digests = []
  for place, place_batch in ((lambda tree, _: tree,) * 2, (sharding.place, sharding.place_batch)):
    params = objective.init(0)
    labels = jax.tree.map(lambda _: 'all', params)
    optimizer = make_optimizer(config.optimizer, 20, params, labels)
    state = place(init_state(params, optimizer, 0, ema=True), mesh)
    step = TrainStep(objective, optimizer, labels, 0.9)
    for _ in range(3):
      state, _ = step(state, place_batch(batch, mesh))
    digests.append(toy.digest(state))
  assert digests[0] == digests[1]


@pytest.mark.timeout(300)
def test_on_four_devices():
  """The file's tests, in a process with as many devices."""
  flags = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'
  file = pathlib.Path(__file__).with_name('four_devices.py')
  done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-x',
                         str(file)], env={**os.environ, 'XLA_FLAGS': flags.strip()},
                        capture_output=True, text=True, timeout=280, cwd=file.parents[2])
  assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
  assert ' passed' in done.stdout
  assert 'skipped' not in done.stdout
