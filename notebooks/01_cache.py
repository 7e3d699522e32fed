# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The PackForcing cache, block by block
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/pf-jax/pf_jax/blob/main/notebooks/01_cache.ipynb)
#
# A video is generated one *block* (4 latent frames, 1 second) after the other. What a block may
# look at is a cache of three partitions whose size never changes: **sink** (the first blocks, full
# resolution, for ever), **mid** (older blocks, compressed 32 times; the most relevant few are
# attended) and **recent** (the newest, full resolution). Here we fill one with the model that ships
# with the package and watch it.

# %%
# On Colab: uncomment and run once.
# # %pip install --quiet git+https://github.com/pf-jax/pf_jax

# %%
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from PIL import Image

import pf_jax
from pf_jax import cache
from pf_jax.cache.inspect import block_states
from pf_jax.viz import plots, sheet

# %% [markdown]
# ## The easiest call
#
# Three lines make a video. We make the cache small, so that everything happens within 24 blocks:
# 12 compressed blocks fit into the archive and a block attends 4 of them.

# %%
model = pf_jax.load(cache=dict(sink_blocks=1, recent_blocks=1, top_k=4, mid_capacity=12))
spec = model.spec.cache
prompt, count = 'a white seven drifts right on a teal background', 24

# %% [markdown]
# ## One block at a time
#
# `model.blocks` yields every block with its frames, its latents, and the archived blocks that each
# layer selected in the block's first denoising pass.

# %%
frames, selected = [], []
for block in model.blocks([prompt], count, seeds=[0]):
  frames.append(np.asarray(block.frames[0]))
  selected.append(np.asarray(block.selected[:, 0]))  # [layers, top_k], -1 for none
video = np.concatenate(frames)

# %%
display(Image.fromarray(sheet.contact_sheet([video], fps=model.video.fps, labels=[prompt])))

# %% [markdown]
# ## Where every block is
#
# A column is a moment: while block *x* is generated, block *y* is in the partition of that colour.
# Blocks age upwards: generated, recent, archived (light) or selected (dark), and evicted when the
# archive of 12 is full. The sink never moves. Selected are the blocks that the *first* layer chose.

# %%
states = np.stack([block_states(i, count, spec, selected[i][0]) for i in range(count)])
display(Image.fromarray(plots.cache_timeline(states, title='layer 0')))

# %% [markdown]
# ## Every layer selects for itself
#
# The score of an archived block is the sum of the block's queries times the sum of its keys: no
# softmax, so one stored *key-sum* per block makes it exact. White is what the layer attended.

# %%
figure, axes = plt.subplots(1, len(selected[0]), figsize=(12, 3), sharey=True)
for layer, axis in enumerate(axes):
  chosen = np.array([np.isin(np.arange(count), s[layer]) for s in selected])
  axis.imshow(chosen.T, origin='lower', cmap='gray')
  axis.set(title=f'layer {layer}', xlabel='block being generated')
axes[0].set_ylabel('archived block')
plt.show()

# %% [markdown]
# ## Positions without gaps
#
# Selected blocks come from anywhere in the past, yet to the model they are neighbours: every slot
# starts where the one before it ends, so positions stop growing once the cache is full. Without
# this *re-alignment* block 23 would look back 92 latent frames, further than any training clip.

# %%
def distances(block, spec):
  """Latent frames from the current block back to each slot that counts."""
  place = cache.layout(np.int32(block), spec)
  slots = np.concatenate([place.sink[0], place.mid[0], place.recent[0]])
  valid = np.concatenate([place.sink_valid[0], place.mid_valid[0], place.recent_valid[0]])
  return (int(place.current[0]) - slots)[valid]

farthest = [distances(i, spec).max(initial=0) for i in range(count)]
plt.plot(farthest, 'o-', label='re-aligned')
plt.plot(np.arange(count) * spec.frames_per_block, '--', label='where the sink really is')
plt.xlabel('block being generated')
plt.ylabel('farthest look back, latent frames')
plt.legend()
plt.show()

# %% [markdown]
# ## What it saves
#
# A cache that keeps everything grows with every block; this one is as large at two hours as it is
# now. (The archive is the larger part here because the miniature's blocks are tiny: a compressed
# block is 2 tokens, a full one 64.)

# %%
parts = spec.partition_bytes()
full = np.arange(1, 7201) * spec.block_tokens * spec.token_bytes()
plt.loglog(full / 1e6, label='full history')
plt.loglog(np.full(7200, sum(parts.values())) / 1e6, label='sink + mid + recent')
plt.xlabel('blocks (seconds)')
plt.ylabel('MB')
plt.legend()
plt.show()
{name: f'{size / 1e3:.1f} kB' for name, size in parts.items()}

# %% [markdown]
# ## Change something
#
# - `pf_jax.load(cache=dict(sink_blocks=0))`: no sink. How long does the digit survive?
# - `selection='fifo'`: the newest blocks instead of the most relevant ones.
# - `positions='absolute'`: no re-alignment.
