"""Bad weights on the command line: one line, exit status 1, nothing run, nothing written.

The files that the readers' tests are made of go through launch.convert and launch.sample, and so do
directories, indices and whole networks that are not what was asked for. Memory is watched twice.
The growth of the peak (VmHWM, set back before each command) is compared with a bound that a bomb of
a hundred megabytes breaks. And all commands run in a process that may allocate a gigabyte beside
what it holds already, so a larger bomb ends in a MemoryError, not in a machine that swaps. That
limit is RLIMIT_DATA: RLIMIT_AS would also refuse to map a network of 57 GB, which takes no memory.
"""

import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from configs.wan import model as wan_model
from launch.build import build
from pf_jax.models.bundle import ModelSpec
from pf_jax.weights import networks
from tests.weights import hostile, hostile_cases, released
from tests.weights.hostile import Launched

pytestmark = pytest.mark.timeout(400)
ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = '--config=configs/wan/t2v_1_3b.py:tiny'
MEGABYTES = 90
# Directories and pipes are met before a reader sees them.
BEFORE_READING = {'directory': 'holds no transformer; wanted one of', 'pipe': 'is a pipe, a device'}


class Bad(NamedTuple):
  """What is given to a launcher."""

  path: pathlib.Path
  message: str  # pattern
  named: str  # in the message


# --- files of the readers' tests ------------------------------------------------------------------

# Those that are tried without --slow; the readers' own tests go through all of them.
FEW_READ = (
    *(f'{name}.pth' for name in (
        'os.system', 'eval', 'getattr chain', 'nested pickle', 'legacy exec', 'legacy INST',
        'memo bomb', 'bomb in a storage', 'view too long', 'overflow', 'list in itself',
        'cut zip, 300', 'cut legacy, -24', 'empty', 'directory', 'pipe')),
    *(f'{name}.safetensors' for name in (
        'huge header', 'a billion tensors', 'many tensors', 'overlapping', 'negative shape',
        'overflowing shape', 'one name twice', 'not JSON', 'not text', 'nested beside',
        'unknown dtype', 'gap', 'truncated header', 'truncated values', 'directory', 'pipe')))


def read_cases(root: pathlib.Path, marker: pathlib.Path, names: Sequence[str] | None
               ) -> dict[str, Bad]:
  """Files for the readers of both formats; None: all of them."""
  cases = {f'{name}.{ending}': (BEFORE_READING.get(name, case.message), case) for ending, both in (
      ('pth', hostile_cases.torch_cases(marker)),
      ('safetensors', hostile_cases.safetensors_cases())) for name, case in both.items()}
  bad = {}
  for name in cases if names is None else names:
    message, case = cases[name]
    case.write(root / name)
    bad[name] = Bad(root / name, message, str(root / name))
  return bad


# --- paths and directories ------------------------------------------------------------------------

MODEL = 'diffusion_pytorch_model.safetensors'
LONG = 'x' * 5000
INDICES = {
    'outside': (json.dumps({'weight_map': {'a': '../../etc/passwd'}}),
                "index.json names '../../etc/passwd', which is not a file beside it"),
    'absolute': (json.dumps({'weight_map': {'a': '/etc/passwd'}}), "names '/etc/passwd', which"),
    'of escapes': (json.dumps({'weight_map': {'a': '\x1b[2J\nerror: '}}),
                   r"lacks 1 of 1 shards: '\\x1b\[2J\\nerror: '; finish"),
    'of many': (json.dumps({'weight_map': {str(i): str(i) for i in range(200_000)}}),
                r"lacks 200000 of 200000 shards: '0', .* and 199990 more; finish"),
    'of a long name': (json.dumps({'weight_map': {'a': LONG}}), r"shards: 'x{64}'\.\.\.; finish"),
    'of a surrogate': ('{"weight_map": {"a": "\\ud800"}}', r"shards: '\\ud800'; finish"),
    'of numbers': (json.dumps({'weight_map': {'a': 3}}), "names '3', which is not a file"),
    'of both': (json.dumps({'weight_map': {'a': 3, 'b': 'c'}}), r'is not an index .*TypeError'),
    'nested': ('[' * 10**6, r'is not an index of shards \(RecursionError'),
    'not text': ('ÿ' * 1000, r'is not an index of shards \('),
    'large': (' ' * (5 << 20), 'has 5242880 bytes, wanted an index of shards with at most'),
    'empty': ('', 'is empty; download it again'),
}


def directory_cases(root: pathlib.Path) -> dict[str, Bad]:
  """Paths that are no files, and directories of shards."""
  bad = {}

  def add(name: str, path: pathlib.Path, message: str, named: pathlib.Path | None = None) -> None:
    bad[name] = Bad(path, message, str(named or path))

  def folder(name: str) -> pathlib.Path:
    (root / name).mkdir()
    return root / name

  add('nothing there', root / 'nowhere.pth', 'there is no file or directory')
  (root / 'notes.txt').write_text('hello')
  add('no ending', root / 'notes.txt', 'is not a checkpoint; wanted one of .safetensors')
  (root / 'loop.pth').symlink_to(root / 'loop.pth')
  add('loop of links', root / 'loop.pth', 'is a pipe, a device or a link to nothing')
  (root / 'zero.safetensors').symlink_to('/dev/zero')
  add('endless device', root / 'zero.safetensors', 'is a pipe, a device or a link to nothing')
  for name, make in (('pipe', os.mkfifo), ('directory', os.mkdir),
                     ('device', lambda path: os.symlink('/dev/zero', path)),
                     ('loop', lambda path: os.symlink(path, path))):
    inside = folder(f'{name} in a directory') / MODEL
    make(inside)
    add(f'{name} in a directory', inside.parent,
        'cannot read .*symbolic links' if name == 'loop' else 'is not a file', inside)
  for name, (text, message) in INDICES.items():
    place = folder(f'index {name}')
    hostile.write_safetensors(place / MODEL, {})
    (place / f'{MODEL}.index.json').write_text(text, encoding='latin-1')
    add(place.name, place, message)
  place = folder('pipe as index')
  hostile.write_safetensors(place / MODEL, {})
  os.mkfifo(place / f'{MODEL}.index.json')
  add('pipe as index', place, 'index.json is not a file')
  place = folder('pipe as shard')
  hostile.write_safetensors(place / MODEL, {})
  os.mkfifo(place / 'a.safetensors')
  (place / f'{MODEL}.index.json').write_text('{"weight_map": {"a": "a.safetensors"}}')
  add('pipe as shard', place, "lacks 1 of 1 shards: 'a.safetensors'")
  place = folder('tensor twice')
  for name in ('a', 'b'):
    write_hole(place / f'diffusion_pytorch_model-{name}.safetensors', {LONG: (1,)})
  add('tensor twice', place, r"'x{64}'\.\.\. is in .*-b.safetensors and in another of 2 files")
  return bad


# --- networks -------------------------------------------------------------------------------------


def write_hole(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], dtype: str = 'F32', *,
               lacking: int = 0) -> None:
  """A safetensors file whose values are a hole: of any size, and it takes no room."""
  width, offset, header = {'F32': 4, 'I8': 1}[dtype], 0, {}
  for name, shape in shapes.items():
    end = offset + width * int(np.prod(shape, dtype=object))
    header[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': [offset, end]}
    offset = end
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text)
  os.truncate(path, 8 + len(text) + offset - lacking)


def shapes_of(tensors: Iterable[released.Tensor]) -> dict[str, tuple[int, ...]]:
  return {tensor.wan: tensor.shape for tensor in tensors}


def network_cases(root: pathlib.Path) -> dict[str, Bad]:
  """Whole files of something else, for which no network of 1.3B or a thousandth of it is taken."""
  wan = shapes_of(released.transformer(5120, 13824, 40))
  wrapped = {f'{prefix}patch_embedding.weight': (1,) for prefix in ('', '_orig_mod.')}
  bad = {}
  for name, message, shapes in (
      ('a VAE', 'holds a VAE; wanted a transformer with width=', shapes_of(released.vae())),
      ('a text encoder', 'holds a text encoder of width 4096; wanted', shapes_of(released.text())),
      ('another size', 'holds a transformer of width 5120 and 40 layers; wanted', wan),
      ('no network', r"tensors of no known network \('a'\); wanted a tr", {'a': (10**10,)}),
      ('nothing', r'tensors of no known network \(none\)', {}),
      ('scalars', r'tensors of no known network', {
          'patch_embedding.weight': (), 'shared.weight': (), 'token_embedding.weight': ()}),
      ('prefixes only', r"known network \('model\.model.*\.\.\.\)", {'model.' * 600_000: (1,)}),
      ('names with lines', r"known network \('\\nerror: \\x1b\[2J'\)", {'\nerror: \x1b[2J': (1,)}),
      ('two wrappers', 'two tensors whose names differ in their wrappers', wrapped)):
    path = root / f'{name}.safetensors'
    write_hole(path, shapes)
    bad[name] = Bad(path, message, str(path))
  path = root / 'cut.safetensors'
  write_hole(path, wan, lacking=1)
  bad['cut by a byte'] = Bad(path, 'is not a whole safetensors file', str(path))
  path = root / 'strange entries.pt'
  view = hostile.tensor('0', 1, (1,), (1,))
  entries = {f'{i}\n' + 'x' * 10_000: {'a': view} for i in range(20)}
  hostile.write_zip(path, entries, {'0': bytes(4)})
  bad['strange entries'] = Bad(path, r"it has '0\\nx.* and 10 more\. Choose one", str(path))
  return bad


def near_misses(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Wan2.1's transformer of 1.3B as integers, and with three tensors wrong."""
  shapes = shapes_of(released.transformer(1536, 8960, 30))
  quantised, near = root / 'quantised.safetensors', root / 'near.safetensors'
  write_hole(quantised, shapes, 'I8')
  shapes['more'] = shapes.pop('blocks.7.modulation')
  shapes['head.head.bias'] = (65,)
  write_hole(near, shapes)
  return quantised, near


# --- both launchers -------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def marker(tmp_path_factory):
  """What appears if anything of a pickle runs."""
  return tmp_path_factory.mktemp('marker') / 'marker'


@pytest.fixture(scope='module')
def bad(tmp_path_factory, marker):
  """Some files, and all that is not just a file."""
  folders = [tmp_path_factory.mktemp(name) for name in ('files', 'places', 'networks')]
  return (read_cases(folders[0], marker, FEW_READ) | directory_cases(folders[1])
          | network_cases(folders[2]))


@pytest.fixture(scope='module')
def all_read(tmp_path_factory, marker):
  return read_cases(tmp_path_factory.mktemp('all'), marker, None)


def check_refused(done: Launched, case: Bad) -> None:
  """One line of bounded length that says what is wrong with which file; little memory."""
  assert done.code == 1, done.err
  assert re.search(case.message, done.err), done.err
  assert done.err.startswith('error: ')
  assert done.err.count('\n') == 1, done.err
  assert done.err.rstrip('\n').isprintable()
  assert case.named in done.err
  assert len(done.err) < 1000
  assert done.megabytes < MEGABYTES
  assert done.seconds < 10


def check_all(done: dict[str, Launched], bad: dict[str, Bad], marker: pathlib.Path) -> None:
  assert done.keys() == bad.keys()
  for name in done:
    check_refused(done[name], bad[name])
  assert not marker.exists()


# --- launch.convert -------------------------------------------------------------------------------


def convert(source: Any, output: Any, *more: str) -> list[str]:
  return [f'--source={source}', '--model=wan_1_3b', f'--output={output}', *more]


def converted(bad: dict[str, Bad], out: pathlib.Path, *more: list[str]
              ) -> tuple[dict[str, Launched], list[Launched]]:
  """What comes of each of them, and of more commands."""
  commands = [convert(case.path, out / str(number)) for number, case in enumerate(bad.values())]
  _, *done = hostile.launch('convert', [convert('nowhere', out / 'first'), *commands, *more])
  return dict(zip(bad, done, strict=False)), done[len(bad):]


def test_converting_refuses_each_of_them(bad, marker, tmp_path):
  out, kept = tmp_path / 'out', tmp_path / 'kept'
  out.mkdir()
  kept.mkdir()
  (kept / 'kept').write_text('kept')
  quantised, near = near_misses(tmp_path)
  done, (several, in_full) = converted(
      bad, out, convert(quantised, kept), convert(near, kept, '--overwrite'))
  check_all(done, bad, marker)
  assert not os.listdir(out)
  check_refused(several, Bad(quantised, '825 tensors that are not floating point', str(quantised)))
  assert (in_full.code, in_full.megabytes < MEGABYTES) == (1, True)
  first, *lines = in_full.err.splitlines()
  assert first == (f'error: {near} does not fit the transformer: 1 missing, 1 unexpected, '
                   '1 wrongly shaped, 0 wrongly typed')
  assert lines == ['  missing: blocks.7.modulation', '  unexpected: more',
                   '  shape: head.head.bias is (65,), wanted (64,)']
  assert os.listdir(kept) == ['kept']


@pytest.mark.slow
def test_converting_refuses_all_files(all_read, marker, tmp_path):
  check_all(converted(all_read, tmp_path)[0], all_read, marker)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize('name', ['legacy exec.pth', pytest.param(
    'a billion tensors.safetensors', marks=pytest.mark.slow)])
def test_converting_on_the_true_command_line(bad, marker, tmp_path, name):
  check_true(bad[name], marker, 'convert', convert(bad[name].path, tmp_path / 'out'))
  assert not os.listdir(tmp_path)


def check_true(case: Bad, marker: pathlib.Path, launcher: str, command: list[str]) -> None:
  """As `check_refused`, by a shell that allows 4 GB of memory and a minute of processor time."""
  done = subprocess.run(
      ['sh', '-c', 'ulimit -d 4194304; ulimit -t 60; exec "$@"', 'sh', sys.executable, '-m',
       f'launch.{launcher}', *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
  check_refused(Launched(done.returncode, done.stdout, done.stderr, 0, 0), case)
  assert not marker.exists()


# --- launch.sample --------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def wan(tmp_path_factory):
  """Text encoder and VAE that fit, a thousandth of Wan2.1's size and never read."""
  spec, folder = build(ModelSpec, wan_model.get_config('tiny')), tmp_path_factory.mktemp('wan')
  for part, name in ((spec.text, 'models_t5_x'), (spec.vae, 'Wan2.1_VAE')):
    write_hole(folder / f'{name}.safetensors',
               {piece.name: piece.shape for piece in networks.network(part).pieces()})
  shutil.copy(ROOT / 'pf_jax' / 'weights' / 'digits' / 'tokenizer.json', folder)
  return folder


def sample(weights: Any, output: Any, *more: str) -> list[str]:
  return [CONFIG, f'--weights={weights}', '--prompt=a', f'--output={output}', *more]


def sampled(wan: pathlib.Path, bad: dict[str, Bad], out: pathlib.Path) -> dict[str, Launched]:
  """What comes of each of them in the transformer's place."""
  commands = [sample(wan, out / str(number), f'--transformer={case.path}')
              for number, case in enumerate(bad.values())]
  _, *done = hostile.launch('sample', [sample('nowhere', out / 'first'), *commands])
  return dict(zip(bad, done, strict=True))


def converted_cases(root: pathlib.Path) -> dict[str, Bad]:
  """Files that claim to be what launch.convert writes."""
  ours, bad = {'format': 'pf_jax.network', 'version': '1', 'kind': 'transformer'}, {}
  for name, metadata, message in (
      ('null', None, r"holds tensors of no known network \('a'\)"),
      ('another kind', ours | {'kind': '\n' + LONG}, r"holds '\\nx{63}'\.\.\. in version '1'"),
      ('without sizes', ours, r"says no sizes of a TransformerSpec \(KeyError: 'spec'\)"),
      ('sizes that are none', ours | {'spec': '[' * 100_000}, r'says no sizes .*\(RecursionError'),
      ('sizes of 0', ours | {'spec': '{"width": 0, "num_heads": 0}'}, 'says no sizes of a Tr'),
      ('sizes in words', ours | {'spec': json.dumps({'width': LONG})}, r'says no sizes .*TypeErr'),
      ('wide patches', ours | {'spec': json.dumps({'patch': ['\n' + LONG]})},
       'says no sizes of a Tr|was converted with'),
      ('other sizes', ours | {'spec': '{}'}, r'was converted with \w+=\d+, the config says')):
    path = root / f'{name}.safetensors'
    hostile.write_safetensors(path, {
        '__metadata__': metadata, 'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}},
        bytes(4))
    bad[name] = Bad(path, message, str(path))
  for name, text in (('nested', '[' * 100_000), ('list', '[]'), ('no JSON', '{')):
    path = root / f'{name}.orbax'
    path.mkdir()
    (path / '_METADATA').write_text(text)
    bad[path.name] = Bad(path, 'is not a whole Orbax checkpoint', str(path))
  return bad


@pytest.fixture(scope='module')
def in_place(bad, tmp_path_factory):
  """What is put in the transformer's place."""
  names = (*FEW_READ, 'loop of links', 'endless device', 'pipe as index', 'a VAE', 'another size',
           'scalars')
  return {name: bad[name] for name in names} | converted_cases(tmp_path_factory.mktemp('converted'))


@pytest.fixture(scope='module')
def outcome(wan, in_place, tmp_path_factory):
  """What comes of them, and where."""
  out = tmp_path_factory.mktemp('sampled')
  return sampled(wan, in_place, out), out


def test_sampling_refuses_what_lies_in_the_transformer_s_place(in_place, outcome, marker):
  check_all(outcome[0], in_place, marker)


def test_sampling_leaves_no_directory(outcome):
  assert not os.listdir(outcome[1])


@pytest.mark.slow
def test_sampling_refuses_all_files(all_read, marker, wan, tmp_path):
  check_all(sampled(wan, all_read, tmp_path), all_read, marker)


@pytest.mark.slow
def test_sampling_on_the_true_command_line(bad, marker, wan, tmp_path):
  """In the VAE's place here."""
  weights = tmp_path / 'weights'
  shutil.copytree(wan, weights)
  (weights / 'Wan2.1_VAE.safetensors').unlink()
  path = shutil.copy(bad['legacy exec.pth'].path, weights / 'Wan2.1_VAE.pth')
  check_true(bad['legacy exec.pth']._replace(named=str(path)), marker, 'sample',
             sample(weights, tmp_path / 'out'))
