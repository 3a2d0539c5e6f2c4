"""The permutation of an MoE layer: tokens to the rows of their experts, and the experts' rows back to tokens.

T tokens, k experts of each, M = T*k slots; slot s belongs to token s // k. D = width. Rows are sorted by expert, and
three arrays say which is which:

    order  [M] int32 or int64   row r is slot order[r]
    place  [M] int32            slot s is row place[s]: the inverse of order
    tokens [M] int32            row r belongs to token tokens[r] = order[r] // k

All three are data. They are clamped where they are read, so no value in them can send a kernel outside its buffers;
what an ``order`` that is no permutation leaves unwritten stays as it was.

Sums over a token's rows are taken in float32, from 0, in the order of its slots, without fused multiply-adds, and
rounded once: they are deterministic and have the bits of the emulation. All but `gather` go by `place`, so that a
token's own row is read or written once and not k times.
"""

import torch
import triton
import triton.language as tl

from xmoe.kernels.launch import launch
from xmoe.kernels.tiles import cdiv

WARPS, THREADS = 4, 128
ACCESS = 16
"""Bytes that a thread loads or stores at once."""
ROWS = 8
"""The most rows, of one token or of several, that a program has on their way at once."""
INVERT_BLOCK = 1024
"""Slots of a program of `invert`."""


@triton.jit
def _clamped(index, count):
    """The index as int32 in [0, count)."""
    return tl.minimum(tl.maximum(index, 0), count - 1).to(tl.int32)


@triton.jit(do_not_specialize=["M", "k"])
def _invert(order_ptr, tokens_ptr, place_ptr, M, k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < M
    slot = _clamped(tl.load(order_ptr + row, inside, 0), M)
    if tokens_ptr is not None:
        tl.store(tokens_ptr + row, slot // k, inside)
    if place_ptr is not None:
        tl.store(place_ptr + slot, row.to(tl.int32), inside)


@triton.jit
def _tile(D, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows [TOKENS] int64, columns [BLOCK]) of this program; the programs of a row follow one another."""
    blocks = tl.cdiv(D, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    return row, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit(do_not_specialize=["T", "M"])
def _gather(x_ptr, stride_xt, tokens_ptr, out_ptr, T, M, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column = _tile(D, ROWS, BLOCK)
    inside = (row < M)[:, None] & (column < D)[None, :]
    token = _clamped(tl.load(tokens_ptr + row, row < M, 0), T).to(tl.int64)
    x = tl.load(x_ptr + token[:, None] * stride_xt + column[None, :], inside, 0.0)
    tl.store(out_ptr + row[:, None] * D + column[None, :], x, inside)


@triton.jit(do_not_specialize=["T", "M"])
def _combine(
    x_ptr, scores_ptr, place_ptr, out_ptr, T, M, D,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Without scores_ptr the plain sum."""
    token, column = _tile(D, TOKENS, BLOCK)
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for first in tl.range(0, K // ROWS * ROWS, ROWS):
        total = _add_rows(total, x_ptr, scores_ptr, place_ptr, token * K + first, token < T, column, M, D, ROWS)
    last: tl.constexpr = K // ROWS * ROWS
    total = _add_rows(total, x_ptr, scores_ptr, place_ptr, token * K + last, token < T, column, M, D, K % ROWS)
    out = out_ptr + token[:, None] * D + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), (token < T)[:, None] & (column < D)[None, :])


@triton.jit
def _add_rows(total, x_ptr, scores_ptr, place_ptr, slot, inside, column, M, D, COUNT: tl.constexpr):
    """total, and the rows of COUNT slots of each token from `slot` on."""
    addresses = ()
    scores = ()
    for i in tl.static_range(COUNT):
        row = _clamped(tl.load(place_ptr + slot + i, inside, 0), M).to(tl.int64)
        addresses += (x_ptr + row[:, None] * D + column[None, :],)
        if scores_ptr is not None:
            scores += (tl.load(scores_ptr + slot + i, inside, 0.0)[:, None],)
    values = ()
    for i in tl.static_range(COUNT):
        values += (tl.load(addresses[i], inside[:, None] & (column < D)[None, :], 0.0),)
    for i in tl.static_range(COUNT):
        value = values[i].to(tl.float32)
        if scores_ptr is not None:
            value *= scores[i]
        total += value
    return total


@triton.jit(do_not_specialize=["M"])
def _combine_backward(
    dout_ptr, x_ptr, scores_ptr, place_ptr, dx_ptr, dscores_ptr, M, D,
    K: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """A program has a token and all its rows, ROWS of them at a time. Without scores_ptr all scores are 1."""
    slot = tl.program_id(0).to(tl.int64) * K
    for first in tl.range(0, K // ROWS * ROWS, ROWS):
        _spread_rows(
            dout_ptr, x_ptr, scores_ptr, place_ptr, dx_ptr, dscores_ptr, slot + first, M, D, ROWS, PIECES, PIECE
        )
    last: tl.constexpr = K // ROWS * ROWS
    if last < K:
        _spread_rows(
            dout_ptr, x_ptr, scores_ptr, place_ptr, dx_ptr, dscores_ptr, slot + last, M, D, K - last, PIECES, PIECE
        )


@triton.jit
def _spread_rows(
    dout_ptr, x_ptr, scores_ptr, place_ptr, dx_ptr, dscores_ptr, slot, M, D,
    COUNT: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The gradients of COUNT slots from `slot` on. The products of a dot are summed in registers, PIECE at a time, and
    across threads at the end of the row."""
    offsets = ()
    scores = ()
    dots = ()
    for i in tl.static_range(COUNT):
        offsets += (_clamped(tl.load(place_ptr + slot + i), M).to(tl.int64) * D,)
        if scores_ptr is not None:
            scores += (tl.load(scores_ptr + slot + i),)
        dots += (tl.zeros((PIECES,), tl.float32),)
    dout_row = dout_ptr + tl.program_id(0).to(tl.int64) * D
    for start in tl.range(0, D, PIECES * PIECE):
        column = start + tl.arange(0, PIECES)[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
        dout = tl.load(dout_row + column, column < D, 0.0)
        values = ()
        if dscores_ptr is not None:
            for i in tl.static_range(COUNT):
                values += (tl.load(x_ptr + offsets[i] + column, column < D, 0.0),)
        sums = ()
        for i in tl.static_range(COUNT):
            if dx_ptr is not None:
                dx = dout
                if scores_ptr is not None:
                    dx = scores[i] * dout.to(tl.float32)
                tl.store(dx_ptr + offsets[i] + column, dx.to(dx_ptr.dtype.element_ty), column < D)
            if dscores_ptr is not None:
                sums += (dots[i] + tl.sum(dout.to(tl.float32) * values[i].to(tl.float32), 1),)
        if dscores_ptr is not None:
            dots = sums
    if dscores_ptr is not None:
        for i in tl.static_range(COUNT):
            tl.store(dscores_ptr + slot + i, tl.sum(dots[i], 0))


# ----------------------------------------------------------------------------------------------------------- launchers


def block(element_size: int) -> int:
    """Columns of a tile: one access of each thread to a row."""
    return THREADS * ACCESS // element_size


def schedule(k: int, element_size: int) -> dict[str, int]:
    """The constants of `_combine`: where k is small a program has several tokens, so that up to ROWS rows are on their
    way."""
    rows = min(k, ROWS)
    return {"K": k, "ROWS": rows, "TOKENS": 1 << (ROWS // rows).bit_length() - 1, "BLOCK": block(element_size)}


def backward_schedule(k: int, element_size: int) -> dict[str, int]:
    """The constants of `_combine_backward`: the fewer rows a token has, the more of each is read at once."""
    accesses = 4 if k == 1 else 2 if k <= 3 else 1
    return {"K": k, "ROWS": min(k, ROWS), "PIECES": THREADS * accesses, "PIECE": ACCESS // element_size}


def invert(order: torch.Tensor, k: int, tokens: torch.Tensor | None, place: torch.Tensor | None) -> None:
    """The token of each row and the row of each slot.

    Args:
        order: int32 or int64 [M], contiguous; clamped to [0, M - 1].
        k: slots of a token; divides M.
        tokens, place: int32 [M], contiguous, written; None: not wanted. In `place` a slot that is not in `order` keeps
            what was there.
    """
    M = order.shape[0]
    assert order.dtype in (torch.int32, torch.int64), f"order is {order.dtype}: int32 or int64"
    assert M < 2**31, f"{M} slots: rows are int32"
    for out in (tokens, place):
        assert out is None or (out.shape, out.dtype) == ((M,), torch.int32), f"{out.shape} {out.dtype}: int32 ({M},)"
    if M:
        launch(_invert, (cdiv(M, INVERT_BLOCK),), order, tokens, place, M, k, BLOCK=INVERT_BLOCK, num_warps=WARPS)


def gather(x: torch.Tensor, tokens: torch.Tensor, out: torch.Tensor) -> None:
    """out[r] = x[tokens[r]].

    Args:
        x: [T, D], rows contiguous, of any stride.
        tokens: int32 [M]; clamped to [0, T - 1].
        out: [M, D] of the dtype of x, contiguous.
    """
    (T, D), M = x.shape, out.shape[0]
    assert out.dtype == x.dtype, f"out is {out.dtype}, x {x.dtype}"
    assert x.stride(1) == 1 or D == 1, f"x has strides {x.stride()}: rows must be contiguous"
    _check(tokens, M, out, (M, D))
    if out.numel():
        assert T, f"{M} rows of no token"
        columns = block(x.element_size())
        launch(
            _gather, (cdiv(M, ROWS) * cdiv(D, columns),), x, x.stride(0), tokens, out, T, M, D,
            ROWS=ROWS, BLOCK=columns, num_warps=WARPS,
        )  # fmt: skip


def gather_sum(x: torch.Tensor, place: torch.Tensor, out: torch.Tensor) -> None:
    """out[t] = sum of x[place[t*k + j]] over j < k, in float32, rounded once.

    Args:
        x: [M, D], bf16 or fp32, contiguous.
        place: int32 [M]; clamped to [0, M - 1].
        out: [T, D], bf16 or fp32, contiguous.
    """
    _launch_combine(x, None, place, out)


def combine(x: torch.Tensor, scores: torch.Tensor, place: torch.Tensor, out: torch.Tensor) -> None:
    """out[t] = sum of scores[t, j] * x[place[t*k + j]] over j < k; each product and sum in float32, rounded once to the
    dtype of out.

    Args:
        x, place, out: as in `gather_sum`.
        scores: float32 [T, k], contiguous.
    """
    _launch_combine(x, scores, place, out)


def _launch_combine(x: torch.Tensor, scores: torch.Tensor | None, place: torch.Tensor, out: torch.Tensor) -> None:
    (M, D), (T, _) = x.shape, out.shape
    _check_slots(scores, place, M, T)
    _check(place, M, out, (T, D))
    if out.numel():
        constants = schedule(M // T, x.element_size())
        programs = cdiv(T, constants["TOKENS"]) * cdiv(D, constants["BLOCK"])
        launch(
            _combine, (programs,), x, scores, place, out, T, M, D,
            **constants, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def scatter(x: torch.Tensor, place: torch.Tensor, out: torch.Tensor) -> None:
    """out[place[t*k + j]] = x[t] for all j < k: what `gather` gives, with one read of each token.

    Args:
        x: [T, D], contiguous.
        place: int32 [M]; clamped to [0, M - 1].
        out: [M, D], contiguous; a row that is nobody's place keeps what was there.
    """
    assert out.dtype == x.dtype, f"out is {out.dtype}, x {x.dtype}"
    _launch_backward(x, None, None, place, out, None)


def combine_backward(
    dout: torch.Tensor,
    x: torch.Tensor | None,
    scores: torch.Tensor,
    place: torch.Tensor,
    dx: torch.Tensor | None,
    dscores: torch.Tensor | None,
) -> None:
    """dx[place[t*k + j]] = scores[t, j] * dout[t], rounded once; dscores[t, j] = the dot of dout[t] and
    x[place[t*k + j]], in float32.

    Args:
        dout: [T, D], bf16 or fp32, contiguous.
        x, scores, place: as in `combine`; x is read for `dscores` only, and may else be None.
        dx: [M, D], bf16 or fp32, contiguous; None: not wanted. A row that is nobody's place keeps what was there.
        dscores: float32 [T, k], contiguous; None: not wanted.
    """
    assert dscores is None or x is not None, "dscores needs x"
    assert dscores is None or dscores.shape == scores.shape, f"dscores {dscores.shape}: expected {scores.shape}"
    _launch_backward(dout, x if dscores is not None else None, scores, place, dx, dscores)


def _launch_backward(
    dout: torch.Tensor,
    x: torch.Tensor | None,
    scores: torch.Tensor | None,
    place: torch.Tensor,
    dx: torch.Tensor | None,
    dscores: torch.Tensor | None,
) -> None:
    (T, D), M = dout.shape, place.shape[0]
    _check_slots(scores, place, M, T)
    for rows in (x, dx):
        assert rows is None or rows.shape == (M, D), f"{rows.shape}: expected {(M, D)}"
    if M:
        launch(
            _combine_backward, (T,), dout, x, scores, place, dx, dscores, M, D,
            **backward_schedule(M // T, dout.element_size()), num_warps=WARPS,
        )  # fmt: skip


def _check_slots(scores: torch.Tensor | None, place: torch.Tensor, M: int, T: int) -> None:
    assert M == 0 if T == 0 else M % T == 0, f"{M} rows of {T} tokens: not as many of each"
    assert place.shape == (M,), f"place {place.shape}: expected {(M,)}"
    assert scores is None or scores.shape[0] * scores.shape[1] == M, f"scores {scores.shape} of {M} rows"


def _check(index: torch.Tensor, M: int, out: torch.Tensor, shape: tuple[int, int]) -> None:
    assert (index.shape, index.dtype) == ((M,), torch.int32), f"{index.shape} {index.dtype}: int32 ({M},)"
    assert out.shape == shape, f"out {out.shape}: expected {shape}"
    assert out.is_contiguous(), f"out has strides {out.stride()}: expected contiguous"
