"""Clips of the bidirectional model as a job: what they take, ask of their programs and leave."""

import dataclasses
import errno
import functools
import json
import os
import weakref

import jax
import numpy as np
import pytest

from configs.wan import baseline_1_3b
from launch.build import build
from pf_jax import outputs
from pf_jax.diffusion.multistep import SolverState
from pf_jax.models.bundle import ModelSpec
from pf_jax.models.prompt_encoder import PromptEncoder
from pf_jax.models.tokenizer import Tokenizer
from pf_jax.pipeline import PACKAGED
from pf_jax.released import ReleasedWeights
from pf_jax.rollout.bidirectional import DECODE, DENOISE, ClipSamplerSpec
from pf_jax.sampling import budget as budget_lib
from pf_jax.sampling import clip
from pf_jax.sampling.budget import DoesNotFit
from pf_jax.sampling.clip import ClipBudget, ClipSpec
from pf_jax.sampling.plan import SampleError
from pf_jax.testing import random_models, tiny_model_spec
from pf_jax.viz.sheet import ContactSheet
from pf_jax.viz.video import read_video
from pf_jax.weights import networks
from pf_jax.weights.tensors import WeightsError
from tests.weights import checkpoints

MODEL = tiny_model_spec()
SPEC = ClipSpec(ClipSamplerSpec(steps=3), latent_frames=6, sheet_columns=3)
NAME = outputs.output_name(0, 'a cat')
NETWORK = functools.cache(networks.network)
FILES = {f'{NAME}.mp4', f'{NAME}.png', f'{NAME}.json'}


@pytest.fixture(scope='module')
def models():
  return random_models(MODEL, 1)


@pytest.fixture(scope='module')
def weights(models, tmp_path_factory):
  folder = checkpoints.write_wan(tmp_path_factory.mktemp('weights') / 'Wan2.1', models)
  return ReleasedWeights(str(folder), MODEL)


class Programs:
  """Programs a reader can follow: latents are seed + 10 frame, every step adds 10, pieces are grey.

  Attributes:
    asked: what they were asked for, in order.
    before: hooks, by method and its number.
    scratch_bytes: of all instances.
  """

  asked: list
  before: dict
  scratch_bytes: dict

  def __init__(self, model, sampler, latent_frames):
    self._shape = (1, latent_frames, *model.video.block_latent_shape[1:])
    self._size = model.video.height, model.video.width
    self.compile_seconds = {'step': 1.5, 'first': 2.0}
    self.asked.append(('compile', sampler, latent_frames))

  def _ask(self, name, *what):
    if isinstance(what[0], int) and (hook := self.before.get((name, what[0]))):
      hook()
    self.asked.append((name, *what))

  def text_keys_values(self, transformer, rows):
    self._transformer = weakref.ref(transformer)
    self._ask('text', jax.tree.map(np.asarray, transformer), np.asarray(rows))
    return rows

  def start(self, seed):
    self._ask('start', seed)
    frames = 10 * np.arange(self._shape[1], dtype=np.float32)[:, None, None, None]
    x = np.broadcast_to(seed + frames, self._shape)
    return SolverState(x, x, (x, x))

  def step(self, index, transformer, state, *texts):
    self._ask('step', index)
    self.asked.append(('texts', *texts))
    return state._replace(x=state.x + 10)

  def decode(self, vae, state, latents):
    done = state or 0
    self._ask('decode', done)
    assert self._transformer() is None  # it is not needed any more
    frames = 4 * latents.shape[1] - (0 if done else 3)
    grey = np.full((1, frames, *self._size, 3), latents.mean(), np.uint8)
    return grey, done + latents.shape[1]


@pytest.fixture(autouse=True)
def programs(monkeypatch):
  for name, value in (('asked', []), ('before', {}), ('scratch_bytes', {DENOISE: 0, DECODE: 0})):
    monkeypatch.setattr(Programs, name, value, raising=False)
  monkeypatch.setattr(clip, 'ClipPrograms', Programs)
  # Shapes depend on specs alone; tracing them again would be most of the time of these tests.
  monkeypatch.setattr(networks, 'network', NETWORK)
  return Programs


def run(weights, output, *, spec=SPEC, prompt='a cat', seed=7, **options):
  return clip.run(weights, prompt, seed, spec, output, **{'say': lambda message: None} | options)


def interrupt():
  raise KeyboardInterrupt


# --- a whole run ---------------------------------------------------------------------------------


def test_files_of_a_run(weights, models, programs, tmp_path, capsys):
  said = []
  path = run(weights, tmp_path / 'new' / 'run', negative_prompt='a dog', say=said.append)
  assert path == tmp_path / 'new' / 'run' / f'{NAME}.mp4'
  assert {file.name for file in path.parent.iterdir()} == FILES | {'.lock'}
  pixels = read_video(path).pixels
  assert pixels.shape == (21, 32, 48, 3)
  # Seed and steps make 37; latent frames 0 and 1 are one piece, 2 to 5 the other.
  np.testing.assert_allclose([pixels[:5].mean(), pixels[5:].mean()], [37 + 5, 37 + 35], atol=2)
  sidecar = json.loads(path.with_suffix('.json').read_text())
  assert (sidecar['prompt'], sidecar['negative_prompt'], sidecar['seed']) == ('a cat', 'a dog', 7)
  assert (sidecar['frames'], sidecar['fps'], sidecar['height'], sidecar['width']) == (
      21, 16, 32, 48)
  assert sidecar['config']['sampler']['steps'] == 3
  assert sidecar['versions']['jax'] == jax.__version__
  assert {name.split('/')[0] for name in sidecar['model']} == {
      'text', 'vae', 'transformer', 'tokenizer'}
  metrics = sidecar['metrics']
  assert (metrics['compile_seconds'], metrics['compile_seconds_of']) == (
      3.5, {'step': 1.5, 'first': 2.0})
  assert 0 < metrics['seconds_per_step']['median'] <= metrics['sampling_seconds'] < 10
  assert metrics['peak_memory_bytes'] > 50e6
  assert said[1] == 'compiled in 3.5 s.'
  assert said[2].startswith('estimate: memory ')
  shown = capsys.readouterr().err
  assert shown.index('estimate: time') < shown.index('step 3/3') < shown.index('frame 21/21')


def test_the_programs_get_what_was_asked_for(weights, models, programs, tmp_path):
  run(weights, tmp_path, negative_prompt='a dog')
  names = [name for name, *_ in programs.asked if name != 'texts']
  assert names == ['compile', 'text', 'text', 'start', *['step'] * 3, *['decode'] * 2]
  assert programs.asked[0] == ('compile', SPEC.sampler, 6)
  tokenizer = Tokenizer.from_file(PACKAGED / 'tokenizer.json', max_tokens=6)
  rows = PromptEncoder(tokenizer, MODEL.text, lambda: models.text)(['a cat', 'a dog'])
  asked = [what for name, *what in programs.asked if name == 'text']
  for (transformer, got), wanted in zip(asked, rows, strict=True):
    np.testing.assert_array_equal(got, wanted[None])
    jax.tree.map(np.testing.assert_array_equal, transformer, models.transformer)
  for texts in (what for name, *what in programs.asked if name == 'texts'):
    for got, wanted in zip(texts, rows, strict=True):  # the negative prompt comes second
      np.testing.assert_array_equal(got, wanted[None])
  # 6 latent frames in blocks of 4: the short piece is the first one.
  assert [what for name, *what in programs.asked if name == 'decode'] == [[0], [2]]


def test_without_guidance_there_is_no_negative_prompt(weights, programs, tmp_path):
  run(weights, tmp_path, spec=dataclasses.replace(SPEC, sampler=ClipSamplerSpec(
      steps=1, guidance=1.0)), negative_prompt='a dog')
  assert [len(what) for name, *what in programs.asked if name == 'texts'] == [1]


def test_prompts_the_tokenizer_cannot_represent_are_pointed_out(weights, tmp_path):
  said = []
  run(weights, tmp_path, prompt='a cat \N{CAT} ' + 'a ' * 20, say=said.append)
  assert any('the rest is ignored' in line for line in said)
  assert any('pieces outside the vocabulary' in line for line in said)
  assert not any("prompt ''" in line for line in said)  # the negative one may be empty


# --- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_read(monkeypatch):
  monkeypatch.setattr(networks, 'fill', lambda *args, **options: pytest.fail('weights were read'))


@pytest.mark.usefixtures('nothing_is_read')
def test_nothing_is_replaced_unasked(weights, programs, tmp_path):
  for name in sorted(FILES):
    (tmp_path / name).write_text('mine')
    with pytest.raises(outputs.OutputExists, match=f'{name} exists already; pass --overwrite'):
      run(weights, tmp_path)
    assert (tmp_path / name).read_text() == 'mine'
    (tmp_path / name).unlink()
  (tmp_path / f'{NAME}.png').mkdir()
  with pytest.raises(outputs.NotWritable, match='is a directory or a link'):
    run(weights, tmp_path, overwrite=True)
  assert programs.asked == []


def changed(**video):
  return dataclasses.replace(MODEL, video=dataclasses.replace(MODEL.video, **video))


@pytest.mark.usefixtures('nothing_is_read')
def test_what_cannot_be_is_refused_and_leaves_nothing(weights, models, programs, monkeypatch,
                                                      tmp_path):
  def refused(kind, match, weights=weights):
    with pytest.raises(kind, match=match):
      run(weights, tmp_path / 'new' / 'run')
    assert list(tmp_path.iterdir()) == [kept]

  kept = tmp_path / 'wan'
  checkpoints.write_wan(kept, models)
  refused(SampleError, 'fps=2000 must be positive', ReleasedWeights('x', changed(fps=2000)))
  refused(SampleError, "no file or directory 'nowhere'", ReleasedWeights('nowhere', MODEL))
  refused(SampleError, "no file or directory 'x.pt'", dataclasses.replace(
      weights, transformer='x.pt'))
  (kept / 'google' / 'umt5-xxl' / 'tokenizer.json').write_text('{')
  refused(SampleError, 'is not a tokenizer.json', ReleasedWeights(str(kept), MODEL))
  assert programs.asked == []
  programs.scratch_bytes = {DENOISE: 0, DECODE: 10**15}
  refused(DoesNotFit, r'1000000\.0 GB are needed, this machine has')
  monkeypatch.setattr(budget_lib, 'device_memory', lambda: (200_000, 'this card'))
  refused(DoesNotFit, r'0\.0 GB are needed, this card has 0\.0 GB', ReleasedWeights('x', MODEL))
  assert len(programs.asked) == 1  # compiled once, for its scratch


@pytest.mark.parametrize('kind', ['text', 'transformer', 'vae'])
def test_damaged_weights_leave_nothing(weights, programs, monkeypatch, tmp_path, kind):
  fill = networks.fill

  def damaged(tensors, target):
    if target.kind == kind:
      raise WeightsError('tensor x is damaged')
    return fill(tensors, target)

  monkeypatch.setattr(networks, 'fill', damaged)
  with pytest.raises(SampleError, match='tensor x is damaged'):
    run(weights, tmp_path / 'run')
  assert not list(tmp_path.iterdir())
  assert not [name for name, *_ in programs.asked if name in ('step', 'decode')]


def test_others_files_in_a_new_directory_are_left(weights, programs, tmp_path):
  programs.before['start', 7] = lambda: (
      (tmp_path / 'new' / 'run' / 'mine').write_text(''), interrupt())
  with pytest.raises(KeyboardInterrupt):
    run(weights, tmp_path / 'new' / 'run')
  assert {path.name for path in (tmp_path / 'new' / 'run').iterdir()} == {'mine', '.lock'}


# --- interruptions -------------------------------------------------------------------------------


def full():
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(('moment', 'hook', 'error'), [
    (('step', 1), interrupt, KeyboardInterrupt), (('decode', 2), full, OSError)])
def test_an_interrupted_run_leaves_what_was_there(weights, programs, tmp_path, moment, hook, error):
  for name in FILES:
    (tmp_path / name).write_text('mine')
  programs.before[moment] = hook
  for output in (tmp_path, tmp_path / 'new'):
    with pytest.raises(error):
      run(weights, output, overwrite=True)
  assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
      **dict.fromkeys(FILES, 'mine'), '.lock': ''}
  programs.before.clear()
  run(weights, tmp_path, overwrite=True)
  assert len(read_video(tmp_path / f'{NAME}.mp4').pixels) == 21


@pytest.mark.parametrize(('owner', 'name'), [(ContactSheet, 'save'), (outputs, 'json_text')])
def test_no_file_appears_before_all_are_whole(weights, monkeypatch, tmp_path, owner, name):
  """The video is finished when the sheet or the sidecar fails."""
  monkeypatch.setattr(owner, name, lambda *args: full())
  with pytest.raises(OSError, match='No space left'):
    run(weights, tmp_path / 'run')
  assert not list(tmp_path.iterdir())


# --- the budget ----------------------------------------------------------------------------------


def test_budget_of_the_full_size():
  config = baseline_1_3b.get_config()
  model = build(ModelSpec, config.model)
  budget = clip.clip_budget(
      model, build(ClipSpec, {name: config[name] for name in config if name != 'model'}))
  assert budget.parameters == {
      'text': 5_680_910_336, 'transformer': 1_418_996_800, 'vae': 126_892_531}
  # 30 layers x (keys, values) x 1536 x 2 bytes a row, 512 rows, two prompts.
  assert budget.text == 2 * 512 * 184_320
  tokens, width, hidden = 21 * 30 * 52, 1536, 8960
  assert budget.solver == 4 * 21 * 60 * 104 * 16 * 4  # x, corrected, two predictions
  assert (budget.residual, budget.attention, budget.feed_forward) == (
      tokens * width * 4, 3 * tokens * width * 2, tokens * hidden * 2)
  assert budget.frames == 16 * 480 * 832 * 3
  held = budget.networks['transformer'] + budget.networks['vae'] + budget.text + budget.solver
  assert budget.denoise_phase == held + budget.residual + budget.feed_forward
  assert budget.decode_phase == budget.networks['vae'] + budget.decoder + budget.frames
  assert budget.peak == budget.text_phase == budget.networks['text']
  assert budget.video_file == round(81 * 480 * 832 * budget_lib.MP4_BITS / 8)


def test_a_batch_of_both_prompts_doubles_activations():
  def budget(**sampler):
    return clip.clip_budget(MODEL, dataclasses.replace(SPEC, sampler=ClipSamplerSpec(**sampler)))

  tokens = 6 * 2 * 3  # frames x grid; width 24, float32
  two, batched = budget(), budget(batched=True)
  assert two.residual == tokens * 24 * 4
  assert (batched.residual, batched.attention, batched.feed_forward) == (
      2 * two.residual, 2 * two.attention, 2 * two.feed_forward)
  assert batched.text == two.text


BUDGET = ClipBudget(
    parameters=dict(text=1, transformer=1, vae=1),
    networks=dict(text=10, transformer=40, vae=5), text=3, solver=2, residual=4, attention=6,
    feed_forward=8, decoder=20, frames=1, scratch=None, video_file=7)


def test_phases_add_up():
  assert (BUDGET.text_phase, BUDGET.denoise_phase, BUDGET.decode_phase) == (
      10, 40 + 5 + 3 + 2 + 4 + 8, 5 + 20 + 1)
  compiled = dataclasses.replace(BUDGET, scratch={DENOISE: 100, DECODE: 30})
  assert (compiled.denoise_phase, compiled.decode_phase) == (50 + 100, 26 + 30)
  values = dict(line.rsplit('  ', 1) for line in dataclasses.replace(
      compiled, scratch={DENOISE: 3 * 10**9, DECODE: 10**9}).lines())
  values = {name.strip(): value for name, value in values.items()}
  assert values['scratch to denoise'] == '3.0000 GB'
  assert values['peak while the clip is denoised'] == '3.0000 GB'


@pytest.mark.parametrize(('changes', 'remedy'), [
    (dict(), r'bfloat16 for the networks \(config\.model\.\*\.dtypes\) or a smaller model'),
    (dict(scratch={DENOISE: 100, DECODE: 0}), r'lower config\.latent_frames or .*batched off'),
    (dict(scratch={DENOISE: 0, DECODE: 100}), r'lower config\.model\.video\.height and width, or'),
    (dict(networks=dict(text=100, transformer=40, vae=5)), 'bfloat16 for the text encoder')])
def test_remedies_name_the_largest_part(changes, remedy):
  budget = dataclasses.replace(BUDGET, **changes)
  budget.check(budget.peak, 'the device')
  with pytest.raises(DoesNotFit, match=rf'^0\.0 GB are needed, the device has 0\.0 GB; .*{remedy}'):
    budget.check(budget.peak - 1, 'the device')


def test_dry_run_names_the_files_and_refuses_what_the_run_would(weights, programs, monkeypatch,
                                                                tmp_path):
  said = []
  monkeypatch.setattr(networks, 'fill', lambda *args, **options: pytest.fail('weights were read'))
  budget = clip.dry_run(MODEL, SPEC, weights=weights, memory=10**9, say=said.append)
  assert said[0].startswith(f'reads {weights.directory}')
  assert '21 frames of 48x32 at 16 fps; 3 steps of unipc, guidance 5' in said
  assert set(budget.lines()) <= set(said)
  assert said[-1].startswith("fits into the 1.0 GB of the device if the programs' scratch stays")
  with pytest.raises(SampleError, match="no file or directory 'nowhere'"):
    clip.dry_run(MODEL, SPEC, weights=ReleasedWeights('nowhere', MODEL), say=said.append)
  with pytest.raises(SampleError, match='fps=2000'):
    clip.dry_run(changed(fps=2000), SPEC, say=said.append)
  said.clear()
  address = 'hub:someone/something@' + '0' * 40
  clip.dry_run(MODEL, SPEC, weights=ReleasedWeights(address, MODEL), say=said.append)
  assert 'Sizes are those of the config.' in said[0]
  with pytest.raises(DoesNotFit, match=r'the device has 0\.0 GB'):
    clip.dry_run(MODEL, SPEC, memory=1000, say=said.append)
  assert programs.asked == []
