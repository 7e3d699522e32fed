"""Wan2.1's causal video VAE, channels last: pixels [B, T, H, W, 3] <-> latents [B, F, h, w, C].

Every temporal convolution looks only at the past, so a video can be encoded or decoded in pieces.
What a piece has to know about the pieces before it is the last `kernel - 1` input frames of each
temporal convolution: its *slots*. Seen that way there is one rule and no special cases for chunk
sizes: put the slot in front of the input, convolve without temporal padding, keep the last frames.
Only three things are particular about the very first frame of a video:

  * slots start as zeros;
  * `Upsample` passes the first latent frame on as a single frame, skipping its temporal
    convolution, and does *not* remember it: the next frame meets a history of zeros;
  * `Downsample` passes the first frame on likewise, but does remember it.

Hence F = 1 + (T - 1) / temporal_stride, and T pixel frames of one video may be cut anywhere
between latent frames: encoding or decoding in one shot is the streaming code with one large first
piece. The state has a fixed shape, so `encode_next` and `decode_next` live inside `jax.jit` and
`jax.lax.scan`.

The layers correspond one to one to the tensors of the released checkpoint, in the same order.

Source: Wan2.1 (arXiv:2503.20314), its published model and inference code.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pf_jax.kernels.conv3d import Epilogue, conv3d, rms_norm, supports
from pf_jax.types import DTypes, check_shape

Array = jax.Array

_PIXEL_CHANNELS = 3
_INITIAL_LOGVAR = -6.0


@dataclasses.dataclass(frozen=True)
class VaeSpec:
  """Sizes of the VAE; those of the released one are the defaults, see also `VaeSpec.wan21`.

  Attributes:
    base_width: channels at full resolution.
    latent_channels: channels of the latents.
    width_multipliers: channels of every resolution, finest first, in units of `base_width`.
    num_res_blocks: residual blocks per resolution in the encoder; the decoder has one more.
    temporal_downsample: for each step down in resolution, whether time is halved too.
    latent_mean: per channel; latents leave the encoder as (mean of posterior - this) / std.
      Empty: zeros.
    latent_std: per channel. Empty: ones.
    dtypes: precision; the streaming state is kept in `compute`.
    convolution: implementation of the convolutions that it fits, see
      `pf_jax.kernels.conv3d.conv3d`; None chooses.

  Raises:
    ValueError: sizes that contradict each other.
  """

  base_width: int = 96
  latent_channels: int = 16
  width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  temporal_downsample: tuple[bool, ...] = (False, True, True)
  latent_mean: tuple[float, ...] = ()
  latent_std: tuple[float, ...] = ()
  dtypes: DTypes = DTypes()
  convolution: str | None = None

  def __post_init__(self):
    if min(self.base_width, self.latent_channels, self.num_res_blocks,
           *self.width_multipliers) < 1:
      raise ValueError(f'{self} has a size below 1.')
    steps = len(self.width_multipliers) - 1
    if len(self.temporal_downsample) != steps:
      raise ValueError(f'temporal_downsample={self.temporal_downsample} needs {steps} entries, one '
                       f'per step between the {steps + 1} width_multipliers.')
    if any(width % 2 for width in self.widths[1:]):
      raise ValueError(f'widths {self.widths} must be even below full resolution, because '
                       'upsampling halves them; use an even base_width.')
    for name in ('latent_mean', 'latent_std'):
      values = getattr(self, name)
      if values and len(values) != self.latent_channels:
        raise ValueError(f'{name} has {len(values)} entries, wanted latent_channels='
                         f'{self.latent_channels} or none.')
    if any(std <= 0 for std in self.latent_std):
      raise ValueError(f'latent_std={self.latent_std} must be positive.')

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels of every resolution, finest first."""
    return tuple(self.base_width * m for m in self.width_multipliers)

  @property
  def spatial_stride(self) -> int:
    return 2 ** len(self.temporal_downsample)

  @property
  def temporal_stride(self) -> int:
    return 2 ** sum(self.temporal_downsample)

  @classmethod
  def wan21(cls, **choices) -> 'VaeSpec':
    """The released Wan2.1 VAE: 126,892,531 parameters, with its latent statistics."""
    return cls(
        **choices,
        latent_mean=(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                     0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
        latent_std=(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160))


class EncoderState(NamedTuple):
  """Last input frames of the encoder's temporal convolutions, [B, 1 or 2, H_i, W_i, C_i] each."""

  slots: tuple[Array, ...]


class DecoderState(NamedTuple):
  """Last input frames of the decoder's temporal convolutions, [B, 2, H_i, W_i, C_i] each."""

  slots: tuple[Array, ...]


class _Stream:
  """Carries the slots through one pass: a temporal convolution takes its own, leaves a new one.

  Lives only while a pass is traced. Convolutions run in a fixed order, which is the slots' order.

  Attributes:
    first: this pass starts the video, so there are no slots to take.
    kept: the slots left so far.
  """

  def __init__(self, slots: tuple[Array, ...] | None = None):
    self.first = slots is None
    self.kept: list[Array] = []
    self._slots = slots

  def past(self, like: Array, frames: int) -> Array:
    """The last `frames` input frames of this convolution; zeros where the video starts."""
    if self.first:
      return jnp.zeros((like.shape[0], frames, *like.shape[2:]), like.dtype)
    assert self._slots is not None
    return self._slots[len(self.kept)].astype(like.dtype)

  def keep(self, slot: Array) -> None:
    """Stores the frames that the same convolution will need in the next pass."""
    self.kept.append(slot)

  def before(self, x: Array, frames: int) -> Array:
    """The past of x; keeps the last `frames` frames of the two together."""
    past = self.past(x, frames)
    self.keep(jnp.concatenate([past, x], axis=1)[:, x.shape[1]:])
    return past


class Conv(nnx.Module):
  """A convolution over [B, T, H, W, C]; with temporal taps it is causal and owns a slot."""

  def __init__(self, shape: tuple[int, ...], *, rngs: nnx.Rngs, scale: float = 1.0,
               dtype: Any = jnp.float32, implementation: str | None = None):
    """Initialises with variance `scale` over the fan-in, biases at zero.

    Args:
      shape: [kt, kh, kw, C, O], or [kh, kw, C, O] for a convolution within frames.
      rngs: source of the initial values.
      scale: 1 keeps the variance of the input; 0 starts at zero.
      dtype: of the parameters; the convolution runs in its input's dtype.
      implementation: see `pf_jax.kernels.conv3d`.
    """
    std = math.sqrt(scale / math.prod(shape[:-1]))
    self.kernel = nnx.Param((std * jax.random.normal(rngs.params(), shape)).astype(dtype))
    self.bias = nnx.Param(jnp.zeros(shape[-1], dtype))
    self.implementation = implementation

  def start_from(self, kernel: Array) -> None:
    """Replaces the drawn kernel by one that does something sensible from the start."""
    self.kernel[...] = kernel.astype(self.kernel.dtype)

  def __call__(self, x: Array, stream: _Stream, epilogue: Epilogue = Epilogue()) -> Array:
    """Convolves the next frames of a video, [B, T, H, W, C] -> [B, T, H, W, O]."""
    frames = self.kernel.shape[0] - 1
    return self.apply(x, past=stream.before(x, frames) if frames else None, epilogue=epilogue)

  def apply(self, x: Array, *, strides: tuple[int, int, int] = (1, 1, 1), padding: Any = None,
            past: Array | None = None, epilogue: Epilogue = Epilogue()) -> Array:
    """Convolves x after its past, without looking at any state."""
    kernel = self.kernel[...]
    if kernel.ndim == 4:
      kernel = kernel[None]
    fits = supports(self.implementation, x, kernel, strides)
    return conv3d(x, kernel, self.bias[...], strides=strides, padding=padding, past=past,
                  epilogue=epilogue, implementation=self.implementation if fits else None)


class RMSNorm(nnx.Module):
  """x / ||x|| * sqrt(C) * gamma over channels, in float32; no mean, no bias."""

  def __init__(self, width: int):
    self.gamma = nnx.Param(jnp.ones(width))

  def __call__(self, x: Array) -> Array:
    """[..., C] -> [..., C]."""
    return rms_norm(x, self.gamma[...])


class ResBlock(nnx.Module):
  """norm, SiLU, conv, norm, SiLU, conv, added to the input (through a 1x1x1 if widths differ)."""

  def __init__(self, width_in: int, width: int, *, rngs: nnx.Rngs, **conv):
    self.norm1 = RMSNorm(width_in)
    self.conv1 = Conv((3, 3, 3, width_in, width), rngs=rngs, **conv)
    self.norm2 = RMSNorm(width)
    # A small last convolution makes the deep stack start out close to its shortcuts.
    self.conv2 = Conv((3, 3, 3, width, width), rngs=rngs, scale=0.1, **conv)
    self.shortcut = (None if width_in == width else
                     Conv((1, 1, 1, width_in, width), rngs=rngs, **conv))

  def __call__(self, x: Array, stream: _Stream) -> Array:
    """[B, T, H, W, width_in] -> [B, T, H, W, width]."""
    y = self.conv1(jax.nn.silu(self.norm1(x)), stream, Epilogue(self.norm2.gamma[...], silu=True))
    beside = x if self.shortcut is None else self.shortcut(x, stream)
    return self.conv2(y, stream, Epilogue(residual=beside))


class FrameAttention(nnx.Module):
  """Single-head self-attention over the positions of each frame; frames do not see each other."""

  def __init__(self, width: int, *, rngs: nnx.Rngs, **conv):
    self.norm = RMSNorm(width)
    self.to_qkv = Conv((1, 1, width, 3 * width), rngs=rngs, **conv)
    self.proj = Conv((1, 1, width, width), rngs=rngs, scale=0.0, **conv)

  def __call__(self, x: Array) -> Array:
    """[B, T, H, W, C] -> the same shape; softmax over the H*W keys of a frame, scale 1/sqrt(C)."""
    batch, frames, height, width, channels = x.shape
    qkv = self.to_qkv.apply(self.norm(x))
    qkv = qkv.reshape(batch * frames, height * width, 1, 3 * channels)
    y = jax.nn.dot_product_attention(*jnp.split(qkv, 3, axis=-1))
    return x + self.proj.apply(y.reshape(x.shape))


class Middle(nnx.Module):
  """Residual block, attention, residual block at the coarsest resolution."""

  def __init__(self, width: int, *, rngs: nnx.Rngs, **conv):
    self.res1 = ResBlock(width, width, rngs=rngs, **conv)
    self.attention = FrameAttention(width, rngs=rngs, **conv)
    self.res2 = ResBlock(width, width, rngs=rngs, **conv)

  def __call__(self, x: Array, stream: _Stream) -> Array:
    """[B, T, h, w, C] -> the same shape."""
    return self.res2(self.attention(self.res1(x, stream)), stream)


class Downsample(nnx.Module):
  """Halves height and width, and with `temporal` the number of frames after the first one."""

  def __init__(self, width: int, temporal: bool, *, rngs: nnx.Rngs, **conv):
    self.conv = Conv((3, 3, width, width), rngs=rngs, **conv)
    # Start as the mean of the 2x2 pixels that are merged: flat colour passes through unharmed.
    box = jnp.zeros((3, 3, 1, 1)).at[:2, :2].set(0.25)
    self.conv.start_from(box * jnp.eye(width))
    self.time_conv = Conv((3, 1, 1, width, width), rngs=rngs, **conv) if temporal else None
    if self.time_conv is not None:
      # Start as the mean of the two frames that are merged.
      self.time_conv.start_from(jnp.stack([jnp.zeros((1, 1, width, width)),
                                           *2 * [jnp.eye(width)[None, None] / 2]]))

  def __call__(self, x: Array, stream: _Stream) -> Array:
    """[B, T, H, W, C] -> [B, T', H/2, W/2, C]; T' = (T+1)/2 at the video's start, else T/2."""
    x = self.conv.apply(x, strides=(1, 2, 2), padding=((0, 1), (0, 1)))
    if self.time_conv is None:
      return x
    if not stream.first:
      return self.time_conv.apply(x, past=stream.before(x, 1), strides=(2, 1, 1))
    stream.keep(x[:, x.shape[1] - 1:])
    if x.shape[1] == 1:
      return x
    return jnp.concatenate([x[:, :1], self.time_conv.apply(x, strides=(2, 1, 1))], axis=1)


class Upsample(nnx.Module):
  """Doubles height and width and halves the channels; with `temporal` doubles the frames."""

  def __init__(self, width: int, temporal: bool, *, rngs: nnx.Rngs, **conv):
    self.time_conv = Conv((3, 1, 1, width, 2 * width), rngs=rngs, **conv) if temporal else None
    if self.time_conv is not None:
      # Start as a repetition of the frame.
      eye = jnp.concatenate([jnp.eye(width)] * 2, axis=-1)[None, None]
      self.time_conv.start_from(jnp.stack([0 * eye, 0 * eye, eye]))
    self.conv = Conv((3, 3, width, width // 2), rngs=rngs, **conv)
    # Start as the scaled sum of two channels each, without a look at the neighbours.
    fold = jnp.concatenate([jnp.eye(width // 2)] * 2) / math.sqrt(2)
    self.conv.start_from(jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0) * fold)

  def __call__(self, x: Array, stream: _Stream) -> Array:
    """[B, T, H, W, C] -> [B, T', 2H, 2W, C/2]; T' = 2T-1 at the video's start, else 2T."""
    if self.time_conv is not None:
      if stream.first:
        # The first frame skips the temporal convolution and leaves no trace in its slot.
        x = jnp.concatenate([x[:, :1], self._double_frames(x[:, 1:], stream)], axis=1)
      else:
        x = self._double_frames(x, stream)
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    return self.conv.apply(x)

  def _double_frames(self, x: Array, stream: _Stream) -> Array:
    assert self.time_conv is not None
    batch, frames, height, width, channels = x.shape
    past = stream.before(x, self.time_conv.kernel.shape[0] - 1)
    if not frames:
      return x
    x = self.time_conv.apply(x, past=past)
    # Output channel k * C + c is channel c of the k-th of the two frames.
    x = x.reshape(batch, frames, height, width, 2, channels)
    return jnp.moveaxis(x, 4, 2).reshape(batch, 2 * frames, height, width, channels)


class Encoder(nnx.Module):
  """Pixels to the posterior's mean and log variance, before the last 1x1x1."""

  def __init__(self, spec: VaeSpec, *, rngs: nnx.Rngs, **conv):
    widths = (spec.base_width, *spec.widths)
    self.conv_in = Conv((3, 3, 3, _PIXEL_CHANNELS, widths[0]), rngs=rngs, **conv)
    layers: list[nnx.Module] = []
    for i, width in enumerate(spec.widths):
      for j in range(spec.num_res_blocks):
        layers.append(ResBlock(width if j else widths[i], width, rngs=rngs, **conv))
      if i < len(spec.temporal_downsample):
        layers.append(Downsample(width, spec.temporal_downsample[i], rngs=rngs, **conv))
    self.down = nnx.List(layers)
    self.middle = Middle(widths[-1], rngs=rngs, **conv)
    self.norm_out = RMSNorm(widths[-1])
    self.conv_out = Conv((3, 3, 3, widths[-1], 2 * spec.latent_channels), rngs=rngs, **conv)

  def __call__(self, x: Array, stream: _Stream) -> Array:
    """[B, T, H, W, 3] -> [B, F, h, w, 2C]."""
    x = self.conv_in(x, stream)
    for layer in self.down:
      x = layer(x, stream)
    x = self.middle(x, stream)
    return self.conv_out(jax.nn.silu(self.norm_out(x)), stream)


class Decoder(nnx.Module):
  """Latents, after the first 1x1x1, to pixels."""

  def __init__(self, spec: VaeSpec, *, rngs: nnx.Rngs, **conv):
    widths = spec.widths[::-1]
    doubled = spec.temporal_downsample[::-1]
    self.conv_in = Conv((3, 3, 3, spec.latent_channels, widths[0]), rngs=rngs, **conv)
    self.middle = Middle(widths[0], rngs=rngs, **conv)
    layers: list[nnx.Module] = []
    width_in = widths[0]
    for i, width in enumerate(widths):
      for j in range(spec.num_res_blocks + 1):
        layers.append(ResBlock(width if j else width_in, width, rngs=rngs, **conv))
      if i < len(doubled):
        layers.append(Upsample(width, doubled[i], rngs=rngs, **conv))
        width_in = width // 2
    self.up = nnx.List(layers)
    self.norm_out = RMSNorm(widths[-1])
    self.conv_out = Conv((3, 3, 3, widths[-1], _PIXEL_CHANNELS), rngs=rngs, **conv)

  def __call__(self, x: Array, stream: _Stream) -> Array:
    """[B, F, h, w, C] -> [B, T, H, W, 3], not clamped."""
    x = self.middle(self.conv_in(x, stream), stream)
    for layer in self.up:
      x = layer(x, stream)
    return self.conv_out(jax.nn.silu(self.norm_out(x)), stream)


class WanVae(nnx.Module):
  """The causal video VAE. Methods are pure: streaming state goes in and comes out.

  Attributes:
    spec: sizes and latent statistics.
  """

  def __init__(self, spec: VaeSpec, *, rngs: nnx.Rngs):
    """Builds an untrained VAE.

    Args:
      spec: sizes.
      rngs: source of the initial values (stream `params`).
    """
    conv: dict[str, Any] = {'implementation': spec.convolution, 'dtype': spec.dtypes.params}
    channels = spec.latent_channels
    self.spec = spec
    self.encoder = Encoder(spec, rngs=rngs, **conv)
    self.quant_conv = Conv((1, 1, 1, 2 * channels, 2 * channels), rngs=rngs, **conv)
    # Start nearly deterministic: at unit variance the sample's noise would drown the picture, and
    # training would first spend itself on outgrowing it.
    self.quant_conv.start_from(self.quant_conv.kernel[...].at[..., channels:].set(0))
    self.quant_conv.bias[...] = self.quant_conv.bias[...].at[channels:].set(_INITIAL_LOGVAR)
    self.post_quant_conv = Conv((1, 1, 1, channels, channels), rngs=rngs, **conv)
    self.decoder = Decoder(spec, rngs=rngs, **conv)

  def encode(self, pixels: Array) -> Array:
    """Encodes whole videos in one shot.

    Args:
      pixels: [B, T, H, W, 3] in [-1, 1]; T = 1 + n * temporal_stride, H and W multiples of the
        spatial stride.

    Returns:
      Normalised posterior means, [B, 1 + n, h, w, C].

    Raises:
      ValueError: T, H or W do not fit.
    """
    return self.encode_first(pixels)[0]

  def encode_first(self, pixels: Array) -> tuple[Array, EncoderState]:
    """Encodes the beginning of a video: `encode`, and what `encode_next` needs to go on."""
    stream = _Stream()
    mean, _ = self._moments(pixels, stream)
    return self._normalise(mean), EncoderState(tuple(stream.kept))

  def encode_next(self, state: EncoderState, pixels: Array) -> tuple[Array, EncoderState]:
    """Encodes the frames that follow.

    Args:
      state: from `encode_first` or `encode_next`.
      pixels: [B, T, H, W, 3]; T = n * temporal_stride.

    Returns:
      Normalised posterior means [B, n, h, w, C], and the next state.

    Raises:
      ValueError: T, H or W do not fit.
    """
    stream = _Stream(state.slots)
    mean, _ = self._moments(pixels, stream)
    return self._normalise(mean), EncoderState(tuple(stream.kept))

  def encode_moments(self, pixels: Array) -> tuple[Array, Array]:
    """Mean and log variance of the posterior, not normalised; for training.

    Args, shapes and errors: as `encode`.
    """
    return self._moments(pixels, _Stream())

  def decode(self, latents: Array) -> Array:
    """Decodes whole videos in one shot.

    Args:
      latents: normalised, [B, F, h, w, C].

    Returns:
      Pixels [B, 1 + temporal_stride * (F - 1), H, W, 3], clamped to [-1, 1].
    """
    return self.decode_first(latents)[0]

  def decode_first(self, latents: Array) -> tuple[Array, DecoderState]:
    """Decodes the beginning of a video: `decode`, and what `decode_next` needs to go on."""
    stream = _Stream()
    pixels = self._pixels(self._denormalise(latents), stream)
    return jnp.clip(pixels, -1, 1), DecoderState(tuple(stream.kept))

  def decode_next(self, state: DecoderState, latents: Array) -> tuple[Array, DecoderState]:
    """Decodes the latent frames that follow.

    Args:
      state: from `decode_first` or `decode_next`.
      latents: normalised, [B, F, h, w, C].

    Returns:
      Pixels [B, temporal_stride * F, H, W, 3] clamped to [-1, 1], and the next state.
    """
    stream = _Stream(state.slots)
    pixels = self._pixels(self._denormalise(latents), stream)
    return jnp.clip(pixels, -1, 1), DecoderState(tuple(stream.kept))

  def decode_sample(self, sample: Array) -> Array:
    """Decodes a posterior sample (not normalised) to pixels that are not clamped; for training."""
    return self._pixels(sample, _Stream())

  def init_decoder_state(self, batch: int, height: int, width: int) -> DecoderState:
    """A decoder state of zeros, for allocation; a video still starts with `decode_first`.

    Args:
      batch: videos.
      height: latent rows.
      width: latent columns.
    """
    latents = jax.ShapeDtypeStruct((batch, 1, height, width, self.spec.latent_channels),
                                   jnp.float32)
    state = jax.eval_shape(lambda z: self.decode_first(z)[1], latents)
    return jax.tree.map(lambda slot: jnp.zeros(slot.shape, slot.dtype), state)

  def init_encoder_state(self, batch: int, height: int, width: int) -> EncoderState:
    """An encoder state of zeros, for allocation; a video still starts with `encode_first`.

    Args:
      batch: videos.
      height: pixel rows.
      width: pixel columns.
    """
    pixels = jax.ShapeDtypeStruct((batch, 1, height, width, _PIXEL_CHANNELS), jnp.float32)
    state = jax.eval_shape(lambda x: self.encode_first(x)[1], pixels)
    return jax.tree.map(lambda slot: jnp.zeros(slot.shape, slot.dtype), state)

  def _moments(self, pixels: Array, stream: _Stream) -> tuple[Array, Array]:
    self._check_pixels(pixels, stream.first)
    pixels = pixels.astype(self.spec.dtypes.compute)
    moments = self.quant_conv(self.encoder(pixels, stream), stream)
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, logvar

  def _pixels(self, sample: Array, stream: _Stream) -> Array:
    check_shape('latents', sample, 'b f h w c', c=self.spec.latent_channels)
    sample = sample.astype(self.spec.dtypes.compute)
    return self.decoder(self.post_quant_conv(sample, stream), stream).astype(jnp.float32)

  def _statistics(self) -> tuple[Array, Array]:
    channels = self.spec.latent_channels
    return (jnp.asarray(self.spec.latent_mean or (0.0,) * channels, jnp.float32),
            jnp.asarray(self.spec.latent_std or (1.0,) * channels, jnp.float32))

  def _normalise(self, mean: Array) -> Array:
    shift, scale = self._statistics()
    return (mean - shift) / scale

  def _denormalise(self, latents: Array) -> Array:
    shift, scale = self._statistics()
    return latents * scale + shift

  def _check_pixels(self, pixels: Array, first: bool) -> None:
    sizes = check_shape('pixels', pixels, 'b t h w c', c=_PIXEL_CHANNELS)
    stride, frames = self.spec.temporal_stride, sizes['t']
    # Frames beyond a whole latent frame would be dropped without a word.
    if first and (frames - 1) % stride:
      below = 1 + (frames - 1) // stride * stride
      raise ValueError(f'{frames=}: the start of a video must be 1 + a multiple of {stride} '
                       f'frames, or the rest would be lost; use {below} or {below + stride}.')
    if not first and (frames % stride or not frames):
      below = max(frames // stride, 1) * stride
      raise ValueError(f'{frames=}: a continuation must be a multiple of {stride} frames; use '
                       f'{below} or {below + stride}.')
    for name in ('h', 'w'):
      if sizes[name] % self.spec.spatial_stride or not sizes[name]:
        below = sizes[name] // self.spec.spatial_stride * self.spec.spatial_stride
        raise ValueError(f'pixels have {name}={sizes[name]}, not a multiple of the spatial stride '
                         f'{self.spec.spatial_stride}; use '
                         f'{max(below, self.spec.spatial_stride)} or '
                         f'{below + self.spec.spatial_stride}.')
