"""Quantizers: bf16 or fp32 in, e4m3 bytes and scales out, in the layouts of docs/design.md.

R, C = rows and columns of a 2D input; G = groups. "Rows" quantizes along the last axis and keeps the layout; "columns"
quantizes along the rows of each group and writes transposed, because fp8 tensor cores read the contraction
contiguously. A group is a run of tokens (ragged, padded to TOKEN_TILE) or one expert's matrix (all of R rows).

Scales: `fp8_rowwise` float32, one a row (column); `fp8_blockwise` float32, one for 128 elements (of a weight: for
128 x 128); `mxfp8_*` E8M0, one for 32 elements. Given a bf16 output, an MX quantizer writes data * scale instead of
bytes and scales: what a GPU without block-scaled MMA multiplies. bf16 tensor cores read either order, so for them MX
columns are quantized straight: in the layout of the input. Where the MMA is block-scaled, E8M0 scales are written in
its tiles (`scale_tiles.py`): a scale has then one axis more, [..., ceil(rows/128), ceil(C/128), 512].

SCALING: "rowwise", "blockwise" or "mx", as in the GEMMs.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from xmoe.kernels.e4m3 import encode, fp8_inverse, fp8_scale, hardware, magnitude, mx_byte, mx_inverse
from xmoe.kernels.launch import launch
from xmoe.kernels.quantize_blocks import SCALING, launch_rows_blocks, launch_straight, scale_bits, square_blocks
from xmoe.kernels.quantize_rows_fp8 import LONGEST_ROW, launch_rows_fp8
from xmoe.kernels.scale_tiles import in_tiles, tile_byte
from xmoe.kernels.swiglu import read
from xmoe.kernels.tiles import cdiv, tile_rows
from xmoe.operands import FP8_BLOCK, MX_BLOCK, SCALE_BLOCKS, SCALE_TILE_ROWS, TOKEN_TILE

SQUARE_WARPS = 8
"""Of a program over 128 x 128 weights."""
EMPTY_SCALE = 2.0**-48
"""Of a column without tokens: that of amax 1e-12."""


@triton.jit(do_not_specialize=["G"])
def _columns_amax(
    x_ptr, stride_xg, stride_xr, stride_xc,
    amax_ptr, tiles_ptr, groups_ptr,
    G, R, C,
    GATED: tl.constexpr, RAGGED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    group, first, end = tile_rows(tl.program_id(0), tiles_ptr, groups_ptr, G, R, RAGGED, BLOCK_R)
    if first < end:  # not a tile past the last one
        row = (first + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (row < end) & (col < C)[None, :]
        x_tile = x_ptr + group.to(tl.int64) * stride_xg + row * stride_xr + col.to(tl.int64)[None, :] * stride_xc
        amax = tl.max(magnitude(read(x_tile, C * stride_xc, mask, GATED).to(tl.float32)), 0)
        tl.atomic_max(amax_ptr + group.to(tl.int64) * C + col, amax, col < C, sem="relaxed")


@triton.jit(do_not_specialize=["G", "stride_st", "stride_sc", "first_block"])
def _columns(
    x_ptr, stride_xg, stride_xr, stride_xc,
    data_ptr, stride_dt, stride_dc,
    scale_ptr, stride_st, stride_sc, first_block,
    amax_ptr, tiles_ptr, groups_ptr,
    G, R, C,
    SCALING: tl.constexpr, GATED: tl.constexpr, RAGGED: tl.constexpr, RCEIL: tl.constexpr, SCALE_TILES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_R rows and BLOCK_C columns, read once, written transposed, in words of four bytes: the rows of
    a word are loaded apart, so that what goes through shared memory is words.

    A ragged tile t goes to columns t * BLOCK_R of data; a dense one to its own rows of its group. Ragged data is
    written whole (padding and unused tiles are zero). "blockwise" scales: one for each column of a ragged tile, one
    for all of a dense tile. SCALE_TILES: stride_sc tiles are side by side, and the scales of a dense group begin at
    first_block."""
    WORDS: tl.constexpr = BLOCK_R // 4
    BLOCKS: tl.constexpr = BLOCK_R // 32
    tile = tl.program_id(0)
    group, first, end = tile_rows(tile, tiles_ptr, groups_ptr, G, R, RAGGED, BLOCK_R)
    group = group.to(tl.int64)
    word = tl.arange(0, WORDS)
    col = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    x_columns = x_ptr + group * stride_xg + col[None, :] * stride_xc
    values = ()
    amax = tl.zeros((WORDS, BLOCK_C), tl.int32)
    for i in tl.static_range(4):
        row = first + word[:, None] * 4 + i
        mask = (row < end) & (col < C)[None, :]
        x = read(x_columns + row.to(tl.int64) * stride_xr, C * stride_xc, mask, GATED).to(tl.float32)
        values += (x,)
        amax = tl.maximum(amax, magnitude(x))

    if SCALING == "mx":
        byte = mx_byte(tl.max(tl.reshape(amax, (BLOCKS, 8, BLOCK_C)), 1), RCEIL)
        inverse = tl.broadcast_to(mx_inverse(byte)[:, None, :], (BLOCKS, 8, BLOCK_C))
        inverse = tl.reshape(inverse, (WORDS, BLOCK_C))
    else:
        if SCALING == "rowwise":
            largest = tl.load(amax_ptr + group * C + col, col < C, 0)
        else:
            largest = tl.max(amax, 0)
            if not RAGGED:
                largest = tl.zeros_like(largest) + tl.max(largest, 0)
        inverse = fp8_inverse(largest)[None, :]

    words = tl.zeros((WORDS, BLOCK_C), tl.int32)
    for i in tl.static_range(4):
        byte_of_word = encode(values[i] * inverse, HARDWARE).to(tl.int32) & 0xFF
        # Padding stays zero beside poison too.
        words |= tl.where(first + word[:, None] * 4 + i < end, byte_of_word, 0) << (8 * i)

    if RAGGED:
        out_first = tile * BLOCK_R
        inside = (col < C)[:, None]
    else:
        out_first = first
        data_ptr += group * stride_dt
        inside = (col < C)[:, None] & (first + word * 4 < R)[None, :]
    tl.store(data_ptr + col[:, None] * stride_dc + out_first // 4 + word[None, :], tl.trans(words), inside)

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
    else:
        block = tl.arange(0, BLOCKS)
        if RAGGED:  # a tile's four bytes are one word
            four = tl.sum(byte << (8 * block)[:, None], 0)
            word = col * (stride_sc // 4) + tile
            written = col < C
            if SCALE_TILES:
                word = tile_byte(col, tile * 4, stride_sc) // 4
                written = col < tl.cdiv(C, 128) * 128
            tl.store(scale_ptr.to(tl.pointer_type(tl.int32)) + word, four, written)
        else:
            block += out_first // 32
            if SCALE_TILES:
                out = tile_byte(col[:, None], first_block + block[None, :], stride_sc)
            else:
                out = col[:, None] * stride_sc + block[None, :]
            out = scale_ptr + group * stride_st + out
            tl.store(out, tl.trans(byte).to(tl.uint8), (col < C)[:, None] & (block * 32 < R)[None, :])


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


@triton.jit(do_not_specialize=["count"])
def _zero(x_ptr, count, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + element, 0, element < count)


def zero(x: torch.Tensor) -> None:
    """`x.zero_()` of a contiguous int32 tensor, as a launch of ours (`replay.py`)."""
    launch(_zero, (cdiv(x.numel(), 4096),), x, x.numel(), BLOCK=4096)


def quantize_rows(
    x: torch.Tensor,
    format: str,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    programs: int,
    columns: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    map: tuple[torch.Tensor, torch.Tensor] | None = None,
    gated: bool = False,
    kept: torch.Tensor | None = None,
) -> bool:
    """Quantize `x` [R, C] or [G, P, C] (bf16 or fp32, any strides) along C. Returns whether `columns` was filled.

    Args:
        format: one of `xmoe.operands.FORMATS`.
        data: e4m3, written, contiguous in the shape of x; or, for an MX format, bf16 that receives data * scale.
        scale: float32 [R] or [G, P] ("fp8_rowwise"), float32 with a further axis of ceil(C/128) ("fp8_blockwise"; that
            of [R, C] has any strides), or E8M0 with one of ceil(C/32), or in tiles, [padded_tokens(R, G)/128,
            ceil(C/128), 512] or [G, ceil(P/128), ceil(C/128), 512], written whole; None with bf16 `data`.
        programs: the number of multiprocessors.
        map: of TOKEN_TILE-row tiles (`tiles.map_tiles`), for scale tiles of x [R, C]: each group begins one. Rows of no
            group are then left unwritten.
        columns: for "fp8_rowwise" (amax int32 [G, C], groups of `tiles.map_tiles`): amax receives, at no cost, the bits
            of each column's largest magnitude in each group, which `quantize_tokens` needs. Rows of no group may then
            be left unwritten. Rows longer than LONGEST_ROW do not fill it.
        gated: x [R, 2C] stands for its SwiGLU [R, C] (`swiglu.py`).
        kept: [R, C] in the dtype of x, receives that where `columns` is filled.
    """
    G, P, C = x.shape if x.ndim == 3 else (1, *x.shape)
    C = C // 2 if gated else C
    strides = x.stride() if x.ndim == 3 else (0, *x.stride())
    R = G * P
    assert data.is_contiguous(), f"strides {data.stride()}: rows are written one after the other"
    amax, groups = columns or (None, None)
    fills = amax is not None and C <= LONGEST_ROW
    if fills:
        zero(amax)
    if R == 0:
        return fills
    if format == "fp8_rowwise":
        of_columns = (amax, groups, kept) if fills else (None, groups, None)
        launch_rows_fp8(x, strides, data, scale, *of_columns, R, P, C, programs, gated)
        return fills
    launch_rows_blocks(x, strides, R, P, C, format, data, scale, map, gated)
    return False


def _launch_columns_amax(x, G, R, C, amax, tiles, groups, num_tiles, gated=False):
    """Raises `amax` [G, C] to the largest magnitudes of x, where they are larger. Arguments as in `_launch_columns`."""
    ragged = tiles is not None
    if num_tiles:
        launch(
            _columns_amax, (num_tiles, cdiv(C, 64)),
            x, 0 if ragged else x.stride(0), x.stride(1), x.stride(2), amax, tiles, groups, G, 0 if ragged else R, C,
            GATED=gated, RAGGED=ragged, BLOCK_R=TOKEN_TILE, BLOCK_C=64,
        )  # fmt: skip


def _launch_columns(
    x, G, R, C, format, data, data_strides, scale, scale_strides, amax, tiles, groups, num_tiles, gated=False,
    scale_tiles=False, first_block=0,
):  # fmt: skip
    """`x` is [G, R, C] (dense) or [1, R, C] with a tile map (ragged)."""
    ragged = tiles is not None
    if format == "fp8_rowwise":
        assert amax.shape == scale.shape == (G, C), f"amax {amax.shape}, scale {scale.shape}: expected {(G, C)}"
        if not num_tiles:
            scale.fill_(EMPTY_SCALE)
    if num_tiles:
        block_c, warps = column_blocks(SCALING[format], ragged, x.element_size())
        assert data.shape[-1] % 4 == 0, f"data {data.shape}: it is written in words of four"
        columns = cdiv(C, SCALE_TILE_ROWS) * SCALE_TILE_ROWS if scale_tiles else C
        launch(
            _columns, (num_tiles, cdiv(columns, block_c)),
            x, 0 if ragged else x.stride(0), x.stride(1), x.stride(2),
            data.view(torch.int32), *(s // 4 for s in data_strides),
            scale_bits(scale), *scale_strides, first_block,
            amax, tiles, groups, G, 0 if ragged else R, C,
            SCALING=SCALING[format], GATED=gated, RAGGED=ragged, RCEIL=format == "mxfp8_rceil",
            SCALE_TILES=scale_tiles, BLOCK_R=TOKEN_TILE, BLOCK_C=block_c, HARDWARE=hardware(x), num_warps=warps,
        )  # fmt: skip


def column_blocks(scaling: str, ragged: bool, element_size: int) -> tuple[int, int]:
    """(columns, warps) of a transposing program. At [128000, 5120] on an H200: fp8_rowwise 0.48 ms with 128 columns and
    0.51 with 64, MX 1.13 and 0.67. A block of 128 x 128 weights is one program's."""
    if scaling == "blockwise" and not ragged:
        return FP8_BLOCK, 4 if element_size == 2 else 8
    return (64, 4) if scaling == "mx" or element_size > 2 else (128, 4)


def quantize_tokens(
    x: torch.Tensor,
    format: str,
    data: torch.Tensor,
    scale: torch.Tensor,
    amax: torch.Tensor | None,
    tiles: torch.Tensor,
    groups: torch.Tensor,
    *,
    amax_is_known: bool = False,
    gated: bool = False,
) -> None:
    """Quantize `x` [M, C] (bf16 or fp32, any strides) along the tokens of each group, transposed and padded.

    Args:
        format: one of `xmoe.operands.FORMATS`.
        data: e4m3 [C, Mp], written whole.
        scale: float32 [G, C] ("fp8_rowwise") or [C, Mp/128] ("fp8_blockwise", any strides), or E8M0 [C, Mp/32], or in
            tiles, [ceil(C/128), Mp/128, 512]; written whole.
        amax: int32 [G, C] scratch, for "fp8_rowwise".
        tiles, groups: the map of TOKEN_TILE-token tiles (`tiles.map_tiles`).
        amax_is_known: `amax` holds the bits of each column's largest magnitude (`columns` of `quantize_rows`).
        gated: x [M, 2C] stands for its SwiGLU [M, C].
    """
    (C, Mp), M, G, x = data.shape, x.shape[0], groups.shape[0] - 1, x.unsqueeze(0)
    map = tiles, groups, Mp // TOKEN_TILE
    if format == "fp8_rowwise" and not amax_is_known:
        assert amax is not None, "fp8_rowwise needs amax"
        zero(amax)
        _launch_columns_amax(x, G, M, C, amax, *map, gated)
    tiled = in_tiles(data, scale)
    if format == "fp8_blockwise":
        scale_strides = scale.stride()[::-1]
    else:
        scale_strides = 0, Mp // (TOKEN_TILE if tiled else MX_BLOCK)
    _launch_columns(x, G, M, C, format, data, (0, Mp), scale, scale_strides, amax, *map, gated, tiled)


def quantize_weights(
    b: torch.Tensor | Sequence[torch.Tensor],
    format: str,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    amax: torch.Tensor | None,
    programs: int,
) -> None:
    """Quantize `b` [G, P, C] (bf16 or fp32, any strides) along C, a multiple of 16. For B [G, K, N]: axis "N" is
    `b = B`, axis "K" is `b = B.mT`.

    Several b are one matrix, side by side along C. They have one shape, with axis 1 contiguous, and their C is a
    multiple of the format's block.

    Args:
        data: e4m3 [G, P, C], written; or, for an MX format, bf16 that receives data * scale and is contiguous in the
            axis (1 or 2) in which b is.
        scale: float32 [G, P] ("fp8_rowwise") or [G, ceil(P/128), ceil(C/128)] ("fp8_blockwise"), or E8M0
            [G, P, ceil(C/32)], or in tiles, [G, ceil(P/128), ceil(C/128), 512], written whole; None with bf16 `data`.
        amax: int32 [G, P] scratch, for "fp8_rowwise".
        programs: the number of multiprocessors.
    """
    parts = [b] if isinstance(b, torch.Tensor) else b
    (G, P, C), total = parts[0].shape, data.shape[2]
    tiles = G * cdiv(C, TOKEN_TILE)
    if parts[0].stride(2) == 1:
        assert len(parts) == 1, f"strides {parts[0].stride()}: several b have axis 1 contiguous"
        if format != "fp8_blockwise":
            quantize_rows(parts[0], format, data, scale, programs)
            return
        launch(
            square_blocks, (G * cdiv(P, FP8_BLOCK) * cdiv(C, FP8_BLOCK),),
            parts[0], *parts[0].stride(), data.view(torch.int8), scale, P, C,
            BLOCK=FP8_BLOCK, HARDWARE=hardware(parts[0]), num_warps=SQUARE_WARPS,
        )  # fmt: skip
        return
    if format == "fp8_rowwise":
        assert amax is not None, "fp8_rowwise needs amax"
        zero(amax)
        for part in parts:
            _launch_columns_amax(part.mT, G, C, P, amax, None, None, tiles)
    block = SCALE_BLOCKS.get(format, total)
    assert len(parts) == 1 or (total == len(parts) * C and (format == "fp8_rowwise" or C % block == 0)), (
        f"{len(parts)} parts of {C} columns for {total}: each fills whole blocks"
    )
    tiled = in_tiles(data, scale)
    if tiled and (P % SCALE_TILE_ROWS or total % TOKEN_TILE):
        zero(scale.view(torch.int32))  # padding
    for index, part in enumerate(parts):
        first = index * C
        if scale is None:
            launch_straight(part.mT, G, C, P, format, data.mT[:, first : first + C], None, None, None, tiles)
            continue
        blocks = cdiv(total, block)
        lines = cdiv(P, FP8_BLOCK) if format == "fp8_blockwise" else P  # of scales
        part_scale, strides = scale, (lines * blocks, blocks)
        if tiled:
            strides = scale.stride(0), scale.shape[2]
        elif format != "fp8_rowwise":
            part_scale = scale[:, :, first // block :]
        _launch_columns(
            part.mT, G, C, P, format,
            data[:, :, first : first + C], (P * total, total), part_scale, strides,
            amax, None, None, tiles, scale_tiles=tiled, first_block=first // block,
        )  # fmt: skip
