"""Kernels of the formats with several scales a row (`fp8_blockwise`, `mxfp8_*`), along the last axis: launched by
`quantize.py`, which says what they share. R, C = rows and columns; a weight is [G, P, C].
"""

import triton
import triton.language as tl

from xmoe.kernels.e4m3 import decode, encode, fp8_inverse, fp8_scale, magnitude, mx_byte, mx_inverse, mx_scale
from xmoe.kernels.tiles import tile_rows


@triton.jit(do_not_specialize=["R", "P"])
def rows_blocks(
    x_ptr, stride_xg, stride_xr, stride_xc,
    data_ptr, scale_ptr,
    R, P, C,
    SCALING: tl.constexpr, RCEIL: tl.constexpr, DEQUANTIZE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Several scales a row: one for 32 ("mx") or 128 ("blockwise") elements."""
    SIZE: tl.constexpr = 32 if SCALING == "mx" else 128
    blocks: tl.constexpr = BLOCK_C // SIZE
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    first = tl.program_id(1) * BLOCK_C
    col = first + tl.arange(0, BLOCK_C)[None, :]
    mask = (row < R) & (col < C)
    x_rows = x_ptr + row // P * stride_xg + row % P * stride_xr
    x = tl.load(x_rows + col.to(tl.int64) * stride_xc, mask, 0.0).to(tl.float32)
    x = tl.reshape(x, (BLOCK_R, blocks, SIZE))
    amax = tl.max(magnitude(x), 2)
    if SCALING == "mx":
        byte = mx_byte(amax, RCEIL)
        inverse = mx_inverse(byte)
        scale = byte.to(tl.uint8)
    else:
        inverse = fp8_inverse(amax)
        scale = fp8_scale(amax)
    data = encode(x * inverse[:, :, None], HARDWARE)
    if DEQUANTIZE:
        data = (decode(data, HARDWARE) * mx_scale(byte)[:, :, None]).to(tl.bfloat16)
    tl.store(data_ptr + row * C + col, tl.reshape(data, (BLOCK_R, BLOCK_C)), mask)
    if not DEQUANTIZE:
        block = first // SIZE + tl.arange(0, blocks)[None, :]
        tl.store(scale_ptr + row * tl.cdiv(C, SIZE) + block, scale, (row < R) & (block * SIZE < C))


@triton.jit
def square_blocks(
    x_ptr, stride_xg, stride_xp, stride_xc,
    data_ptr, scale_ptr,
    P, C,
    BLOCK: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK x BLOCK of a weight [G, P, C] a program: one scale."""
    index = tl.program_id(0)
    c_blocks = tl.cdiv(C, BLOCK)
    per_group = tl.cdiv(P, BLOCK) * c_blocks
    group = (index // per_group).to(tl.int64)
    p = (index % per_group // c_blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    c = (index % c_blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    mask = (p < P) & (c < C)
    x = tl.load(x_ptr + group * stride_xg + p * stride_xp + c * stride_xc, mask, 0.0).to(tl.float32)
    amax = tl.max(tl.max(magnitude(x), 1), 0)
    tl.store(data_ptr + (group * P + p) * C + c, encode(x * fp8_inverse(amax), HARDWARE), mask)
    tl.store(scale_ptr + index, fp8_scale(amax))


@triton.jit(do_not_specialize=["G"])
def columns_straight(
    x_ptr, stride_xg, stride_xr, stride_xc,
    data_ptr, stride_dg,
    scale_ptr, tiles_ptr, groups_ptr,
    G, R, C,
    RAGGED: tl.constexpr, RCEIL: tl.constexpr, DEQUANTIZE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One block of 32 rows and BLOCK_C columns, written where it was read. A thread holds all rows of its columns, so
    nothing is exchanged between threads. The blocks of tile t of BLOCK_R rows are the scale's rows from
    t * BLOCK_R / 32 on."""
    blocks: tl.constexpr = BLOCK_R // 32
    block = tl.program_id(0)
    group, first, end = tile_rows(block // blocks, tiles_ptr, groups_ptr, G, R, RAGGED, BLOCK_R)
    first += block % blocks * 32
    group = group.to(tl.int64)
    col = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    x_columns = x_ptr + group * stride_xg + col * stride_xc
    byte = tl.zeros((BLOCK_C,), tl.int32)
    if first < end:
        amax = tl.zeros((BLOCK_C,), tl.int32)
        values = ()
        for i in tl.static_range(32):
            row = (first + i).to(tl.int64)
            x = tl.load(x_columns + row * stride_xr, (row < end) & (col < C), 0.0)
            values += (x,)
            amax = tl.maximum(amax, magnitude(x.to(tl.float32)))
        byte = mx_byte(amax, RCEIL)
        for i in tl.static_range(32):
            row = (first + i).to(tl.int64)
            data = encode(values[i].to(tl.float32) * mx_inverse(byte), HARDWARE)
            if DEQUANTIZE:
                data = (decode(data, HARDWARE) * mx_scale(byte)).to(tl.bfloat16)
            tl.store(data_ptr + group * stride_dg + row * C + col, data, (row < end) & (col < C))
    if not DEQUANTIZE:
        tl.store(scale_ptr + block.to(tl.int64) * C + col, byte.to(tl.uint8), col < C)


@triton.jit(do_not_specialize=["G"])
def dequantize_straight(
    data_ptr, scale_ptr, out_ptr, tiles_ptr, groups_ptr, G, C,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """The inverse of a ragged `columns_straight`."""
    blocks: tl.constexpr = BLOCK_R // 32
    block = tl.program_id(0)
    _, first, end = tile_rows(block // blocks, tiles_ptr, groups_ptr, G, 0, True, BLOCK_R)
    first += block % blocks * 32
    col = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    if first < end:
        scale = mx_scale(tl.load(scale_ptr + block.to(tl.int64) * C + col, col < C, 0).to(tl.int32))
        for i in tl.static_range(32):
            row = (first + i).to(tl.int64)
            inside = (row < end) & (col < C)
            value = decode(tl.load(data_ptr + row * C + col, inside, 0), HARDWARE) * scale
            tl.store(out_ptr + row * C + col, value.to(tl.bfloat16), inside)
