"""Triton device functions for e4m3 bytes and power-of-two scales; the rules of docs/design.md, bit for bit.

amax travels as the bits of its absolute value: integer order is the order of the values, and everything from
0x7F800000 up is Inf or NaN, so one integer maximum finds both the scale and the poison. The bits of a bfloat16 are the
upper half of those of the same float32, so two bfloat16 maxima fit in a register (a *pair*), and sm_90 has instructions
for both at once.

HARDWARE says what the GPU may be asked for: 0 nothing (the interpreter), 1 the cast to e4m3, 2 also pairs.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl


@triton.jit
def magnitude(x):
    """The bits of |x|, x float32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def no_magnitudes(shape: tl.constexpr, dtype: tl.constexpr):
    """Where `larger` starts from."""
    return tl.zeros(shape, tl.int16 if dtype == tl.bfloat16 else tl.int32)


@triton.jit
def larger(amax, x, HARDWARE: tl.constexpr):
    """The larger of amax and |x|, both as the bits of x's dtype, bfloat16 or float32."""
    if x.dtype == tl.float32:
        amax = tl.maximum(amax, magnitude(x))
    elif HARDWARE == 2:
        amax = tl.inline_asm_elementwise(
            "{ .reg .b32 m; and.b32 m, $2, 0x7FFF7FFF; max.u16x2 $0, $1, m; }",
            "=r,r,r", (amax, x), dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        amax = tl.maximum(amax, x.to(tl.int16, bitcast=True) & 0x7FFF)
    return amax


@triton.jit
def magnitude_of(amax):
    """What `larger` found, as `magnitude` would have it."""
    return amax if amax.dtype == tl.int32 else amax.to(tl.int32) << 16


@triton.jit
def pair(low, high, HARDWARE: tl.constexpr):
    """Two bfloat16 tensors in one of int32."""
    if HARDWARE == 2:
        both = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
            "=r,=r,r,r", (low, high), dtype=tl.int32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        both = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        both |= high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return both


@triton.jit
def low_float(pair):
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_float(pair):
    return (pair & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def low_of(pair):
    return pair & 0xFFFF


@triton.jit
def high_of(pair):
    return (pair >> 16) & 0xFFFF


@triton.jit
def _larger_pair(a, b):
    return tl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", (a, b), tl.int32, is_pure=True, pack=1)


@triton.jit
def larger_pair(a, b, HARDWARE: tl.constexpr):
    if HARDWARE == 2:
        c = _larger_pair(a, b)
    else:
        c = tl.maximum(low_of(a), low_of(b)) | tl.maximum(high_of(a), high_of(b)) << 16
    return c


@triton.jit
def smaller_pair(a, b, HARDWARE: tl.constexpr):
    if HARDWARE == 2:
        c = tl.inline_asm_elementwise("min.u16x2 $0, $1, $2;", "=r,r,r", (a, b), tl.int32, is_pure=True, pack=1)
    else:
        c = tl.minimum(low_of(a), low_of(b)) | tl.minimum(high_of(a), high_of(b)) << 16
    return c


@triton.jit
def largest_pair(x, HARDWARE: tl.constexpr):
    """Along the last of x's three axes."""
    return tl.reduce(x, 2, _larger_pair) if HARDWARE == 2 else tl.max(low_of(x), 2) | tl.max(high_of(x), 2) << 16


@triton.jit
def pair_inverse(amax, RCEIL: tl.constexpr, SMALLEST: tl.constexpr, HARDWARE: tl.constexpr):
    """`mx_inverse` of `mx_byte`, or `fp8_inverse` (RCEIL), of a pair of maxima, as a pair of bfloat16. SMALLEST is the
    scale exponent of tiny maxima: -127 in MX formats, -48 of the 1e-12 that the others clamp to."""
    exponent = amax
    if RCEIL:
        exponent += 0x001F001F  # a carry where the mantissa exceeds 0x60 (float32: 0x600000)
    exponent &= -0x007F0080  # 0xFF80FF80
    largest = tl.zeros_like(amax) + (127 - SMALLEST << 7) * 0x10001
    inverse = smaller_pair(-0x7CFF7D00 - exponent, largest, HARDWARE)  # 0x83008300: twice the exponent 262
    finite = tl.zeros_like(amax) + 0x7F7F7F7F
    poison = larger_pair(amax, finite, HARDWARE) - finite
    return inverse | smaller_pair(poison, tl.zeros_like(amax) + 0x10001, HARDWARE) * 0x7FC0


@triton.jit
def is_poison(amax):
    return amax >= 0x7F800000


@triton.jit
def fp8_exponent(amax):
    """Exponent of the power of two that 448/max(amax, 1e-12) rounds down to, inverted."""
    amax = tl.maximum(amax, 0x2B8CBCCC)  # 1e-12
    return (amax >> 23) - 135 + ((amax & 0x7FFFFF) > 0x600000).to(tl.int32)


@triton.jit
def fp8_inverse(amax):
    """What a row or block of this amax is multiplied by before the cast; NaN poisons all of it."""
    return tl.where(is_poison(amax), float("nan"), power_of_two(-fp8_exponent(amax)))


@triton.jit
def fp8_scale(amax):
    return tl.where(is_poison(amax), float("nan"), power_of_two(fp8_exponent(amax)))


@triton.jit
def mx_byte(amax, RCEIL: tl.constexpr):
    """The E8M0 byte of a block: 2^ceil(log2(amax/448)) (RCEIL) or 2^(floor(log2 amax) - 8) (OCP MX v1.0, 6.3)."""
    byte = (amax >> 23) - 8
    if RCEIL:
        byte += ((amax & 0x7FFFFF) > 0x600000).to(tl.int32)
    return tl.where(is_poison(amax), 255, tl.maximum(byte, 0))


@triton.jit
def power_of_two(exponent):
    """2^exponent as float32, exponent in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def mx_inverse(byte):
    """What a block with this E8M0 byte is multiplied by before the cast; NaN poisons all of it."""
    return tl.where(byte == 255, float("nan"), power_of_two(127 - byte))


@triton.jit
def mx_scale(byte):
    """2^(byte - 127), NaN for byte 255; byte 0 is the float32 subnormal 2^-127."""
    scale = tl.where(byte == 0, 0x00400000, byte << 23).to(tl.float32, bitcast=True)
    return tl.where(byte == 255, float("nan"), scale)


@triton.jit
def encode(x, HARDWARE: tl.constexpr):
    """float32 to the e4m3 byte, as int8: saturating, to nearest even, 0x7F for NaN, as the PTX instruction
    cvt.rn.satfinite.e4m3x2.f32 does it. Without HARDWARE (the interpreter's own cast does not round to even) the byte
    is put together from integers."""
    if HARDWARE:
        byte = x.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        absolute = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), 448.0)
        normal = absolute.to(tl.int32, bitcast=True)
        normal = ((normal + 0x7FFFF + ((normal >> 20) & 1)) >> 20) - (120 << 3)
        # Adding 2^14 leaves a multiple of 2^-9, the e4m3 subnormal step, in the low bits.
        subnormal = (absolute + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        byte = tl.where(absolute < 0.015625, subnormal, normal) | ((bits >> 24) & 0x80)
        byte = tl.where(x == x, byte, 0x7F).to(tl.int8)
    return byte


@triton.jit
def encode_four(x0, x1, x2, x3, HARDWARE: tl.constexpr):
    """Four bytes as one int32, that of x0 the lowest: two instructions, where `encode` pairs neighbours of one tensor
    and leaves the rest to byte permutes."""
    if HARDWARE:
        word = tl.inline_asm_elementwise(
            """{ .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high}; }""",
            "=r,f,f,f,f", (x0, x1, x2, x3), dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        byte = encode(tl.join(tl.join(x0, x2), tl.join(x1, x3)), 0).to(tl.int32) & 0xFF
        even, odd = tl.split(byte)
        low, high = tl.split(even | odd << 8)
        word = low | high << 16
    return word


@triton.jit
def decode(byte, HARDWARE: tl.constexpr):
    """The e4m3 byte (int8) as float32, exact; of NaN, something that a NaN scale makes NaN again."""
    if HARDWARE:
        value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = byte.to(tl.int32) & 0xFF
        exponent = (bits >> 3) & 0xF
        fraction = bits & 7
        normal = (((exponent + 120) << 23) | (fraction << 20)).to(tl.float32, bitcast=True)
        value = tl.where(exponent == 0, fraction.to(tl.float32) * 0.001953125, normal)
        value = tl.where(bits >= 0x80, -value, value)
    return value


HARDWARE = 2 if isinstance(encode, triton.JITFunction) else 0
"""What GPUs from sm_90 on may be asked for; 0 under Triton's CPU interpreter."""


@lru_cache
def _has_pairs(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


def hardware(x: torch.Tensor) -> int:
    """What the quantizers of x ask for. On sm_89 Triton casts to e4m3 through float16, which rounds float32 twice
    (bfloat16 fits): there the byte is put together from integers."""
    if not HARDWARE or not x.is_cuda or _has_pairs(x.device.index):
        return HARDWARE
    return 0 if x.dtype == torch.float32 else 1
