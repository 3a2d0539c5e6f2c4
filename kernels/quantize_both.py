"""Both operands of an activation, rows and tokens, from one read: for formats whose scales are of blocks.

M tokens, C columns. What the operands hold is in `quantize.py` and docs/design.md. A program has BLOCK_R tokens of one
group, as many as a block along tokens, and 128 columns; a warp has ROWS of the tokens, a thread four columns. Maxima
along tokens are found in the thread, those along two rows (a pair, `e4m3.py`) travel through the warp in one register.

"blockwise": rows in e4m3, tokens transposed. "mx": what bf16 MMAs multiply, rows as bf16, tokens straight.
"""

import torch
import triton
import triton.language as tl

from xmoe.kernels.e4m3 import (
    decode,
    encode,
    encode_four,
    fp8_inverse,
    fp8_scale,
    hardware,
    high_float,
    high_of,
    larger_pair,
    largest_pair,
    low_float,
    low_of,
    mx_byte,
    mx_inverse,
    mx_scale,
    pair,
    pair_inverse,
)
from xmoe.kernels.launch import launch
from xmoe.kernels.quantize_blocks import SCALING, int8_or_bf16, scale_bits
from xmoe.kernels.quantize_columns import in_order, transposed
from xmoe.kernels.swiglu import read, read_gradient, read_half_gradient
from xmoe.kernels.tiles import cdiv, tile_rows
from xmoe.operands import TOKEN_TILE, padded_tokens

BLOCK_C = 128


@triton.jit(do_not_specialize=["G", "stride_sr", "stride_sb", "stride_st", "stride_sc"])
def rows_and_tokens(
    x_ptr, stride_xr, stride_xc, index_ptr, dh_ptr,
    rows_ptr,
    rows_scale_ptr, stride_sr, stride_sb,
    data_ptr, stride_dc,
    scale_ptr, stride_st, stride_sc,
    tiles_ptr, groups_ptr,
    G, C,
    SCALING: tl.constexpr, GATED: tl.constexpr, RCEIL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """With dh_ptr, of the gradient of a SwiGLU's two halves: "mx", a program has the same columns of both, so that
    tokens may lie where they came from; "blockwise", one half, because both do not fit into registers."""
    BOTH: tl.constexpr = dh_ptr is not None and SCALING == "mx"
    HALVES: tl.constexpr = 1 if dh_ptr is None else 2
    RUNS: tl.constexpr = BLOCK_R // ROWS
    width = C // HALVES
    column_blocks = tl.cdiv(width, BLOCK_C)
    program = tl.program_id(0)
    half = 0
    if dh_ptr is not None and not BOTH:
        half = program % 2
        program //= 2
    part = program // column_blocks
    first_col = program % column_blocks * BLOCK_C
    tile = part // (128 // BLOCK_R)
    _, first, end = tile_rows(tile, tiles_ptr, groups_ptr, G, 0, True, 128)
    first += part % (128 // BLOCK_R) * BLOCK_R
    run = tl.arange(0, RUNS)
    col = (first_col + tl.arange(0, BLOCK_C)).to(tl.int64)
    left = (end - first - run * ROWS)[:, None]
    own = col < width
    inside = own[None, :]
    row = (first + run * ROWS).to(tl.int64)[:, None]
    x_columns = x_ptr + col[None, :] * stride_xc
    x_at = x_columns + row * stride_xr
    if dh_ptr is not None:
        dh_at = dh_ptr + row * width + col[None, :]
    pairs = ()
    ups = ()
    for i in tl.static_range(0, ROWS, 2):  # all on their way before the first is looked at
        y_at = x_at + stride_xr
        if index_ptr is not None:
            x_at = x_columns + tl.load(index_ptr + row + i, i < left, 0).to(tl.int64) * stride_xr
            y_at = x_columns + tl.load(index_ptr + row + i + 1, i + 1 < left, 0).to(tl.int64) * stride_xr
        if dh_ptr is None:
            x = read(x_at, C * stride_xc, (i < left) & inside, GATED, HARDWARE)
            y = read(y_at, C * stride_xc, (i + 1 < left) & inside, GATED, HARDWARE)
        elif BOTH:
            x, x_up = read_gradient(dh_at, x_at, width * stride_xc, (i < left) & inside, HARDWARE)
            y, y_up = read_gradient(
                dh_at + width, x_at + stride_xr, width * stride_xc, (i + 1 < left) & inside, HARDWARE
            )
            ups += (pair(x_up, y_up, HARDWARE),)
        else:
            to_up = width * stride_xc
            x = read_half_gradient(dh_at, x_at, to_up, half, (i < left) & inside, HARDWARE)
            y = read_half_gradient(dh_at + width, y_at, to_up, half, (i + 1 < left) & inside, HARDWARE)
        pairs += (pair(x, y, HARDWARE),)
        if dh_ptr is not None:
            dh_at += 2 * width
        x_at += 2 * stride_xr

    first_col += half * width
    col += half * width
    for i in tl.static_range(2 if BOTH else 1):
        if i == 1:
            pairs = ups
            first_col += width
            col += width
        largest = _rows(
            pairs, rows_ptr + row * C + col[None, :], C, left, inside, first, end, first_col,
            rows_scale_ptr, stride_sr, stride_sb, SCALING, RCEIL, BLOCK_C, HARDWARE,
        )  # fmt: skip
        amax = tl.maximum(low_of(largest), high_of(largest)) << 16
        if SCALING == "mx":
            data_at = data_ptr + row * C + col[None, :]
            byte = _tokens_straight(pairs, data_at, amax, C, left, inside, scale_ptr is None, RCEIL, HARDWARE)
            if scale_ptr is not None:
                block = part * (BLOCK_R // 32) + tl.arange(0, BLOCK_R // 32)[:, None]
                tl.store(scale_ptr + block.to(tl.int64) * C + col[None, :], byte.to(tl.uint8), inside)
        else:
            amax = tl.max(amax, 0)
            words = transposed(_words(pairs, fp8_inverse(amax)[None, :], HARDWARE), left, BLOCK_C)
            word = tile * (BLOCK_R // 4) + tl.arange(0, BLOCK_R // 4)
            tl.store(data_ptr + col[:, None] * stride_dc + word[None, :], words, own[:, None])
            tl.store(scale_ptr + tile.to(tl.int64) * stride_st + col * stride_sc, fp8_scale(amax), own)


@triton.jit
def _rows(
    pairs, rows_at, C, left, inside, first, end, first_col, scale_ptr, stride_sr, stride_sb,
    SCALING: tl.constexpr, RCEIL: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Writes the rows of `pairs` and their scales; gives the larger magnitudes along tokens, as a pair."""
    PAIRS: tl.constexpr = len(pairs)
    ROWS: tl.constexpr = 2 * PAIRS
    RUNS: tl.constexpr = left.shape[0]
    SIZE: tl.constexpr = 32 if SCALING == "mx" else 128
    BLOCKS: tl.constexpr = BLOCK_C // SIZE
    largest = tl.zeros((RUNS, BLOCK_C), tl.int32)
    inverses = ()
    for i in tl.static_range(PAIRS):
        magnitudes = pairs[i] & 0x7FFF7FFF
        largest = larger_pair(largest, magnitudes, HARDWARE)
        amax = largest_pair(tl.reshape(magnitudes, (RUNS, BLOCKS, SIZE)), HARDWARE)
        inverses += (pair_inverse(amax, RCEIL, -127 if SCALING == "mx" else -48, HARDWARE),)
        for j in tl.static_range(2):
            x = low_float(pairs[i]) if j == 0 else high_float(pairs[i])
            inverse = low_float(inverses[i]) if j == 0 else high_float(inverses[i])
            data = encode(tl.reshape(x, (RUNS, BLOCKS, SIZE)) * inverse[:, :, None], HARDWARE)
            if SCALING == "mx":
                scale = mx_scale((254 - (inverse.to(tl.int32, bitcast=True) >> 23)) & 0xFF)
                data = (decode(data, HARDWARE) * scale[:, :, None]).to(tl.bfloat16)
            tl.store(rows_at, tl.reshape(data, (RUNS, BLOCK_C)), (2 * i + j < left) & inside)
            rows_at += C
    if SCALING == "blockwise":
        inverse = in_order(inverses)
        inverse = tl.reshape(tl.join(low_of(inverse), high_of(inverse)), (RUNS, BLOCKS, ROWS))
        inverse = tl.reshape(tl.permute(inverse, (0, 2, 1)), (RUNS * ROWS, BLOCKS))
        scale = ((254 << 23) - (inverse << 16)).to(tl.float32, bitcast=True)
        scale = tl.where(inverse >= 0x7F80, float("nan"), scale)
        r = first + tl.arange(0, RUNS * ROWS)[:, None]
        b = first_col // SIZE + tl.arange(0, BLOCKS)[None, :]
        tl.store(scale_ptr + r.to(tl.int64) * stride_sr + b.to(tl.int64) * stride_sb, scale, r < end)
    return largest


@triton.jit
def _tokens_straight(
    pairs, data_at, amax, C, left, inside,
    DEQUANTIZE: tl.constexpr, RCEIL: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Writes the tokens of `pairs` as they lie, in bf16 or as bytes; gives the scales' bytes."""
    ROWS: tl.constexpr = 2 * len(pairs)
    RUNS: tl.constexpr = amax.shape[0]
    BLOCK_C: tl.constexpr = amax.shape[1]
    BLOCKS: tl.constexpr = RUNS * ROWS // 32
    byte = mx_byte(tl.max(tl.reshape(amax, (BLOCKS, RUNS // BLOCKS, BLOCK_C)), 1), RCEIL)
    of_rows = tl.reshape(tl.broadcast_to(byte[:, None, :], (BLOCKS, RUNS // BLOCKS, BLOCK_C)), (RUNS, BLOCK_C))
    inverse = mx_inverse(of_rows)
    for i in tl.static_range(ROWS):
        x = low_float(pairs[i // 2]) if i % 2 == 0 else high_float(pairs[i // 2])
        data = encode(x * inverse, HARDWARE)
        if DEQUANTIZE:
            data = (decode(data, HARDWARE) * mx_scale(of_rows)).to(tl.bfloat16)
        tl.store(data_at, data, (i < left) & inside)
        data_at += C
    return byte


@triton.jit
def _words(pairs, inverse, HARDWARE: tl.constexpr):
    """The bytes of every four rows of `pairs`."""
    words = ()
    for i in tl.static_range(0, len(pairs), 2):
        words += (
            encode_four(
                low_float(pairs[i]) * inverse, high_float(pairs[i]) * inverse,
                low_float(pairs[i + 1]) * inverse, high_float(pairs[i + 1]) * inverse, HARDWARE,
            ),
        )  # fmt: skip
    return words


def schedule(scaling: str, gated: bool = False, gradient: bool = False) -> tuple[int, int, int | None]:
    """(BLOCK_R, ROWS, registers a thread; None: what the compiler takes).

    At [128000, 7168] on an H200, in ms, where the two quantizers of either operand take 1.39 (blockwise) and 1.71 (MX):
    blockwise with 32 rows 1.22, and 1.28 without the limit, with 16 rows 1.35; MX with 8 rows 1.19, with 16 1.22, with
    128 tokens a program 1.30. Gated [131072, 8192]: blockwise with 16 rows 2.11 (limited to 80: 2.21), MX with 8 rows
    1.82. Gradients of [131072, 2 x 8192], where the gradient and then its operands take 5.54 and 6.7: blockwise with 16
    rows 4.42 (without the limit 7.12, with 32 rows 5.27), MX with 8 rows 3.86. The spills that a limit causes cost less
    than the warps gain for which it makes room.
    """
    if scaling == "mx":
        return 32, 8, None
    if gradient:
        return 128, 16, 128
    return (128, 16, None) if gated else (128, 32, 168)


def fuses(format: str, x: torch.Tensor, straight: bool) -> bool:
    """Whether `quantize_rows_and_tokens` is for `format` and for x; `straight`: in MX formats, for bf16 MMAs."""
    return x.dtype == torch.bfloat16 and (format == "fp8_blockwise" or straight)


def quantize_rows_and_tokens(
    x: torch.Tensor,
    format: str,
    rows: torch.Tensor,
    rows_scale: torch.Tensor | None,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    tiles: torch.Tensor,
    groups: torch.Tensor,
    *,
    gated: bool = False,
    dh: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
) -> None:
    """`quantize_rows` and `quantize_tokens` (MX: `quantize_tokens_straight`) of x [M, C], bf16 with any strides.

    Args:
        rows: e4m3 [M, C], or bf16 in an MX format. Rows of no group are left as they are.
        rows_scale: float32 [M, ceil(C/128)], any strides; None in an MX format.
        data, scale: e4m3 [C, Mp] and float32 [C, Mp/128], any strides; in an MX format [M, C] and E8M0 [Mp/32, C], or
            bf16 that receives data * scale, and may be x, and None.
        tiles, groups: the map of TOKEN_TILE-token tiles (`tiles.prepare`).
        gated: x [M, 2C] stands for its SwiGLU [M, C].
        dh: x [M, C] stands for its gradient, given that of its SwiGLU, dh [M, C/2] (`swiglu.py`), both contiguous; C/2
            is a multiple of the format's block.
        index: int32 [M]: x is [T, C], and its row index[r] is row r.
    """
    (M, C), G = rows.shape, groups.shape[0] - 1
    num_tiles = padded_tokens(M, G) // TOKEN_TILE
    if not num_tiles:
        return
    if format == "fp8_blockwise":
        assert rows_scale is not None, "fp8_blockwise has scales"
        assert scale is not None, "fp8_blockwise has scales"
        out = rows.view(torch.int8), rows_scale, *rows_scale.stride(), data.view(torch.int32), data.stride(0) // 4
        out = *out, scale, scale.stride(1), scale.stride(0)
    else:
        out = rows, None, 0, 0, int8_or_bf16(data), 0, scale_bits(scale), 0, 0
    scaling, width = SCALING[format], C if dh is None else C // 2
    halves = 2 if dh is not None and scaling == "blockwise" else 1
    block_r, rows_of_warp, registers = schedule(scaling, gated, dh is not None)
    launch(
        rows_and_tokens, (num_tiles * (TOKEN_TILE // block_r) * cdiv(width, BLOCK_C) * halves,),
        x, *x.stride(), index, dh, *out, tiles, groups,
        G, C, SCALING=scaling, GATED=gated, RCEIL=format != "mxfp8_floor", BLOCK_R=block_r, BLOCK_C=BLOCK_C,
        ROWS=rows_of_warp, HARDWARE=hardware(x), num_warps=block_r // rows_of_warp, maxnreg=registers,
    )  # fmt: skip
