"""Wan2.1's text checkpoint (`models_t5_umt5-xxl-enc-bf16.pth`) <-> `UMT5Encoder`."""

from pf_jax.weights.rules import Rule, rename, transposed

RULES = {
    'token_embedding': Rule('token_embedding.weight'),
    'layers.norm1.scale': Rule('blocks.{}.norm1.weight'),
    'layers.attn.q.kernel': transposed('blocks.{}.attn.q.weight'),
    'layers.attn.k.kernel': transposed('blocks.{}.attn.k.weight'),
    'layers.attn.v.kernel': transposed('blocks.{}.attn.v.weight'),
    'layers.attn.o.kernel': transposed('blocks.{}.attn.o.weight'),
    'layers.attn.position_bias': Rule('blocks.{}.pos_embedding.embedding.weight'),
    'layers.norm2.scale': Rule('blocks.{}.norm2.weight'),
    'layers.ffn.gate.kernel': transposed('blocks.{}.ffn.gate.0.weight'),
    'layers.ffn.fc1.kernel': transposed('blocks.{}.ffn.fc1.weight'),
    'layers.ffn.fc2.kernel': transposed('blocks.{}.ffn.fc2.weight'),
    'norm.scale': Rule('norm.weight'),
}

_ATTENTION, _FEED_FORWARD = 'layer.0.SelfAttention', 'layer.1.DenseReluDense'
# Wan2.1's names -> transformers'.
_TRANSFORMERS = (
    (r'^token_embedding\.', 'shared.'),
    (r'^norm\.', 'encoder.final_layer_norm.'),
    (r'^blocks\.', 'encoder.block.'),
    (r'\.norm1\.', '.layer.0.layer_norm.'),
    (r'\.norm2\.', '.layer.1.layer_norm.'),
    (r'\.attn\.', f'.{_ATTENTION}.'),
    (r'\.pos_embedding\.embedding\.', f'.{_ATTENTION}.relative_attention_bias.'),
    (r'\.ffn\.gate\.0\.', f'.{_FEED_FORWARD}.wi_0.'),
    (r'\.ffn\.fc1\.', f'.{_FEED_FORWARD}.wi_1.'),
    (r'\.ffn\.fc2\.', f'.{_FEED_FORWARD}.wo.'),
)


def transformers_name(name: str) -> str:
  """A tensor's name in transformers' `UMT5EncoderModel`."""
  return rename(name, _TRANSFORMERS)
