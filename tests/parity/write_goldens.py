"""Writes tests/goldens/*.npz: oracle cases that plain `make test` replays without torch.

Run by hand when a case changes: `.venv-parity/bin/python -m tests.parity.write_goldens [NAME ...]`.
`test_goldens.py` checks that the stored files still are what the oracles say.

Every file holds `weights/<Wan2.1's original name>` and the arrays of its cases, float32. Weights
are stored once per model: `dit_causal.npz` and `dit_pack.npz` use those of `dit.npz`. Only
`sampler.npz` has two networks, `transformer/...` and `vae/...`.
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import torch

from tests.parity import oracles, sampler_oracle, test_scheduler_parity, vae_oracle

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / 'goldens'
LARGEST = 600_000  # bytes a file, so that the repository stays small

Arrays = dict[str, np.ndarray]


def text_case() -> Arrays:
  """UMT5 over 200 rows: one prompt fills them, one ends early, one is a single token."""
  model = oracles.tiny_umt5(seed=1)
  rng = np.random.default_rng(2)
  ids = rng.integers(4, 97, (3, 200)).astype(np.int32)
  mask = np.arange(200) < np.array([[200], [137], [1]])
  ids = np.where(mask, ids, 0)
  return _weights(model) | {'ids': ids, 'mask': mask, 'output': oracles.umt5_oracle(
      model, ids, mask)}


def _dit() -> torch.nn.Module:
  return oracles.tiny_wan_transformer(seed=3, float64_sinusoid=True)


def _inputs(frames: int) -> Arrays:
  """Latents [2, frames, 6, 10, 4] and text [2, 12, 20], of which 7 and 12 rows are real."""
  rng = np.random.default_rng(4)
  text = rng.standard_normal((2, 12, 20)).astype(np.float32)
  text[0, 7:] = 0
  return {'latents': rng.standard_normal((2, frames, 6, 10, 4)).astype(np.float32), 'text': text}


def dit_case() -> Arrays:
  """The bidirectional transformer at `oracles.TIMESTEPS`, both samples at each.

  `flow` [6, B, F, h, w, C']: one timestep for all frames; `frame_flow`: all of them in turn, frame
  by frame, as `frame_timesteps` [6, F] says.
  """
  model, inputs = _dit(), _inputs(frames=3)
  timesteps = np.array(oracles.TIMESTEPS, np.float32)
  per_frame = np.stack([np.roll(timesteps, shift) for shift in (0, 1, 3)], axis=1)

  def flows(timesteps):
    return np.stack([oracles.wan_oracle(model, **inputs, timesteps=np.stack([t, t]))
                     for t in timesteps])

  return _weights(model) | inputs | {
      'timesteps': timesteps, 'flow': flows(timesteps),
      'frame_timesteps': per_frame, 'frame_flow': flows(per_frame)}


def causal_case() -> Arrays:
  """Six blocks of two frames; flows [6, B, 2, h, w, C'] of block i after i clean blocks.

  `full_flow`: everything before is visible. `window_flow`: one sink block and two recent ones,
  at the positions they were generated at. `packed_flow`: the same blocks without gaps.
  """
  model, inputs = _dit(), _inputs(frames=12)
  blocks = np.split(inputs['latents'], 6, axis=1)
  flows = {'full_flow': [], 'window_flow': [], 'packed_flow': []}
  for count in range(1, 7):
    timesteps = np.zeros((2, 2 * count), np.float32)
    timesteps[:, -2:] = 937.5
    visible, packed = oracles.window(count, sink=1, recent=2, frames=2)
    cases = ({}, {'visible': visible}, {'visible': visible, 'positions': packed})
    for flow, case in zip(flows.values(), cases, strict=True):
      flow.append(oracles.masked_causal_oracle(model, blocks[:count], timesteps, inputs['text'],
                                               **case))
  return inputs | {'timestep': np.float32(937.5)} | {k: np.stack(v) for k, v in flows.items()}


def pack_case() -> Arrays:
  """Eight blocks under sink 1, recent 1, K = 2 compressed blocks of 2 tokens, chosen per layer.

  `selected` [8, L, B, K] follows no rule (a test hands it to the cache); `fifo` is the newest K.
  Both flows are [8, B, 2, h, w, C'].
  """
  model, inputs = _dit(), _inputs(frames=16)
  blocks = np.split(inputs['latents'], 8, axis=1)
  rng = np.random.default_rng(5)
  compressed = rng.standard_normal((7, 2, 2, 48)).astype(np.float32)
  offsets = np.array([[0.5, 1.0, 1.0], [0.5, 1.0, 3.5]])
  selected, fifo = np.full((2, 8, 2, 2, 2), -1)
  for index in range(3, 8):
    archive = np.arange(1, index - 1)
    size = min(len(archive), 2)
    fifo[index, :, :, :size] = archive[-size:]
    for layer, sample in np.ndindex(2, 2):
      selected[index, layer, sample, :size] = np.sort(rng.choice(archive, size, replace=False))
  flows = {'selected_flow': selected, 'fifo_flow': fifo}
  for name, choice in list(flows.items()):
    flows[name] = np.stack([oracles.pack_oracle(
        model, blocks[:count], compressed[:count - 1], offsets, 937.5, inputs['text'],
        sink_blocks=1, recent_blocks=1, selected=choice) for count in range(1, 9)])
  return inputs | flows | {
      'compressed': compressed, 'offsets': offsets.astype(np.float32),
      'timestep': np.float32(937.5), 'selected': selected.astype(np.int32),
      'fifo': fifo.astype(np.int32)}


CASES = {'text': text_case, 'dit': dit_case, 'dit_causal': causal_case, 'dit_pack': pack_case,
         'vae': vae_oracle.vae_case, 'sampler': sampler_oracle.sampler_case,
         'schedulers': test_scheduler_parity.scheduler_case}


def _weights(model: torch.nn.Module) -> Arrays:
  return {f'weights/{name}': array for name, array in oracles.wan_tensors(model).items()}


def main(names: Sequence[str]):
  """Writes the named files, or all."""
  torch.set_grad_enabled(False)
  torch.set_num_threads(1)
  for name in names or CASES:
    path = GOLDENS / f'{name}.npz'
    np.savez_compressed(path, **CASES[name]())
    size = path.stat().st_size
    print(f'{path.relative_to(GOLDENS.parent.parent)}: {size:,} bytes')
    if size > LARGEST:
      raise ValueError(f'{path} has {size} bytes, wanted at most {LARGEST}; make the case smaller.')


if __name__ == '__main__':
  main(sys.argv[1:])
