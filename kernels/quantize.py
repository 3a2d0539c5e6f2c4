"""Quantizers: bf16 or fp32 in, e4m3 bytes and scales out, in the layouts of docs/design.md.

R, C = rows and columns of a 2D input; G = groups. "Rows" quantizes along the last axis and keeps the layout; "columns"
quantizes along the rows of each group and writes transposed, because fp8 tensor cores read the contraction
contiguously. A group is a run of tokens (ragged, padded to TOKEN_TILE) or one expert's matrix (all of R rows).

Scales: `fp8_rowwise` float32, one a row (column); `fp8_blockwise` float32, one for 128 elements (of a weight: for
128 x 128); `mxfp8_*` E8M0, one for 32 elements. Given a bf16 output, an MX quantizer writes data * scale instead of
bytes and scales: what a GPU without block-scaled MMA multiplies. bf16 tensor cores read either order, so for them MX
columns are quantized straight: in the layout of the input.

SCALING: "rowwise", "blockwise" or "mx", as in the GEMMs.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from xmoe.kernels.e4m3 import encode, fp8_inverse, fp8_scale, hardware, magnitude, mx_byte, mx_inverse
from xmoe.kernels.launch import launch
from xmoe.kernels.quantize_blocks import int8_or_bf16, launch_straight, rows_blocks, square_blocks
from xmoe.kernels.swiglu import read
from xmoe.kernels.tiles import cdiv, tile_rows
from xmoe.operands import FP8_BLOCK, MX_BLOCK, SCALE_BLOCKS, TOKEN_TILE

LONGEST_ROW = 16384
"""Rows up to this long stay in registers between the maximum and the cast (elements)."""
ROW_BLOCKS = 1024
"""Columns of a program over 4096 elements: MX 0.51 ms at [128000, 5120] on an H200, 0.72 with 32 x 128."""
SQUARE_WARPS = 8
"""Of a program over 128 x 128 weights."""
EMPTY_SCALE = 2.0**-48
"""Of a column without tokens: that of amax 1e-12."""


@triton.jit(do_not_specialize=["R", "P", "G"])
def _rows_fp8(
    x_ptr, stride_xg, stride_xr, stride_xc,
    data_ptr, scale_ptr, kept_ptr,
    amax_ptr, groups_ptr,
    R, P, C, G,
    GATED: tl.constexpr, AMAX: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Persistent: each program has an equal run of rows; row r is row r % P of matrix r // P. A row lies in registers,
    in PIECES whose lengths are powers of two. With AMAX also the maximum of each column in each group of rows, over
    the rows that have a group; the others are left out. Without groups_ptr a matrix is a group. What was read goes to
    kept_ptr, if there is one."""
    RAGGED: tl.constexpr = groups_ptr is not None
    rows = R
    if RAGGED:
        rows = tl.load(groups_ptr + G * 4)
    first = (tl.program_id(0).to(tl.int64) * rows // tl.num_programs(0)).to(tl.int32)
    end = ((tl.program_id(0) + 1).to(tl.int64) * rows // tl.num_programs(0)).to(tl.int32)
    group = first // P
    if RAGGED:
        group = 0
        for some in range(0, G, 128):
            lane = some + tl.arange(0, 128)
            group += tl.sum((tl.load(groups_ptr + lane * 4 + 1, lane < G, 0x7FFFFFFF) <= first).to(tl.int32))
    while first < end:
        last = end
        if RAGGED:
            last = tl.minimum(end, tl.load(groups_ptr + group * 4 + 1))
        elif AMAX:
            last = tl.minimum(end, (group + 1) * P)
        if first < last:
            _rows_fp8_run(
                x_ptr, stride_xg, stride_xr, stride_xc, data_ptr, scale_ptr, kept_ptr, amax_ptr,
                group, first, last, P, C, GATED, AMAX, PIECES, STAGES, HARDWARE,
            )  # fmt: skip
        first = last
        group += 1


@triton.jit
def _rows_fp8_run(
    x_ptr, stride_xg, stride_xr, stride_xc, data_ptr, scale_ptr, kept_ptr, amax_ptr, group, first, last, P, C,
    GATED: tl.constexpr, AMAX: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Rows first to last, all of one group."""
    columns = ()
    largest = ()  # of each column
    start = 0
    for i in tl.static_range(len(PIECES)):
        column = start + tl.arange(0, PIECES[i])
        columns += (column,)
        largest += (tl.zeros_like(column),)
        start += PIECES[i]
    for step in tl.range(0, last - first, num_stages=STAGES):
        row = first + step
        x_row = x_ptr + (row // P).to(tl.int64) * stride_xg + (row % P).to(tl.int64) * stride_xr
        out_row = data_ptr + row.to(tl.int64) * C
        amax = tl.zeros((), tl.int32)
        values = ()
        seen = ()
        for i in tl.static_range(len(PIECES)):
            x_piece = x_row + columns[i].to(tl.int64) * stride_xc
            x = read(x_piece, C * stride_xc, columns[i] < C, GATED)
            if kept_ptr is not None:
                tl.store(kept_ptr + row.to(tl.int64) * C + columns[i], x, columns[i] < C)
            x = x.to(tl.float32)
            values += (x,)
            amax = tl.maximum(amax, tl.max(magnitude(x), 0))
            if AMAX:
                seen += (tl.maximum(largest[i], magnitude(x)),)
        if AMAX:
            largest = seen
        for i in tl.static_range(len(PIECES)):
            tl.store(out_row + columns[i], encode(values[i] * fp8_inverse(amax), HARDWARE), columns[i] < C)
        tl.store(scale_ptr + row, fp8_scale(amax))
    if AMAX:
        for i in tl.static_range(len(PIECES)):
            tl.atomic_max(amax_ptr + group.to(tl.int64) * C + columns[i], largest[i], columns[i] < C, sem="relaxed")


@triton.jit(do_not_specialize=["P"])
def _long_rows_fp8(
    x_ptr, stride_xg, stride_xr, stride_xc,
    data_ptr, scale_ptr,
    P, C,
    GATED: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One row a program, read twice."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row // P * stride_xg + row % P * stride_xr
    column = tl.arange(0, BLOCK_C)
    amax = tl.zeros((), tl.int32)
    for first in range(0, C, BLOCK_C):
        c = first + column
        x = read(x_row + c.to(tl.int64) * stride_xc, C * stride_xc, c < C, GATED).to(tl.float32)
        amax = tl.maximum(amax, tl.max(magnitude(x), 0))
    for first in range(0, C, BLOCK_C):
        c = first + column
        x = read(x_row + c.to(tl.int64) * stride_xc, C * stride_xc, c < C, GATED).to(tl.float32)
        tl.store(data_ptr + row * C + c, encode(x * fp8_inverse(amax), HARDWARE), c < C)
    tl.store(scale_ptr + row, fp8_scale(amax))


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


@triton.jit(do_not_specialize=["G", "stride_st", "stride_sc"])
def _columns(
    x_ptr, stride_xg, stride_xr, stride_xc,
    data_ptr, stride_dt, stride_dc,
    scale_ptr, stride_st, stride_sc,
    amax_ptr, tiles_ptr, groups_ptr,
    G, R, C,
    SCALING: tl.constexpr, GATED: tl.constexpr, RAGGED: tl.constexpr, RCEIL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_R rows and BLOCK_C columns, read once, written transposed, in words of four bytes: the rows of
    a word are loaded apart, so that what goes through shared memory is words.

    A ragged tile t goes to columns t * BLOCK_R of data; a dense one to its own rows of its group. Ragged data is
    written whole (padding and unused tiles are zero). "blockwise" scales: one for each column of a ragged tile, one
    for all of a dense tile."""
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
            tl.store(scale_ptr.to(tl.pointer_type(tl.int32)) + col * (stride_sc // 4) + tile, four, col < C)
        else:
            block += out_first // 32
            out = scale_ptr + group * stride_st + col[:, None] * stride_sc + block[None, :]
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


_SCALING = {"fp8_rowwise": "rowwise", "fp8_blockwise": "blockwise", "mxfp8_rceil": "mx", "mxfp8_floor": "mx"}


def _scale_bits(scale: torch.Tensor | None) -> torch.Tensor | None:
    return scale if scale is None or scale.dtype == torch.float32 else scale.view(torch.uint8)


def _block_strides(scale: torch.Tensor | None) -> tuple[int, int]:
    """From row to row, and from block to block of a row; the rows of a weight lie one after the other."""
    return (0, 0) if scale is None else (scale.stride(-2), scale.stride(-1))


def row_pieces(C: int) -> tuple[int, ...]:
    """One or two powers of two that cover a row of C: 5120 = 4096 + 1024, where one block of 8192 would idle a third of
    its lanes."""
    first = 1 << (C.bit_length() - 1)
    return (first, 1 << (C - first - 1).bit_length()) if first < C else (first,)


def row_schedule(pieces: tuple[int, ...], element_size: int, gated: bool) -> tuple[int, int, int]:
    """(warps, programs a multiprocessor, stages: rows on their way from memory) of `_rows_fp8`. At [128000, 8192] on an
    H200: 0.80 ms with 4 warps and 4 programs, 0.87 with 4 and 3, 0.86 with 8 and 1; gated 1.98, 2.57, and 1.70 with 8
    and 2."""
    elements, row_bytes = sum(pieces), sum(pieces) * element_size
    warps = next((w for w in (1, 2, 4) if elements <= 1280 * w), 4 if elements <= 8192 else 8)
    stages = 4 if row_bytes <= 2**14 else 3 if row_bytes <= 2**15 else 2  # of which all but one lie in shared memory
    if gated:
        if elements > 4096:
            return 8, 2, 1
        stages = 2
    return warps, 12 // warps if elements <= 5120 else 16 // warps, stages


def quantize_rows(
    x: torch.Tensor,
    format: str,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    programs: int,
    columns: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    *,
    gated: bool = False,
    kept: torch.Tensor | None = None,
) -> bool:
    """Quantize `x` [R, C] or [G, P, C] (bf16 or fp32, any strides) along C. Returns whether `columns` was filled.

    Args:
        format: one of `xmoe.operands.FORMATS`.
        data: e4m3, written, contiguous in the shape of x; or, for an MX format, bf16 that receives data * scale.
        scale: float32 [R] or [G, P] ("fp8_rowwise"), float32 with a further axis of ceil(C/128) ("fp8_blockwise"; that
            of [R, C] has any strides), or E8M0 with one of ceil(C/32), written; None with bf16 `data`.
        programs: the number of multiprocessors.
        columns: for "fp8_rowwise" (amax int32 [G, C] of zeros, groups of `tiles.prepare`): amax receives, at no cost,
            the bits of each column's largest magnitude in each group, which `quantize_tokens` needs. Rows of no group
            may then be left unwritten. Without groups (None) those of each matrix of [G, P, C], which quantizing it
            along P needs. Rows longer than LONGEST_ROW do not fill it.
        gated: x [R, 2C] stands for its SwiGLU [R, C] (`swiglu.py`).
        kept: [R, C] in the dtype of x, receives that where `columns` is filled.
    """
    G, P, C = x.shape if x.ndim == 3 else (1, *x.shape)
    C = C // 2 if gated else C
    strides = x.stride() if x.ndim == 3 else (0, *x.stride())
    R = G * P
    assert data.is_contiguous(), f"strides {data.stride()}: rows are written one after the other"
    of_columns = (*columns, kept) if columns is not None and C <= LONGEST_ROW else (None, None, None)
    fills = of_columns[0] is not None
    if R == 0:
        return fills
    if format == "fp8_rowwise":
        _launch_rows_fp8(x, strides, data, scale, *of_columns, R, P, C, programs, gated)
        return fills
    block_c = min(ROW_BLOCKS, max(SCALE_BLOCKS[format], 1 << (C - 1).bit_length()))
    block_r = 4096 // block_c
    launch(
        rows_blocks, (cdiv(R, block_r), cdiv(C, block_c)),
        x, *strides, int8_or_bf16(data), _scale_bits(scale), *_block_strides(scale), R, P, C,
        SCALING=_SCALING[format], GATED=gated, RCEIL=format == "mxfp8_rceil", DEQUANTIZE=scale is None,
        BLOCK_R=block_r, BLOCK_C=block_c, HARDWARE=hardware(x),
    )  # fmt: skip
    return False


def _launch_rows_fp8(x, strides, data, scale, amax, groups, kept, R, P, C, programs, gated):
    if C > LONGEST_ROW:
        launch(
            _long_rows_fp8, (R,), x, *strides, data.view(torch.int8), scale, P, C,
            GATED=gated, BLOCK_C=4096, HARDWARE=hardware(x),
        )  # fmt: skip
        return
    pieces = row_pieces(C)
    warps, programs_each, stages = row_schedule(pieces, x.element_size(), gated)
    G = 1 if groups is None else groups.shape[0] - 1
    launch(
        _rows_fp8, (programs * programs_each,),
        x, *strides, data.view(torch.int8), scale, kept, amax, groups, R, P, C, G,
        GATED=gated, AMAX=amax is not None, PIECES=pieces, STAGES=stages, HARDWARE=hardware(x),
        num_warps=warps,
    )  # fmt: skip


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
    x, G, R, C, format, data, data_strides, scale, scale_strides, amax, tiles, groups, num_tiles, gated=False
):
    """`x` is [G, R, C] (dense) or [1, R, C] with a tile map (ragged)."""
    ragged = tiles is not None
    if format == "fp8_rowwise":
        assert amax.shape == scale.shape == (G, C), f"amax {amax.shape}, scale {scale.shape}: expected {(G, C)}"
        if not num_tiles:
            scale.fill_(EMPTY_SCALE)
    if num_tiles:
        block_c, warps = column_blocks(_SCALING[format], ragged, x.element_size())
        assert data.shape[-1] % 4 == 0, f"data {data.shape}: it is written in words of four"
        launch(
            _columns, (num_tiles, cdiv(C, block_c)),
            x, 0 if ragged else x.stride(0), x.stride(1), x.stride(2),
            data.view(torch.int32), *(s // 4 for s in data_strides),
            _scale_bits(scale), *scale_strides,
            amax, tiles, groups, G, 0 if ragged else R, C,
            SCALING=_SCALING[format], GATED=gated, RAGGED=ragged, RCEIL=format == "mxfp8_rceil",
            BLOCK_R=TOKEN_TILE, BLOCK_C=block_c, HARDWARE=hardware(x), num_warps=warps,
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
        scale: float32 [G, C] ("fp8_rowwise") or [C, Mp/128] ("fp8_blockwise", any strides), or E8M0 [C, Mp/32], written
            whole.
        amax: for "fp8_rowwise", int32 [G, C] scratch, zeros.
        tiles, groups: the map of TOKEN_TILE-token tiles (`tiles.prepare`).
        amax_is_known: `amax` holds instead the bits of each column's largest magnitude (`columns` of `quantize_rows`).
        gated: x [M, 2C] stands for its SwiGLU [M, C].
    """
    (C, Mp), M, G, x = data.shape, x.shape[0], groups.shape[0] - 1, x.unsqueeze(0)
    map = tiles, groups, Mp // TOKEN_TILE
    if format == "fp8_rowwise" and not amax_is_known:
        assert amax is not None, "fp8_rowwise needs amax"
        _launch_columns_amax(x, G, M, C, amax, *map, gated)
    scale_strides = scale.stride()[::-1] if format == "fp8_blockwise" else (0, Mp // MX_BLOCK)
    _launch_columns(x, G, M, C, format, data, (0, Mp), scale, scale_strides, amax, *map, gated)


def quantize_weights(
    b: torch.Tensor | Sequence[torch.Tensor],
    format: str,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    amax: torch.Tensor | None,
    programs: int,
    *,
    amax_is_known: bool = False,
    columns: torch.Tensor | None = None,
) -> None:
    """Quantize `b` [G, P, C] (bf16 or fp32, any strides) along C, a multiple of 16. For B [G, K, N]: axis "N" is
    `b = B`, axis "K" is `b = B.mT`.

    Several b are one matrix, side by side along C. They have one shape, with axis 1 contiguous, and their C is a
    multiple of the format's block.

    Args:
        data: e4m3 [G, P, C], written; or, for an MX format, bf16 that receives data * scale and is contiguous in the
            axis (1 or 2) in which b is.
        scale: float32 [G, P] ("fp8_rowwise") or [G, ceil(P/128), ceil(C/128)] ("fp8_blockwise"), or E8M0
            [G, P, ceil(C/32)], written; None with bf16 `data`.
        amax: for "fp8_rowwise" with axis 1 contiguous, int32 [G, P] scratch, zeros.
        programs: the number of multiprocessors.
        amax_is_known: `amax` holds instead the bits of each row's largest magnitude (`columns` of the other axis).
        columns: for "fp8_rowwise" with axis 2 contiguous and C up to LONGEST_ROW, int32 [G, C]: of zeros, or of what
            another b with the same columns has left, receives the bits of each column's largest magnitude.
    """
    parts = [b] if isinstance(b, torch.Tensor) else b
    (G, P, C), total = parts[0].shape, data.shape[2]
    tiles = G * cdiv(C, TOKEN_TILE)
    if parts[0].stride(2) == 1:
        assert len(parts) == 1, f"strides {parts[0].stride()}: several b have axis 1 contiguous"
        if format != "fp8_blockwise":
            quantize_rows(parts[0], format, data, scale, programs, None if columns is None else (columns, None))
            return
        launch(
            square_blocks, (G * cdiv(P, FP8_BLOCK) * cdiv(C, FP8_BLOCK),),
            parts[0], *parts[0].stride(), data.view(torch.int8), scale, P, C,
            BLOCK=FP8_BLOCK, HARDWARE=hardware(parts[0]), num_warps=SQUARE_WARPS,
        )  # fmt: skip
        return
    assert columns is None, f"strides {parts[0].stride()}: columns are found where axis 2 is contiguous"
    if format == "fp8_rowwise" and not amax_is_known:
        assert amax is not None, "fp8_rowwise needs amax"
        for part in parts:
            _launch_columns_amax(part.mT, G, C, P, amax, None, None, tiles)
    block = SCALE_BLOCKS.get(format, total)
    assert len(parts) == 1 or (total == len(parts) * C and (format == "fp8_rowwise" or C % block == 0)), (
        f"{len(parts)} parts of {C} columns for {total}: each fills whole blocks"
    )
    for index, part in enumerate(parts):
        first = index * C
        if scale is None:
            launch_straight(part.mT, G, C, P, format, data.mT[:, first : first + C], None, None, None, tiles)
            continue
        blocks = cdiv(total, block)
        lines = cdiv(P, FP8_BLOCK) if format == "fp8_blockwise" else P  # of scales
        part_scale = scale if format == "fp8_rowwise" else scale[:, :, first // block :]
        _launch_columns(
            part.mT, G, C, P, format,
            data[:, :, first : first + C], (P * total, total), part_scale, (lines * blocks, blocks),
            amax, None, None, tiles,
        )  # fmt: skip
