"""Stage "teacher": bidirectional flow matching of whole clips, the model that students distil.

All frames of a clip are noised to one level and attend each other; there is no cache. The text of
some clips is replaced by the empty prompt, so that guidance has an unconditional prediction.

Source: Wan2.1 (what the released model is); Self-Forcing's recipe starts from it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pf_jax.models.bundle import Models
from pf_jax.models.tokenizer import TextBatch
from pf_jax.train.flow_matching import (
  ClipBatch,
  FlowBatch,
  FlowMatchingSpec,
  PartsObjective,
  add_levels,
  check_shares,
  first_loss,
  flow_loss,
)
from pf_jax.types import Array


@dataclasses.dataclass(frozen=True)
class TeacherSpec(FlowMatchingSpec):
  """Choices of the stage, beside those of `FlowMatchingSpec`.

  Attributes:
    drop_text: probability that a clip is shown without its prompt.

  Raises:
    ValueError: a value out of range.
  """

  drop_text: float = 0.1

  def __post_init__(self):
    super().__post_init__()
    check_shares(self, 'drop_text')


def clip_loss(models: Models, clips: ClipBatch, empty: TextBatch, key: Array, spec: TeacherSpec
              ) -> Array:
  """Mean loss of whole clips.

  Args:
    models: networks; the transformer and the text encoder take part.
    clips: true latents and their prompts.
    empty: tokens [1, rows] of the empty prompt.
    key: of levels, noise and dropped prompts.
    spec: choices of the stage.
  """
  drop_key, noise_key = jax.random.split(key)
  dropped = jax.random.bernoulli(drop_key, spec.drop_text, (len(clips.ids), 1))
  text = models.text_keys_values(jnp.where(dropped, empty.ids, clips.ids),
                                 jnp.where(dropped, empty.mask, clips.mask))
  noised = add_levels(clips.latents, noise_key, spec.noise_levels, spec)
  out = models.transformer(noised.x_t, noised.timesteps, text)
  return jnp.mean(flow_loss(out.flow, noised, spec))


class TeacherObjective(PartsObjective):
  """`fit`'s view of the stage: trains transformer and text encoder.

  Args:
    models: the networks to start from; VAE and compressor are carried along untouched.
    empty: tokens of the empty prompt.
    spec: choices of the stage.
  """

  def __init__(self, models: Models, empty: TextBatch, spec: TeacherSpec):
    super().__init__(models, ('transformer', 'text'))
    self._empty, self._spec = empty, spec

  def loss(self, params, batch: FlowBatch, key: Array) -> tuple[Array, dict[str, Array]]:
    """`clip_loss` plus weighted `first_loss`."""
    models = self.assemble(params)
    loss, metrics = jnp.zeros(()), {}
    if batch.clips is not None:
      metrics['clips'] = clip_loss(models, batch.clips, self._empty, key, self._spec)
      loss += metrics['clips']
    if batch.first is not None:
      metrics['first_blocks'] = first_loss(models, batch.first, jax.random.fold_in(key, 1),
                                           self._spec)
      loss += self._spec.first_weight * metrics['first_blocks']
    return loss, metrics
