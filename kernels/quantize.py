"""Quantizers: bf16 or fp32 in, e4m3 bytes and scales out, in the layouts of docs/design.md.

R, C = rows and columns of a 2D input; G = groups. "Rows" quantizes along the last axis and keeps the layout; "columns"
quantizes along the rows of each group and writes transposed, because fp8 tensor cores read the contraction
contiguously. A group is a run of tokens (ragged, padded to TOKEN_TILE) or one expert's matrix (all of R rows).

Scales: `fp8_rowwise` float32, one a row (column); `mxfp8_*` E8M0, one for 32 elements. Given a bf16 output, an MX
quantizer writes data * scale instead of bytes and scales: what a GPU without block-scaled MMA multiplies.

Bytes are stored as int8: a kernel that stores fp8 both straight and transposed is miscompiled by ptxas <= 12.9.
"""

import torch
import triton
import triton.language as tl

from xmoe.kernels.e4m3 import (
    POISON,
    apply_byte,
    decode,
    encode,
    is_poison,
    magnitude,
    mx_byte,
    power_of_two,
    rowwise_exponent,
)
from xmoe.operands import MX_BLOCK, TOKEN_TILE

LONGEST_ROW = 16384
"""Rows up to this long stay in registers between the maximum and the cast (elements)."""
COLUMN_BLOCK = 64
"""Columns of a transposing program over TOKEN_TILE rows. At [128000, 5120] on an H200: fp8 0.93 ms, MX 1.15; with 128
fp8 takes 0.87 but spills where the input is strided, and 8 warps are slower everywhere."""
ROWS_MX_BLOCK = 1024
"""Columns of a program over 4096 elements: 0.51 ms at [128000, 5120] on an H200, 0.72 with 32 x 128."""


def _row_blocks(C: int) -> tuple[int, int]:
    """Two powers of two that cover a row of C: 5120 = 4096 + 1024, where one block of 8192 would idle a third of its
    lanes (2.9 TB/s)."""
    first = 1 << (C.bit_length() - 1)
    return first, 1 << (C - first - 1).bit_length() if first < C else 0


@triton.jit
def _rowwise_data(x, amax, HARDWARE: tl.constexpr):
    """Bytes of x under one scale per entry of amax (already broadcast against x)."""
    return tl.where(is_poison(amax), POISON, encode(x * power_of_two(-rowwise_exponent(amax)), HARDWARE))


@triton.jit
def _rowwise_scale(amax):
    return tl.where(is_poison(amax), float("nan"), power_of_two(rowwise_exponent(amax)))


@triton.jit
def _mx_block(x, amax, RCEIL: tl.constexpr, DEQUANTIZE: tl.constexpr, HARDWARE: tl.constexpr):
    """(bytes or bf16 values, E8M0 byte) of a block x whose magnitudes' maximum is amax (broadcastable to x)."""
    byte = mx_byte(amax, RCEIL)
    data = encode(x * power_of_two(127 - tl.minimum(byte, 253)), HARDWARE)
    if DEQUANTIZE:
        out = apply_byte(decode(data, HARDWARE), byte).to(tl.bfloat16)
    else:
        out = tl.where(byte == 255, POISON, data).to(tl.int8)
    return out, byte


@triton.jit(do_not_specialize=["P"])
def _rows_fp8(
    x_ptr, stride_xg, stride_xr, stride_xc,
    data_ptr, scale_ptr,
    P, C,
    BLOCK_C: tl.constexpr, TAIL_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One row a program; row r is row r % P of matrix r // P. BLOCK_C columns, then TAIL_C (0: none), all in
    registers; or, with TAIL_C < 0, two passes in steps of BLOCK_C."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row // P * stride_xg + row % P * stride_xr
    out_row = data_ptr + row * C
    col = tl.arange(0, BLOCK_C)
    if TAIL_C < 0:
        amax = tl.zeros((), tl.int32)
        for first in range(0, C, BLOCK_C):
            c = first + col
            x = tl.load(x_row + c.to(tl.int64) * stride_xc, c < C, 0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.max(magnitude(x), 0))
        for first in range(0, C, BLOCK_C):
            c = first + col
            x = tl.load(x_row + c.to(tl.int64) * stride_xc, c < C, 0.0).to(tl.float32)
            tl.store(out_row + c, _rowwise_data(x, amax, HARDWARE).to(tl.int8), c < C)
    else:
        x = tl.load(x_row + col.to(tl.int64) * stride_xc, col < C, 0.0).to(tl.float32)
        amax = tl.max(magnitude(x), 0)
        if TAIL_C > 0:
            tail_col = BLOCK_C + tl.arange(0, TAIL_C)
            tail = tl.load(x_row + tail_col.to(tl.int64) * stride_xc, tail_col < C, 0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.max(magnitude(tail), 0))
            tl.store(out_row + tail_col, _rowwise_data(tail, amax, HARDWARE).to(tl.int8), tail_col < C)
        tl.store(out_row + col, _rowwise_data(x, amax, HARDWARE).to(tl.int8), col < C)
    tl.store(scale_ptr + row, _rowwise_scale(amax))


@triton.jit(do_not_specialize=["R", "P"])
def _rows_mx(
    x_ptr, stride_xg, stride_xr, stride_xc,
    data_ptr, scale_ptr,
    R, P, C,
    RCEIL: tl.constexpr, DEQUANTIZE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = BLOCK_C // 32
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    first = tl.program_id(1) * BLOCK_C
    col = first + tl.arange(0, BLOCK_C)[None, :]
    mask = (row < R) & (col < C)
    x_rows = x_ptr + row // P * stride_xg + row % P * stride_xr
    x = tl.load(x_rows + col.to(tl.int64) * stride_xc, mask, 0.0).to(tl.float32)
    x = tl.reshape(x, (BLOCK_R, blocks, 32))
    amax = tl.max(magnitude(x), 2)
    data, byte = _mx_block(x, amax[:, :, None], RCEIL, DEQUANTIZE, HARDWARE)
    tl.store(data_ptr + row * C + col, tl.reshape(data, (BLOCK_R, BLOCK_C)), mask)
    if not DEQUANTIZE:
        block = first // 32 + tl.arange(0, blocks)[None, :]
        scale = scale_ptr + row * tl.cdiv(C, 32) + block
        tl.store(scale, tl.reshape(byte, (BLOCK_R, blocks)).to(tl.uint8), (row < R) & (block * 32 < C))


@triton.jit
def _tile(tile, tiles_ptr, groups_ptr, G, R, RAGGED: tl.constexpr, BLOCK_R: tl.constexpr):
    """(group, first row, end row) of a tile; a tile past the last one is empty. Rows of a dense group count from 0."""
    if RAGGED:
        used = tl.load(groups_ptr + G * 4 + 2)
        group = tl.load(tiles_ptr + tile * 4, tile < used, 0)
        first = tl.load(tiles_ptr + tile * 4 + 1, tile < used, 0)
        end = tl.load(tiles_ptr + tile * 4 + 2, tile < used, 0)
    else:
        per_group = tl.cdiv(R, BLOCK_R)
        group = tile // per_group
        first = tile % per_group * BLOCK_R
        end = R
    return group, first, end


@triton.jit(do_not_specialize=["R", "G"])
def _columns_amax(
    x_ptr, stride_xg, stride_xr, stride_xc,
    amax_ptr, tiles_ptr, groups_ptr,
    G, R, C,
    RAGGED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    group, first, end = _tile(tl.program_id(0), tiles_ptr, groups_ptr, G, R, RAGGED, BLOCK_R)
    if first < end:  # not a tile past the last one
        row = (first + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (row < end) & (col < C)[None, :]
        x_tile = x_ptr + group.to(tl.int64) * stride_xg + row * stride_xr + col.to(tl.int64)[None, :] * stride_xc
        amax = tl.max(magnitude(tl.load(x_tile, mask, 0.0).to(tl.float32)), 0)
        tl.atomic_max(amax_ptr + group.to(tl.int64) * C + col, amax, col < C, sem="relaxed")


@triton.jit(do_not_specialize=["GC"])
def _columns_fp8_scale(amax_ptr, scale_ptr, GC, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(scale_ptr + index, _rowwise_scale(tl.load(amax_ptr + index, index < GC, 0)), index < GC)


@triton.jit(do_not_specialize=["R", "G", "stride_st", "stride_sc"])
def _columns(
    x_ptr, stride_xg, stride_xr, stride_xc,
    data_ptr, stride_dt, stride_dc,
    scale_ptr, stride_st, stride_sc,
    amax_ptr, tiles_ptr, groups_ptr,
    G, R, C,
    RAGGED: tl.constexpr, MX: tl.constexpr, RCEIL: tl.constexpr, DEQUANTIZE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_R rows and BLOCK_C columns, read once, written transposed.

    A ragged tile t goes to columns t * BLOCK_R of data; a dense one to its own rows of its group. Ragged data is
    written whole (padding and unused tiles are zero)."""
    blocks: tl.constexpr = BLOCK_R // 32
    tile = tl.program_id(0)
    group, first, end = _tile(tile, tiles_ptr, groups_ptr, G, R, RAGGED, BLOCK_R)
    local = tl.arange(0, BLOCK_R)
    row = (first + local).to(tl.int64)[:, None]
    col = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    x_tile = x_ptr + group.to(tl.int64) * stride_xg + row * stride_xr + col[None, :] * stride_xc
    x = tl.load(x_tile, (row < end) & (col < C)[None, :], 0.0).to(tl.float32)

    if RAGGED:
        out_group = tl.zeros((), tl.int64)
        out_first = tile * BLOCK_R
        out_rows = tl.full((BLOCK_R,), True, tl.int1)
    else:
        out_group = group.to(tl.int64)
        out_first = first
        out_rows = first + local < R

    if MX:
        x = tl.reshape(x, (blocks, 32, BLOCK_C))
        amax = tl.max(magnitude(x), 1)
        data, byte = _mx_block(x, amax[:, None, :], RCEIL, DEQUANTIZE, HARDWARE)
        data = tl.reshape(data, (BLOCK_R, BLOCK_C))
        if not DEQUANTIZE:
            block = out_first // 32 + tl.arange(0, blocks)
            inside = (col < C)[:, None]
            if not RAGGED:
                inside = inside & (block * 32 < R)[None, :]
            scale = scale_ptr + out_group * stride_st + col[:, None] * stride_sc + block[None, :]
            tl.store(scale, tl.trans(tl.reshape(byte, (blocks, BLOCK_C))).to(tl.uint8), inside)
    else:
        amax = tl.load(amax_ptr + group.to(tl.int64) * C + col, col < C, 0)[None, :]
        data = _rowwise_data(x, amax, HARDWARE).to(tl.int8)

    data = tl.where(row < end, data, 0).to(data_ptr.dtype.element_ty)  # padding stays zero beside poison too
    out = data_ptr + out_group * stride_dt + col[:, None] * stride_dc + out_first + local[None, :]
    tl.store(out, tl.trans(data), (col < C)[:, None] & out_rows[None, :])


@triton.jit(do_not_specialize=["R"])
def _dequantize(
    data_ptr, scale_ptr, out_ptr, R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    first = tl.program_id(1) * BLOCK_C
    col = first + tl.arange(0, BLOCK_C)[None, :]
    block = first // 32 + tl.arange(0, BLOCK_C // 32)[None, :]
    mask = (row < R) & (col < C)
    data = tl.reshape(tl.load(data_ptr + row * C + col, mask, 0), (BLOCK_R, BLOCK_C // 32, 32))
    byte = tl.load(scale_ptr + row * tl.cdiv(C, 32) + block, (row < R) & (block * 32 < C), 0).to(tl.int32)
    value = apply_byte(decode(data, HARDWARE), byte[:, :, None])
    tl.store(out_ptr + row * C + col, tl.reshape(value, (BLOCK_R, BLOCK_C)).to(tl.bfloat16), mask)


HARDWARE = isinstance(_rows_fp8, triton.JITFunction)
"""False under Triton's CPU interpreter."""


def _stores(data: torch.Tensor) -> torch.Tensor:
    return data if data.dtype == torch.bfloat16 else data.view(torch.int8)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv takes a microsecond


def row_warps(block: int) -> int:
    """Warps of a `_rows_fp8` program: 16 to 64 elements a thread."""
    return 8 if block > 8192 else 4 if block > 512 else 1


def quantize_rows(x: torch.Tensor, format: str, data: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Quantize `x` [R, C] or [G, P, C] (bf16 or fp32, any strides) along C.

    Args:
        format: "fp8_rowwise", "mxfp8_rceil" or "mxfp8_floor".
        data: e4m3, written, contiguous in the shape of x; or, for an MX format, bf16 that receives data * scale.
        scale: float32 [R] or [G, P], or E8M0 with a last axis of ceil(C/32), written; None with bf16 `data`.
    """
    G, P, C = x.shape if x.ndim == 3 else (1, *x.shape)
    strides = x.stride() if x.ndim == 3 else (0, *x.stride())
    R = G * P
    if R == 0:
        return
    if format == "fp8_rowwise":
        block, tail = _row_blocks(C) if C <= LONGEST_ROW else (4096, -1)
        _rows_fp8[(R,)](
            x, *strides, data.view(torch.int8), scale, P, C,
            BLOCK_C=block, TAIL_C=tail, HARDWARE=HARDWARE, num_warps=row_warps(block),
        )  # fmt: skip
        return
    block_c = min(ROWS_MX_BLOCK, max(MX_BLOCK, 1 << (C - 1).bit_length()))
    block_r = 4096 // block_c
    _rows_mx[(_cdiv(R, block_r), _cdiv(C, block_c))](
        x, *strides, _stores(data), None if scale is None else scale.view(torch.uint8), R, P, C,
        RCEIL=format == "mxfp8_rceil", DEQUANTIZE=scale is None,
        BLOCK_R=block_r, BLOCK_C=block_c, HARDWARE=HARDWARE,
    )  # fmt: skip


def _launch_columns(x, G, R, C, format, data, data_strides, scale, scale_strides, amax, tiles, groups, num_tiles):
    """`x` is [G, R, C] (dense) or [1, R, C] with a tile map (ragged)."""
    ragged = tiles is not None
    blocks = {"RAGGED": ragged, "BLOCK_R": TOKEN_TILE, "BLOCK_C": COLUMN_BLOCK}
    grid = (num_tiles, _cdiv(C, blocks["BLOCK_C"]))
    mx = format != "fp8_rowwise"
    strides = (0 if ragged else x.stride(0), x.stride(1), x.stride(2))
    if not mx:
        assert amax.shape == scale.shape == (G, C), f"amax {amax.shape}, scale {scale.shape}: expected {(G, C)}"
        amax.zero_()
        if num_tiles:
            _columns_amax[grid](x, *strides, amax, tiles, groups, G, R, C, **blocks)
        _columns_fp8_scale[(_cdiv(G * C, 1024),)](amax, scale, G * C, BLOCK=1024)
    if num_tiles:
        _columns[grid](
            x, *strides, _stores(data), *data_strides,
            scale.view(torch.uint8) if mx and scale is not None else None, *scale_strides,
            amax, tiles, groups, G, R, C,
            MX=mx, RCEIL=format == "mxfp8_rceil", DEQUANTIZE=mx and scale is None, HARDWARE=HARDWARE, **blocks,
        )  # fmt: skip


def quantize_tokens(
    x: torch.Tensor,
    format: str,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    amax: torch.Tensor | None,
    tiles: torch.Tensor,
    groups: torch.Tensor,
) -> None:
    """Quantize `x` [M, C] (bf16 or fp32, any strides) along the tokens of each group, transposed and padded.

    Args:
        format: "fp8_rowwise", "mxfp8_rceil" or "mxfp8_floor".
        data: e4m3 [C, Mp], written whole; or, for an MX format, bf16 [C, Mp] that receives data * scale.
        scale: float32 [G, C], or E8M0 [C, Mp/32], written whole; None with bf16 `data`.
        amax: int32 [G, C] scratch, for "fp8_rowwise".
        tiles, groups: the map of TOKEN_TILE-token tiles (`tiles.map_tiles`).
    """
    (M, C), Mp = x.shape, data.shape[1]
    _launch_columns(
        x.unsqueeze(0), groups.shape[0] - 1, M, C, format,
        data, (0, Mp), scale, (0, Mp // MX_BLOCK), amax, tiles, groups, Mp // TOKEN_TILE,
    )  # fmt: skip


def quantize_weights(
    b: torch.Tensor, format: str, data: torch.Tensor, scale: torch.Tensor | None, amax: torch.Tensor | None
) -> None:
    """Quantize `b` [G, P, C] (bf16 or fp32, any strides) along C. For B [G, K, N]: axis "N" is `b = B`, axis "K" is
    `b = B.mT`.

    Args:
        data: e4m3 [G, P, C], written; or, for an MX format, bf16 that receives data * scale.
        scale: float32 [G, P], or E8M0 [G, P, ceil(C/32)], written; None with bf16 `data`.
        amax: int32 [G, P] scratch, for "fp8_rowwise".
    """
    G, P, C = b.shape
    if b.stride(2) == 1:
        quantize_rows(b, format, data, scale)
        return
    _launch_columns(
        b.mT, G, C, P, format,
        data, (P * C, C), scale, (P * _cdiv(C, MX_BLOCK), _cdiv(C, MX_BLOCK)),
        amax, None, None, G * _cdiv(C, TOKEN_TILE),
    )  # fmt: skip


def dequantize(data: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """bf16 `out` = `data` (e4m3 [R, C]) * `scale` (E8M0 [R, ceil(C/32)])."""
    R, C = data.shape
    grid = (_cdiv(R, 32), _cdiv(C, 128))
    if R and C:
        _dequantize[grid](
            data.view(torch.int8), scale.view(torch.uint8), out, R, C, BLOCK_R=32, BLOCK_C=128, HARDWARE=HARDWARE
        )
