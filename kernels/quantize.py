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

from xmoe.kernels.e4m3 import hardware
from xmoe.kernels.launch import launch
from xmoe.kernels.quantize_blocks import launch_rows_blocks, launch_straight, square_blocks
from xmoe.kernels.quantize_columns import launch_columns, launch_columns_amax
from xmoe.kernels.quantize_rows_fp8 import LONGEST_ROW, launch_rows_fp8
from xmoe.kernels.scale_tiles import in_tiles
from xmoe.kernels.tiles import cdiv
from xmoe.operands import FP8_BLOCK, MX_BLOCK, SCALE_BLOCKS, SCALE_TILE_ROWS, TOKEN_TILE

SQUARE_WARPS = 8
"""Of a program over 128 x 128 weights."""


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
    columns: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    *,
    map: tuple[torch.Tensor, torch.Tensor] | None = None,
    gated: bool = False,
    dh: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
) -> bool:
    """Quantize `x` [R, C] or [G, P, C] (bf16 or fp32, any strides) along C. Returns whether `columns` was filled.

    Args:
        format: one of `xmoe.operands.FORMATS`.
        data: e4m3, written, contiguous in the shape of x; or, for an MX format, bf16 that receives data * scale.
        scale: float32 [R] or [G, P] ("fp8_rowwise"), float32 with a further axis of ceil(C/128) ("fp8_blockwise"; that
            of [R, C] has any strides), or E8M0 with one of ceil(C/32), or in tiles, [padded_tokens(R, G)/128,
            ceil(C/128), 512] or [G, ceil(P/128), ceil(C/128), 512], written whole; None with bf16 `data`.
        programs: the number of multiprocessors.
        map: of TOKEN_TILE-row tiles (`tiles.prepare`), for scale tiles of x [R, C]: each group begins one. Rows of no
            group are then left unwritten.
        columns: for "fp8_rowwise" (amax int32 [G, C] of zeros, groups of `tiles.prepare`): amax receives, at no cost,
            the bits of each column's largest magnitude in each group, which `quantize_tokens` needs. Rows of no group
            may then be left unwritten. Without groups (None) those of each matrix of [G, P, C], which quantizing it
            along P needs. Rows longer than LONGEST_ROW do not fill it.
        gated: x [R, 2C] stands for its SwiGLU [R, C] (`swiglu.py`).
        dh: for "fp8_rowwise" with C up to LONGEST_ROW: x [R, C] stands for its gradient, given that of its SwiGLU, dh
            [R, C/2] (`swiglu.py`), both contiguous. `data` may lie where a dh of its size does.
        kept: [R, C] in the dtype of x, receives what x stands for: `gated`, where `columns` is filled; with `dh` it may
            be x.
        index: int32 [R]: x is [T, C] with T <= R, and its row index[r] is row r.
    """
    G, P, C = x.shape if x.ndim == 3 else (1, len(x if index is None else index), x.shape[1])
    C = C // 2 if gated else C
    strides = x.stride() if x.ndim == 3 else (0, *x.stride())
    R = G * P
    assert data.is_contiguous(), f"strides {data.stride()}: rows are written one after the other"
    fills = columns is not None and C <= LONGEST_ROW
    if R == 0:
        return fills
    if format == "fp8_rowwise":
        amax, groups = columns if fills else (None, None)
        kept = kept if fills or dh is not None else None
        launch_rows_fp8(x, strides, index, dh, data, scale, amax, groups, kept, R, P, C, programs, gated)
        return fills
    assert dh is None, f"{format}: rows of a gradient come with its tokens"
    launch_rows_blocks(x, strides, index, R, P, C, format, data, scale, map, gated)
    return False


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
    index: torch.Tensor | None = None,
) -> None:
    """Quantize `x` [M, C] (bf16 or fp32, any strides) along the tokens of each group, transposed and padded.

    Args:
        format: one of `xmoe.operands.FORMATS`.
        data: e4m3 [C, Mp], written whole.
        scale: float32 [G, C] ("fp8_rowwise") or [C, Mp/128] ("fp8_blockwise", any strides), or E8M0 [C, Mp/32], or in
            tiles, [ceil(C/128), Mp/128, 512]; written whole.
        amax: for "fp8_rowwise", int32 [G, C] scratch, zeros.
        tiles, groups: the map of TOKEN_TILE-token tiles (`tiles.prepare`).
        amax_is_known: `amax` holds instead the bits of each column's largest magnitude (`columns` of `quantize_rows`).
        gated: x [M, 2C] stands for its SwiGLU [M, C].
        index: int32 [M]: x is [T, C], and its row index[r] is row r.
    """
    M, G = len(x if index is None else index), groups.shape[0] - 1
    (C, Mp), x = data.shape, x.unsqueeze(0)
    map = tiles, groups, Mp // TOKEN_TILE
    if format == "fp8_rowwise" and not amax_is_known:
        assert amax is not None, "fp8_rowwise needs amax"
        launch_columns_amax(x, G, M, C, amax, *map, gated, index)
    tiled = in_tiles(data, scale)
    if format == "fp8_blockwise":
        scale_strides = scale.stride()[::-1]
    else:
        scale_strides = 0, Mp // (TOKEN_TILE if tiled else MX_BLOCK)
    launch_columns(x, G, M, C, format, data, (0, Mp), scale, scale_strides, amax, *map, gated, tiled, index=index)


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
            [G, P, ceil(C/32)], or in tiles, [G, ceil(P/128), ceil(C/128), 512], written whole; None with bf16 `data`.
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
            launch_columns_amax(part.mT, G, C, P, amax, None, None, tiles)
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
        launch_columns(
            part.mT, G, C, P, format,
            data[:, :, first : first + C], (P * total, total), part_scale, strides,
            amax, None, None, tiles, scale_tiles=tiled, first_block=first // block,
        )  # fmt: skip
