"""Tests that `test_sharding.py` runs in a process with four CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pf_jax.kernels.attention import Blocks, Segment, attend, pallas, reference
from pf_jax.kernels.context import assemble
from pf_jax.models.transformer import CausalTransformer
from pf_jax.train import sharding
from pf_jax.train.checkpoint import Checkpoints
from pf_jax.train.flow_matching import FlowMatchingSpec, add_levels, flow_loss
from pf_jax.train.state import init_state
from pf_jax.train.step import TrainStep
from pf_jax.types import tree_bytes
from tests.evals import micro
from tests.train import toy

pytestmark = pytest.mark.timeout(250)
SPEC = FlowMatchingSpec()
ONE, FOUR = sharding.mesh(jax.devices()[:1]), sharding.mesh()


@pytest.fixture(autouse=True)
def small_arrays_are_split_too(monkeypatch):
  monkeypatch.setattr(sharding, 'SMALLEST', 8)


def fresh(objective, optimizer, mesh):
  state = init_state(objective.init(0), optimizer, 0, ema=True)
  return sharding.place(state, mesh)


def train(objective, optimizer, batch, mesh, steps=2):
  """The state after some steps, and the last metrics."""
  state = fresh(objective, optimizer, mesh)
  step = TrainStep(objective, optimizer, jax.tree.map(lambda _: 'all', state.params), 0.9)
  with jax.set_mesh(mesh):
    for _ in range(steps):
      state, metrics = step(state, sharding.place_batch(batch, mesh))
  assert step.whole._cache_size() == 1  # what a step returns is what the next one was compiled for
  return state, metrics


def values(tree):
  return [np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                     else leaf) for leaf in jax.tree.leaves(tree)]


def assert_close(tree, other, rtol=1e-4, atol=1e-6):
  for one, two in zip(values(tree), values(other), strict=True):
    np.testing.assert_allclose(one, two, rtol=rtol, atol=atol)


def bytes_on(device, tree):
  return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree)
             for shard in leaf.addressable_shards if shard.device == device)


TOY = toy.Toy(), optax.adamw(1e-2), toy.batch_of(0)


class FlowMatching:
  """A transformer of whole clips; `batch` holds latents and text rows."""

  def init(self, seed):
    """Numbers in all parameters, so that no branch is silent."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: CausalTransformer(micro.spec().transformer, rngs=nnx.Rngs(0)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)

  def loss(self, transformer, batch, key):
    noised = add_levels(batch['latents'], key, 2, SPEC)
    text = transformer.text_keys_values(batch['rows'])
    flow = transformer(noised.x_t, noised.timesteps, text).flow
    return jnp.mean(flow_loss(flow, noised, SPEC)), {}


def flow_matching():
  """Plain descent: Adam makes steps of any size out of rounding."""
  rng = np.random.default_rng(0)
  batch = {'latents': rng.standard_normal((4, 3, 16, 16, 4)).astype(np.float32),
           'rows': rng.standard_normal((4, 5, 12)).astype(np.float32)}
  return FlowMatching(), optax.sgd(0.1, momentum=0.9), batch


@pytest.mark.parametrize('case', [lambda: TOY, flow_matching], ids=['toy', 'transformer'])
def test_four_devices_compute_what_one_does_and_keep_their_shares(case):
  objective, optimizer, batch = case()
  alone, alone_metrics = train(objective, optimizer, batch, ONE)
  state, metrics = train(objective, optimizer, batch, FOUR)
  assert_close(state, alone)
  assert_close(metrics, alone_metrics)
  with pytest.raises(AssertionError):  # the tolerance would notice that nothing was learned
    assert_close(state.params, objective.init(0))
  wanted = sharding.state_shardings(state, FOUR)
  for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
    assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
  for name in ('params', 'opt_state', 'ema'):
    whole = tree_bytes(getattr(state, name))
    assert all(bytes_on(device, getattr(state, name)) < 0.4 * whole for device in jax.devices())


@pytest.mark.parametrize(('saved_on', 'restored_on'), [(ONE, FOUR), (FOUR, ONE)],
                         ids=['one to four', 'four to one'])
def test_checkpoints_move_between_numbers_of_devices(saved_on, restored_on, tmp_path):
  objective, optimizer, batch = TOY
  state, _ = train(objective, optimizer, batch, saved_on)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state)
    checkpoints.wait()
    template = fresh(objective, optimizer, restored_on)
    restored, _ = checkpoints.restore(template)
  assert_close(restored, state, rtol=0, atol=0)
  for leaf, place in zip(jax.tree.leaves(restored.params), jax.tree.leaves(template.params),
                         strict=True):
    assert leaf.sharding == place.sharding
  assert len(restored.params.first.kernel[...].sharding.device_set) == restored_on.size


def test_a_batch_is_split_along_its_videos():
  placed = sharding.place_batch({'x': np.arange(8.0).reshape(8, 1)}, FOUR)['x']
  assert [shard.data.ravel().tolist() for shard in placed.addressable_shards] == [
      [0, 1], [2, 3], [4, 5], [6, 7]]
  with pytest.raises(ValueError, match=r"batch\['x'\] has shape \[6, 1\], wanted .* 4 devices"):
    sharding.place_batch({'x': np.zeros((6, 1))}, FOUR)


def test_a_result_is_split_though_nothing_it_came_from_is():
  def ones():
    return sharding.constrain({'layers': {'w': jnp.ones((4, 8, 2))}})

  with jax.set_mesh(FOUR):
    made = jax.jit(ones)()['layers']['w']
  assert [shard.data.shape for shard in made.addressable_shards] == [(4, 2, 2)] * 4


def draw(seed, batch, tokens):
  return jax.random.normal(jax.random.key(seed), (batch, tokens, 2, 8))


@pytest.mark.parametrize('batches', [(8, 8), (8, 4), (8, 2), (8, 1), (3, 3)], ids=[
    'own', 'shared, split', 'shared, repeated', 'for all', 'whole'])
def test_each_device_attends_with_its_own_videos(batches):
  batch, shared = batches
  q, own = draw(0, batch, 5), Segment(draw(1, batch, 5), draw(2, batch, 5))
  valid = jnp.asarray(np.random.default_rng(0).random((shared, 7)) < 0.5)
  valid = valid.at[:, 0].set(True)
  segments = [own, Segment(draw(3, shared, 7), draw(4, shared, 7), valid)]

  def loss(q, k):
    return jnp.sum(jnp.sin(attend(q, [own, segments[1]._replace(k=k)])))

  grad = jax.value_and_grad(loss, (0, 1))
  wanted = jax.jit(grad)(q, segments[1].k)
  with jax.set_mesh(FOUR):
    program = jax.jit(grad).lower(q, segments[1].k).compile()
  assert_close(program(q, segments[1].k), wanted, rtol=1e-4, atol=1e-5)
  assert f'f32[{batch // 4 or batch},2,5,12]' in program.as_text()  # logits of a device


@pytest.mark.parametrize('layers', [0, 3])
@pytest.mark.parametrize(('videos', 'flags'), [(4, 4), (4, 1), (1, 1)],
                         ids=['own', 'flags for all', 'for all'])
def test_each_device_reads_blocks_of_its_own_videos(videos, flags, layers, monkeypatch):
  """A backend that is handed blocks; positions and choices may be those of all videos."""
  rng = np.random.default_rng(0)
  blocks = Blocks(*(jnp.asarray(rng.standard_normal((videos, 3, 2, 2, 8)), jnp.float32)
                    for _ in range(2)), jnp.asarray(rng.integers(-9, 0, (flags, 2)), jnp.float32),
                  jnp.ones((flags, 2), bool).at[-1, 1].set(flags == 1),
                  jnp.asarray(rng.integers(0, 3, (flags, 2))))
  q = draw(0, 4, 5)

  def backend(q, segments):
    return reference.attend(q, [assemble(segments)])

  wanted = backend(q, [blocks])
  monkeypatch.setattr(pallas, 'supports', lambda q, segments: True)
  monkeypatch.setattr(pallas, 'attend', backend)
  with jax.set_mesh(FOUR):
    if layers:  # the last of them is attended
      k, v = (jnp.stack([jnp.full_like(x, jnp.nan)] * (layers - 1) + [x]) for x in blocks[:2])
      blocks = blocks._replace(k=k, v=v, layer=jnp.int32(layers - 1))
    got = jax.jit(lambda q, blocks: attend(q, [blocks], implementation='pallas'))(q, blocks)
  assert_close(got, wanted, rtol=1e-5, atol=1e-6)
