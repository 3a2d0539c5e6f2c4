"""Triton device functions for e4m3 bytes and power-of-two scales; the rules of docs/design.md, bit for bit.

amax travels as the bits of its absolute value: integer order is the order of the values, and everything from
0x7F800000 up is Inf or NaN, so one integer maximum finds both the scale and the poison.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def magnitude(x):
    """The bits of |x|, x float32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


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


HARDWARE = isinstance(encode, triton.JITFunction)
"""False under Triton's CPU interpreter."""


def hardware(x: torch.Tensor) -> bool:
    """Whether the cast instruction makes e4m3 of x. On sm_89 Triton casts through float16, which rounds float32 twice
    (bfloat16 fits): there the byte is put together from integers."""
    twice = x.dtype == torch.float32 and x.is_cuda and torch.cuda.get_device_capability(x.device) == (8, 9)
    return HARDWARE and not twice
