"""What only the formats with several scales a row need (`fp8_blockwise`, `mxfp8_*`): their kernels along the last axis,
and the straight quantizer of MX. `quantize.py` says what all quantizers share. R, C = rows and columns; a weight is
[G, P, C].
"""

import torch
import triton
import triton.language as tl

from xmoe.kernels.e4m3 import (
    HARDWARE,
    decode,
    encode,
    fp8_inverse,
    fp8_scale,
    hardware,
    magnitude,
    mx_byte,
    mx_inverse,
    mx_scale,
)
from xmoe.kernels.launch import launch
from xmoe.kernels.scale_tiles import in_tiles, tile_byte
from xmoe.kernels.swiglu import read
from xmoe.kernels.tiles import cdiv, tile_rows
from xmoe.operands import MX_BLOCK, SCALE_BLOCKS, SCALE_TILE_BLOCKS, SCALE_TILE_ROWS, TOKEN_TILE, padded_tokens


@triton.jit
def source_row(x_ptr, stride_xg, stride_xr, index_ptr, row, P, inside=None):
    """Where row `row`, of matrix row // P, begins in x; with index_ptr that is row index[row] of x."""
    if index_ptr is not None:
        row = tl.load(index_ptr + row, inside, None if inside is None else 0)
    return x_ptr + (row // P).to(tl.int64) * stride_xg + (row % P).to(tl.int64) * stride_xr


@triton.jit(do_not_specialize=["R", "P", "G", "stride_sb"])
def rows_blocks(
    x_ptr, stride_xg, stride_xr, stride_xc, index_ptr,
    data_ptr,
    scale_ptr, stride_sr, stride_sb,
    tiles_ptr, groups_ptr,
    R, P, C, G,
    SCALING: tl.constexpr, GATED: tl.constexpr, RCEIL: tl.constexpr, DEQUANTIZE: tl.constexpr,
    SCALE_TILES: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Several scales a row: one for 32 ("mx") or 128 ("blockwise") elements.

    SCALE_TILES: the programs go over the rows of the scale's tiles, written whole. 128 of them are a tile of the map
    (RAGGED), or of a matrix of P rows, the last ones padding. A program has every 32nd row or so, because in a tile the
    scales of these lie side by side."""
    SIZE: tl.constexpr = 32 if SCALING == "mx" else 128
    blocks: tl.constexpr = BLOCK_C // SIZE
    end = R
    if SCALE_TILES:
        STEP: tl.constexpr = 128 // BLOCK_R
        tile = tl.program_id(0) // STEP
        row_of_tile = tl.program_id(0) % STEP + tl.arange(0, BLOCK_R)[:, None] * STEP
        group, start, end = tile_rows(tile, tiles_ptr, groups_ptr, G, P, RAGGED, 128)
        row = (start + row_of_tile).to(tl.int64)
        if not RAGGED:
            row = tl.where(row < P, group.to(tl.int64) * P + row, R)
            end = R
    else:
        row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    first = tl.program_id(1) * BLOCK_C
    col = first + tl.arange(0, BLOCK_C)[None, :]
    mask = (row < end) & (col < C)
    x_rows = source_row(x_ptr, stride_xg, stride_xr, index_ptr, row, P, row < end)
    x = read(x_rows + col.to(tl.int64) * stride_xc, C * stride_xc, mask, GATED, HARDWARE).to(tl.float32)
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
        if SCALE_TILES:
            across = tl.cdiv(C, 128)
            tl.store(scale_ptr + tile_byte(tile * 128 + row_of_tile, block, across), scale, block < across * 4)
        else:
            out = scale_ptr + row * stride_sr + block.to(tl.int64) * stride_sb
            tl.store(out, scale, (row < R) & (block * SIZE < C))


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
    x_ptr, stride_xg, stride_xr, stride_xc, index_ptr,
    data_ptr, stride_dg,
    scale_ptr, tiles_ptr, groups_ptr,
    G, R, C,
    GATED: tl.constexpr, RAGGED: tl.constexpr, RCEIL: tl.constexpr, DEQUANTIZE: tl.constexpr,
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
            x_row = row
            if index_ptr is not None:
                x_row = tl.load(index_ptr + row, row < end, 0).to(tl.int64)
            x = read(x_columns + x_row * stride_xr, C * stride_xc, (row < end) & (col < C), GATED, HARDWARE)
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


SCALING = {"fp8_rowwise": "rowwise", "fp8_blockwise": "blockwise", "mxfp8_rceil": "mx", "mxfp8_floor": "mx"}
ROW_BLOCKS = 1024
"""Columns of a program over 4096 elements: MX 0.51 ms at [128000, 5120] on an H200, 0.72 with 32 x 128."""


def scale_bits(scale: torch.Tensor | None) -> torch.Tensor | None:
    return scale if scale is None or scale.dtype == torch.float32 else scale.view(torch.uint8)


def launch_rows_blocks(x, strides, index, R, P, C, format, data, scale, map, gated):
    """`x` is R rows of C, P a matrix; its strides are those of [R/P, P, C]. `index`: where its rows are, or None."""
    tiled = in_tiles(data, scale)
    narrowest = SCALE_TILE_BLOCKS * MX_BLOCK if tiled else SCALE_BLOCKS[format]
    block_c = min(ROW_BLOCKS, max(narrowest, 1 << (C - 1).bit_length()))
    block_r = 4096 // block_c
    scale_rows, scale_strides = R, (0, 0)
    if tiled:
        assert (map is None) == (data.ndim == 3), "scale tiles of tokens follow a map, those of weights none"
        scale_rows = scale.shape[:-2].numel() * SCALE_TILE_ROWS
    elif scale is not None:
        scale_strides = scale.stride(-2), scale.stride(-1)  # the rows of a weight lie one after the other
    tiles, groups = map if tiled and map is not None else (None, None)
    launch(
        rows_blocks, (cdiv(scale_rows, block_r), cdiv(C, block_c)),
        x, *strides, index, int8_or_bf16(data), scale_bits(scale), *scale_strides,
        tiles, groups, R, P, C, 1 if groups is None else groups.shape[0] - 1,
        SCALING=SCALING[format], GATED=gated, RCEIL=format == "mxfp8_rceil", DEQUANTIZE=scale is None,
        SCALE_TILES=tiled, RAGGED=tiles is not None, BLOCK_R=block_r, BLOCK_C=block_c, HARDWARE=hardware(x),
    )  # fmt: skip


def straight_block(element_size: int, gated: bool) -> int:
    """Columns of a straight program of one warp: 4 a thread, of 32 rows each, or as many as do not spill."""
    return 64 if gated and element_size > 2 else 128


def int8_or_bf16(data: torch.Tensor) -> torch.Tensor:
    return data if data.dtype == torch.bfloat16 else data.view(torch.int8)


def launch_straight(x, G, R, C, format, data, scale, tiles, groups, num_tiles, gated=False, index=None):
    """`x` and `data` are [G, R, C] (dense) or [1, R, C] with a tile map (ragged). `index`: where the rows are in a
    ragged x."""
    ragged = tiles is not None
    assert data.stride()[1:] == (C, 1), f"strides {data.stride()}: expected rows of {C}"
    if num_tiles:
        block_c = straight_block(x.element_size(), gated)
        launch(
            columns_straight, (num_tiles * (TOKEN_TILE // MX_BLOCK), cdiv(C, block_c)),
            x, 0 if ragged else x.stride(0), x.stride(1), x.stride(2), index,
            int8_or_bf16(data), 0 if ragged else data.stride(0), None if scale is None else scale.view(torch.uint8),
            tiles, groups, G, 0 if ragged else R, C,
            GATED=gated, RAGGED=ragged, RCEIL=format == "mxfp8_rceil", DEQUANTIZE=scale is None,
            BLOCK_R=TOKEN_TILE, BLOCK_C=block_c, HARDWARE=hardware(x), num_warps=1,
        )  # fmt: skip


def quantize_tokens_straight(
    x: torch.Tensor,
    format: str,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    tiles: torch.Tensor,
    groups: torch.Tensor,
    *,
    gated: bool = False,
    index: torch.Tensor | None = None,
) -> None:
    """Quantize `x` [M, C] (bf16 or fp32, any strides) along the tokens of each group, in place of its layout: the bytes
    of `quantize_tokens`, neither transposed nor padded.

    Args:
        format: "mxfp8_rceil" or "mxfp8_floor".
        data: e4m3 [M, C], or bf16 that receives data * scale. Rows of no group are left as they are.
        scale: E8M0 [Mp/32, C], written whole: the transpose of `quantize_tokens`'s; None with bf16 `data`.
        tiles, groups: the map of TOKEN_TILE-token tiles (`tiles.prepare`).
        gated: x [M, 2C] stands for its SwiGLU [M, C].
        index: int32 [M]: x is [T, C], and its row index[r] is row r.
    """
    (M, C), G = data.shape, groups.shape[0] - 1
    num_tiles = padded_tokens(M, G) // TOKEN_TILE
    launch_straight(x[None], G, M, C, format, data[None], scale, tiles, groups, num_tiles, gated, index)


def dequantize_tokens_straight(
    data: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, tiles: torch.Tensor, groups: torch.Tensor
) -> None:
    """bf16 `out` [M, C] = data * scale of `quantize_tokens_straight`. Rows of no group are left as they are."""
    (M, C), G = data.shape, groups.shape[0] - 1
    blocks = padded_tokens(M, G) // MX_BLOCK
    if blocks:
        launch(
            dequantize_straight, (blocks, cdiv(C, 512)),
            data.view(torch.int8), scale.view(torch.uint8), out, tiles, groups, G, C,
            BLOCK_R=TOKEN_TILE, BLOCK_C=512, HARDWARE=HARDWARE, num_warps=1,
        )  # fmt: skip
