"""Videos to judge: prompts, policies, true beginnings, branches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.digits import evaluate as evaluate_config
from launch.build import build
from pf_jax.data import digits
from pf_jax.evals import parts, rollouts, study
from pf_jax.evals.config import AblationConfig, EvaluateConfig, PartsConfig
from pf_jax.evals.rollouts import Run
from pf_jax.pipeline import Pipeline
from pf_jax.rollout import block as block_lib
from pf_jax.rollout.beginning import given_selection
from tests.evals import micro

pytestmark = pytest.mark.timeout(400)

DRAWS = rollouts.held_out(micro.WORLD, 2, 0)
PROMPTS = [draw.prompt for draw in DRAWS]


@pytest.fixture(scope='module')
def pipeline():
  return micro.pipeline()


@pytest.fixture(scope='module')
def beginning(pipeline):
  return rollouts.encode_clips(pipeline.models, micro.WORLD, DRAWS, 2)


def config(variant=None):
  return build(EvaluateConfig, evaluate_config.get_config(variant))


def test_held_out_draws_show_every_class_equally_often():
  draws = rollouts.held_out(micro.WORLD, 20, 3)
  assert [draw.digit for draw in draws] == [*range(10), *range(10)]
  assert {draw.split for draw in draws} == {'test'}
  assert {draw.image_id for draw in draws} <= set(micro.WORLD.images('test').tolist())
  assert draws[:5] == rollouts.held_out(micro.WORLD, 5, 3)


def test_swapped_prompts_have_least_in_common_with_the_old_ones():
  a = digits.make_prompt(1, 'left', 'teal')
  b = digits.make_prompt(1, 'left', 'navy')
  c = digits.make_prompt(2, 'right', 'navy')
  d = digits.make_prompt(2, 'right', 'teal')
  # Next neighbours share two, one, two and one attributes; those opposite each other none.
  assert rollouts.swap_prompts([a, b, c, d]) == [c, d, a, b]
  with pytest.raises(ValueError, match='1 prompts cannot be swapped'):
    rollouts.swap_prompts([a])


def test_policies_run_with_the_cache_they_are_named_after(pipeline):
  runs = {run.name: run for run in study.plan(config())}
  assert list(runs) == [
      'prompt-pack', 'clip-pack', 'parts-both', 'parts-swapped', 'parts-hr', 'parts-lr',
      'parts-none', 'prompt-no_mid', 'clip-no_mid', 'prompt-no_realignment', 'clip-no_realignment',
      'prompt-no_sink', 'clip-no_sink', 'prompt-pack_fifo', 'clip-pack_fifo']
  caches = {name: rollouts.variant(pipeline, run).spec.cache for name, run in runs.items()}
  pack = pipeline.spec.cache
  assert caches['prompt-pack'] == caches['clip-pack'] == caches['parts-swapped'] == pack
  changes = {'no_sink': {'sink_blocks': 0}, 'no_mid': {'top_k': 0},
             'no_realignment': {'positions': 'absolute'}, 'pack_fifo': {'selection': 'fifo'}}
  for name, change in changes.items():
    assert caches[f'prompt-{name}'] == dataclasses.replace(pack, **change) != pack
    assert caches[f'clip-{name}'] == caches[f'prompt-{name}']
  assert (runs['prompt-pack'].start_blocks, runs['clip-pack'].start_blocks) == (0, 2)
  assert runs['prompt-pack'].judged == (5, *range(10, 121, 10))
  branches = {name: rollouts.variant(pipeline, run).models.spec.compressor.branches
              for name, run in runs.items() if name.startswith('parts')}
  assert branches == {'parts-both': 'both', 'parts-swapped': 'both', 'parts-hr': 'hr',
                      'parts-lr': 'lr', 'parts-none': 'none'}


def test_every_policy_samples_a_block(pipeline):
  """Traced only: the history each policy's block attends, and what it selects."""
  tokens, mid = micro.VIDEO.tokens_per_block, pipeline.spec.cache.mid_tokens
  history = {'pack': 2 * tokens + mid, 'no_mid': 2 * tokens, 'no_sink': tokens + mid,
             'no_realignment': 2 * tokens + mid, 'pack_fifo': 2 * tokens + mid}
  policies = config().ablation.policies
  assert policies.keys() == history.keys()
  for name, overrides in policies.items():
    made = rollouts.variant(pipeline, Run(name, 0, 3, (3,), cache=overrides))
    rows = np.ones((2, 16, made.models.spec.text.width), np.float32)
    text = jax.eval_shape(lambda m, r: m.transformer.text_keys_values(r), made.models, rows)
    state = jax.eval_shape(lambda m, spec=made.spec: block_lib.init(m, 2, spec), made.models)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    _, pixels, _, selected = jax.eval_shape(
        lambda *a, spec=made.spec: block_lib.sample_block(*a, first=False, spec=spec),
        made.models, state, text, keys)
    assert made.spec.cache.context_tokens == history[name]
    assert selected.shape == (2, 2, 0 if name == 'no_mid' else 1)
    assert pixels.shape == (2, 8, 32, 32, 3)


def test_unknown_cache_choices_are_named(pipeline):
  run = Run('prompt-odd', 0, 3, (3,), cache={'sink_block': 0})
  with pytest.raises(ValueError, match=r'prompt-odd: .*sink_block.*did you mean sink_blocks'):
    rollouts.variant(pipeline, run)
  with pytest.raises(ValueError, match=r'prompt-odd: top_k=9 blocks cannot be selected'):
    rollouts.variant(pipeline, dataclasses.replace(run, cache={'top_k': 9}))


def test_branches_switch_the_halves_of_the_compressor(pipeline):
  latents = jnp.asarray(np.random.default_rng(0).normal(size=(1, *micro.VIDEO.block_latent_shape)),
                        jnp.float32)
  pixels = jnp.zeros((1, micro.VIDEO.block_frames, 32, 32, 3))
  hr, lr = micro.once(parts.branch_tokens, pipeline.models, latents, pixels)
  assert float(jnp.linalg.norm(hr)) > 0.1
  wanted = {'both': hr + lr, 'hr': hr, 'lr': lr, 'none': 0 * lr}
  low = micro.once(lambda m: m.encode_low_resolution(pixels), pipeline.models)
  for name, tokens in wanted.items():
    models = rollouts.with_branches(pipeline.models, name)
    got = micro.once(lambda m: m.compress(latents, low)[0], models)
    np.testing.assert_allclose(got, tokens.reshape(1, -1, 24), atol=1e-5, err_msg=name)
  assert pipeline.models.spec.compressor.branches == 'both'


@pytest.mark.parametrize(('sink', 'recent', 'top_k', 'block', 'wanted'), [
    (1, 1, 2, 0, [-1, -1]), (1, 1, 2, 2, [-1, -1]), (1, 1, 2, 3, [1, -1]), (1, 1, 2, 4, [1, 2]),
    (1, 1, 2, 6, [3, 4]), (0, 1, 2, 2, [0, -1]), (2, 2, 1, 5, [2]), (1, 1, 0, 4, [])])
def test_what_a_true_block_attends(pipeline, sink, recent, top_k, block, wanted):
  cache = dataclasses.replace(pipeline.spec.cache, sink_blocks=sink, recent_blocks=recent,
                              top_k=top_k, mid_capacity=4)
  selected = given_selection(cache, block, 3)
  assert (selected.shape, selected.dtype) == ((2, 3, top_k), np.int32)
  assert (selected == np.array(wanted, np.int32)).all()


def test_a_video_keeps_the_true_blocks_it_was_given(pipeline, beginning):
  assert beginning.shape == (2, 2, *micro.VIDEO.block_latent_shape)
  clip = micro.WORLD.render(DRAWS[1], micro.VIDEO.pixel_frames(2)).pixels
  vae = pipeline.models.vae
  encoded = micro.once(lambda vae, x: vae.encode(x), vae, digits.to_float(clip)[None])
  np.testing.assert_allclose(beginning[1].reshape(encoded.shape), encoded, atol=1e-4)

  blocks = list(rollouts.sample(pipeline, PROMPTS, [7, 8], blocks=4, beginning=beginning))
  free = list(rollouts.sample(pipeline, PROMPTS, [7, 8], blocks=4))
  assert [block.replayed for block in blocks] == [True, True, False, False]
  for i in range(2):
    np.testing.assert_array_equal(blocks[i].latents, beginning[:, i])
    assert np.abs(np.asarray(free[i].latents) - beginning[:, i]).max() > 0.01
  decoded = digits.to_uint8(micro.once(lambda vae, z: vae.decode(z), vae, encoded)[0])
  frames = np.concatenate([block.frames[1] for block in blocks[:2]])
  assert np.abs(frames.astype(int) - decoded).max() <= 1
  # What follows depends on the beginning, and so on the instance.
  assert np.abs(np.asarray(blocks[2].latents) - free[2].latents).max() > 1e-4
  # As long as at most K blocks are archived, a true block attends what a sampled one does.
  for block in free:
    selected = given_selection(pipeline.spec.cache, block.number, 2)
    np.testing.assert_array_equal(block.selected, selected)


def test_a_video_does_not_depend_on_the_batch_around_it(pipeline):
  """Its noise is its seed's, so swapped prompts meet the same noise."""
  both = next(rollouts.sample(pipeline, PROMPTS, [7, 8], blocks=1))
  other = next(rollouts.sample(pipeline, [PROMPTS[1], PROMPTS[1]], [8, 8], blocks=1))
  np.testing.assert_allclose(both.latents[1], other.latents[0], atol=1e-5)


def test_frames_and_their_blocks():
  number = rollouts.block_of(micro.VIDEO)
  assert [number(frame) for frame in (0, 6, 7, 14, 15)] == [1, 1, 2, 2, 3]
  for block in (1, 2, 9):
    assert number(micro.VIDEO.pixel_frames(block) - 1) == block
    assert number(micro.VIDEO.pixel_frames(block)) == block + 1


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: AblationConfig({}), "baseline='pack' is not one of the policies"),
    (lambda: AblationConfig({'pack': {}, 'No Sink': {}}), "'No Sink' becomes a file name"),
    (lambda: AblationConfig({'pack': {}}, judged=(5, 121)), r'judged=\(5, 121\) must rise within'),
    (lambda: AblationConfig({'pack': {}}, judged=(2, 30)), r'must rise within 3\.\.120'),
    (lambda: AblationConfig({'pack': {}}, starts=('promt',)), r"starts=\('promt',\) must name"),
    (lambda: PartsConfig(branches=('hr', 'hr')), 'must name some of both, hr, lr, none, each once'),
    (lambda: PartsConfig(clip_blocks=1), 'clip_blocks=1 must be at least 2'),
    (lambda: EvaluateConfig(AblationConfig({'pack': {}}), videos=6, batch=4),
     'videos=6 is not a multiple of batch=4; use 8 videos'),
])
def test_settings_that_cannot_work_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_the_pipeline_is_the_samplers():
  """The evaluation adds no sampler of its own."""
  assert rollouts.Pipeline is Pipeline


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_policies_make_different_videos_from_the_same_noise(pipeline):
  """Each from the first block on at which its memory differs from pack's."""
  first_difference = {'pack': None, 'no_sink': 2, 'no_mid': 3, 'no_realignment': 4, 'pack_fifo': 4}
  latents = {}
  for name, overrides in config().ablation.policies.items():
    made = rollouts.variant(pipeline, Run(name, 0, 7, (7,), cache=overrides))
    blocks = rollouts.sample(made, PROMPTS, [7, 8], blocks=7)
    latents[name] = np.stack([block.latents for block in blocks])
  for name, wanted in first_difference.items():
    differs = np.abs(latents[name] - latents['pack']).max((1, 2, 3, 4, 5)) > 1e-5
    if wanted is None:
      assert not differs.any()
    elif name == 'pack_fifo':  # the newest may happen to be the best for a while
      assert not differs[:wanted].any()
      assert differs.any()
    else:
      assert differs.tolist() == [block >= wanted for block in range(7)], name
