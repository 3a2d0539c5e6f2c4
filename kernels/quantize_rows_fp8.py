"""The rows of `fp8_rowwise`: one float32 scale each. `quantize.py` says what all quantizers share. R, C = rows and
columns; a weight is [G, P, C].
"""

import torch
import triton
import triton.language as tl

from xmoe.kernels.e4m3 import encode, fp8_inverse, fp8_scale, hardware, magnitude
from xmoe.kernels.launch import launch
from xmoe.kernels.quantize_blocks import source_row
from xmoe.kernels.quantize_columns import copies
from xmoe.kernels.swiglu import read, read_gradient
from xmoe.kernels.tiles import cdiv

LEAST_RUN = 16
"""Rows of a program that finds column maxima: it merges those of its run into memory at the end."""
LONGEST_ROW = 16384
"""Rows up to this long stay in registers between the maximum and the cast (elements)."""


@triton.jit(do_not_specialize=["R", "P", "G", "copies"])
def _rows_fp8(
    x_ptr, stride_xg, stride_xr, stride_xc, index_ptr, dh_ptr,
    data_ptr, scale_ptr, kept_ptr,
    amax_ptr, groups_ptr,
    R, P, C, G, copies,
    GATED: tl.constexpr, AMAX: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """Persistent: each program has an equal run of rows; row r is row r % P of matrix r // P, or row index[r] of x. A
    row lies in registers, in PIECES whose lengths are powers of two. With AMAX also the maximum of each column in each
    group of rows, over the rows that have a group, in one of `copies`; the other rows are left out. Without groups_ptr
    a matrix is a group. What was read goes to kept_ptr, if there is one. With dh_ptr a row is the gradient of a
    SwiGLU's two halves, and PIECES cover one of them. It may lie at kept_ptr and its bytes at data_ptr where its rows
    came from: a row is written when all of it has been read, a piece of the gradient by those that have read it."""
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
    copy = 0
    if not GATED and dh_ptr is None:  # which have no register to spare
        copy = tl.program_id(0) % copies
    while first < end:
        last = end
        if RAGGED:
            last = tl.minimum(end, tl.load(groups_ptr + group * 4 + 1))
        elif AMAX:
            last = tl.minimum(end, (group + 1) * P)
        if first < last:
            _rows_fp8_run(
                x_ptr, stride_xg, stride_xr, stride_xc, index_ptr, dh_ptr, data_ptr, scale_ptr, kept_ptr, amax_ptr,
                copy * G + group, first, last, P, C, GATED, AMAX, PIECES, STAGES, HARDWARE,
            )  # fmt: skip
        first = last
        group += 1


@triton.jit
def _rows_fp8_run(
    x_ptr, stride_xg, stride_xr, stride_xc, index_ptr, dh_ptr, data_ptr, scale_ptr, kept_ptr, amax_ptr,
    line, first, last, P, C,
    GATED: tl.constexpr, AMAX: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Rows first to last, all of one group; that has `line` of the maxima."""
    HALVES: tl.constexpr = 1 if dh_ptr is None else 2
    width = C // HALVES
    columns = ()
    inside = ()
    largest = ()  # of each column
    for half in tl.static_range(HALVES):
        start = 0
        for i in tl.static_range(len(PIECES)):
            column = start + tl.arange(0, PIECES[i])
            columns += (half * width + column,)
            inside += (column < width,)
            largest += (tl.zeros_like(column),)
            start += PIECES[i]
    for step in tl.range(0, last - first, num_stages=STAGES):
        row = first + step
        x_row = source_row(x_ptr, stride_xg, stride_xr, index_ptr, row, P)
        out_row = row.to(tl.int64) * C
        read_values = ()
        ups = ()
        for i in tl.static_range(len(PIECES)):
            x_piece = x_row + columns[i].to(tl.int64) * stride_xc
            if dh_ptr is None:
                read_values += (read(x_piece, C * stride_xc, inside[i], GATED, HARDWARE),)
            else:
                dh_piece = dh_ptr + row.to(tl.int64) * width + columns[i]
                gate, up = read_gradient(dh_piece, x_piece, width * stride_xc, inside[i], HARDWARE)
                read_values += (gate,)
                ups += (up,)
        read_values += ups
        amax = tl.zeros((), tl.int32)
        values = ()
        seen = ()
        for i in tl.static_range(len(columns)):
            if kept_ptr is not None:
                tl.store(kept_ptr + out_row + columns[i], read_values[i], inside[i])
            x = read_values[i].to(tl.float32)
            values += (x,)
            amax = tl.maximum(amax, tl.max(magnitude(x), 0))
            if AMAX:
                seen += (tl.maximum(largest[i], magnitude(x)),)
        if AMAX:
            largest = seen
        for i in tl.static_range(len(columns)):
            tl.store(data_ptr + out_row + columns[i], encode(values[i] * fp8_inverse(amax), HARDWARE), inside[i])
        tl.store(scale_ptr + row, fp8_scale(amax))
    if AMAX:
        for i in tl.static_range(len(columns)):
            tl.atomic_max(amax_ptr + line.to(tl.int64) * C + columns[i], largest[i], inside[i], sem="relaxed")


@triton.jit(do_not_specialize=["P"])
def _long_rows_fp8(
    x_ptr, stride_xg, stride_xr, stride_xc, index_ptr,
    data_ptr, scale_ptr,
    P, C,
    GATED: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One row a program, read twice."""
    row = tl.program_id(0)
    x_row = source_row(x_ptr, stride_xg, stride_xr, index_ptr, row, P)
    row = row.to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    amax = tl.zeros((), tl.int32)
    for first in range(0, C, BLOCK_C):
        c = first + column
        x = read(x_row + c.to(tl.int64) * stride_xc, C * stride_xc, c < C, GATED, HARDWARE).to(tl.float32)
        amax = tl.maximum(amax, tl.max(magnitude(x), 0))
    for first in range(0, C, BLOCK_C):
        c = first + column
        x = read(x_row + c.to(tl.int64) * stride_xc, C * stride_xc, c < C, GATED, HARDWARE).to(tl.float32)
        tl.store(data_ptr + row * C + c, encode(x * fp8_inverse(amax), HARDWARE), c < C)
    tl.store(scale_ptr + row, fp8_scale(amax))


def row_pieces(C: int) -> tuple[int, ...]:
    """One or two powers of two that cover a row of C: 5120 = 4096 + 1024, where one block of 8192 would idle a third of
    its lanes."""
    first = 1 << (C.bit_length() - 1)
    return (first, 1 << (C - first - 1).bit_length()) if first < C else (first,)


def row_schedule(
    pieces: tuple[int, ...], element_size: int, gated: bool = False, gradient: bool = False
) -> tuple[int, int, int]:
    """(warps, programs a multiprocessor, stages: rows on their way from memory) of `_rows_fp8`.

    With column maxima on an H200, in us: eight warps a multiprocessor [128000, 5120] 486 (twelve: 520), [128000, 8192]
    782 (sixteen: 799), [131072, 2048] 206 (220), weights [8, 8192, 5120] 257 (280), [128, 768, 2048] 155 (171).

    Gated [131072, 8192] 8, 2, 1: 1944 (three stages 2050, sixteen warps 2243); with 2, 8, 1 [131072, 2048] 505 (4, 4,
    3: 510), [131072, 1408] 356 (1, 12, 2: 501), [131072, 768] 230 (216), [8192, 512] 15 (19).

    Gradients of [131072, 2 x 8192] 16, 1, 3: 3398 (four stages 3374, which takes more shared memory than sm_89 and
    sm_120 have; one 4541), of [131072, 2 x 2048] 8, 2, 3: 879 (one stage 1040;
    4, 4, 1: 897).
    """
    elements, row_bytes = sum(pieces), sum(pieces) * element_size
    if gradient:
        if pieces[0] < 128:  # threads without elements of their own would read what others have already written
            return 1, 8, 1
        return (16, 1, 3) if elements > 4096 else (8, 2, 3) if elements > 1024 else (4, 4, 3)
    if gated:
        if elements > 8192:
            return 16, 1, 1
        return (8, 2, 1) if elements > 4096 else (4, 4, 3) if elements > 2048 else (2, 8, 1)
    warps = next((w for w in (1, 2, 4) if elements <= 1280 * w), 4 if elements <= 8192 else 8)
    stages = 4 if row_bytes < 2**14 else 3 if row_bytes <= 2**15 else 2  # of which all but one lie in shared memory
    return warps, 8 // warps, stages


def launch_rows_fp8(x, strides, index, dh, data, scale, amax, groups, kept, R, P, C, programs, gated):
    if C > LONGEST_ROW:
        assert dh is None, f"rows of {C}: a gradient is found in rows of up to {LONGEST_ROW}"
        launch(
            _long_rows_fp8, (R,), x, *strides, index, data.view(torch.int8), scale, P, C,
            GATED=gated, BLOCK_C=4096, HARDWARE=hardware(x),
        )  # fmt: skip
        return
    pieces = row_pieces(C if dh is None else C // 2)
    warps, programs_each, stages = row_schedule(pieces, x.element_size(), gated, dh is not None)
    G = 1 if groups is None else groups.shape[0] - 1
    count = programs * programs_each
    if amax is not None:
        count = min(count, max(programs, cdiv(R, LEAST_RUN)))
    launch(
        _rows_fp8, (count,),
        x, *strides, index, dh, data.view(torch.int8), scale, kept, amax, groups, R, P, C, G, copies(amax),
        GATED=gated, AMAX=amax is not None, PIECES=pieces, STAGES=stages, HARDWARE=hardware(x),
        num_warps=warps,
    )  # fmt: skip
