"""The quantizers of tensorwise operands: one scale for a whole matrix [R, C].

Two launches, because nothing can be cast before the largest of all is known: the maxima of some parts, and the cast,
whose programs all look at these few maxima again (no atomics, and nothing to zero). The cast reads x once and writes
its rows, its columns (transposed, because fp8 tensor cores read the contraction contiguously), or both: 2 + 2 + 1 + 1
bytes an element of bfloat16.
"""

import torch
import triton
import triton.language as tl

from xmoe.kernels.e4m3 import hardware, is_poison, larger, magnitude, magnitude_of, no_magnitudes, power_of_two
from xmoe.kernels.e5m2 import encode_as, encode_four_as
from xmoe.kernels.launch import launch
from xmoe.kernels.quantize_columns import transposed
from xmoe.kernels.tiles import cdiv

ROWS, LANES = 128, 1024
"""Rows of a tile of the cast, and maxima that its programs look at at once."""
PART = 8192
"""Elements that a program of `tensor_maxima` looks at at once."""
PARTS = 4
"""Programs of `tensor_maxima` a multiprocessor: 256 threads each, with four loads of 16 bytes on their way."""


@triton.jit(do_not_specialize=["count"])
def tensor_maxima(x_ptr, maxima_ptr, count, PART: tl.constexpr, HARDWARE: tl.constexpr):
    """maxima[p]: the largest magnitude of every num_programs-th part of x, beginning with the p-th."""
    amax = no_magnitudes((PART,), x_ptr.dtype.element_ty)
    part = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(count, PART)
    while part < parts:
        element = part * PART + tl.arange(0, PART)
        amax = larger(amax, tl.load(x_ptr + element, element < count, 0), HARDWARE)
        part += tl.num_programs(0)
    tl.store(maxima_ptr + tl.program_id(0), tl.max(magnitude_of(amax), 0).to(tl.float32, bitcast=True))


@triton.jit
def tensor_exponent(amax, E5M2: tl.constexpr):
    """Exponent of the power of two that 448/max(amax, 1e-12), or 57344/..., rounds down to, inverted."""
    amax = tl.maximum(amax, 0x2B8CBCCC)  # 1e-12
    return (amax >> 23) - (142 if E5M2 else 135) + ((amax & 0x7FFFFF) > 0x600000).to(tl.int32)


@triton.jit(do_not_specialize=["count", "R"])
def cast_tensor(
    x_ptr, maxima_ptr, count,
    rows_ptr,
    columns_ptr, stride_cc,
    scale_ptr,
    R, C,
    E5M2: tl.constexpr, LANES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One tile of x [R, C]. A thread has 32 rows of its columns and packs four of them to a word, so that only words
    are exchanged for the columns; stride_cc words are a column, those past the last row zeros."""
    tl.static_assert(BLOCK_R == 128, "four blocks of 32 rows")
    lane = tl.arange(0, LANES)
    largest = tl.zeros((LANES,), tl.int32)
    for some in range(0, count, LANES):
        largest = tl.maximum(largest, magnitude(tl.load(maxima_ptr + some + lane, some + lane < count, 0.0)))
    amax = tl.max(largest, 0)
    exponent = tensor_exponent(amax, E5M2)
    inverse = tl.where(is_poison(amax), float("nan"), power_of_two(-exponent))
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, tl.where(is_poison(amax), float("nan"), power_of_two(exponent)))

    column_blocks = tl.cdiv(C, BLOCK_C)
    first = tl.program_id(0) // column_blocks * BLOCK_R
    col = (tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    block = tl.arange(0, 4)
    left = (R - first - block * 32)[:, None]
    at = (first + block * 32).to(tl.int64)[:, None] * C + col[None, :]
    values = ()
    for i in tl.static_range(32):
        x = tl.load(x_ptr + at + i * C, (i < left) & (col < C)[None, :], 0)
        values += (x,)
    if rows_ptr is not None:
        for i in tl.static_range(32):
            byte = encode_as(values[i].to(tl.float32) * inverse, E5M2, HARDWARE)
            tl.store(rows_ptr + at + i * C, byte, (i < left) & (col < C)[None, :])
    if columns_ptr is not None:
        words = ()
        for i in tl.static_range(0, 32, 4):
            words += (
                encode_four_as(
                    values[i].to(tl.float32) * inverse, values[i + 1].to(tl.float32) * inverse,
                    values[i + 2].to(tl.float32) * inverse, values[i + 3].to(tl.float32) * inverse, E5M2, HARDWARE,
                ),
            )  # fmt: skip
        words = transposed(words, left, BLOCK_C)
        word = first // 4 + tl.arange(0, BLOCK_R // 4)
        tl.store(
            columns_ptr + col[:, None] * stride_cc + word[None, :], words, (col < C)[:, None] & (word < stride_cc)[None]
        )


def count_maxima(x: torch.Tensor, programs: int) -> int:
    """How many maxima `find_maxima` gives of x; `programs`: the number of multiprocessors."""
    return max(1, min(PARTS * programs, cdiv(x.numel(), PART)))


def find_maxima(x: torch.Tensor, maxima: torch.Tensor) -> None:
    """Writes float32 maxima, as many as `count_maxima`, whose largest is that of |x| (NaN is larger than all).

    x: bf16 or fp32, contiguous.
    """
    launch(
        tensor_maxima, (maxima.shape[0],), x, maxima, x.numel(), PART=PART, HARDWARE=hardware(x), num_warps=8
    )  # fmt: skip


def cast(
    x: torch.Tensor,
    maxima: torch.Tensor,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
    scale: torch.Tensor,
    e5m2: bool,
) -> None:
    """Quantizes x [R, C] (bf16 or fp32, contiguous), which is not empty, with one scale.

    Args:
        maxima: float32, any number, whose largest is that of |x|.
        rows: fp8 [R, C], written; or None.
        columns: fp8 [C, Rp] with Rp a multiple of 16 from R on, written whole, zeros past R; or None.
        scale: float32 [], written.
        e5m2: the elements, else e4m3.
    """
    R, C = x.shape
    block_c = 128 if x.element_size() == 2 else 64
    launch(
        cast_tensor, (cdiv(R, ROWS) * cdiv(C, block_c),),
        x, maxima, maxima.shape[0],
        None if rows is None else rows.view(torch.int8),
        None if columns is None else columns.view(torch.int32), 0 if columns is None else columns.shape[1] // 4,
        scale, R, C,
        E5M2=e5m2, LANES=LANES, BLOCK_R=ROWS, BLOCK_C=block_c, HARDWARE=hardware(x), num_warps=4,
    )  # fmt: skip
