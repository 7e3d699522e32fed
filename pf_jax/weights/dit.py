"""Wan2.1's transformer checkpoint (`diffusion_pytorch_model*.safetensors`) <-> `CausalTransformer`.

Self-Forcing's checkpoints hold the same tensors under a prefix.
"""

from pf_jax.models.transformer import TransformerSpec
from pf_jax.weights.rules import Rule, linear, rename, without_batch

# Wan2.1's names -> diffusers'. Wan's norm3, the affine one before cross-attention, is norm2 there.
_DIFFUSERS = (
    (r'^text_embedding\.0', 'condition_embedder.text_embedder.linear_1'),
    (r'^text_embedding\.2', 'condition_embedder.text_embedder.linear_2'),
    (r'^time_embedding\.0', 'condition_embedder.time_embedder.linear_1'),
    (r'^time_embedding\.2', 'condition_embedder.time_embedder.linear_2'),
    (r'^time_projection\.1', 'condition_embedder.time_proj'),
    (r'^head\.modulation', 'scale_shift_table'),
    (r'^head\.head', 'proj_out'),
    (r'\.modulation$', '.scale_shift_table'),
    (r'\.(self|cross)_attn\.([qkv])\.', r'.\1_attn.to_\2.'),
    (r'\.(self|cross)_attn\.o\.', r'.\1_attn.to_out.0.'),
    (r'\.self_attn\.', '.attn1.'),
    (r'\.cross_attn\.', '.attn2.'),
    (r'\.norm3\.', '.norm2.'),
    (r'\.ffn\.0\.', '.ffn.net.0.proj.'),
    (r'\.ffn\.2\.', '.ffn.net.2.'),
)


def diffusers_name(name: str) -> str:
  """A tensor's name in diffusers' `WanTransformer3DModel`."""
  return rename(name, _DIFFUSERS)


def rules(spec: TransformerSpec) -> dict[str, Rule]:
  """The table of a transformer; the patch embedding's layout depends on the sizes."""
  layer = {'layers.modulation': without_batch('blocks.{}.modulation'),
           'layers.norm3.scale': Rule('blocks.{}.norm3.weight'),
           'layers.norm3.bias': Rule('blocks.{}.norm3.bias')}
  for attention in ('self_attn', 'cross_attn'):
    for part in 'qkvo':
      layer |= linear(f'layers.{attention}.{part}', f'blocks.{{}}.{attention}.{part}')
    for norm in ('norm_q', 'norm_k'):
      layer[f'layers.{attention}.{norm}.scale'] = Rule(f'blocks.{{}}.{attention}.{norm}.weight')
  return {
      'patch_embedding.proj.kernel': _patch_kernel(spec),
      'patch_embedding.proj.bias': Rule('patch_embedding.bias'),
      **linear('text_in', 'text_embedding.0'),
      **linear('text_out', 'text_embedding.2'),
      **linear('time_in', 'time_embedding.0'),
      **linear('time_out', 'time_embedding.2'),
      **linear('time_projection', 'time_projection.1'),
      **layer,
      **linear('layers.ffn_in', 'blocks.{}.ffn.0'),
      **linear('layers.ffn_out', 'blocks.{}.ffn.2'),
      'head_modulation': without_batch('head.modulation'),
      **linear('head', 'head.head'),
  }


def _patch_kernel(spec: TransformerSpec) -> Rule:
  """Released [D, C, p, q, r]; ours is [p*q*r*C, D]: the channel moves from slowest to fastest."""
  sizes = (*spec.patch, spec.in_channels, spec.width)
  return Rule('patch_embedding.weight',
              lambda kernel: kernel.transpose(2, 3, 4, 1, 0).reshape(-1, spec.width),
              lambda kernel: kernel.reshape(sizes).transpose(4, 3, 0, 1, 2))
