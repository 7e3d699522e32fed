"""Trains the VAE: reconstruction plus a small KL term, at full and at pooled resolution.

  loss = rec(x, D(z)) + w_kl KL(N(mu, sigma^2) || N(0, 1)),   z = mu + sigma noise
  rec(x, y) = w_l1 mean|x - y| + w_l2 mean (x - y)^2

The compressor's low-resolution branch re-encodes pixels that were pooled in time and space, so the
same weights must also reconstruct such clips: every batch is therefore seen twice, once as random
crops and once pooled. A pooled clip is small, which makes the second pass cheap.
"""

import dataclasses
from collections.abc import Mapping

import einops
import jax
import jax.numpy as jnp
import numpy as np

from pf_jax.models.initialise import init_module
from pf_jax.models.vae import VaeSpec, WanVae
from pf_jax.types import Array

_LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class VaeLossSpec:
  """Choices of the VAE's training.

  Attributes:
    crop: (frames, height, width) of random crops; None trains on whole clips.
    l1: weight of the mean absolute error.
    l2: weight of the mean squared error.
    kl: weight of the KL term per latent element.
    pooled: weight of the pooled clips' loss; 0 leaves them out.
    pool_time: pixel frames averaged into one.
    pool_space: pixels averaged into one, each axis.
    pooled_latent_frames: length of the pooled clips.

  Raises:
    ValueError: a weight is negative, or nothing is reconstructed.
  """

  crop: tuple[int, int, int] | None = (17, 32, 32)
  l1: float = 1.0
  l2: float = 0.0
  kl: float = 1e-5
  pooled: float = 0.1
  pool_time: int = 2
  pool_space: int = 4
  pooled_latent_frames: int = 2

  def __post_init__(self):
    if min(self.l1, self.l2, self.kl, self.pooled) < 0 or not self.l1 + self.l2 > 0:
      raise ValueError(f'{self} needs weights of 0 or more, and l1 or l2 above 0.')


def psnr(pixels: Array, reconstruction: Array) -> Array:
  """Peak signal-to-noise ratio in dB, float32 []; pixels in [-1, 1], the reconstruction clamped."""
  error = jnp.mean(jnp.square(pixels - jnp.clip(reconstruction, -1, 1)))
  return 10 * jnp.log10(4 / jnp.maximum(error, 1e-10))


def random_crops(pixels: Array, key: Array, crop: tuple[int, int, int]) -> Array:
  """Cuts one box out of every clip, at its own random place.

  Args:
    pixels: [B, T, H, W, 3].
    key: PRNG key.
    crop: frames, height, width.

  Returns:
    [B, *crop, 3].

  Raises:
    ValueError: the box is larger than the clips.
  """
  sizes = pixels.shape[1:4]
  if any(c > s for c, s in zip(crop, sizes, strict=True)):
    raise ValueError(f'{crop=} does not fit into clips of {sizes}; use a smaller one or None.')

  def cut(clip: Array, key: Array) -> Array:
    spare = jnp.asarray([s - c + 1 for c, s in zip(crop, sizes, strict=True)])
    start = jax.random.randint(key, (3,), 0, spare)
    return jax.lax.dynamic_slice(clip, (*start, 0), (*crop, clip.shape[-1]))

  return jax.vmap(cut)(pixels, jax.random.split(key, pixels.shape[0]))


def pool_clips(pixels: Array, vae: VaeSpec, spec: VaeLossSpec) -> Array:
  """Pools the beginning of clips the way the compressor's low-resolution branch pools a block.

  The frames of the first latent frame are averaged into a single picture, the others in groups of
  `pool_time`.

  Args:
    pixels: [B, T, H, W, 3], T >= pooled_latent_frames * pool_time * vae.temporal_stride.
    vae: strides.
    spec: pooling.

  Returns:
    [B, 1 + (pooled_latent_frames - 1) * vae.temporal_stride, H/p, W/p, 3].

  Raises:
    ValueError: too few frames.
  """
  head = spec.pool_time * vae.temporal_stride
  frames = spec.pooled_latent_frames * head
  if pixels.shape[1] < frames:
    raise ValueError(f'clips of {pixels.shape[1]} frames are too short to be pooled to '
                     f'{spec.pooled_latent_frames=}; use at least {frames} frames.')
  pixels = einops.reduce(pixels[:, :frames], 'b t (y p) (x q) c -> b t y x c', 'mean',
                         p=spec.pool_space, q=spec.pool_space)
  first = einops.reduce(pixels[:, :head], 'b t y x c -> b 1 y x c', 'mean')
  rest = einops.reduce(pixels[:, head:], 'b (t s) y x c -> b t y x c', 'mean', s=spec.pool_time)
  return jnp.concatenate([first, rest], axis=1)


def _reconstruction_loss(vae: WanVae, pixels: Array, key: Array,
                         spec: VaeLossSpec) -> tuple[Array, dict[str, Array]]:
  mean, logvar = vae.encode_moments(pixels)
  logvar = jnp.clip(logvar, *_LOGVAR_RANGE)
  noise = jax.random.normal(key, mean.shape, mean.dtype)
  decoded = vae.decode_sample(mean + jnp.exp(0.5 * logvar) * noise)
  error = decoded - pixels
  kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
  loss = (spec.l1 * jnp.mean(jnp.abs(error)) + spec.l2 * jnp.mean(jnp.square(error))
          + spec.kl * kl)
  return loss, {'psnr': psnr(pixels, decoded), 'kl': kl, 'latent_std': jnp.std(mean)}


def vae_loss(vae: WanVae, pixels: Array, key: Array,
             spec: VaeLossSpec) -> tuple[Array, dict[str, Array]]:
  """The loss of one batch of clips.

  Args:
    vae: the network.
    pixels: [B, T, H, W, 3] in [-1, 1].
    key: PRNG key for crops and posterior samples.
    spec: choices.

  Returns:
    The loss, and scalar metrics: `psnr` (dB, of the sampled reconstruction), `kl` (nats per latent
    element), `latent_std`, and with pooling `psnr_pooled`.

  Raises:
    ValueError: clips too small for the crop or the pooling.
  """
  crop_key, key, pooled_key = jax.random.split(key, 3)
  crops = pixels if spec.crop is None else random_crops(pixels, crop_key, spec.crop)
  loss, metrics = _reconstruction_loss(vae, crops, key, spec)
  if spec.pooled:
    pooled, extra = _reconstruction_loss(vae, pool_clips(pixels, vae.spec, spec), pooled_key, spec)
    loss = loss + spec.pooled * pooled
    metrics['psnr_pooled'] = extra['psnr']
  return loss, metrics


class VaeObjective:
  """`fit`'s view of the VAE's training."""

  def __init__(self, vae: VaeSpec, spec: VaeLossSpec = VaeLossSpec()):
    """Keeps the choices; `init` builds the network.

    Args:
      vae: sizes.
      spec: choices of the training.
    """
    self._vae, self._spec = vae, spec

  def init(self, seed: int) -> WanVae:
    """A fresh VAE."""
    return init_module(lambda rngs: WanVae(self._vae, rngs=rngs), seed)

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
