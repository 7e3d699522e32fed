"""What the released checkpoints hold: every tensor's names and shape, written down from the files.

Nothing here is derived from pf_jax: it is the other side of the comparison. Numbers of layers and
widths are those of the published configurations.
"""

from collections.abc import Iterator
from typing import NamedTuple

Shape = tuple[int, ...]


class Tensor(NamedTuple):
  """A tensor's name in Wan2.1's own files and in diffusers' or transformers', and its shape."""

  wan: str
  diffusers: str
  shape: Shape


def _pair(wan: str, diffusers: str, shape: Shape) -> list[Tensor]:
  """A weight and its bias, one entry per output."""
  return [Tensor(f'{wan}.weight', f'{diffusers}.weight', shape),
          Tensor(f'{wan}.bias', f'{diffusers}.bias', shape[:1])]


def transformer(width: int, ffn: int, layers: int) -> Iterator[Tensor]:
  """The DiT: 825 tensors at 30 layers (1.3B), 1,095 at 40 (14B)."""
  yield from _pair('patch_embedding', 'patch_embedding', (width, 16, 1, 2, 2))
  embedder = 'condition_embedder'
  yield from _pair('text_embedding.0', f'{embedder}.text_embedder.linear_1', (width, 4096))
  yield from _pair('text_embedding.2', f'{embedder}.text_embedder.linear_2', (width, width))
  yield from _pair('time_embedding.0', f'{embedder}.time_embedder.linear_1', (width, 256))
  yield from _pair('time_embedding.2', f'{embedder}.time_embedder.linear_2', (width, width))
  yield from _pair('time_projection.1', f'{embedder}.time_proj', (6 * width, width))
  for i in range(layers):
    yield Tensor(f'blocks.{i}.modulation', f'blocks.{i}.scale_shift_table', (1, 6, width))
    for ours, theirs in (('self_attn', 'attn1'), ('cross_attn', 'attn2')):
      for part, other in (('q', 'to_q'), ('k', 'to_k'), ('v', 'to_v'), ('o', 'to_out.0')):
        yield from _pair(f'blocks.{i}.{ours}.{part}', f'blocks.{i}.{theirs}.{other}',
                         (width, width))
      for norm in ('norm_q', 'norm_k'):
        yield Tensor(f'blocks.{i}.{ours}.{norm}.weight', f'blocks.{i}.{theirs}.{norm}.weight',
                     (width,))
    yield from _pair(f'blocks.{i}.norm3', f'blocks.{i}.norm2', (width,))
    yield from _pair(f'blocks.{i}.ffn.0', f'blocks.{i}.ffn.net.0.proj', (ffn, width))
    yield from _pair(f'blocks.{i}.ffn.2', f'blocks.{i}.ffn.net.2', (width, ffn))
  yield Tensor('head.modulation', 'scale_shift_table', (1, 2, width))
  yield from _pair('head.head', 'proj_out', (64, width))


def text() -> Iterator[Tensor]:
  """UMT5-XXL's encoder: 242 tensors."""
  yield Tensor('token_embedding.weight', 'shared.weight', (256384, 4096))
  for i in range(24):
    attention = f'encoder.block.{i}.layer.0'
    feed_forward = f'encoder.block.{i}.layer.1'
    yield Tensor(f'blocks.{i}.norm1.weight', f'{attention}.layer_norm.weight', (4096,))
    for part in 'qkvo':
      yield Tensor(f'blocks.{i}.attn.{part}.weight', f'{attention}.SelfAttention.{part}.weight',
                   (4096, 4096))
    yield Tensor(f'blocks.{i}.pos_embedding.embedding.weight',
                 f'{attention}.SelfAttention.relative_attention_bias.weight', (32, 64))
    yield Tensor(f'blocks.{i}.norm2.weight', f'{feed_forward}.layer_norm.weight', (4096,))
    for part, other, shape in (('gate.0', 'wi_0', (10240, 4096)), ('fc1', 'wi_1', (10240, 4096)),
                               ('fc2', 'wo', (4096, 10240))):
      yield Tensor(f'blocks.{i}.ffn.{part}.weight', f'{feed_forward}.DenseReluDense.{other}.weight',
                   shape)
  yield Tensor('norm.weight', 'encoder.final_layer_norm.weight', (4096,))


def _res_block(wan: str, diffusers: str, width_in: int, width: int) -> Iterator[Tensor]:
  yield Tensor(f'{wan}.residual.0.gamma', f'{diffusers}.norm1.gamma', (width_in, 1, 1, 1))
  yield from _pair(f'{wan}.residual.2', f'{diffusers}.conv1', (width, width_in, 3, 3, 3))
  yield Tensor(f'{wan}.residual.3.gamma', f'{diffusers}.norm2.gamma', (width, 1, 1, 1))
  yield from _pair(f'{wan}.residual.6', f'{diffusers}.conv2', (width, width, 3, 3, 3))
  if width_in != width:
    yield from _pair(f'{wan}.shortcut', f'{diffusers}.conv_shortcut', (width, width_in, 1, 1, 1))


def _middle(coder: str) -> Iterator[Tensor]:
  yield from _res_block(f'{coder}.middle.0', f'{coder}.mid_block.resnets.0', 384, 384)
  wan, diffusers = f'{coder}.middle.1', f'{coder}.mid_block.attentions.0'
  yield Tensor(f'{wan}.norm.gamma', f'{diffusers}.norm.gamma', (384, 1, 1))
  yield from _pair(f'{wan}.to_qkv', f'{diffusers}.to_qkv', (1152, 384, 1, 1))
  yield from _pair(f'{wan}.proj', f'{diffusers}.proj', (384, 384, 1, 1))
  yield from _res_block(f'{coder}.middle.2', f'{coder}.mid_block.resnets.1', 384, 384)


# (layer, channels in, channels out, kind): what stands where in the two flat lists.
_ENCODER = ((0, 96, 96, 'res'), (1, 96, 96, 'res'), (2, 96, 96, 'space'),
            (3, 96, 192, 'res'), (4, 192, 192, 'res'), (5, 192, 192, 'space and time'),
            (6, 192, 384, 'res'), (7, 384, 384, 'res'), (8, 384, 384, 'space and time'),
            (9, 384, 384, 'res'), (10, 384, 384, 'res'))
_DECODER = ((0, 384, 384, 'res'), (1, 384, 384, 'res'), (2, 384, 384, 'res'),
            (3, 384, 192, 'space and time'),
            (4, 192, 384, 'res'), (5, 384, 384, 'res'), (6, 384, 384, 'res'),
            (7, 384, 192, 'space and time'),
            (8, 192, 192, 'res'), (9, 192, 192, 'res'), (10, 192, 192, 'res'),
            (11, 192, 96, 'space'),
            (12, 96, 96, 'res'), (13, 96, 96, 'res'), (14, 96, 96, 'res'))


def vae() -> Iterator[Tensor]:
  """The VAE: 194 tensors."""
  for coder, width_in, width_out in (('encoder', 3, 96), ('decoder', 16, 384)):
    yield from _pair(f'{coder}.conv1', f'{coder}.conv_in', (width_out, width_in, 3, 3, 3))
  for layer, width_in, width, kind in _ENCODER:
    wan, diffusers = f'encoder.downsamples.{layer}', f'encoder.down_blocks.{layer}'
    if kind == 'res':
      yield from _res_block(wan, diffusers, width_in, width)
      continue
    yield from _pair(f'{wan}.resample.1', f'{diffusers}.resample.1', (width, width, 3, 3))
    if 'time' in kind:
      yield from _pair(f'{wan}.time_conv', f'{diffusers}.time_conv', (width, width, 3, 1, 1))
  for layer, width_in, width, kind in _DECODER:
    wan, group = f'decoder.upsamples.{layer}', f'decoder.up_blocks.{layer // 4}'
    if kind == 'res':
      yield from _res_block(wan, f'{group}.resnets.{layer % 4}', width_in, width)
      continue
    diffusers = f'{group}.upsamplers.0'
    yield from _pair(f'{wan}.resample.1', f'{diffusers}.resample.1', (width, width_in, 3, 3))
    if 'time' in kind:
      yield from _pair(f'{wan}.time_conv', f'{diffusers}.time_conv',
                       (2 * width_in, width_in, 3, 1, 1))
  for coder in ('encoder', 'decoder'):
    yield from _middle(coder)
  for coder, width_in, width in (('encoder', 384, 32), ('decoder', 96, 3)):
    yield Tensor(f'{coder}.head.0.gamma', f'{coder}.norm_out.gamma', (width_in, 1, 1, 1))
    yield from _pair(f'{coder}.head.2', f'{coder}.conv_out', (width, width_in, 3, 3, 3))
  yield from _pair('conv1', 'quant_conv', (32, 32, 1, 1, 1))
  yield from _pair('conv2', 'post_quant_conv', (16, 16, 1, 1, 1))
