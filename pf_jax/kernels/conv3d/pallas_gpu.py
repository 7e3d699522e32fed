"""Causal convolution as an implicit matrix product, for NVIDIA's Hopper cards.

  y[t, i, j, :] = f( sum_{k, p, q} x[t + k, i + p - low_h, j + q - low_w, :] K[k, p, q] )

with f = bias, RMS norm over channels, SiLU, a residual, each if wanted. Rows of the product are the
pixels of a patch of one frame, columns the output channels; what is contracted are taps and input
channels. Nothing is unrolled in memory: a tap reads the patch moved by that tap, one TMA copy out
of the frames as they lie. Padding in space is what TMA reads outside of a frame, zeros; the frames
before the video are an array of their own, so nobody lays the two side by side.

A program computes `TileSpec.pixels` of a frame by `TileSpec.channels`. One warpgroup fetches, two
or three multiply. For every (tap in time, tap along the width, chunk of input channels) it fetches
the patch with kh - 1 more rows, which serves all kh taps along the height: those begin at whole
rows, multiples of 8 pixels, where a product may begin to read. That is 3 copies of a patch and a
bit instead of 9, out of L2: neighbours in time run at the same time, so frames come from memory
once. Weights have a ring of their own, one buffer a tap and chunk.

What a residual block moves, in arrays of frames (16 x 480 x 832 x 96 at two bytes are 1.2 GB):

                         XLA and cuDNN                       here
  first norm, SiLU       2 read (sum, then all), 1 written   1 read, 1 written (XLA)
  first convolution      1 read, 1 written                   1 read, 1 written, with the second norm
  second norm, SiLU      2 read, 1 written                   -
  second convolution     2 read, 1 written                   2 read, 1 written

11 and 7; with the frames that are kept for the next block 11.7 and 6.9 as compiled, in arrays of
frames with their past (BENCHMARKS.md). A patch of r rows reads (kh - 1) / r more of its frame where
its neighbours have left L2: 8% for 24 rows. Weights come out of L2 once a patch: that, and not
memory, is what larger patches save.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pf_jax.kernels import mosaic
from pf_jax.kernels.conv3d.reference import NORM_FLOOR
from pf_jax.kernels.mosaic import ROWS
from pf_jax.types import Array, tree_bytes

GROUP = 8  # rows of a swizzled tile


@dataclasses.dataclass(frozen=True)
class TileSpec:
  """Sizes that are tuned for a card (`pf_jax.kernels.tuning`).

  Attributes:
    warpgroups: that compute.
    blocks: of 64 pixels that each of them computes.
    columns: of a patch; its rows follow.
    channels: of the output.
    chunk: of input channels that are fetched at once, a row of a swizzled tile: 32 or 64.
    patches: in their ring.
    weights: buffers in theirs.

  Raises:
    ValueError: sizes that the hardware cannot multiply.
  """

  warpgroups: int = 3
  blocks: int = 2
  columns: int = 16
  channels: int = 96
  chunk: int = 32
  patches: int = 3
  weights: int = 8

  def __post_init__(self):
    mosaic.check_warpgroups(self.warpgroups)
    if self.columns % GROUP or self.blocks < 1 or self.blocks * ROWS % self.columns:
      raise ValueError(f'columns={self.columns} must be a multiple of {GROUP} that divides the '
                       f'{self.blocks * ROWS} pixels of a warpgroup.')
    if self.chunk not in (32, 64):
      raise ValueError(f'chunk={self.chunk} must be 32 or 64: swizzled rows have 64 or 128 bytes.')
    if self.channels % self.chunk or not self.chunk <= self.channels <= 256:
      raise ValueError(f'channels={self.channels} must be a multiple of chunk={self.chunk} within '
                       f'{self.chunk}..256.')
    if self.patches < 2 or self.weights < 2:
      raise ValueError(f'patches={self.patches} and weights={self.weights} must be at least 2: one '
                       'is read while another fills.')

  @property
  def pixels(self) -> int:
    """Of a program."""
    return self.warpgroups * self.blocks * ROWS

  @property
  def rows(self) -> int:
    """Of a patch."""
    return self.pixels // self.columns

  @property
  def pieces(self) -> int:
    """Swizzled rows of the output channels."""
    return self.channels // self.chunk

  def shared_bytes(self, taps: int) -> int:
    """Shared memory of a program for so many taps along the height, without its barriers."""
    half, full = 2, 4
    patch = (self.rows + taps - 1) * self.columns * self.chunk
    weights = self.chunk * self.channels
    return (half * (self.patches * patch + self.weights * weights + self.pixels * self.channels)
            + 2 * full * self.channels)

  def fits(self, kernel: Sequence[int]) -> bool:
    """Whether it divides a kernel [kt, kh, kw, C, O], and shared memory is enough."""
    _, height, _, channels_in, channels = kernel
    return (channels_in % self.chunk == channels % self.channels == 0
            and self.shared_bytes(height) <= mosaic.SHARED_BYTES)


def default_tiles(channels: int) -> TileSpec:
  """The largest that need no more registers than there are (BENCHMARKS.md); none was timed.

  Args:
    channels: of the output, a multiple of 32.
  """
  width = max(w for w in range(32, 193, 32) if channels % w == 0)
  if width > 96:
    return TileSpec(warpgroups=2, channels=width, patches=3, weights=5)
  return TileSpec(channels=width)


def candidates(kernel: Sequence[int]) -> list[TileSpec]:
  """Tiles worth timing for a kernel [kt, kh, kw, C, O], the default first; some spill.

  Of rings the largest that fits: what waits in them hides how long memory takes.
  """
  channels = kernel[4]
  widths = [w for w in range(192, 31, -32) if channels % w == 0][:2]
  found = [default_tiles(channels)]
  for (groups, blocks), columns, width, chunk in itertools.product(
      ((3, 2), (2, 2), (3, 1), (2, 1)), (16, 32), widths, (32, 64)):
    if width % chunk == 0:
      rings = (TileSpec(groups, blocks, columns, width, chunk, *ring)
               for ring in ((3, 8), (3, 5), (2, 4), (2, 2)))
      found.extend(itertools.islice((tiles for tiles in rings if tiles.fits(kernel)), 1))
  return list(dict.fromkeys(found))


class Finish(NamedTuple):
  """What happens to a sum before it is written, in this order.

  Attributes:
    norm: divided by its root mean square over all channels, times a gain.
    silu: x * sigmoid(x).
    residual: something is added.
  """

  norm: bool = False
  silu: bool = False
  residual: bool = False


def convolve(pieces: Sequence[Array], kernel: Array, vectors: Array, residual: Array | None, *,
             low: tuple[int, int], size: tuple[int, int], finish: Finish, operations: int,
             tiles: TileSpec, interpret: Any = None) -> Array:
  """One convolution at stride 1.

  Args:
    pieces: of a video, one after the other, [B, T_i, H, W, C] each, C a multiple of the chunk; half
      precision as all but `vectors`.
    kernel: [kt, kh, kw, C, O], O a multiple of the tile's channels.
    vectors: [2, O] float32: bias, and the gain of the norm.
    residual: [B, T', H', W', O], or None.
    low: zeros before the first row and column.
    size: H' and W' of the output.
    finish: what follows the sum.
    operations: of the products that are no padding, for the count of operations.
    tiles: sizes.
    interpret: parameters of Pallas' interpreter, on machines without the card.

  Returns:
    [B, T + 1 - kt, H', W', O] in their dtype, T frames in all.

  Raises:
    ValueError: a norm over more channels than a tile has, or more shared memory than there is.
  """
  channels = kernel.shape[4]
  if finish.norm and channels != tiles.channels:
    raise ValueError(f'a norm over {channels} channels needs all of them in one tile, got '
                     f'{tiles.channels}; apply it after the convolution.')
  needed = tiles.shared_bytes(kernel.shape[1])
  if needed > mosaic.SHARED_BYTES:
    raise ValueError(f'{tiles} with {kernel.shape[1]} taps along the height takes {needed} bytes '
                     f'of shared memory, of {mosaic.SHARED_BYTES}; use fewer buffers.')
  batch, dtype = pieces[0].shape[0], pieces[0].dtype
  frames = sum(piece.shape[1] for piece in pieces) + 1 - kernel.shape[0]
  grid = (batch, pl.cdiv(size[0], tiles.rows), frames, pl.cdiv(size[1], tiles.columns),
          channels // tiles.channels)
  out_type = jax.ShapeDtypeStruct((batch, frames, *size, channels), dtype)
  pixels = math.prod(out_type.shape[:-1])
  cost = pl.CostEstimate(
      flops=operations, transcendentals=pixels * (finish.norm + finish.silu * channels),
      bytes_accessed=tree_bytes((*pieces, kernel, vectors, residual, out_type)))
  interpreted = interpret is not None
  whole = size
  if interpreted:  # it reads no zeros outside, and writes nothing there
    whole = grid[1] * tiles.rows, grid[3] * tiles.columns
    read = whole[0] + kernel.shape[1] - 1, whole[1] + kernel.shape[2] - 1
    more = 1, 2  # zeros in front of those, so that it matters where a patch begins
    pieces = [_inside(piece, (low[0] + more[0], low[1] + more[1]),
                      (read[0] + more[0], read[1] + more[1])) for piece in pieces]
    residual = None if residual is None else _inside(residual, (0, 0), whole)
    low = -more[0], -more[1]
  body = functools.partial(_program, pieces=len(pieces), low=low, finish=finish, tiles=tiles,
                           interpreted=interpreted)
  arrays = [*pieces, kernel, vectors, *([] if residual is None else [residual])]
  out = mosaic.kernel(
      body, name='conv3d', out_type=jax.ShapeDtypeStruct((batch, frames, *whole, channels), dtype),
      scratch_types=_scratch(dtype, kernel.shape[1], finish, tiles, interpreted),
      # Frames within rows: those that share a patch run at the same time.
      grid=grid, grid_names=('video', 'row', 'frame', 'column', 'channel'),
      num_threads=tiles.warpgroups + 1, thread_name='warpgroup', cost=cost, interpret=interpret)(
          *arrays)
  return out[:, :, :size[0], :size[1]]


def _inside(x: Array, low: tuple[int, int], size: tuple[int, int]) -> Array:
  """[B, T, H, W, C] with zeros around it, cut to `size`."""
  high = [max(s - n - l, 0) for s, n, l in zip(size, x.shape[2:4], low, strict=True)]
  padded = jnp.pad(x, ((0, 0), (0, 0), *zip(low, high, strict=True), (0, 0)))
  return padded[:, :, :size[0], :size[1]]


class _Scratch(NamedTuple):
  """Shared memory and barriers of a program.

  Attributes:
    patches: [patches, (rows + kh - 1) * columns, chunk], as it is copied to and as it is read.
    weights: [weights, chunk, channels].
    out: [pieces, pixels, chunk], the residual and then the result; likewise.
    vectors: [2, channels].
    patch_ready: for each buffer, likewise the rest.
    patch_free: all warpgroups have read the patch.
    weights_ready: weights arrived.
    weights_free: all warpgroups have read them.
    vectors_ready: vectors arrived.
    residual_ready: the residual arrived.
  """

  patches: Any
  weights: Any
  out: Any
  vectors: Any
  patch_ready: Any
  patch_free: Any
  weights_ready: Any
  weights_free: Any
  vectors_ready: Any
  residual_ready: Any


def _scratch(dtype, taps: int, finish: Finish, tiles: TileSpec, interpreted: bool) -> _Scratch:
  swizzle = plgpu.SwizzleTransform(tiles.chunk * jnp.dtype(dtype).itemsize)

  def room(*shape: int, tiling: tuple[int, ...]):
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform(tiling), swizzle))

  def pixels(number: int, rows: int):
    """One memory, two views: rows and columns for copies, pixels in a row for all else.

    A tile of 8 pixels by one swizzled row is the same bytes as 8 times one pixel by one swizzled
    row. But copies in tiles of 8 begin at multiples of 8 in global memory, and taps do not.
    """
    read = room(number, rows * tiles.columns, tiles.chunk, tiling=(GROUP, tiles.chunk))
    if interpreted:
      return read
    return plgpu.RefUnion(room(number, rows, tiles.columns, tiles.chunk, tiling=(tiles.chunk,)),
                          read)

  # The interpreter copies a patch row by row.
  rows = tiles.rows + taps - 1
  copies = rows if interpreted else 1
  return _Scratch(
      patches=pixels(tiles.patches, rows),
      weights=room(tiles.weights, tiles.chunk, tiles.channels, tiling=(GROUP, tiles.chunk)),
      out=pixels(tiles.pieces, tiles.rows), vectors=plgpu.SMEM((2, tiles.channels), jnp.float32),
      patch_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=tiles.patches),
      patch_free=plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=tiles.patches),
      weights_ready=plgpu.Barrier(num_barriers=tiles.weights),
      weights_free=plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=tiles.weights),
      vectors_ready=plgpu.Barrier(),
      residual_ready=plgpu.Barrier(
          num_arrivals=tiles.pieces * (tiles.rows if interpreted else 1))
      if finish.residual else None)


class _Pixels(NamedTuple):
  """Pixels in shared memory: `copied` [n, rows, columns, chunk], `read` [n, pixels, chunk]."""

  copied: Any
  read: Any
  columns: int

  def fetch(self, number, patch, ready) -> None:
    """Fills one of them from `patch` [rows, columns, chunk] in global memory."""
    if self.copied is not None:
      plgpu.copy_gmem_to_smem(patch, self.copied.at[number], ready)
      return
    for row in range(patch.shape[0]):
      plgpu.copy_gmem_to_smem(patch.at[row],
                              self.read.at[number, pl.ds(row * self.columns, self.columns)], ready)

  def store(self, number, first, patch) -> None:
    """Writes the rows from `first` on to `patch` [rows, columns, chunk] in global memory."""
    if self.copied is not None:
      plgpu.copy_smem_to_gmem(self.copied.at[number, pl.ds(first, patch.shape[0])], patch)
      return
    for row in range(patch.shape[0]):
      plgpu.copy_smem_to_gmem(
          self.read.at[number, pl.ds((first + row) * self.columns, self.columns)], patch.at[row])


def _program(*refs, pieces, low, finish, tiles, interpreted):
  """What one program does; arguments are references to global memory, then to shared memory."""
  videos, (kernel, vectors, *rest) = refs[:pieces], refs[pieces:]
  residual = rest.pop(0) if finish.residual else None
  out, scratch = rest[0], _Scratch(*rest[1:])
  views = [(None, memory) if interpreted else memory for memory in (scratch.patches, scratch.out)]
  patches, results = (_Pixels(copied, read, tiles.columns) for copied, read in views)
  scratch = scratch._replace(patches=patches, out=results)
  taps, channels_in = kernel.shape[:3], kernel.shape[3]
  group = lax.axis_index('warpgroup')
  computing, fetching = mosaic.REGISTERS[tiles.warpgroups]
  rounds = taps[0] * taps[2] * (channels_in // tiles.chunk)

  @pl.when(group < tiles.warpgroups)
  def _():
    plgpu.set_max_registers(computing, action='increase')
    _compute(out, scratch, rounds, taps[1], finish, tiles)

  @pl.when(group == tiles.warpgroups)
  def _():
    plgpu.set_max_registers(fetching, action='decrease')
    column = pl.ds(lax.axis_index('channel') * tiles.channels, tiles.channels)
    plgpu.copy_gmem_to_smem(vectors.at[:, column], scratch.vectors, scratch.vectors_ready)
    _fetch(videos, kernel.at[:, :, :, :, column], scratch, rounds, low, tiles)
    if residual is not None:  # last: it is needed last
      for piece in range(tiles.pieces):
        scratch.out.fetch(piece, _patch(residual, piece, tiles), scratch.residual_ready)
    _drain(scratch, rounds, taps[1], tiles)


def _patch(array, piece: int, tiles: TileSpec, first=0, rows: int | None = None):
  """The program's pixels of an array like the output, and a swizzled row of its channels."""
  rows = tiles.rows if rows is None else rows
  return array.at[
      lax.axis_index('video'), lax.axis_index('frame'),
      pl.ds(lax.axis_index('row') * tiles.rows + first, rows),
      pl.ds(lax.axis_index('column') * tiles.columns, tiles.columns),
      pl.ds(lax.axis_index('channel') * tiles.channels + piece * tiles.chunk, tiles.chunk)]


def _fetch(pieces, kernel, scratch, rounds, low, tiles):
  """The fetching warpgroup: every patch and its weights, as soon as all others left their place."""
  video, frame = lax.axis_index('video'), lax.axis_index('frame')
  taps = kernel.shape[:3]
  rows = pl.ds(lax.axis_index('row') * tiles.rows - low[0], tiles.rows + taps[1] - 1)
  chunks = rounds // (taps[0] * taps[2])

  @pl.loop(0, rounds)
  def _(number):
    place = lax.rem(number, jnp.int32(tiles.patches))
    tap, chunk = lax.div(number, jnp.int32(chunks)), lax.rem(number, jnp.int32(chunks))
    time, across = lax.div(tap, jnp.int32(taps[2])), lax.rem(tap, jnp.int32(taps[2]))
    columns = pl.ds(lax.axis_index('column') * tiles.columns - low[1] + across, tiles.columns)
    channel = pl.ds(chunk * tiles.chunk, tiles.chunk)

    @pl.when(number >= tiles.patches)
    def _():
      plgpu.barrier_wait(scratch.patch_free.at[place])

    first = 0
    for piece in pieces:
      here = frame + time - first
      first += piece.shape[1]

      @pl.when((here >= 0) & (here < piece.shape[1]))
      def _(piece=piece, here=here):
        scratch.patches.fetch(place, piece.at[video, here, rows, columns, channel],
                              scratch.patch_ready.at[place])

    for down in range(taps[1]):
      count = number * taps[1] + down
      at = lax.rem(count, jnp.int32(tiles.weights))

      @pl.when(count >= tiles.weights)
      def _(at=at):
        plgpu.barrier_wait(scratch.weights_free.at[at])

      plgpu.copy_gmem_to_smem(kernel.at[time, down, across, channel], scratch.weights.at[at],
                              scratch.weights_ready.at[at])


def _drain(scratch, rounds, taps, tiles):
  """Nobody may leave while others still arrive."""
  @pl.loop(max(rounds - tiles.patches, 0), rounds)
  def _(number):
    plgpu.barrier_wait(scratch.patch_free.at[lax.rem(number, jnp.int32(tiles.patches))])

  @pl.loop(max(rounds * taps - tiles.weights, 0), rounds * taps)
  def _(count):
    plgpu.barrier_wait(scratch.weights_free.at[lax.rem(count, jnp.int32(tiles.weights))])


def _compute(out, scratch, rounds, taps, finish, tiles):
  """One warpgroup: its pixels, all taps and input channels, and what follows."""
  group = lax.axis_index('warpgroup')
  count = tiles.blocks * ROWS
  first = group * count

  def products(acc):
    @pl.loop(0, rounds)
    def _(number):
      place = lax.rem(number, jnp.int32(tiles.patches))
      plgpu.barrier_wait(scratch.patch_ready.at[place])
      for down in range(taps):
        at = lax.rem(number * taps + down, jnp.int32(tiles.weights))
        plgpu.barrier_wait(scratch.weights_ready.at[at])
        rows = pl.ds(pl.multiple_of(first + down * tiles.columns, GROUP), count)
        plgpu.wgmma(acc, scratch.patches.read.at[place, rows], scratch.weights.at[at])
        # All but this product are done, so the memory of the one before it is free.
        plgpu.wgmma_wait(1)
        _release(scratch, number * taps + down - 1, number - 1 if down == 0 else None, tiles)

    return acc[...]

  total = pl.run_scoped(products, plgpu.ACC((count, tiles.channels), jnp.float32))
  _release(scratch, jnp.int32(rounds * taps - 1), jnp.int32(rounds - 1), tiles)
  plgpu.barrier_wait(scratch.vectors_ready)
  pixels = pl.ds(pl.multiple_of(first, GROUP), count)
  if finish.residual:
    plgpu.barrier_wait(scratch.residual_ready)
  # Piece by piece: of bias and gain only those at work need registers.
  for piece, part in enumerate(_finished(total, scratch.vectors, finish, tiles)):
    if finish.residual:
      part = part + scratch.out.read[piece, pixels].astype(jnp.float32)
    scratch.out.read[piece, pixels] = part.astype(out.dtype)
  plgpu.commit_smem()
  rows = count // tiles.columns
  for piece in range(tiles.pieces):
    scratch.out.store(piece, group * rows, _patch(out, piece, tiles, group * rows, rows))
  plgpu.wait_smem_to_gmem(0)


def _release(scratch, weights, patch, tiles) -> None:
  """Gives buffers back by the number of their use; before the first one there is none."""
  @pl.when(weights >= 0)
  def _():
    plgpu.barrier_arrive(scratch.weights_free.at[lax.rem(weights, jnp.int32(tiles.weights))])

  if patch is None:
    return

  @pl.when(patch >= 0)
  def _():
    plgpu.barrier_arrive(scratch.patch_free.at[lax.rem(patch, jnp.int32(tiles.patches))])


def _finished(total: Array, vectors, finish: Finish, tiles: TileSpec) -> Iterator[Array]:
  """Bias, norm and SiLU of sums [pixels, channels] in float32, one piece of channels at a time."""
  shape = total.shape[0], tiles.chunk
  channels = [pl.ds(piece * tiles.chunk, tiles.chunk) for piece in range(tiles.pieces)]

  def along(vector):
    return lax.broadcast_in_dim(vector, shape, [1])

  parts = [total[:, piece * tiles.chunk:(piece + 1) * tiles.chunk] + along(vectors[0, here])
           for piece, here in enumerate(channels)]
  if finish.norm:
    square = functools.reduce(jnp.add, [(part * part).sum(axis=1) for part in parts])
    scale = lax.rsqrt(jnp.maximum(square, NORM_FLOOR**2)) * math.sqrt(total.shape[1])
    scale = lax.broadcast_in_dim(scale, shape, [0])
  for part, here in zip(parts, channels, strict=True):
    if finish.norm:
      part = part * scale * along(vectors[1, here])
    yield part / (1.0 + jnp.exp(-part)) if finish.silu else part
