"""Grouped GEMMs: one persistent kernel for fwd and dgrad (2D x 3D), one for wgrad (2D x 2D).

M tokens, G groups. Both contract the last axis of quantized operands (fp8 tensor cores read K-major operands only);
bf16 operands are read as they lie, because bf16 wgmma takes either order.

    out[M, P]    = a[M, C] @ b[g, P, C]^T                      (g: the group that owns the row)
    out[g, P, Q] = a[P, tokens of g] @ b[Q, tokens of g]^T

SCALING: "none" (bf16), "rowwise" (float32 a row of each operand, applied to the sum), "blockwise" (float32 for 128 of
the contraction, applied to each step's product; of weights for 128 rows too), "mx" (E8M0 per 32, inside the MMA:
`tl.dot_scaled`, which is tcgen05 block scaling on sm_100; their tiles go by TMA to shared memory and from there to
tensor memory).

STAGES: the loop's own, for "blockwise", else None (the launch's, for the operands alone). It sends the scales ahead
through shared memory too; else the MMA would wait for them, and each thread of a wgrad would load 34 a step.
"""

import torch
import triton
import triton.language as tl
from triton.tools.ragged_tma import to_ragged_indices

from xmoe.kernels.launch import Descriptor, launch, ragged_descriptor
from xmoe.kernels.scale_tiles import descriptor, scales_of
from xmoe.kernels.tuning import GemmTiles
from xmoe.operands import FP8_BLOCK, TOKEN_TILE


@triton.jit
def _multiply(a, b, acc, PRECISE: tl.constexpr):
    """acc + a @ b^T; PRECISE adds each partial product in float32 outside the tensor core."""
    if PRECISE:
        acc += tl.dot(a, b.T)
    else:
        acc = tl.dot(a, b.T, acc)
    return acc


@triton.jit
def _store_rows(desc, acc, first, end, col, PARTS: tl.constexpr):
    """Store acc into the rows `first` to `end` of a ragged descriptor, at `col`; in two PARTS it stages half in shared
    memory at a time."""
    acc = acc.to(desc.dtype)
    ROWS: tl.constexpr = acc.shape[0]
    COLS: tl.constexpr = acc.shape[1] // PARTS
    x, y, z = to_ragged_indices(first, end - first, 0)
    if PARTS == 1:
        desc.store([x, y, z, col], acc.reshape(1, 1, ROWS, COLS))
    else:
        left, right = acc.reshape(ROWS, 2, COLS).permute(0, 2, 1).split()
        desc.store([x, y, z, col], left.reshape(1, 1, ROWS, COLS))
        desc.store([x, y, z, col + COLS], right.reshape(1, 1, ROWS, COLS))


@triton.jit(do_not_specialize=["M", "G"])
def _grouped_mm(
    a_desc, b_desc, out_desc,
    out_ptr, stride_out,
    a_scales, b_scales,  # pointers, or for "mx" descriptors of tiles
    tiles_ptr, groups_ptr,
    M, P, C, G,
    SCALING: tl.constexpr, PRECISE: tl.constexpr, B_CONTRACTION_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PROGRAMS: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    m_tiles = tl.load(groups_ptr + G * 4 + 2)
    p_blocks = tl.cdiv(P, BLOCK_P)
    for tile in tl.range(tl.program_id(0), m_tiles * p_blocks, PROGRAMS, flatten=True):
        # BAND token tiles walk the columns together, so that they share b in L2.
        band = BAND * p_blocks
        top = tile // band * BAND
        height = tl.minimum(m_tiles - top, BAND)
        m_tile = top + tile % band % height
        first_p = tile % band // height * BLOCK_P
        group = tl.load(tiles_ptr + m_tile * 4)
        first_m = tl.load(tiles_ptr + m_tile * 4 + 1)
        end_m = tl.load(tiles_ptr + m_tile * 4 + 2)
        m = first_m + tl.arange(0, BLOCK_M)
        p = first_p + tl.arange(0, BLOCK_P)

        acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        for c in tl.range(0, C, BLOCK_C, num_stages=STAGES):
            a = a_desc.load([first_m, c])
            if B_CONTRACTION_LAST:
                b = b_desc.load([group, first_p, c]).reshape(BLOCK_P, BLOCK_C)
            else:
                b = b_desc.load([group, c, first_p]).reshape(BLOCK_C, BLOCK_P).T
            if SCALING == "blockwise":
                blocks = tl.cdiv(C, BLOCK_C)
                block = c // BLOCK_C
                a_scale = tl.load(a_scales + m.to(tl.int64) * blocks + block, m < end_m, 0.0)
                # One for all columns of a tile, but loaded by the row: a scalar would not be on its way beforehand.
                b_line = group.to(tl.int64) * tl.cdiv(P, BLOCK_C) + first_p // BLOCK_C
                b_scale = tl.load(b_scales + b_line * blocks + block + tl.zeros_like(m))
                acc += tl.dot(a, b.T) * (a_scale * b_scale)[:, None]
            elif SCALING == "mx":
                a_scale = scales_of(a_scales.load([m_tile, c // 128, 0, 0]))
                b_scale = scales_of(b_scales.load([group * tl.cdiv(P, 128) + first_p // 128, c // 128, 0, 0]))
                acc = tl.dot_scaled(a, a_scale, "e4m3", b.T, b_scale, "e4m3", acc)
            else:
                acc = _multiply(a, b, acc, PRECISE)

        if SCALING == "rowwise":
            acc *= tl.load(a_scales + m, m < end_m, 0.0)[:, None]
            acc *= tl.load(b_scales + group.to(tl.int64) * P + p, p < P, 0.0)[None, :]
        _store_rows(out_desc, acc, first_m, end_m, first_p, PARTS)  # rows from end_m on belong to the next group

    first_free = tl.load(groups_ptr + G * 4)
    for tile in range(tl.program_id(0), tl.cdiv(M - first_free, BLOCK_M) * p_blocks, PROGRAMS):
        m = first_free + tile // p_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        p = tile % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        zero = tl.zeros((BLOCK_M, BLOCK_P), out_ptr.dtype.element_ty)
        tl.store(out_ptr + m.to(tl.int64)[:, None] * stride_out + p[None, :], zero, (m < M)[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["M", "G", "stride_as", "stride_bs"])
def _grouped_mm_tokens(
    a_desc, b_desc, out_desc,
    a_ptr, stride_a, b_ptr, stride_b,
    a_scales, stride_as, b_scales, stride_bs,
    groups_ptr,
    M, P, Q, G,
    SCALING: tl.constexpr, PRECISE: tl.constexpr, TOKEN_TILE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    PROGRAMS: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Scaled operands are [P, Mp] and [Q, Mp], each group zero-padded to TOKEN_TILE. Others are bf16 [M, P] and [M, Q]
    as they lie: whole tiles of tokens by TMA, the group's last tokens by masked loads."""
    p_blocks = tl.cdiv(P, BLOCK_P)
    q_blocks = tl.cdiv(Q, BLOCK_Q)
    for tile in tl.range(tl.program_id(0), G * p_blocks * q_blocks, PROGRAMS):
        group = tile // (p_blocks * q_blocks)
        in_group = tile % (p_blocks * q_blocks)
        band = BAND * q_blocks
        top = in_group // band * BAND
        height = tl.minimum(p_blocks - top, BAND)
        first_p = (top + in_group % band % height) * BLOCK_P
        first_q = in_group % band // height * BLOCK_Q
        p = first_p + tl.arange(0, BLOCK_P)
        q = first_q + tl.arange(0, BLOCK_Q)
        start = tl.load(groups_ptr + group * 4)
        end = tl.load(groups_ptr + group * 4 + 1)

        acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
        if SCALING != "none":
            start = tl.load(groups_ptr + group * 4 + 2) * TOKEN_TILE
            end = tl.load(groups_ptr + group * 4 + 6) * TOKEN_TILE  # where the next group starts
            for m in tl.range(start, end, BLOCK_M, num_stages=STAGES):
                a = a_desc.load([first_p, m])
                b = b_desc.load([first_q, m])
                if SCALING == "blockwise":
                    blocks = M // BLOCK_M
                    block = m // BLOCK_M
                    # triton 3.6 spills with other orders of these sums and products.
                    a_scale = tl.load((a_scales + block) + p.to(tl.int64) * blocks, p < P, 0.0)
                    b_scale = tl.load((b_scales + block) + q.to(tl.int64) * blocks, q < Q, 0.0)
                    acc += tl.dot(a, b.T) * (a_scale[:, None] * b_scale[None, :])
                elif SCALING == "mx":
                    a_scale = scales_of(a_scales.load([first_p // 128, m // 128, 0, 0]))
                    b_scale = scales_of(b_scales.load([first_q // 128, m // 128, 0, 0]))
                    acc = tl.dot_scaled(a, a_scale, "e4m3", b.T, b_scale, "e4m3", acc)
                else:
                    acc = _multiply(a, b, acc, PRECISE)
        else:
            whole = start + (end - start) // BLOCK_M * BLOCK_M
            for m in range(start, whole, BLOCK_M):
                acc = _multiply(a_desc.load([m, first_p]).T, b_desc.load([m, first_q]).T, acc, PRECISE)
            if whole < end:
                row = (whole + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
                a = tl.load(a_ptr + row * stride_a + p[None, :], (row < end) & (p < P)[None, :], 0.0)
                b = tl.load(b_ptr + row * stride_b + q[None, :], (row < end) & (q < Q)[None, :], 0.0)
                acc = _multiply(a.T, b.T, acc, PRECISE)

        if SCALING == "rowwise":
            acc *= tl.load(a_scales + group.to(tl.int64) * stride_as + p, p < P, 0.0)[:, None]
            acc *= tl.load(b_scales + group.to(tl.int64) * stride_bs + q, q < Q, 0.0)[None, :]
        _store_rows(out_desc, acc, group * P + first_p, (group + 1) * P, first_q, PARTS)


def _scale_args(a_scale: torch.Tensor | None, b_scale: torch.Tensor | None, blockwise: bool, tuned: GemmTiles):
    if a_scale is None or b_scale is None:
        return "none", None, None
    if blockwise:
        assert tuned.depth == FP8_BLOCK, f"a depth of {tuned.depth}: a step has one block, {FP8_BLOCK}"
        return "blockwise", a_scale, b_scale
    if a_scale.dtype == torch.float32:
        return "rowwise", a_scale, b_scale
    return "mx", descriptor(a_scale, tuned.rows, tuned.depth), descriptor(b_scale, tuned.cols, tuned.depth)


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
    precise: bool = False,
    blockwise: bool = False,
) -> None:
    """out[M, P] = a[M, C] @ b[g, P, C]^T for the group g of each row; rows of no group become zero.

    Args:
        a: e4m3 or bf16 [M, C], contiguous.
        b: e4m3 [G, P, C] contiguous, or bf16 [G, P, C] with axis 1 or 2 contiguous.
        a_scale, b_scale: float32 [M], [G, P]; or, `blockwise`, [M, ceil(C/128)], [G, ceil(P/128), ceil(C/128)]; or E8M0
            tiles [Mp/128, ceil(C/128), 512], [G, ceil(P/128), ceil(C/128), 512]; or None for bf16.
        tiles, groups: the map of `tuned.rows`-token tiles (`tiles.prepare`).
        out: bf16 or fp32 [M, P], written whole; rows may lie apart.
        programs: persistent programs, the number of multiprocessors.
        precise: add partial products in float32 outside the tensor core; `blockwise` does so anyway.
    """
    (M, C), (G, P, _) = a.shape, b.shape
    if M == 0:
        return
    assert a.is_contiguous(), f"strides {a.stride()}: a is contiguous"
    assert not blockwise or FP8_BLOCK % tuned.cols == 0, f"{tuned.cols} columns a tile: all in one block of {FP8_BLOCK}"
    scaling, a_scales, b_scales = _scale_args(a_scale, b_scale, blockwise, tuned)
    assert scaling != "mx" or tuned.rows == TOKEN_TILE, f"{tuned.rows} rows a tile: scale tiles have {TOKEN_TILE}"
    contraction_last = b.stride(2) == 1
    if contraction_last:
        b_desc = Descriptor(b, (G, P, C), b.stride(), (1, tuned.cols, tuned.depth))
    else:
        b_desc = Descriptor(b, (G, C, P), (b.stride(0), b.stride(2), 1), (1, tuned.depth, tuned.cols))
    launch(
        _grouped_mm, (programs,), Descriptor(a, (M, C), (C, 1), (tuned.rows, tuned.depth)), b_desc,
        ragged_descriptor(out, (tuned.rows, tuned.cols // tuned.parts)), out, out.stride(0),
        a_scales, b_scales, tiles, groups, M, P, C, G,
        SCALING=scaling, PRECISE=precise and not blockwise, B_CONTRACTION_LAST=contraction_last,
        BLOCK_M=tuned.rows, BLOCK_P=tuned.cols, BLOCK_C=tuned.depth, PROGRAMS=programs, BAND=tuned.band,
        STAGES=tuned.stages if blockwise else None, PARTS=tuned.parts,
        num_warps=tuned.warps, num_stages=tuned.stages,
    )  # fmt: skip


def grouped_mm_tokens(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    b: torch.Tensor,
    b_scale: torch.Tensor | None,
    groups: torch.Tensor,
    out: torch.Tensor,
    tuned: GemmTiles,
    programs: int,
    precise: bool = False,
    blockwise: bool = False,
) -> None:
    """out[g, P, Q] = a[P, tokens of g] @ b[Q, tokens of g]^T; a group without tokens gives zeros.

    Args:
        a, b: e4m3 [P, Mp] and [Q, Mp], padded by group (`quantize.quantize_tokens`), contiguous; or bf16 [M, P] and
            [M, Q], as they lie, whose rows may lie apart.
        a_scale, b_scale: float32 [G, P], [G, Q], whose rows may lie apart; or, `blockwise`, [P, Mp/128], [Q, Mp/128];
            or E8M0 tiles [ceil(P/128), Mp/128, 512], [ceil(Q/128), Mp/128, 512]; or None for bf16.
        groups: from `tiles.prepare`, with tiles of TOKEN_TILE tokens.
        out: bf16 or fp32 [G, P, Q], contiguous, written whole.
    """
    G, P, Q = out.shape
    scaling, a_scales, b_scales = _scale_args(a_scale, b_scale, blockwise, tuned)
    M = a.shape[0] if scaling == "none" else a.shape[1]
    if M == 0:
        out.zero_()
        return
    assert scaling == "none" or TOKEN_TILE % tuned.depth == 0, f"a depth of {tuned.depth} would leave a group's padding"
    stride_a, stride_b = a.stride(0), b.stride(0)
    if scaling == "none":
        a_desc = Descriptor(a, (M, P), (stride_a, 1), (tuned.depth, tuned.rows))
        b_desc = Descriptor(b, (M, Q), (stride_b, 1), (tuned.depth, tuned.cols))
    else:
        a_desc = Descriptor(a, (P, M), (stride_a, 1), (tuned.rows, tuned.depth))
        b_desc = Descriptor(b, (Q, M), (stride_b, 1), (tuned.cols, tuned.depth))
    launch(
        _grouped_mm_tokens, (programs,), a_desc, b_desc,
        ragged_descriptor(out.view(G * P, Q), (tuned.rows, tuned.cols // tuned.parts)),
        a, stride_a, b, stride_b,
        a_scales, 0 if a_scale is None else a_scale.stride(0), b_scales, 0 if b_scale is None else b_scale.stride(0),
        groups, M, P, Q, G,
        SCALING=scaling, PRECISE=precise and not blockwise, TOKEN_TILE=TOKEN_TILE,
        BLOCK_P=tuned.rows, BLOCK_Q=tuned.cols, BLOCK_M=tuned.depth, PROGRAMS=programs, BAND=tuned.band,
        STAGES=tuned.stages if blockwise else None, PARTS=tuned.parts,
        num_warps=tuned.warps, num_stages=tuned.stages,
    )  # fmt: skip
