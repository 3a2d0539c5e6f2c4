"""The inverse of the quantizers: data * scale in bf16 or float32.

R rows of C elements, P rows a matrix (R of a 2D operand).
"""

import torch
import triton
import triton.language as tl

from xmoe.kernels.e4m3 import HARDWARE, decode, mx_scale
from xmoe.kernels.launch import launch
from xmoe.kernels.quantize_blocks import scale_bits
from xmoe.kernels.tiles import cdiv
from xmoe.operands import FP8_BLOCK, SCALE_BLOCKS

BLOCK_R, BLOCK_C = 8, 512


@triton.jit(do_not_specialize=["R", "P", "stride_sg", "stride_sl", "stride_sb"])
def _dequantize(
    data_ptr,
    scale_ptr, stride_sg, stride_sl, stride_sb,
    out_ptr,
    R, P, C,
    LINES: tl.constexpr, SIZE: tl.constexpr, MX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCKS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """A scale covers LINES rows of a matrix and SIZE columns; or all columns, at a stride of 0."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[None]
    at = row // P * stride_sg + row % P // LINES * stride_sl + block.to(tl.int64) * stride_sb
    scale = tl.load(scale_ptr + at, (row < R) & (block * SIZE < C), 0)
    if MX:
        scale = mx_scale(scale.to(tl.int32))
    col = block[:, :, None] * SIZE + tl.arange(0, SIZE)[None, None]
    inside = (row[:, :, None] < R) & (col < C)
    element = row[:, :, None] * C + col
    value = decode(tl.load(data_ptr + element, inside, 0), HARDWARE) * scale[:, :, None]
    tl.store(out_ptr + element, value.to(out_ptr.dtype.element_ty), inside)


def dequantize(data: torch.Tensor, scale: torch.Tensor, format: str, out: torch.Tensor) -> None:
    """out = data * scale, float32 rounded once, of an operand along K or N in a layout of docs/design.md but scale
    tiles: data e4m3 [R, C] or [G, P, C], contiguous, as is out, bf16 or float32."""
    assert data.is_contiguous(), f"strides {data.stride()}: data is read row after row"
    assert out.is_contiguous(), f"strides {out.stride()}: out is written row after row"
    P, C = data.shape[-2:]
    R = data.numel() // max(C, 1)
    if not data.numel():
        return
    size = SCALE_BLOCKS.get(format, BLOCK_C)
    strides = (0, *scale.stride()) if data.ndim == 2 else scale.stride()
    strides = (*strides, 0) if format == "fp8_rowwise" else strides
    launch(
        _dequantize, (cdiv(R, BLOCK_R), cdiv(C, BLOCK_C)),
        data.view(torch.int8), scale_bits(scale), *strides, out, R, P, C,
        LINES=FP8_BLOCK if format == "fp8_blockwise" and data.ndim == 3 else 1, SIZE=size,
        MX=format.startswith("mx"), BLOCK_R=BLOCK_R, BLOCKS=BLOCK_C // size, HARDWARE=HARDWARE,
    )  # fmt: skip
