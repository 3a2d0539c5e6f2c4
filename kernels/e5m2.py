"""Triton device functions for e5m2 bytes, the counterparts of those in `e4m3.py`; the rules of docs/design.md."""

import triton
import triton.language as tl

from xmoe.kernels.e4m3 import encode, encode_four


@triton.jit
def encode_as(x, E5M2: tl.constexpr, HARDWARE: tl.constexpr):
    """float32 to the fp8 byte, as int8: saturating, to nearest even, 0x7F for NaN."""
    if not E5M2:
        byte = encode(x, HARDWARE)
    elif HARDWARE:
        byte = tl.inline_asm_elementwise(
            """{ .reg .b16 low, high;
            cvt.rn.satfinite.e5m2x2.f32 low, $2, $1;
            cvt.rn.satfinite.e5m2x2.f32 high, $4, $3;
            mov.b32 $0, {low, high}; }""",
            "=r,f,f,f,f", (x,), dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        bits = x.to(tl.int32, bitcast=True)
        absolute = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), 57344.0)
        normal = absolute.to(tl.int32, bitcast=True)
        normal = ((normal + 0xFFFFF + ((normal >> 21) & 1)) >> 21) - (112 << 2)
        # Adding 2^7 leaves a multiple of 2^-16, the e5m2 subnormal step, in the low bits.
        subnormal = (absolute + 128.0).to(tl.int32, bitcast=True) - 0x43000000
        byte = tl.where(absolute < 0.00006103515625, subnormal, normal) | ((bits >> 24) & 0x80)
        byte = tl.where(x == x, byte, 0x7F).to(tl.int8)
    return byte


@triton.jit
def encode_four_as(x0, x1, x2, x3, E5M2: tl.constexpr, HARDWARE: tl.constexpr):
    """Four bytes as one int32, that of x0 the lowest."""
    if not E5M2:
        word = encode_four(x0, x1, x2, x3, HARDWARE)
    elif HARDWARE:
        word = tl.inline_asm_elementwise(
            """{ .reg .b16 low, high;
            cvt.rn.satfinite.e5m2x2.f32 low, $2, $1;
            cvt.rn.satfinite.e5m2x2.f32 high, $4, $3;
            mov.b32 $0, {low, high}; }""",
            "=r,f,f,f,f", (x0, x1, x2, x3), dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        byte = encode_as(tl.join(tl.join(x0, x2), tl.join(x1, x3)), E5M2, 0).to(tl.int32) & 0xFF
        even, odd = tl.split(byte)
        low, high = tl.split(even | odd << 8)
        word = low | high << 16
    return word
