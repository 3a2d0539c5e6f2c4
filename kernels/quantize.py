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

from xmoe.kernels.e4m3 import encode, fp8_inverse, fp8_scale, hardware, magnitude
from xmoe.kernels.launch import launch
from xmoe.kernels.quantize_blocks import int8_or_bf16, launch_straight, rows_blocks, square_blocks
from xmoe.kernels.quantize_columns import SCALING, launch_columns, launch_columns_amax, scale_bits
from xmoe.kernels.swiglu import read
from xmoe.kernels.tiles import cdiv
from xmoe.operands import FP8_BLOCK, MX_BLOCK, SCALE_BLOCKS, TOKEN_TILE

LONGEST_ROW = 16384
"""Rows up to this long stay in registers between the maximum and the cast (elements)."""
ROW_BLOCKS = 1024
"""Columns of a program over 4096 elements: MX 0.51 ms at [128000, 5120] on an H200, 0.72 with 32 x 128."""
SQUARE_WARPS = 8
"""Of a program over 128 x 128 weights."""


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
    the rows that have a group; the others are left out. What was read goes to kept_ptr, if there is one."""
    rows = R
    if AMAX:
        rows = tl.load(groups_ptr + G * 4)
    first = (tl.program_id(0).to(tl.int64) * rows // tl.num_programs(0)).to(tl.int32)
    end = ((tl.program_id(0) + 1).to(tl.int64) * rows // tl.num_programs(0)).to(tl.int32)
    group = 0
    if AMAX:
        for some in range(0, G, 128):
            lane = some + tl.arange(0, 128)
            group += tl.sum((tl.load(groups_ptr + lane * 4 + 1, lane < G, 0x7FFFFFFF) <= first).to(tl.int32))
    while first < end:
        last = end
        if AMAX:
            last = tl.minimum(end, tl.load(groups_ptr + group * 4 + 1))
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


@triton.jit(do_not_specialize=["count"])
def _zero(x_ptr, count, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + element, 0, element < count)


def zero(x: torch.Tensor) -> None:
    """`x.zero_()` of a contiguous int32 tensor, as a launch of ours (`replay.py`)."""
    launch(_zero, (cdiv(x.numel(), 4096),), x, x.numel(), BLOCK=4096)


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
    columns: tuple[torch.Tensor, torch.Tensor] | None = None,
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
        _launch_rows_fp8(x, strides, data, scale, *of_columns, R, P, C, programs, gated)
        return fills
    block_c = min(ROW_BLOCKS, max(SCALE_BLOCKS[format], 1 << (C - 1).bit_length()))
    block_r = 4096 // block_c
    launch(
        rows_blocks, (cdiv(R, block_r), cdiv(C, block_c)),
        x, *strides, int8_or_bf16(data), scale_bits(scale), *_block_strides(scale), R, P, C,
        SCALING=SCALING[format], GATED=gated, RCEIL=format == "mxfp8_rceil", DEQUANTIZE=scale is None,
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
        launch_columns_amax(x, G, M, C, amax, *map, gated)
    scale_strides = scale.stride()[::-1] if format == "fp8_blockwise" else (0, Mp // MX_BLOCK)
    launch_columns(x, G, M, C, format, data, (0, Mp), scale, scale_strides, amax, *map, gated)


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
            [G, P, ceil(C/32)], written; None with bf16 `data`.
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
            launch_columns_amax(part.mT, G, C, P, amax, None, None, tiles)
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
        launch_columns(
            part.mT, G, C, P, format,
            data[:, :, first : first + C], (P * total, total), part_scale, (lines * blocks, blocks),
            amax, None, None, tiles,
        )  # fmt: skip
