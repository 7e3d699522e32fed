"""Trains the VAE: reconstruction plus a small KL term.

  loss = rec(x, D(z)) + w_kl KL(N(mu, sigma^2) || N(0, 1)),   z = mu + sigma noise
  rec(x, y) = w_l1 mean|x - y| + w_l2 mean (x - y)^2

The compressor's low-resolution branch re-encodes pixels that were pooled in time and space, so the
same weights must also reconstruct such clips: they are part of every batch (see `data.crops`).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pf_jax.models.initialise import init_module
from pf_jax.models.vae import VaeSpec, WanVae
from pf_jax.types import Array, PyTree

_LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class VaeLossSpec:
  """Weights of the loss.

  Attributes:
    l1: weight of the mean absolute error.
    l2: weight of the mean squared error.
    kl: weight of the KL term per latent element.

  Raises:
    ValueError: a weight is negative, or nothing is reconstructed.
  """

  l1: float = 1.0
  l2: float = 1.0
  kl: float = 1e-5

  def __post_init__(self):
    if min(self.l1, self.l2, self.kl) < 0 or not self.l1 + self.l2 > 0:
      raise ValueError(f'{self} needs weights of 0 or more, and l1 or l2 above 0.')


def psnr(pixels: Array, reconstruction: Array) -> Array:
  """Peak signal-to-noise ratio in dB of pictures in [-1, 1], one per clip: [B, ...] -> [B].

  The reconstruction is clamped first.
  """
  error = jnp.square(pixels - jnp.clip(reconstruction, -1, 1))
  error = jnp.mean(error, axis=tuple(range(1, pixels.ndim)))
  return 10 * jnp.log10(4 / jnp.maximum(error, 1e-10))


def vae_loss(vae: WanVae, pixels: Array, key: Array,
             spec: VaeLossSpec) -> tuple[Array, dict[str, Array]]:
  """The loss of one batch of clips.

  Args:
    vae: the network.
    pixels: [B, T, H, W, 3] in [-1, 1].
    key: PRNG key of the posterior samples.
    spec: weights.

  Returns:
    The loss, and scalar metrics: `psnr` (dB, mean over clips of the sampled reconstruction), `kl`
    (nats per latent element) and `latent_std`.
  """
  mean, logvar = vae.encode_moments(pixels)
  logvar = jnp.clip(logvar, *_LOGVAR_RANGE)
  noise = jax.random.normal(key, mean.shape, mean.dtype)
  decoded = vae.decode_sample(mean + jnp.exp(0.5 * logvar) * noise)
  error = decoded - pixels
  kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
  loss = (spec.l1 * jnp.mean(jnp.abs(error)) + spec.l2 * jnp.mean(jnp.square(error))
          + spec.kl * kl)
  return loss, {'psnr': jnp.mean(psnr(pixels, decoded)), 'kl': kl, 'latent_std': jnp.std(mean)}


class VaeObjective:
  """`fit`'s view of the VAE's training."""

  def __init__(self, vae: VaeSpec, spec: VaeLossSpec = VaeLossSpec()):
    """Keeps the choices; `init` builds the network.

    Args:
      vae: sizes.
      spec: weights of the loss.
    """
    self._vae, self._spec = vae, spec

  def init(self, seed: int) -> WanVae:
    """A fresh VAE."""
    return init_module(lambda rngs: WanVae(self._vae, rngs=rngs), seed)

  def muon_axes(self, params: WanVae) -> PyTree:
    """Muon for convolution kernels, as matrices from all their inputs to their outputs."""
    return jax.tree.map(
        lambda leaf: optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
        if leaf.ndim > 1 else None, params)

  def loss(self, params: WanVae, batch: Mapping[str, Array],
           key: Array) -> tuple[Array, dict[str, Array]]:
    """See `vae_loss`; `batch['pixels']` is uint8 [B, T, H, W, 3]."""
    return vae_loss(params, batch['pixels'].astype(jnp.float32) / 127.5 - 1, key, self._spec)


def latent_statistics(latents: np.ndarray, spec: VaeSpec) -> VaeSpec:
  """Measures a trained VAE's latents and writes mean and deviation into its spec.

  Args:
    latents: un-normalised posterior means of many clips, [..., C].
    spec: the VAE they come from.

  Returns:
    The spec with `latent_mean` and `latent_std` per channel, so that `encode` gives zero mean and
    unit variance.
  """
  flat = np.asarray(latents, np.float64).reshape(-1, spec.latent_channels)
  return dataclasses.replace(spec, latent_mean=tuple(flat.mean(0).tolist()),
                             latent_std=tuple(np.maximum(flat.std(0), 1e-6).tolist()))
