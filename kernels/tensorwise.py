"""Tensorwise fp8, for linears: operands with one scale each (docs/design.md, Numerics), and their GEMM.

R, C = rows and columns of a matrix; Rp = `padded_rows(R)`. A whole matrix is quantized in two steps, so that a compiler
may fuse the first one with what made the matrix: `find_maxima`, then `cast`. On a GPU both are Triton kernels and the
GEMM is ``torch._scaled_mm``; elsewhere, and where the emulation is asked for, plain PyTorch with the same bytes.
"""

from functools import lru_cache

import torch

from xmoe.config import KernelPreference
from xmoe.kernels import emulation
from xmoe.kernels.call import on_device, programs
from xmoe.kernels.dispatch import Device, UnsupportedError
from xmoe.kernels.specs import HAS_TRITON, device_of

if HAS_TRITON:
    from xmoe.kernels import quantize_tensor

ROW_MULTIPLE = 16
"""Of the contraction of ``torch._scaled_mm``: 16 bytes."""
_DTYPES = {False: torch.float8_e4m3fn, True: torch.float8_e5m2}
_LARGEST = {False: 448.0, True: 57344.0}
_INF_BITS, _MIN_AMAX_BITS, _NAN = 0x7F800000, 0x2B8CBCCC, 0x7F


@lru_cache
def is_emulated(preference: KernelPreference, device: Device) -> bool:
    """Whether plain PyTorch computes tensorwise GEMMs on `device`.

    Raises:
        UnsupportedError: `preference` names an implementation that there is not.
    """
    if preference is KernelPreference.TRITON:
        raise UnsupportedError(
            "kernel_preference=triton has no tensorwise GEMM, which is torch._scaled_mm's; use kernel_preference=auto, "
            "torch or emulated, or granularity=rowwise"
        )
    has_fp8 = device.type == "cuda" and device.capability is not None and device.capability >= (8, 9)
    if preference is KernelPreference.TORCH and not has_fp8:
        raise UnsupportedError(
            f"kernel_preference=torch cannot run tensorwise on {device}: torch._scaled_mm needs an NVIDIA GPU of "
            "compute capability 8.9 or higher; use kernel_preference=auto or emulated"
        )
    return preference is KernelPreference.EMULATED or not has_fp8


def emulated_on(preference: KernelPreference, device: torch.device) -> bool:
    """`is_emulated` of a torch device."""
    return is_emulated(preference, device_of(device.type, device.index))


def padded_rows(R: int) -> int:
    """The columns of the transposed operand of R rows."""
    return (R + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE


def dtype_of(e5m2: bool) -> torch.dtype:
    """Of the elements."""
    return _DTYPES[e5m2]


# -------------------------------------------------------------------------------------------------------- quantizers


def _by_triton(x: torch.Tensor) -> bool:
    return HAS_TRITON and x.is_cuda and not isinstance(x, torch._subclasses.FakeTensor)


def find_maxima(x: torch.Tensor, *, plain: bool = False) -> torch.Tensor:
    """Float32 [P], whose largest is the largest magnitude of x (bf16 or fp32, not empty; NaN is larger than all).

    `plain`: one value, by PyTorch's own operations, for a compiler to fuse.
    """
    if plain or not _by_triton(x):
        return x.detach().abs().amax().float().view(1)
    x = x.contiguous()
    with on_device(x):
        maxima = torch.empty(
            quantize_tensor.count_maxima(x, programs(x.device.index)), dtype=torch.float32, device=x.device
        )
        quantize_tensor.find_maxima(x, maxima)
    return maxima


def cast(
    x: torch.Tensor, maxima: torch.Tensor, e5m2: bool, rows: bool, columns: bool, *, emulated: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(rows, columns, scale)`` of x [R, C], bf16 or fp32, given `find_maxima` of it.

    fp8 [R, C] and, transposed, [C, Rp], zeros past R, each empty [0] unless asked for; float32 []. e5m2 or e4m3.
    """
    (R, C), dtype = x.shape, _DTYPES[e5m2]
    if emulated or not _by_triton(x):
        data, scale = _cast(x, maxima, e5m2)
        none = x.new_empty(0, dtype=dtype)
        return data if rows else none, transposed(data) if columns else none, scale
    out = x.new_empty((R, C) if rows else 0, dtype=dtype)
    turned = x.new_empty((C, padded_rows(R)) if columns else 0, dtype=dtype)
    scale = x.new_empty((), dtype=torch.float32)
    x = x.contiguous()
    with on_device(x):
        quantize_tensor.cast(x, maxima, out if rows else None, turned if columns else None, scale, e5m2)
    return out, turned, scale


def _cast(x: torch.Tensor, maxima: torch.Tensor, e5m2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(data, scale); the exponent of the scale is read off the bits of the largest magnitude, as in `emulation._cast`:
    448 = 1.75 * 2^8 and 57344 = 1.75 * 2^15."""
    bits = maxima.max().view(torch.int32)
    amax = bits.clamp(min=_MIN_AMAX_BITS)
    exponent = (amax >> 23) - (142 if e5m2 else 135) + ((amax & 0x7FFFFF) > 0x600000)
    poisoned = bits >= _INF_BITS
    scaled = (x.float() * _exp2(-exponent)).clamp(-_LARGEST[e5m2], _LARGEST[e5m2])
    data = scaled.to(_DTYPES[e5m2]).view(torch.uint8).masked_fill(poisoned, _NAN)
    return data.contiguous().view(_DTYPES[e5m2]), _exp2(exponent).masked_fill(poisoned, torch.nan)


def _exp2(exponent: torch.Tensor) -> torch.Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def transposed(data: torch.Tensor) -> torch.Tensor:
    """The bytes of [R, C] as the columns operand [C, Rp]."""
    R, C = data.shape
    out = torch.zeros(C, padded_rows(R), dtype=torch.uint8, device=data.device)
    out[:, :R] = data.view(torch.uint8).t()
    return out.view(data.dtype)


# --------------------------------------------------------------------------------------------------------------- GEMM


def scaled_mm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    fast: bool,
    emulated: bool = False,
) -> torch.Tensor:
    """[M, P] = a [M, C] @ b [P, C]^T, fp8 (e5m2 in one of them at most), rounded once to bf16 or fp32 `out_dtype`.

    `fast`: partial sums in the tensor core alone. C and P are multiples of 16, and nothing is empty.
    """
    if emulated:
        return _emulated_mm(a, a_scale, b, b_scale).to(out_dtype)
    return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=out_dtype, use_fast_accum=fast)


@emulation.outside_autocast
def _emulated_mm(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    # Not in place: selective activation checkpointing may keep the product.
    return (a.float() @ b.float().t()) * a_scale * b_scale
