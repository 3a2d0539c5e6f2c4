"""The plain-PyTorch emulation of every kernel: the same bytes as the NumPy oracle, on any device.

M = tokens, K = contraction of the forward GEMM, N = output features, G = groups, C = any row length, R = any row count.

Formats, scale rules and operand layouts are those of ``docs/design.md``. The emulation is for machines without a
suitable GPU and for debugging: unlike a kernel it allocates its results and reads the group offsets on the host
(on a GPU: one synchronisation a call).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from xmoe.operands import (
    FORMATS,
    FP8_BLOCK,
    SCALE_BLOCKS,
    SCALE_TILE_BLOCKS,
    SCALE_TILE_ROWS,
    TOKEN_TILE,
    QuantizedOperand,
    padded_tokens,
)

Operand = QuantizedOperand[torch.Tensor]

_INF_BITS = 0x7F800000
_MIN_AMAX_BITS = 0x2B8CBCCC
"""The bits of float32(1e-12), the least amax that gives an FP8 scale."""
_E4M3_MAX, _E4M3_NAN = 448.0, 0x7F
_E8M0_NAN = 0xFF


def group_ends(offs: torch.Tensor, M: int) -> list[int]:
    """The end row of every group, read on the host: the running maximum of ``clip(offs, 0, M)``.

    ``offs`` is int32 [G]. Any values give non-decreasing ends inside [0, M].
    """
    return torch.cummax(offs.clamp(0, M), 0).values.tolist() if offs.numel() else []


def token_layout(ends: list[int]) -> list[tuple[int, int, int]]:
    """``(start, end, column)`` of every group: its rows [start, end) and its first column in a wgrad operand."""
    layout, start, column = [], 0, 0
    for end in ends:
        layout.append((start, end, column))
        column += -(-(end - start) // TOKEN_TILE) * TOKEN_TILE
        start = end
    return layout


# ---------------------------------------------------------------------------------------------------- quantizers


def quantize_rows(x: torch.Tensor, fmt: str, *, axis: str = "K") -> Operand:
    """Quantizes x [R, C] along C: data e4m3 [R, C]; scale float32 [R] or [R, ceil(C/128)], or E8M0 [R, ceil(C/32)]."""
    _check_input("x", x, 2)
    data, scale = _quantize_along_last(x, fmt)
    return QuantizedOperand(data, scale, axis, fmt)


def quantize_weights(B: torch.Tensor, axis: str, fmt: str) -> Operand:
    """Quantizes B [G, K, N] (any strides) along ``axis``, which becomes the last axis of the data.

    "K" gives e4m3 [G, N, K] with float32 [G, N] or [G, ceil(N/128), ceil(K/128)], or E8M0 [G, N, ceil(K/32)]; "N" gives
    e4m3 [G, K, N] with float32 [G, K] or [G, ceil(K/128), ceil(N/128)], or E8M0 [G, K, ceil(N/32)].
    """
    _check_input("B", B, 3)
    if axis not in ("K", "N"):
        raise ValueError(f"axis is {axis!r}; give 'K' (forward operand) or 'N' (dgrad operand)")
    quantize = _quantize_squares if fmt == "fp8_blockwise" else _quantize_along_last
    data, scale = quantize(B.transpose(1, 2) if axis == "K" else B, fmt)
    return QuantizedOperand(data, scale, axis, fmt)


def quantize_tokens(x: torch.Tensor, offs: torch.Tensor, fmt: str) -> Operand:
    """Quantizes x [M, C] along the tokens of each group: the wgrad operand.

    Data e4m3 [C, Mp] with Mp = ``padded_tokens(M, G)``; scale float32 [G, C] or [C, Mp/128], or E8M0 [C, Mp/32].
    Each group begins at a multiple of TOKEN_TILE columns; every column without a token is zero.
    """
    _check_input("x", x, 2)
    (M, C), G = x.shape, offs.shape[0]
    layout = token_layout(group_ends(offs, M))
    x32 = x.new_zeros(padded_tokens(M, G), C, dtype=torch.float32)
    for start, end, column in layout:
        x32[column : column + end - start] = x[start:end]

    if fmt == "fp8_rowwise":
        data = torch.zeros(x32.shape, dtype=torch.uint8, device=x.device)
        scale = torch.empty(G, C, dtype=torch.float32, device=x.device)
        for g, (start, end, column) in enumerate(layout):
            tokens = slice(column, column + end - start)
            data[tokens], scale[g : g + 1] = _cast(x32[tokens], _amax_bits(x32[tokens], 0), fmt)
    else:
        size = SCALE_BLOCKS[_checked(fmt)]
        blocks = x32.view(-1, size, C)
        data, scale = _cast(blocks, _amax_bits(blocks, 1), fmt)
        data, scale = data.view(-1, C), _transposed(scale[:, 0])
        for start, end, column in layout:  # a poisoned block's padding is zero as well
            tokens = end - start
            data[column + tokens : column + tokens + -tokens % size] = 0
    return QuantizedOperand(data.t().contiguous().view(torch.float8_e4m3fn), scale, "tokens", fmt)


def dequantize(operand: Operand, offs: torch.Tensor | None = None) -> torch.Tensor:
    """Float32 data * scale in the layout of ``operand.data``, with one rounding.

    A "tokens" operand in ``fp8_rowwise`` has one scale per group: it needs ``offs``, int32 [G].
    """
    data, scale = operand.data.float(), operand.scale
    if operand.format == "fp8_blockwise":
        if data.ndim == 3:  # weights
            scale = scale.repeat_interleave(FP8_BLOCK, 1)[:, : data.shape[1]]
        return data * scale.repeat_interleave(FP8_BLOCK, -1)[..., : data.shape[-1]]
    if operand.format != "fp8_rowwise":
        # Two normal factors in place of one: 2^-127 is a float32 subnormal, which the process may flush.
        byte = scale.view(torch.uint8).int()
        half = (byte - 127) >> 1
        nan = byte == _E8M0_NAN
        factors = (_exp2(e).masked_fill_(nan, torch.nan).unsqueeze(-1) for e in (half, byte - 127 - half))
        blocks = _in_blocks(data, SCALE_BLOCKS[operand.format])
        for factor in factors:
            blocks = blocks * factor
        return blocks.flatten(-2)[..., : data.shape[-1]]
    if operand.axis != "tokens":
        return data * scale[..., None]
    if offs is None:
        raise ValueError("offs is None: a rowwise wgrad operand has one scale per group; give the group ends [G]")
    for g, (start, end, column) in enumerate(token_layout(group_ends(offs, data.shape[-1]))):
        data[:, column : column + end - start] *= scale[g, :, None]
    return data


# ------------------------------------------------------------------------------------------------------- scale tiles


def to_scale_tiles(scale: torch.Tensor, offs: torch.Tensor | None = None) -> torch.Tensor:
    """E8M0 scales [..., R, B] in the tiles that a block-scaled tensor core reads: [..., ceil(R/128), ceil(B/4), 512].

    A tile holds 128 rows and 4 blocks: row r, block c in byte (r % 32) * 16 + r // 32 * 4 + c, and byte 0 past the
    last ones. That is the scale factor layout of tcgen05.mma with scale_vec::1X (PTX ISA) and the 1D block scaling
    factors layout of cuBLAS. With ``offs``, int32 [G], the R rows are tokens and each group begins a tile:
    [padded_tokens(R, G)/128, ceil(B/4), 512], without the rows of no group.
    """
    byte = scale.view(torch.uint8)
    if offs is not None:
        padded = byte.new_zeros(padded_tokens(byte.shape[0], offs.shape[0]), byte.shape[1])
        for start, end, row in token_layout(group_ends(offs, byte.shape[0])):
            padded[row : row + end - start] = byte[start:end]
        byte = padded
    byte = F.pad(byte, (0, -byte.shape[-1] % SCALE_TILE_BLOCKS, 0, -byte.shape[-2] % SCALE_TILE_ROWS))
    quarters = byte.unflatten(-1, (-1, SCALE_TILE_BLOCKS)).unflatten(-3, (-1, 4, SCALE_TILE_ROWS // 4))
    return quarters.transpose(-4, -2).flatten(-3).contiguous().view(scale.dtype)


def from_scale_tiles(tiles: torch.Tensor, R: int, B: int, offs: torch.Tensor | None = None) -> torch.Tensor:
    """E8M0 [..., R, B] of `to_scale_tiles` with the same ``offs``; byte 0 for rows of no group."""
    quarters = tiles.view(torch.uint8).unflatten(-1, (SCALE_TILE_ROWS // 4, 4, SCALE_TILE_BLOCKS)).transpose(-4, -2)
    byte = quarters.flatten(-2).flatten(-4, -2)
    if offs is not None:
        padded, byte = byte, byte.new_zeros(R, byte.shape[-1])
        for start, end, row in token_layout(group_ends(offs, R)):
            byte[start:end] = padded[row : row + end - start]
    return byte[..., :R, :B].contiguous().view(tiles.dtype)


# ----------------------------------------------------------------------------------------------------- grouped GEMMs


def outside_autocast(gemm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`gemm`, whose float32 products autocast would round."""

    @functools.wraps(gemm)
    def outside(a: Any, *args: Any, **options: Any) -> torch.Tensor:
        kind = (a if isinstance(a, torch.Tensor) else a.data).device.type
        if not is_autocast_enabled(kind):
            return gemm(a, *args, **options)
        with torch.autocast(kind, enabled=False):
            return gemm(a, *args, **options)

    return outside


def is_autocast_enabled(device_type: str) -> bool:
    """``torch.is_autocast_enabled``, of any type of device (it refuses "meta")."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


@outside_autocast
def grouped_mm(
    a: Operand,
    b: Operand,
    offs: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[M, P] = a_g @ b_g^T for the rows of each group; rows past the last group are zero.

    ``a`` from `quantize_rows` [M, C], ``b`` from `quantize_weights` [G, P, C]. Float32 products and sums of the
    elements (rowwise: then the epilogue (acc * scale_a) * scale_b) or of the dequantized values (block scales), one
    rounding to ``out_dtype``.
    """
    M, P = a.data.shape[0], b.data.shape[1]
    ends = group_ends(offs, M)
    out = torch.empty(M, P, dtype=out_dtype, device=a.data.device) if out is None else out
    rowwise = a.format == "fp8_rowwise"
    a32, b32 = (x.data.float() if rowwise else dequantize(x) for x in (a, b))
    start = 0
    for g, end in enumerate(ends):
        if end > start:
            acc = a32[start:end] @ b32[g].t()
            if rowwise:
                acc = acc.mul_(a.scale[start:end, None]).mul_(b.scale[g])
            out[start:end] = acc
        start = end
    out[start:] = 0
    return out


@outside_autocast
def grouped_mm_tokens(
    a: Operand,
    b: Operand,
    offs: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[G, P, Q] = a_g @ b_g^T over the tokens of each group; an empty group gives exact zeros.

    ``a`` [P, Mp] and ``b`` [Q, Mp] from `quantize_tokens` with the same ``offs``. ``out`` may have any strides.
    """
    (P, Mp), Q, G = a.data.shape, b.data.shape[0], offs.shape[0]
    out = torch.empty(G, P, Q, dtype=out_dtype, device=a.data.device) if out is None else out
    rowwise = a.format == "fp8_rowwise"
    a32, b32 = (x.data.float() if rowwise else dequantize(x) for x in (a, b))
    for g, (start, end, column) in enumerate(token_layout(group_ends(offs, Mp))):
        if end == start:
            out[g] = 0
            continue
        columns = slice(column, column + end - start)
        acc = a32[:, columns] @ b32[:, columns].t()
        if rowwise:
            acc = acc.mul_(a.scale[g, :, None]).mul_(b.scale[g])
        out[g] = acc
    return out


@outside_autocast
def grouped_mm_bf16(
    A: torch.Tensor,
    B: torch.Tensor,
    offs: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[M, N] = A_g @ B_g without scales: A [M, K] and B [G, K, N] rounded to bfloat16, float32 sums."""
    M, N = A.shape[0], B.shape[2]
    out = torch.empty(M, N, dtype=out_dtype, device=A.device) if out is None else out
    A32, B32 = A.bfloat16().float(), B.bfloat16().float()
    start = 0
    for g, end in enumerate(group_ends(offs, M)):
        if end > start:
            out[start:end] = A32[start:end] @ B32[g]
        start = end
    out[start:] = 0
    return out


@outside_autocast
def grouped_mm_tokens_bf16(
    A: torch.Tensor,
    dOut: torch.Tensor,
    offs: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[G, K, N] = A_g^T @ dOut_g without scales: A [M, K] and dOut [M, N] rounded to bfloat16, float32 sums."""
    (M, K), N, G = A.shape, dOut.shape[1], offs.shape[0]
    out = torch.empty(G, K, N, dtype=out_dtype, device=A.device) if out is None else out
    A32, dOut32 = A.bfloat16().float(), dOut.bfloat16().float()
    start = 0
    for g, end in enumerate(group_ends(offs, M)):
        out[g] = A32[start:end].t() @ dOut32[start:end] if end > start else 0
        start = end
    return out


# ------------------------------------------------------------------------------------------------------------- SwiGLU


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """h [M, H] = silu(g) u of gate_up [M, 2H] = [g | u]: float32, rounded once to the dtype of gate_up."""
    g, u = gate_up.float().chunk(2, 1)
    return (g / (1 + torch.exp(-g)) * u).to(gate_up.dtype)


def swiglu_gradient(dh: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """[dg | du] [M, 2H] of dh [M, H], each rounded once to the dtype of gate_up."""
    g, u = gate_up.float().chunk(2, 1)
    s = 1 / (1 + torch.exp(-g))
    dg, du = dh.float() * u * (s * (1 + g * (1 - s))), dh.float() * (g * s)
    return torch.cat([dg, du], 1).to(gate_up.dtype)


# -------------------------------------------------------------------------------------------------------- permutation


def invert(order: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, place), int32 [M], of an ``order`` [M] of M = T*k slots: the token of each row, the row of each slot
    (0 of a slot that is not in ``order``)."""
    M = order.shape[0]
    slots = order.long().clamp(0, max(M - 1, 0))
    rows = torch.arange(M, dtype=torch.int32, device=order.device)
    return (slots // k).int(), torch.zeros_like(rows).scatter_(0, slots, rows)


def gather(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """x[tokens] [M, D] of x [T, D]."""
    return x[_rows(tokens, x.shape[0])]


def scatter(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """[M, D] with x[t], of x [T, D], in the rows place[t*k : (t+1)*k]; zeros in a row that is nobody's place."""
    (T, D), M = x.shape, place.shape[0]
    return x.new_zeros(M, D).index_copy_(0, _rows(place, M), x.repeat_interleave(M // max(T, 1), 0))


def gather_sum(x: torch.Tensor, place: torch.Tensor, k: int) -> torch.Tensor:
    """[T, D] of x [M, D]: the float32 sum of the rows place[t*k : (t+1)*k], one after the other, rounded once."""
    M, D = x.shape
    return _sum_slots(x[_rows(place, M)].float().view(M // k, k, D)).to(x.dtype)


def combine(
    x: torch.Tensor, scores: torch.Tensor, place: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """[T, D] of x [M, D] and float32 scores [T, k]: as `gather_sum`, each row times its score, in ``dtype``."""
    rows = x[_rows(place, x.shape[0])].float().view(*scores.shape, x.shape[1])
    return _sum_slots(rows * scores.unsqueeze(-1)).to(dtype or x.dtype)


def combine_backward(
    dout: torch.Tensor,
    x: torch.Tensor | None,
    scores: torch.Tensor,
    place: torch.Tensor,
    dx_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx [M, D] in ``dx_dtype``, dscores float32 [T, k]) of dout [T, D]; None without ``dx_dtype``, and without x.

    Zeros in a row of dx that is nobody's place.
    """
    rows, each = _rows(place, place.shape[0]), dout.float().unsqueeze(1)
    dx = dscores = None
    if dx_dtype is not None:
        slots = (each * scores.unsqueeze(-1)).flatten(0, 1).to(dx_dtype)
        dx = torch.zeros_like(slots).index_copy_(0, rows, slots)
    if x is not None:
        dscores = (each * x[rows].float().view(*scores.shape, x.shape[1])).sum(-1)
    return dx, dscores


def _rows(index: torch.Tensor, count: int) -> torch.Tensor:
    return index.long().clamp(0, max(count - 1, 0))


def _sum_slots(rows: torch.Tensor) -> torch.Tensor:
    """The sum over the second axis of [T, k, D], in order."""
    total = torch.zeros_like(rows[:, 0])
    for row in rows.unbind(1):
        total = total + row
    return total


# --------------------------------------------------------------------------------------------------------- internals


def _check_input(name: str, x: torch.Tensor, ndim: int) -> None:
    if x.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; give a tensor with {ndim} dimensions")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{name} is {x.dtype}; give bfloat16, float16 or float32")


def _checked(fmt: str) -> str:
    if fmt not in FORMATS:
        raise ValueError(f"fmt is {fmt!r}; give one of {', '.join(FORMATS)}")
    return fmt


def _in_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[..., C] as [..., ceil(C/size), size], zero-padded."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def _transposed(scale: torch.Tensor) -> torch.Tensor:
    """[T, C] as contiguous [C, T]; through bytes where E8M0, which few operators take."""
    if scale.dtype == torch.float32:
        return scale.t().contiguous()
    return scale.view(torch.uint8).t().contiguous().view(scale.dtype)


def _quantize_along_last(x: torch.Tensor, fmt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Data e4m3 like x [..., C]; scale float32 [...] or [..., ceil(C/128)], or E8M0 [..., ceil(C/32)]."""
    x32 = x.float().contiguous()
    if fmt == "fp8_rowwise":
        data, scale = _cast(x32, _amax_bits(x32, -1), fmt)
        return data.view(torch.float8_e4m3fn), scale.squeeze(-1)
    blocks = _in_blocks(x32, SCALE_BLOCKS[_checked(fmt)])
    data, scale = _cast(blocks, _amax_bits(blocks, -1), fmt)
    data = data.flatten(-2)[..., : x.shape[-1]].contiguous()
    return data.view(torch.float8_e4m3fn), scale.squeeze(-1)


def _quantize_squares(x: torch.Tensor, fmt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Data e4m3 like x [G, P, C]; scale float32 [G, ceil(P/128), ceil(C/128)]."""
    _, P, C = x.shape
    x32 = F.pad(x.float(), (0, -C % FP8_BLOCK, 0, -P % FP8_BLOCK)).contiguous()
    squares = x32.unflatten(2, (-1, FP8_BLOCK)).unflatten(1, (-1, FP8_BLOCK))  # [G, P/128, 128, C/128, 128]
    amax = _amax_bits(_amax_bits(squares, 4).view(torch.float32), 2)
    data, scale = _cast(squares, amax, fmt)
    data = data.view(x32.shape)[:, :P, :C].contiguous()
    return data.view(torch.float8_e4m3fn), scale[:, :, 0, :, 0]


def _amax_bits(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The float32 bits (int32) of the largest absolute value along ``dim``, kept as an axis of 1; 0 along an empty one.

    As integers, so that NaN is the largest of all and no subnormal is flushed.
    """
    bits = x.view(torch.int32) & 0x7FFFFFFF
    return bits.amax(dim, keepdim=True) if x.shape[dim] else bits.sum(dim, keepdim=True, dtype=torch.int32)


def _cast(x: torch.Tensor, amax: torch.Tensor, fmt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(data, scale)``: e4m3 bytes (uint8, like float32 x), and the scale in ``amax``'s shape, float32 or E8M0.

    ``amax`` are float32 bits (int32) that broadcast over x. The exponent of the scale is read off them:
    floor(log2 amax) - 8, plus one (not under FLOOR) when amax's mantissa is beyond that of 448 = 1.75 * 2^8.
    """
    fp8 = fmt in ("fp8_rowwise", "fp8_blockwise")
    if fp8:
        amax = amax.clamp(min=_MIN_AMAX_BITS)
    byte = (amax >> 23) - 8
    if fmt != "mxfp8_floor":
        byte += (amax & 0x7FFFFF) > 0x600000
    byte.clamp_(min=0)
    poisoned = amax >= _INF_BITS

    scaled = x * _exp2(127 - byte)
    if not fp8 and bool(((amax > 0) & (byte < 12)).any()):
        # Only below such a scale does a float32 subnormal reach e4m3's least value, 2^-9 (an FP8 scale is at least
        # 2^-48). Take it as the integer it is, times 2^-149: the process may flush subnormal operands.
        bits = x.view(torch.int32)
        magnitude = bits & 0x7FFFFFFF
        lifted = magnitude.float() * _exp2(127 - 149 - byte)
        scaled = torch.where(magnitude < 0x800000, torch.where(bits < 0, -lifted, lifted), scaled)
    data = scaled.clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    data.masked_fill_(poisoned, _E4M3_NAN)

    if fp8:
        return data, _exp2(byte - 127).masked_fill_(poisoned, torch.nan)
    return data, byte.masked_fill_(poisoned, _E8M0_NAN).to(torch.uint8).view(torch.float8_e8m0fnu)


def _exp2(exponent: torch.Tensor) -> torch.Tensor:
    """Float32 2^exponent by its bits; exponents (int32) are clamped to those of normal numbers."""
    return ((exponent + 127).clamp_(1, 254) << 23).view(torch.float32)
