"""Conversion at full size: 1.3B parameters, 5.7 GB of random bytes in the released layout.

`make test-full` runs it: two minutes or more, and 12 GB of disk where pytest keeps its files.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pf_jax.weights.convert import converted_path, read_safetensors
from pf_jax.weights.safetensors_file import SafetensorsWriter
from tests.sampled import environment
from tests.weights import released

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
GB = 10**9
NEEDED = 12 * GB
# The launcher in a child of its own, whose peak includes every mapped page that was resident.
MEASURE = """
import json, resource, runpy, sys, time
begun = time.perf_counter()
sys.argv[0] = 'launch.convert'
try:
  runpy.run_module('launch.convert', run_name='__main__', alter_sys=True)
except SystemExit as end:
  code = end.code or 0
print(json.dumps({'code': code, 'seconds': time.perf_counter() - begun,
                  'peak': 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  root = tmp_path_factory.mktemp('full')
  if shutil.disk_usage(root).free < NEEDED:
    pytest.skip(f'needs {NEEDED / GB:.0f} GB of disk')
  tensors = list(released.transformer(1536, 8960, 30))
  writer = SafetensorsWriter(root / 'diffusion_pytorch_model.safetensors',
                             {t.wan: (t.shape, np.dtype(np.float32)) for t in tensors})
  rng = np.random.default_rng(0)
  for tensor in tensors:
    with writer.piece(tensor.wan) as array:
      array[...] = rng.random(tensor.shape, np.float32)
  writer.finish()
  yield root
  shutil.rmtree(root)


@pytest.mark.parametrize('form', ['safetensors', 'both'])
def test_converting_1_3b_stays_below_3_gb(source, tmp_path, form):
  (path,) = source.glob('*.safetensors')
  assert path.stat().st_size > 5.6 * GB
  done = subprocess.run(
      [sys.executable, '-c', MEASURE, f'--source={source}', '--model=wan_1_3b',
       f'--output={tmp_path}/out', f'--format={form}'], capture_output=True, text=True,
      env=environment())
  measured = json.loads(done.stdout.splitlines()[-1])
  assert measured['code'] == 0, done.stderr
  print(f'\n{form}: {measured["seconds"]:.0f} s, {measured["peak"] / GB:.2f} GB at most')
  assert measured['peak'] < 3 * GB
  # A tensor of the last layer, bit for bit.
  name = 'blocks.29.ffn.2.weight'
  wanted = read_safetensors(path)[0][name].read()
  got = read_safetensors(converted_path(tmp_path / 'out', 'transformer'))[0]
  np.testing.assert_array_equal(got['layers.ffn_out.kernel'].read()[29],
                                wanted.T.astype(got['layers.ffn_out.kernel'].dtype))
  shutil.rmtree(tmp_path)
