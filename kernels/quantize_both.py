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
from xmoe.kernels.quantize_blocks import SCALING
from xmoe.kernels.quantize_columns import in_order, transposed
from xmoe.kernels.swiglu import read
from xmoe.kernels.tiles import cdiv, tile_rows
from xmoe.operands import TOKEN_TILE, padded_tokens

BLOCK_C = 128


@triton.jit(do_not_specialize=["G", "stride_sr", "stride_sb", "stride_st", "stride_sc"])
def rows_and_tokens(
    x_ptr, stride_xr, stride_xc,
    rows_ptr,
    rows_scale_ptr, stride_sr, stride_sb,
    data_ptr, stride_dc,
    scale_ptr, stride_st, stride_sc,
    tiles_ptr, groups_ptr,
    G, C,
    SCALING: tl.constexpr, GATED: tl.constexpr, RCEIL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    RUNS: tl.constexpr = BLOCK_R // ROWS
    PAIRS: tl.constexpr = ROWS // 2
    SIZE: tl.constexpr = 32 if SCALING == "mx" else 128
    BLOCKS: tl.constexpr = BLOCK_C // SIZE
    column_blocks = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks
    tile = part // (128 // BLOCK_R)
    _, first, end = tile_rows(tile, tiles_ptr, groups_ptr, G, 0, True, 128)
    first += part % (128 // BLOCK_R) * BLOCK_R
    run = tl.arange(0, RUNS)
    col = (column_block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    left = (end - first - run * ROWS)[:, None]
    inside = (col < C)[None, :]
    row = (first + run * ROWS).to(tl.int64)[:, None]
    x_at = x_ptr + row * stride_xr + col[None, :] * stride_xc
    pairs = ()
    for i in tl.static_range(0, ROWS, 2):  # all on their way before the first is looked at
        x = read(x_at, C * stride_xc, (i < left) & inside, GATED)
        y = read(x_at + stride_xr, C * stride_xc, (i + 1 < left) & inside, GATED)
        pairs += (pair(x, y, HARDWARE),)
        x_at += 2 * stride_xr

    rows_at = rows_ptr + row * C + col[None, :]
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
        inverse = tl.reshape(tl.permute(inverse, (0, 2, 1)), (BLOCK_R, BLOCKS))
        scale = ((254 << 23) - (inverse << 16)).to(tl.float32, bitcast=True)
        scale = tl.where(inverse >= 0x7F80, float("nan"), scale)
        r = first + tl.arange(0, BLOCK_R)[:, None]
        b = column_block * BLOCKS + tl.arange(0, BLOCKS)[None, :]
        out = rows_scale_ptr + r.to(tl.int64) * stride_sr + b.to(tl.int64) * stride_sb
        tl.store(out, scale, (r < end) & (b * SIZE < C))

    amax = tl.maximum(low_of(largest), high_of(largest)) << 16
    if SCALING == "mx":
        byte = mx_byte(tl.max(tl.reshape(amax, (BLOCK_R // 32, 32 // ROWS, BLOCK_C)), 1), RCEIL)
        inverse = tl.broadcast_to(mx_inverse(byte)[:, None, :], (BLOCK_R // 32, 32 // ROWS, BLOCK_C))
        inverse = tl.reshape(inverse, (RUNS, BLOCK_C))
        data_at = data_ptr + row * C + col[None, :]
        for i in tl.static_range(ROWS):
            x = low_float(pairs[i // 2]) if i % 2 == 0 else high_float(pairs[i // 2])
            tl.store(data_at, encode(x * inverse, HARDWARE), (i < left) & inside)
            data_at += C
        block = part * (BLOCK_R // 32) + tl.arange(0, BLOCK_R // 32)[:, None]
        tl.store(scale_ptr + block.to(tl.int64) * C + col[None, :], byte.to(tl.uint8), inside)
    else:
        amax = tl.max(amax, 0)
        inverse = fp8_inverse(amax)[None, :]
        words = ()
        for i in tl.static_range(0, PAIRS, 2):
            words += (
                encode_four(
                    low_float(pairs[i]) * inverse, high_float(pairs[i]) * inverse,
                    low_float(pairs[i + 1]) * inverse, high_float(pairs[i + 1]) * inverse, HARDWARE,
                ),
            )  # fmt: skip
        words = transposed(words, left, BLOCK_C)
        word = tile * (BLOCK_R // 4) + tl.arange(0, BLOCK_R // 4)
        tl.store(data_ptr + col[:, None] * stride_dc + word[None, :], words, (col < C)[:, None])
        tl.store(scale_ptr + tile.to(tl.int64) * stride_st + col * stride_sc, fp8_scale(amax), col < C)


def schedule(scaling: str, gated: bool) -> tuple[int, int, int | None]:
    """(BLOCK_R, ROWS, registers a thread; None: what the compiler takes).

    At [128000, 7168] on an H200, in ms, where the two quantizers of either operand take 1.39 (blockwise) and 1.71 (MX):
    blockwise with 32 rows 1.22, and 1.28 without the limit, with 16 rows 1.35; gated with 16 rows 2.00, without the
    limit 2.92, with 32 rows 2.04. MX with 8 rows 1.19, with 16 1.22; gated with 16 1.60, with 8 1.77; with 128 tokens a
    program 1.30 and 1.99 at best. The spills that a limit causes cost less than the warps gain for which it makes room.
    """
    if scaling == "mx":
        return (32, 16, 104) if gated else (32, 8, None)
    return (128, 16, 80) if gated else (128, 32, 168)


def fuses(format: str, x: torch.Tensor, straight: bool) -> bool:
    """Whether `quantize_rows_and_tokens` is for `format` and for x; `straight`: in MX formats, for bf16 MMAs."""
    return x.dtype == torch.bfloat16 and (format == "fp8_blockwise" or straight)


def quantize_rows_and_tokens(
    x: torch.Tensor,
    format: str,
    rows: torch.Tensor,
    rows_scale: torch.Tensor | None,
    data: torch.Tensor,
    scale: torch.Tensor,
    tiles: torch.Tensor,
    groups: torch.Tensor,
    *,
    gated: bool = False,
) -> None:
    """`quantize_rows` and `quantize_tokens` (MX: `quantize_tokens_straight`) of x [M, C], bf16 with any strides.

    Args:
        rows: e4m3 [M, C], or bf16 in an MX format. Rows of no group are left as they are.
        rows_scale: float32 [M, ceil(C/128)], any strides; None in an MX format.
        data, scale: e4m3 [C, Mp] and float32 [C, Mp/128], any strides; in an MX format [M, C] and E8M0 [Mp/32, C].
        tiles, groups: the map of TOKEN_TILE-token tiles (`tiles.prepare`).
        gated: x [M, 2C] stands for its SwiGLU [M, C].
    """
    (M, C), G = rows.shape, groups.shape[0] - 1
    num_tiles = padded_tokens(M, G) // TOKEN_TILE
    if not num_tiles:
        return
    if format == "fp8_blockwise":
        assert rows_scale is not None, "fp8_blockwise has scales"
        out = rows.view(torch.int8), rows_scale, *rows_scale.stride(), data.view(torch.int32), data.stride(0) // 4
        out = *out, scale, scale.stride(1), scale.stride(0)
    else:
        out = rows, None, 0, 0, data.view(torch.int8), 0, scale.view(torch.uint8), 0, 0
    scaling = SCALING[format]
    block_r, rows_of_warp, registers = schedule(scaling, gated)
    launch(
        rows_and_tokens, (num_tiles * (TOKEN_TILE // block_r) * cdiv(C, BLOCK_C),), x, *x.stride(), *out, tiles, groups,
        G, C, SCALING=scaling, GATED=gated, RCEIL=format != "mxfp8_floor", BLOCK_R=block_r, BLOCK_C=BLOCK_C,
        ROWS=rows_of_warp, HARDWARE=hardware(x), num_warps=block_r // rows_of_warp, maxnreg=registers,
    )  # fmt: skip
