"""Grouped GEMMs of `fp8_blockwise` on sm_90: what `grouped_gemm` computes, by warps with roles, in Gluon.

    out[M, P]    = a[M, C] @ b[g, P, C]^T                      (g: the group that owns the row)
    out[g, P, Q] = a[P, tokens of g] @ b[Q, tokens of g]^T

A step multiplies ROWS x 128 of a by 128 x 128 of b: one block of the contraction, whose product is scaled and added in
float32. Triton's pipeliner has the tensor cores wait for that; here two consumers have ROWS / 2 rows each, and one
multiplies while the other adds. Each starts its next product before it gives its stage back:

    loader     one warp: tiles of a and b by TMA into a ring of STAGES
    scales     one warp: their scales by cp.async into the same ring, in a layout of any strides
    consumer   four warps: product, wait, scale and add, 64 rows at a time; then its part of the tile to memory by TMA

A stage is `full` once the loader's bytes (one arrival) and each lane's scales (32) have come, and `empty` again once
both consumers have said so. 64 rows of products are 64 registers a thread, ROWS = 256 rows of sums 128, and 232 is what
there is: so the second 64 rows of a consumer must use the registers of the first.
"""

# ruff: noqa: RUF005, RUF059 - kernels unpack their arguments' tuples whole, and have no starred expressions

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.tools.ragged_tma import to_ragged_indices

from xmoe.kernels.launch import Descriptor, launch, ragged_descriptor
from xmoe.kernels.tiles import cdiv
from xmoe.kernels.tuning import GemmTiles
from xmoe.operands import FP8_BLOCK

CONSUMERS = 2
WARPS = 4
"""Of a consumer; the first consumer is Gluon's default partition."""

LAUNCH_REGISTERS = 168
"""Registers a thread at the launch: 65536 over two consumers and the four warps that the two loaders are rounded to."""

LOADER_REGISTERS = 40
"""With 24, the fewest there are, the scales' addresses spill."""

CONSUMER_REGISTERS = (3 * LAUNCH_REGISTERS - LOADER_REGISTERS) // CONSUMERS
"""The second consumer's; Gluon gives the rest, as many, to the first."""


@gluon.jit
def _tile_counts(shape, ROWS: gl.constexpr, COLS: gl.constexpr, TOKENS: gl.constexpr):
    """(row tiles, those of one group if TOKENS; column tiles; tiles in all)"""
    tiles_ptr, groups_ptr, R, S, T, G = shape
    columns = gl.cdiv(S, COLS)
    if TOKENS:
        rows = gl.cdiv(R, ROWS)
        tiles = G * rows * columns
    else:
        rows = gl.load(groups_ptr + G * 4 + 2)
        tiles = rows * columns
    return rows, columns, tiles


@gluon.jit
def _place(
    tile, rows, columns, shape, ROWS: gl.constexpr, COLS: gl.constexpr, BAND: gl.constexpr, TOKENS: gl.constexpr
):
    """(group, first row of a, first column of out, first step, end of steps) of a tile. BAND row tiles walk the columns
    together, so that they share b in L2."""
    tiles_ptr, groups_ptr, R, S, T, G = shape
    in_group = tile % (rows * columns)
    top = in_group // (BAND * columns) * BAND
    height = gl.minimum(rows - top, BAND)
    row = top + in_group % (BAND * columns) % height
    column = in_group % (BAND * columns) // height * COLS
    if TOKENS:
        group = tile // (rows * columns)
        row *= ROWS
        first = gl.load(groups_ptr + group * 4 + 2)
        end = gl.load(groups_ptr + group * 4 + 6)  # where the next group starts
    else:
        group = gl.load(tiles_ptr + row * 4)
        row = gl.load(tiles_ptr + row * 4 + 1)
        first = 0
        end = T
    return group, row, column, first, end


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage; the phase flips with every round."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _load_tiles(
    descs, ring, bars, shape,
    ROWS: gl.constexpr, COLS: gl.constexpr, BAND: gl.constexpr, PROGRAMS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    a_desc, b_desc, out_desc = descs
    a_ring, b_ring, a_scale_ring, b_scale_ring = ring
    full, empty = bars
    tiles_ptr, groups_ptr, R, S, T, G = shape
    DEPTH: gl.constexpr = a_desc.block_type.shape[1]
    rows, columns, tiles = _tile_counts(shape, ROWS, COLS, TOKENS)
    stage = 0
    phase = 1  # all stages are empty
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        group, row, column, first, end = _place(tile, rows, columns, shape, ROWS, COLS, BAND, TOKENS)
        b_row = column if TOKENS else group * S + column  # rows of the next expert make columns that are never stored
        for step in range(first, end):
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(ready, a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(a_desc, [row, step * DEPTH], ready, a_ring.index(stage))
            tma.async_copy_global_to_shared(b_desc, [b_row, step * DEPTH], ready, b_ring.index(stage))
            stage, phase = _next(stage, phase, a_ring.shape[0])


@gluon.jit
def _load_scales(
    scales, ring, bars, shape,
    ROWS: gl.constexpr, COLS: gl.constexpr, BAND: gl.constexpr, PROGRAMS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Offsets are int32: with one scale for 128 bytes of an operand, they reach 2^31 where the operand has 256 GiB."""
    a_scale_ptr, stride_ar, stride_at, b_scale_ptr, stride_br, stride_bt = scales
    a_ring, b_ring, a_scale_ring, b_scale_ring = ring
    full, empty = bars
    tiles_ptr, groups_ptr, R, S, T, G = shape
    B_LANES: gl.constexpr = b_scale_ring.shape[1]
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    a_lane = gl.arange(0, ROWS, lanes)
    b_lane = gl.arange(0, B_LANES, lanes)
    rows, columns, tiles = _tile_counts(shape, ROWS, COLS, TOKENS)
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        group, row, column, first, end = _place(tile, rows, columns, shape, ROWS, COLS, BAND, TOKENS)
        a_offset = (row + a_lane) * stride_ar + first * stride_at
        if TOKENS:
            b_offset = (column + b_lane) * stride_br + first * stride_bt
            b_inside = column + b_lane < S
        else:  # one for the tile's 128 columns, to each row
            b_offset = (group * gl.cdiv(S, COLS) + column // COLS) * stride_br + gl.zeros_like(b_lane)
            b_inside = b_lane >= 0
        for _ in range(first, end):
            mbarrier.wait(empty.index(stage), phase)
            async_copy.async_copy_global_to_shared(a_scale_ring.index(stage), a_scale_ptr + a_offset, row + a_lane < R)
            async_copy.async_copy_global_to_shared(b_scale_ring.index(stage), b_scale_ptr + b_offset, b_inside)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            a_offset += stride_at
            b_offset += stride_bt
            stage, phase = _next(stage, phase, a_ring.shape[0])


@gluon.jit
def _add_scaled(acc, product, row_scale, b_scale, TOKENS: gl.constexpr):
    """acc + product * (row_scale * b_scale); b_scale is a row's too unless TOKENS, when it is a column's, in shared
    memory: its 32 registers a thread are taken only now."""
    if TOKENS:
        column_scale = b_scale.load(gl.SliceLayout(0, acc.type.layout))
        scale = gl.expand_dims(row_scale, 1) * gl.expand_dims(column_scale, 0)
    else:
        scale = gl.expand_dims(row_scale * b_scale, 1)
    return acc + product * scale


@gluon.jit
def _store_part(desc, staged, part, row, rows_left, column):
    """Store `part` through shared memory: of its rows, the first `rows_left`."""
    tma.store_wait(0)  # the last part's bytes have left
    staged.reshape(part.shape).store(part)
    fence_async_shared()
    x, y, z = to_ragged_indices(row, rows_left, 0)
    tma.async_copy_shared_to_global(desc, [x, y, z, column], staged)


@gluon.jit
def _store_rows(desc, staged, acc, row, end, column):
    """Rows `row` to `end` of out from acc, 64 rows, in one part or as its left and its right columns."""
    acc = acc.to(desc.dtype)
    COLS: gl.constexpr = desc.block_type.shape[3]
    if acc.shape[1] == COLS:
        _store_part(desc, staged, acc, row, end - row, column)
    else:
        left, right = acc.reshape(acc.shape[0], 2, COLS).permute(0, 2, 1).split()
        _store_part(desc, staged, left, row, end - row, column)
        _store_part(desc, staged, right, row, end - row, column + COLS)


@gluon.jit
def _consume(
    descs, ring, bars, staged, shape, FIRST: gl.constexpr,
    ROWS: gl.constexpr, COLS: gl.constexpr, BAND: gl.constexpr, PROGRAMS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Rows FIRST to FIRST + ROWS / 2 of each tile."""
    a_desc, b_desc, out_desc = descs
    a_ring, b_ring, a_scale_ring, b_scale_ring = ring
    full, empty = bars
    tiles_ptr, groups_ptr, R, S, T, G = shape
    STAGES: gl.constexpr = a_ring.shape[0]
    TWO: gl.constexpr = ROWS == 256
    SECOND: gl.constexpr = FIRST + 64
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 32])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    never = T < 0  # which the compiler cannot know
    rows, columns, tiles = _tile_counts(shape, ROWS, COLS, TOKENS)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        group, row, column, first, end = _place(tile, rows, columns, shape, ROWS, COLS, BAND, TOKENS)
        if TOKENS:
            row += group * R
            end_row = group * R + R
        else:
            end_row = gl.load(groups_ptr + group * 4 + 1)  # rows from here on belong to the next group
        zero = gl.zeros([64, COLS], gl.float32, mma)
        acc = zero
        acc_second = zero
        before = 0
        for step in range(first, end):
            a = a_ring.index(stage)
            b = b_ring.index(stage).permute((1, 0))
            a_scale = a_scale_ring.index(stage)
            b_scale = b_scale_ring.index(stage)
            mbarrier.wait(full.index(stage), phase)
            product = warpgroup_mma(a.slice(FIRST, 64), b, zero, use_acc=False, is_async=True)
            # Its four warps meet for this, so it is done in the shadow of the product.
            mbarrier.arrive(empty.index(before), pred=step > first)
            row_scale = a_scale.slice(FIRST, 64).load(by_row)
            if TWO:
                row_scale_second = a_scale.slice(SECOND, 64).load(by_row)
            if not TOKENS:
                b_scale = b_scale.load(by_row)
            product = warpgroup_mma_wait(0, [product])
            acc = _add_scaled(acc, product, row_scale, b_scale, TOKENS)
            if TWO:
                # Left to itself, the compiler starts this product before the last one is added, and spills the 64
                # registers that this takes. So it overwrites the last one's (`never` keeps it from adding to them),
                # after sums that the empty statement, which has to stay between the two, asks for.
                acc = gl.inline_asm_elementwise("", "=f,0", [acc], gl.float32, is_pure=False, pack=1)
                product = warpgroup_mma(a.slice(SECOND, 64), b, product, use_acc=never, is_async=True)
                product = warpgroup_mma_wait(0, [product])
                acc_second = _add_scaled(acc_second, product, row_scale_second, b_scale, TOKENS)
            before = stage
            stage, phase = _next(stage, phase, STAGES)
        mbarrier.arrive(empty.index(before), pred=end > first)
        _store_rows(out_desc, staged, acc, row + FIRST, end_row, column)
        if TWO:
            _store_rows(out_desc, staged, acc_second, row + SECOND, end_row, column)
    tma.store_wait(0)


@gluon.jit
def _zero_rows(out_ptr, stride_out, shape, COLS: gl.constexpr, PROGRAMS: gl.constexpr):
    """Rows past the last group."""
    tiles_ptr, groups_ptr, R, S, T, G = shape
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    columns = gl.cdiv(S, COLS)
    first = gl.load(groups_ptr + G * 4)
    zero = gl.zeros([64, COLS], out_ptr.dtype.element_ty, layout)
    for tile in range(gl.program_id(0), gl.cdiv(R - first, 64) * columns, PROGRAMS):
        row = first + tile // columns * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
        column = tile % columns * COLS + gl.arange(0, COLS, gl.SliceLayout(0, layout))
        offset = gl.expand_dims(row.to(gl.int64) * stride_out, 1) + gl.expand_dims(column, 0)
        gl.store(out_ptr + offset, zero, gl.expand_dims(row < R, 1) & gl.expand_dims(column < S, 0))


@gluon.jit(do_not_specialize=["stride_at", "stride_bt", "R", "T", "G"])
def _blockwise(
    a_desc, b_desc, out_desc,
    out_ptr, stride_out,
    a_scale_ptr, stride_ar, stride_at,
    b_scale_ptr, stride_br, stride_bt,
    tiles_ptr, groups_ptr,
    R, S, T, G,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, PROGRAMS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """R rows of a (TOKENS: of each group's out), S columns of out, T steps of the contraction (TOKENS: read from the
    groups). stride_ar, stride_at: a's scales from row to row and from step to step."""
    ROWS: gl.constexpr = a_desc.block_type.shape[0]
    COLS: gl.constexpr = b_desc.block_type.shape[0]
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = (
        gl.allocate_shared_memory(a_desc.dtype, [STAGES] + a_desc.block_type.shape, a_desc.layout),
        gl.allocate_shared_memory(b_desc.dtype, [STAGES] + b_desc.block_type.shape, b_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], line),
        gl.allocate_shared_memory(gl.float32, [STAGES, COLS if TOKENS else 64], line),
    )
    staged = gl.allocate_shared_memory(out_desc.dtype, [2] + out_desc.block_type.shape, out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1 + 32)
        mbarrier.init(empty.index(stage), count=2)
    descs = a_desc, b_desc, out_desc
    bars = full, empty
    shape = tiles_ptr, groups_ptr, R, S, T, G
    scales = a_scale_ptr, stride_ar, stride_at, b_scale_ptr, stride_br, stride_bt
    gl.warp_specialize(
        [
            (_consume, (descs, ring, bars, staged.index(0), shape, 0, ROWS, COLS, BAND, PROGRAMS, TOKENS)),
            (_consume, (descs, ring, bars, staged.index(1), shape, ROWS // 2, ROWS, COLS, BAND, PROGRAMS, TOKENS)),
            (_load_tiles, (descs, ring, bars, shape, ROWS, COLS, BAND, PROGRAMS, TOKENS)),
            (_load_scales, (scales, ring, bars, shape, ROWS, COLS, BAND, PROGRAMS, TOKENS)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )
    if not TOKENS:
        _zero_rows(out_ptr, stride_out, shape, COLS, PROGRAMS)


OPERAND_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
OUT_LAYOUTS = {bits: gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=4) for bits in (16, 32)}


def _operand(x: torch.Tensor, rows: int) -> Descriptor:
    return Descriptor(x, tuple(x.shape), x.stride(), (rows, FP8_BLOCK), OPERAND_LAYOUT)


def _launch(a, a_scale, b, b_scale, out, maps, sizes, tuned: GemmTiles, programs: int, tokens: bool) -> None:
    for scale in (a_scale, b_scale):
        assert scale is not None, "blockwise operands have scales"
    assert tuned.rows in (128, 256), f"{tuned.rows} rows a tile: a consumer takes 64 or 128"
    assert tuned.cols == tuned.depth == FP8_BLOCK, f"{tuned.cols} columns and a depth of {tuned.depth}: one block each"
    assert tuned.warps == CONSUMERS * WARPS, f"{tuned.warps} warps that multiply: there are {CONSUMERS * WARPS}"
    out_desc = ragged_descriptor(out, (64, tuned.cols // tuned.parts), OUT_LAYOUTS[8 * out.element_size()])
    launch(
        _blockwise, (programs,),
        _operand(a, tuned.rows), _operand(b, tuned.cols), out_desc, out, out.stride(0),
        a_scale, *a_scale.stride(), b_scale, *b_scale.stride()[-2:], *maps, *sizes,
        TOKENS=tokens, STAGES=tuned.stages, BAND=tuned.band, PROGRAMS=programs,
        LOADER_REGISTERS=LOADER_REGISTERS, CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        num_warps=WARPS, maxnreg=LAUNCH_REGISTERS,
    )  # fmt: skip


def grouped_mm(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    b: torch.Tensor,
    b_scale: torch.Tensor | None,
    tiles: torch.Tensor,
    groups: torch.Tensor,
    out: torch.Tensor,
    tuned: GemmTiles,
    programs: int,
) -> None:
    """out[M, P] = a[M, C] @ b[g, P, C]^T for the group g of each row; rows of no group become zero.

    Args:
        a, b: e4m3 [M, C] and [G, P, C], contiguous.
        a_scale: float32 [M, ceil(C/128)], any strides; the fastest have the rows of a block side by side.
        b_scale: float32 [G, ceil(P/128), ceil(C/128)], contiguous.
        tiles, groups: the map of `tuned.rows`-token tiles (`tiles.prepare`).
        out: bf16 or fp32 [M, P], written whole; rows may lie apart.
        tuned: 128 or 256 rows, 128 columns; its warps are those of the consumers.
        programs: persistent programs, the number of multiprocessors.
    """
    (M, C), (G, P, _) = a.shape, b.shape
    if M == 0:
        return
    b, maps, sizes = b.view(G * P, C), (tiles, groups), (M, P, cdiv(C, FP8_BLOCK), G)
    _launch(a, a_scale, b, b_scale, out, maps, sizes, tuned, programs, False)


def grouped_mm_tokens(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    b: torch.Tensor,
    b_scale: torch.Tensor | None,
    groups: torch.Tensor,
    out: torch.Tensor,
    tuned: GemmTiles,
    programs: int,
) -> None:
    """out[g, P, Q] = a[P, tokens of g] @ b[Q, tokens of g]^T; a group without tokens gives zeros.

    Args:
        a, b: e4m3 [P, Mp] and [Q, Mp], padded by group (`quantize.quantize_tokens`), contiguous.
        a_scale, b_scale: float32 [P, Mp/128] and [Q, Mp/128], any strides, as in `grouped_mm`.
        groups: from `tiles.prepare`, with tiles of TOKEN_TILE tokens.
        out: bf16 or fp32 [G, P, Q], contiguous, written whole.
        tuned, programs: as in `grouped_mm`.
    """
    G, P, Q = out.shape
    if a.shape[1] == 0:
        out.zero_()
        return
    out, maps, sizes = out.view(G * P, Q), (groups, groups), (P, Q, a.shape[1] // FP8_BLOCK, G)
    _launch(a, a_scale, b, b_scale, out, maps, sizes, tuned, programs, True)
