"""The transformer run through the cache block by block, as golden and parity tests need it."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from pf_jax import cache as cache_lib
from pf_jax.cache import CacheSpec
from pf_jax.models.transformer import CausalTransformer, TransformerSpec

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / 'goldens'
GATE = 2e-5  # max|d| / max|ref|, float32
SPEC = TransformerSpec(width=48, ffn_width=80, num_heads=3, num_layers=2, in_channels=4,
                       out_channels=6, time_width=32, text_width=20)
GRID = (2, 3, 5)  # tokens of a block: frames, rows, columns


def load(name: str) -> dict[str, np.ndarray]:
  """Arrays of one golden file; weights are called weights/<original name>."""
  with np.load(GOLDENS / f'{name}.npz') as stored:
    return {key: stored[key] for key in stored.files}


def cache_spec(**choices) -> CacheSpec:
  """Sizes of `SPEC` and `GRID`, two compressed tokens a block."""
  return CacheSpec(num_layers=2, num_heads=3, head_dim=16, grid=GRID, mid_grid=(1, 1, 2), **choices)


def cached_flows(model: CausalTransformer, case: dict, spec: CacheSpec, selected=None
                 ) -> tuple[np.ndarray, np.ndarray]:
  """Flow of every block of a case, each denoised once over the cache of the clean ones before.

  Args:
    model: sizes as in `SPEC`.
    case: latents [B, n * 2, h, w, C], text, timestep and perhaps compressed tokens.
    spec: of the cache.
    selected: int [n, L, B, K] compressed blocks to attend; None leaves the choice to the cache.

  Returns:
    Flows [n, B, 2, h, w, C'] and what was attended [n, L, B, K].
  """
  latents = np.split(case['latents'], case['latents'].shape[1] // 2, axis=1)
  batch = len(case['latents'])
  tokens = case.get('compressed', np.zeros((len(latents), batch, 2, SPEC.width), np.float32))
  offsets = case.get('offsets', np.zeros((2, 3), np.float32)).astype(np.float64)
  text = model.text_keys_values(case['text'])

  def run(cache, latents, timestep, choice, *, select=False, **kwargs):
    def context_fn(layer_and_choice, q):
      layer, chosen = layer_and_choice
      if select:
        chosen = cache_lib.select(layer, q, cache.blocks, spec=spec)
      layout = cache_lib.layout(cache.blocks, spec)
      return cache_lib.context(layer, chosen, cache.blocks, layout, spec=spec), chosen

    return model(latents, jnp.full(latents.shape[:2], timestep), text,
                 slices=(cache.layers, choice), context_fn=context_fn, **kwargs)

  @jax.jit
  def one_block(cache, latents, compressed, choice):
    noisy = run(cache, latents, case['timestep'], choice, select=selected is None)
    clean = run(cache, latents, 0.0, noisy.aux, compressed=(compressed, offsets))
    cache = cache_lib.commit(cache, clean.keys_values, clean.compressed, spec=spec)
    return cache, noisy.flow, noisy.aux

  cache, flows, choices = cache_lib.init(spec, batch), [], []
  nothing = np.full((SPEC.num_layers, batch, spec.top_k), -1, np.int32)
  for index, block in enumerate(latents):
    cache, flow, choice = one_block(cache, block, tokens[min(index, len(tokens) - 1)],
                                    nothing if selected is None else selected[index])
    flows.append(flow)
    choices.append(choice)
  return np.stack(flows), np.stack(choices)


def relative_error(ours, theirs) -> float:
  """max|d| / max|ref|."""
  assert ours.shape == theirs.shape
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
