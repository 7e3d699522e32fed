"""Bytes that kernels move, out of texts written by hand."""

import pytest

from pf_jax.aot.traffic import Kernel, kernels, moved

PROGRAM = """HloModule jit_f, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%squares (p0: bf16[8,96]) -> f32[8] {
  %p0 = bf16[8,96]{1,0} parameter(0)
  %columns = bf16[8,32]{1,0} slice(%p0), slice={[0:8], [32:64]}
  %wide = f32[8,32]{1,0} convert(%columns)
  %square = f32[8,32]{1,0} multiply(%wide, %wide)
  %zero = f32[] constant(0)
  ROOT %total = f32[8]{0} reduce(%square, %zero), dimensions={1}, to_apply=%sum
}

%chosen (p0: s32[2], p1: bf16[3,16,4], p2: bf16[16,4], p3: bf16[9]) -> (bf16[2,4], bf16[16,4]) {
  %p1 = bf16[3,16,4]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %layer = bf16[1,16,4]{2,1,0} dynamic-slice(%p1, %zero, %zero, %zero), dynamic_slice_sizes={1,16,4}
  %rows = bf16[16,4]{1,0} bitcast(%layer)
  %p0 = s32[2]{0} parameter(0)
  %some = bf16[2,4]{1,0} gather(%rows, %p0), offset_dims={1}, slice_sizes={1,4}
  %p2 = bf16[16,4]{1,0} parameter(2)
  %half = bf16[8,4]{1,0} slice(%p2), slice={[0:8], [0:4]}
  %p3 = bf16[9]{0} parameter(3)
  %twice = bf16[16,4]{1,0} add(%p2, %p2), metadata={op_name="jit(f)/add (here)"}
  ROOT %both = (bf16[2,4]{1,0}, bf16[16,4]{1,0}) tuple(%some, %twice)
}

ENTRY %main (x.1: bf16[8,96], cache: bf16[3,16,4], i: s32[2], n: bf16[9]) -> (f32[8], bf16[16,4]) {
  %x.1 = bf16[8,96]{1,0} parameter(0)
  %cache = bf16[3,16,4]{2,1,0} parameter(1)
  %i = s32[2]{0} parameter(2)
  %n = bf16[9]{0} parameter(3)
  %norms = f32[8]{0} fusion(%x.1), kind=kInput, calls=%squares
  %theirs = (bf16[16,4]{1,0}, u8[0]{0}) custom-call(%x.1, /*index=1*/%cache), custom_call_target="x"
  %rows.2 = bf16[16,4]{1,0} get-tuple-element(%theirs), index=0
  %pair = (bf16[2,4]{1,0}, bf16[16,4]) fusion(%i, %cache, %rows.2, %n), kind=kLoop, calls=%chosen
  %last = bf16[16,4]{1,0} get-tuple-element(%pair), index=1
  ROOT %out = (f32[8]{0}, bf16[16,4]{1,0}) tuple(%norms, %last)
}
"""


def test_by_hand():
  assert kernels(PROGRAM) == [
      Kernel('norms', 'fusion', 2 * 8 * 32, 4 * 8),  # a third of the columns
      Kernel('theirs', 'custom-call', 2 * 8 * 96 + 2 * 3 * 16 * 4, 2 * 16 * 4),
      # Indices, two rows of one layer, all of p2 for its sum; nothing uses p3.
      Kernel('pair', 'fusion', 4 * 2 + 2 * 2 * 4 + 2 * 16 * 4, 2 * 2 * 4 + 2 * 16 * 4)]
  assert kernels(PROGRAM)[0].moved == 544
  assert moved(PROGRAM) == 544 + (1536 + 384 + 128) + (8 + 16 + 128 + 144)


SLICED = """
%fused (p.0: bf16[16,8], p.1: bf16[8]) -> bf16[2,8] {
  %p.1 = bf16[8]{0} parameter(1)
  %p.0 = bf16[16,8]{1,0} parameter(0)
  %wide = bf16[16,8]{1,0} broadcast(%p.1), dimensions={1}
  %product = bf16[16,8]{1,0} multiply(%p.0, %wide)
  ROOT %slice = bf16[2,8]{1,0} slice(%product), slice={[14:16], [0:8]}
}

ENTRY %main.1 (x: bf16[16,8], w: bf16[8]) -> (bf16[16,8], bf16[2,8]) {
  %x = bf16[16,8]{1,0} parameter(0)
  %w = bf16[8]{0} parameter(1)
  %end = bf16[2,8]{1,0} fusion(%x, %w), kind=kLoop, calls=%fused
  %call = (bf16[16,8]{1,0}, u8[64]{0}) custom-call(%x, %end), custom_call_target="mosaic_gpu"
  %y = bf16[16,8]{1,0} get-tuple-element(%call), index=0
  ROOT %result = (bf16[16,8]{1,0}, bf16[2,8]{1,0}) tuple(%y, %end)
}
"""


def test_slices_of_what_was_computed():
  """The fusion reads the last two rows of x only; the call reads all of it."""
  assert moved(SLICED) == (32 + 32 + 16) + (256 + 64 + 256 + 32)
  squared = SLICED.replace('multiply(%p.0, %wide)', 'multiply(%p.0, %p.0)')  # read once
  assert moved(squared) == moved(SLICED) - 16
  whole = SLICED.replace('multiply(%p.0, %wide)', 'dot(%p.0, %wide)')
  assert moved(whole) == moved(SLICED) + 256 - 32


def test_refuses_what_it_cannot_count():
  with pytest.raises(ValueError, match='no ENTRY computation found'):
    kernels('HloModule empty')
  looped = PROGRAM.replace('fusion(%x.1), kind=kInput, calls', 'while(%x.1), body')
  with pytest.raises(ValueError, match='the program has a while; wanted one without control flow'):
    kernels(looped)
