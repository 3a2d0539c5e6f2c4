"""Operands that a caller brings quantized: made, taken back, and laid out as an implementation multiplies them.

Not for the tensors of a call of `pipeline`: these allocate. M tokens, K contraction of the forward, N output features,
G groups.
"""

import torch

from xmoe.config import GroupedMMConfig
from xmoe.kernels import emulation
from xmoe.kernels.call import on_device, programs
from xmoe.kernels.dispatch import Device, select
from xmoe.kernels.specs import HAS_TRITON, Prepared
from xmoe.operands import FP8_BLOCK, SCALE_BLOCKS, QuantizedOperand

if HAS_TRITON:
    from xmoe.kernels import dequantize as kernel
    from xmoe.kernels import quantize

Operand = QuantizedOperand[torch.Tensor]


_TMA_BYTES = 16


def _by_triton(x: torch.Tensor) -> bool:
    return HAS_TRITON and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)


def scale_shape(shape: tuple[int, ...], format: str, square: bool) -> tuple[int, ...]:
    """Of data [..., C] along C. `square`: a weight [..., P, C], whose blocks in ``fp8_blockwise`` are so."""
    lines, C = shape[:-1], shape[-1]
    if square and format == "fp8_blockwise":
        lines = (*lines[:-1], -(-lines[-1] // FP8_BLOCK))
    return lines if format == "fp8_rowwise" else (*lines, -(-C // SCALE_BLOCKS[format]))


def scale_dtype(format: str) -> torch.dtype:
    return torch.float32 if format.startswith("fp8") else torch.float8_e8m0fnu


def quantize_rows(x: torch.Tensor, format: str) -> Operand:
    """`emulation.quantize_rows` of x [M, K], by a kernel on a GPU."""
    if not _by_triton(x):
        return emulation.quantize_rows(x, format)
    operand = _empty(tuple(x.shape), x, format, False)
    with on_device(x):
        quantize.quantize_rows(x, format, operand.data, operand.scale, programs(x.device.index))
    return operand


def quantize_weights(B: torch.Tensor, format: str) -> Operand:
    """`emulation.quantize_weights` of B [G, K, N] along K, by a kernel on a GPU."""
    if not _by_triton(B):
        return emulation.quantize_weights(B, "K", format)
    b = B.mT if 1 in B.stride()[1:] else B.mT.contiguous()
    operand = _empty(tuple(b.shape), B, format, True)
    amax = torch.zeros(b.shape[:2], dtype=torch.int32, device=B.device) if format == "fp8_rowwise" else None
    with on_device(B):
        quantize.quantize_weights(b, format, operand.data, operand.scale, amax, programs(B.device.index))
    return operand


def _empty(shape: tuple[int, ...], like: torch.Tensor, format: str, square: bool) -> Operand:
    data = like.new_empty(shape, dtype=torch.float8_e4m3fn)
    scale = like.new_empty(scale_shape(shape, format, square), dtype=scale_dtype(format))
    return QuantizedOperand(data, scale, "K", format)


def dequantize(operand: Operand, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """data * scale of an operand along K or N, rounded once; exact in bf16 where the scale is a power of two, as all of
    ours are, and the result a normal number."""
    if not _by_triton(operand.data):
        return emulation.dequantize(operand).to(dtype).contiguous()
    data = operand.data.contiguous()
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    with on_device(data):
        kernel.dequantize(data, operand.scale, operand.format, out)
    return out


def takes_rows(config: GroupedMMConfig, device: Device) -> bool:
    """Whether `as_rows` has a layout for rows; if not, scales lie where the groups are, which the quantizers know."""
    return not select(config, device).scale_tiles


def as_rows(operand: Operand, config: GroupedMMConfig, device: Device, values: torch.Tensor | None = None) -> Prepared:
    """Rows [M, K] for `pipeline.forward`. `values`: `dequantize` of them, if that was made."""
    implementation = select(config, device)
    if implementation.elements == "bf16" and implementation.gemm != "emulated":
        return Prepared(dequantize(operand) if values is None else values, None)
    scale = operand.scale.mT.contiguous().mT if implementation.warp_specialized else readable(operand.scale)
    return Prepared(readable(operand.data), scale)


def as_weights(operand: Operand, config: GroupedMMConfig, device: Device) -> Prepared:
    """Weights [G, N, K] for `pipeline.forward`."""
    implementation = select(config, device)
    if implementation.elements == "bf16" and implementation.gemm != "emulated":
        return Prepared(dequantize(operand), None)
    scale = emulation.to_scale_tiles(operand.scale) if implementation.scale_tiles else readable(operand.scale)
    return Prepared(readable(operand.data), scale)


def readable(x: torch.Tensor) -> torch.Tensor:
    """x contiguous where TMA and cuBLAS can read it, from a multiple of 16 bytes; a copy where it is not."""
    x = x.contiguous().view(x.shape)  # whose axes of length 1 have the strides of a contiguous tensor, too
    return x if x.data_ptr() % _TMA_BYTES == 0 else x.clone()
