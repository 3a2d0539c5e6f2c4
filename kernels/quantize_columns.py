"""The transposing quantizers: along the rows of each group, written with those rows last, because fp8 tensor cores read
the contraction contiguously. `quantize.py` says what all quantizers share.

R, C = rows and columns; a group is a run of tokens (ragged) or one expert's matrix (dense, all of R rows).
"""

import torch
import triton
import triton.language as tl

from xmoe.kernels.e4m3 import (
    encode_four,
    fp8_inverse,
    fp8_scale,
    hardware,
    larger,
    magnitude,
    magnitude_of,
    mx_byte,
    mx_inverse,
    no_magnitudes,
)
from xmoe.kernels.launch import launch
from xmoe.kernels.quantize_blocks import SCALING, scale_bits
from xmoe.kernels.scale_tiles import tile_byte
from xmoe.kernels.swiglu import read
from xmoe.kernels.tiles import cdiv, tile_rows
from xmoe.operands import FP8_BLOCK, SCALE_TILE_ROWS, TOKEN_TILE

EMPTY_SCALE = 2.0**-48
"""Of a column without tokens: that of amax 1e-12."""


@triton.jit(do_not_specialize=["G", "copies"])
def columns_amax(
    x_ptr, stride_xg, stride_xr, stride_xc, index_ptr,
    amax_ptr, tiles_ptr, groups_ptr,
    G, R, C, copies,
    GATED: tl.constexpr, RAGGED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    group, first, end = tile_rows(tl.program_id(0), tiles_ptr, groups_ptr, G, R, RAGGED, BLOCK_R)
    if first < end:  # not a tile past the last one
        row = (first + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (row < end) & (col < C)[None, :]
        x_row = row
        if index_ptr is not None:
            x_row = tl.load(index_ptr + row, row < end, 0).to(tl.int64)
        x_tile = x_ptr + group.to(tl.int64) * stride_xg + x_row * stride_xr + col.to(tl.int64)[None, :] * stride_xc
        amax = tl.max(magnitude(read(x_tile, C * stride_xc, mask, GATED, HARDWARE).to(tl.float32)), 0)
        copy = (tl.program_id(0) % copies).to(tl.int64) * G + group
        tl.atomic_max(amax_ptr + copy * C + col, amax, col < C, sem="relaxed")


@triton.jit
def in_order(tensors):
    """Tensors, as many as a power of two, as one with further axes of 2, in whose order they follow each other. Nothing
    leaves its thread."""
    if len(tensors) == 1:
        return tensors[0]
    else:
        return tl.join(in_order(tensors[::2]), in_order(tensors[1::2]))


@triton.jit
def transposed(words, left, BLOCK_C: tl.constexpr):
    """A tile's bytes as [BLOCK_C, 32] words of four rows.

    words: [B, BLOCK_C] each, the words of B equal blocks of rows, from the top; `left` [B, 1]: how many rows from a
    block's first on are the group's. Bytes past them are zero, beside poison too."""
    COUNT: tl.constexpr = len(words)
    whole = ()
    for i in tl.static_range(COUNT):
        rows = tl.minimum(tl.maximum(left - 4 * i, 0), 4)
        whole += (words[i] & tl.where(rows == 4, -1, (1 << 8 * (rows & 3)) - 1),)
    blocks = tl.reshape(in_order(whole), (32 // COUNT, BLOCK_C, COUNT))
    return tl.reshape(tl.permute(blocks, (1, 0, 2)), (BLOCK_C, 32))


@triton.jit(do_not_specialize=["G", "stride_st", "stride_sc", "first_block", "copies"])
def columns(
    x_ptr, stride_xg, stride_xr, stride_xc, index_ptr,
    data_ptr, stride_dt, stride_dc,
    scale_ptr, stride_st, stride_sc, first_block,
    amax_ptr, tiles_ptr, groups_ptr,
    G, R, C, copies,
    SCALING: tl.constexpr, GATED: tl.constexpr, RAGGED: tl.constexpr, RCEIL: tl.constexpr, SCALE_TILES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_R = 128 rows and BLOCK_C columns, read once, written transposed. A thread holds 32 rows of its
    columns: it finds their maximum and packs their bytes to words by itself, and only words are exchanged, for stores
    of whole lines.

    A ragged tile t goes to columns t * BLOCK_R of data; a dense one to its own rows of its group. Ragged data is
    written whole (padding and unused tiles are zero). "blockwise" scales: one for each column of a ragged tile, one
    for all of a dense tile. SCALE_TILES: stride_sc tiles are side by side, and the scales of a dense group begin at
    first_block."""
    tl.static_assert(BLOCK_R == 128, "four blocks of 32 rows")
    tile = tl.program_id(0)
    group, first, end = tile_rows(tile, tiles_ptr, groups_ptr, G, R, RAGGED, BLOCK_R)
    group = group.to(tl.int64)
    block = tl.arange(0, 4)
    col = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    left = (end - first - block * 32)[:, None]
    x_columns = x_ptr + group * stride_xg + col[None, :] * stride_xc
    row = (first + block * 32).to(tl.int64)[:, None]
    values = ()
    amax = no_magnitudes((4, BLOCK_C), x_ptr.dtype.element_ty)
    for i in tl.static_range(32):
        x_row = row + i
        if index_ptr is not None:
            x_row = tl.load(index_ptr + x_row, i < left, 0).to(tl.int64)
        x = read(x_columns + x_row * stride_xr, C * stride_xc, (i < left) & (col < C)[None, :], GATED, HARDWARE)
        values += (x,)
        if SCALING != "rowwise":
            amax = larger(amax, x, HARDWARE)
    amax = magnitude_of(amax)

    if SCALING == "mx":
        byte = mx_byte(amax, RCEIL)
        inverse = mx_inverse(byte)
    else:
        if SCALING == "rowwise":
            largest = tl.load(amax_ptr + group * C + col, col < C, 0)
            for i in range(1, copies):
                largest = tl.maximum(largest, tl.load(amax_ptr + (i * G + group) * C + col, col < C, 0))
        else:
            largest = tl.max(amax, 0)
            if not RAGGED:
                largest = tl.zeros_like(largest) + tl.max(largest, 0)
        inverse = fp8_inverse(largest)[None, :]

    words = ()
    for i in tl.static_range(0, 32, 4):
        words += (
            encode_four(
                values[i].to(tl.float32) * inverse, values[i + 1].to(tl.float32) * inverse,
                values[i + 2].to(tl.float32) * inverse, values[i + 3].to(tl.float32) * inverse, HARDWARE,
            ),
        )  # fmt: skip
    words = transposed(words, left, BLOCK_C)
    word = tl.arange(0, BLOCK_R // 4)
    inside = (col < C)[:, None]
    if RAGGED:
        out_first = tile * BLOCK_R
    else:
        out_first = first
        data_ptr += group * stride_dt
        inside &= (first + word * 4 < R)[None, :]
    tl.store(data_ptr + col[:, None] * stride_dc + out_first // 4 + word[None, :], words, inside)

    if SCALING == "rowwise":
        group_first = 0
        if RAGGED:
            group_first = tl.load(groups_ptr + group * 4)
            if tile == 0:
                _scale_empty_groups(scale_ptr, groups_ptr, G, col, C)
        if first == group_first:
            tl.store(scale_ptr + group * C + col, fp8_scale(largest), col < C)
    elif SCALING == "blockwise":
        if RAGGED:
            tl.store(scale_ptr + tile.to(tl.int64) * stride_st + col * stride_sc, fp8_scale(largest), col < C)
        else:
            out = scale_ptr + group * stride_st + tl.program_id(1) * stride_sc + first // BLOCK_R
            tl.store(out, fp8_scale(tl.max(largest, 0)))
    elif RAGGED:  # a tile's four bytes are one word
        four = tl.sum(byte << (8 * block)[:, None], 0)
        out = col * (stride_sc // 4) + tile
        written = col < C
        if SCALE_TILES:
            out = tile_byte(col, tile * 4, stride_sc) // 4
            written = col < tl.cdiv(C, 128) * 128
        tl.store(scale_ptr.to(tl.pointer_type(tl.int32)) + out, four, written)
    else:
        block += out_first // 32
        if SCALE_TILES:
            out = tile_byte(col[None, :], first_block + block[:, None], stride_sc)
        else:
            out = col[None, :] * stride_sc + block[:, None]
        inside = (block * 32 < R)[:, None] & (col < C)[None, :]
        tl.store(scale_ptr + group * stride_st + out, byte.to(tl.uint8), inside)


@triton.jit
def _scale_empty_groups(scale_ptr, groups_ptr, G, col, C):
    """Groups without tokens have no tile that would write their scale."""
    for some in range(0, G, 16):
        group = some + tl.arange(0, 16)
        start = tl.load(groups_ptr + group * 4, group < G, 0)
        end = tl.load(groups_ptr + group * 4 + 1, group < G, 0)
        empty = (group < G) & (start == end)
        scale = fp8_scale(tl.zeros((16, 1), tl.int32))
        tl.store(scale_ptr + group.to(tl.int64)[:, None] * C + col[None, :], scale, empty[:, None] & (col < C)[None, :])


def copies(amax: torch.Tensor | None) -> int:
    """Of maxima [copies, G, C] (`specs.column_maxima`); one of [G, C]."""
    return 1 if amax is None or amax.ndim == 2 else amax.shape[0]


def launch_columns_amax(x, G, R, C, amax, tiles, groups, num_tiles, gated=False, index=None):
    """Raises `amax`, [G, C] or copies of it, to the largest magnitudes of x, where they are larger. Arguments as in
    `launch_columns`."""
    ragged = tiles is not None
    if num_tiles:
        launch(
            columns_amax, (num_tiles, cdiv(C, 64)),
            x, 0 if ragged else x.stride(0), x.stride(1), x.stride(2), index, amax, tiles, groups,
            G, 0 if ragged else R, C, copies(amax),
            GATED=gated, RAGGED=ragged, BLOCK_R=TOKEN_TILE, BLOCK_C=64, HARDWARE=hardware(x),
        )  # fmt: skip


def launch_columns(
    x, G, R, C, format, data, data_strides, scale, scale_strides, amax, tiles, groups, num_tiles, gated=False,
    scale_tiles=False, first_block=0, index=None,
):  # fmt: skip
    """`x` is [G, R, C] (dense) or [1, R, C] with a tile map (ragged). `index`: where the rows are in a ragged x."""
    ragged = tiles is not None
    if format == "fp8_rowwise":
        assert amax.shape[-2:] == scale.shape == (G, C), f"amax {amax.shape}, scale {scale.shape}: expected {(G, C)}"
        if not num_tiles:
            scale.fill_(EMPTY_SCALE)
    if num_tiles:
        block_c, warps = column_blocks(SCALING[format], ragged, x.element_size())
        assert data.shape[-1] % 4 == 0, f"data {data.shape}: it is written in words of four"
        width = cdiv(C, SCALE_TILE_ROWS) * SCALE_TILE_ROWS if scale_tiles else C
        launch(
            columns, (num_tiles, cdiv(width, block_c)),
            x, 0 if ragged else x.stride(0), x.stride(1), x.stride(2), index,
            data.view(torch.int32), *(s // 4 for s in data_strides),
            scale_bits(scale), *scale_strides, first_block,
            amax, tiles, groups, G, 0 if ragged else R, C, copies(amax),
            SCALING=SCALING[format], GATED=gated, RAGGED=ragged, RCEIL=format == "mxfp8_rceil",
            SCALE_TILES=scale_tiles, BLOCK_R=TOKEN_TILE, BLOCK_C=block_c,
            HARDWARE=hardware(x), num_warps=warps,
        )  # fmt: skip


def column_blocks(scaling: str, ragged: bool, element_size: int) -> tuple[int, int]:
    """(columns, warps) of a transposing program: four columns a thread of bfloat16, two of float32. At [128000, 5120]
    on an H200, of the speed of a copy: MX 93%, fp8_blockwise 96, fp8_rowwise 98. A block of 128 x 128 weights is one
    program's."""
    if element_size == 2:
        return 128, 4
    return (FP8_BLOCK, 8) if scaling == "blockwise" and not ragged else (64, 4)
