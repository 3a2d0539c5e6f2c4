"""The NumPy oracle: what every implementation must compute, written to be checked by eye rather than to be fast.

M = tokens, K = contraction of the forward GEMM, N = output features, G = groups, C = any row length, R = any row count,
Mp = ``padded_tokens(M, G)``. The rules are those of ``docs/design.md``, Numerics and Operand layouts.

Quantizers give the bytes that the other implementations reproduce bit for bit. GEMMs are float64 on the dequantized
operands, without the last rounding to the output dtype: compare with ``sqnr``.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from xmoe.config import Element, Gemm, GroupedMMConfig, LinearConfig
from xmoe.operands import FORMATS, FP8_BLOCK, SCALE_BLOCKS, TOKEN_TILE, QuantizedOperand, padded_tokens

Array = NDArray[np.generic]
Operand = QuantizedOperand[Array]
Float64 = NDArray[np.float64]

_INF_BITS = 0x7F800000
_NAN_BITS = 0x7FC00000
_MIN_FP8_AMAX_BITS = int(np.float32(1e-12).view(np.int32))
_MANTISSA_OF_LARGEST = 0x600000
"""448 = 1.75 * 2^8: a mantissa beyond this makes amax/448 exceed a power of two. And 57344 = 1.75 * 2^15."""
_FP8_NAN = 0x7F
"""In e4m3 as in e5m2."""
_E8M0_NAN, _E8M0_MAX_FINITE = 0xFF, 0xFE


class _Fp8(NamedTuple):
    """8-bit elements; the largest of either kind is 1.75 times a power of two."""

    dtype: type
    largest: float
    exponent: int
    """Of the largest."""


_ELEMENTS = {
    "e4m3": _Fp8(ml_dtypes.float8_e4m3fn, 448.0, 8),
    "e5m2": _Fp8(ml_dtypes.float8_e5m2, 57344.0, 15),
}


class TokenGroup(NamedTuple):
    """Where one group's tokens are: rows ``start:end`` of A, columns from ``column`` on in a wgrad operand."""

    start: int
    end: int
    column: int

    @property
    def columns(self) -> slice:
        """The columns that hold tokens; padding follows up to the next multiple of TOKEN_TILE."""
        return slice(self.column, self.column + self.end - self.start)


def token_layout(offs: ArrayLike, M: int) -> list[TokenGroup]:
    """Rows and columns of every group. ``offs`` int [G] may hold anything: ends = running max of clip(offs, 0, M)."""
    groups: list[TokenGroup] = []
    start = column = 0
    for end in np.maximum.accumulate(np.clip(np.asarray(offs, np.int64), 0, M)).tolist():
        groups.append(TokenGroup(start, end, column))
        column += -(-(end - start) // TOKEN_TILE) * TOKEN_TILE
        start = end
    return groups


# --- Quantizers -------------------------------------------------------------------------------------------------------


def quantize_rows(x: Array, fmt: str, *, axis: str = "K") -> Operand:
    """Quantizes x [R, C] along C: e4m3 [R, C]; scale float32 [R] or [R, ceil(C/128)], or E8M0 [R, ceil(C/32)].

    x is bfloat16, float16 or float32; ``axis`` is the name C goes by. Raises ValueError on another shape, dtype or fmt.
    """
    data, scale = _quantize_last_axis(_float32("x", x, 2), fmt)
    return _operand(data, scale, axis, fmt)


def quantize_weights(B: Array, axis: str, fmt: str) -> Operand:
    """Quantizes B [G, K, N] along ``axis``, which becomes the last one of the data.

    "K" (fwd): e4m3 [G, N, K]; scale float32 [G, N] or [G, ceil(N/128), ceil(K/128)], or E8M0 [G, N, ceil(K/32)].
    "N" (dgrad): e4m3 [G, K, N]; scale float32 [G, K] or [G, ceil(K/128), ceil(N/128)], or E8M0 [G, K, ceil(N/32)].
    """
    if axis not in ("K", "N"):
        raise ValueError(f"axis={axis!r} is not an axis of B's contractions; use 'K' (fwd) or 'N' (dgrad)")
    x = _float32("B", B, 3)
    quantize = _quantize_squares if fmt == "fp8_blockwise" else _quantize_last_axis
    data, scale = quantize(x.swapaxes(1, 2) if axis == "K" else x, fmt)
    return _operand(data, scale, axis, fmt)


def quantize_tokens(x: Array, offs: ArrayLike, fmt: str) -> Operand:
    """Quantizes x [M, C] along the tokens of each group (wgrad): e4m3 [C, Mp]; scale float32 [G, C] or [C, Mp/128], or
    E8M0 [C, Mp/32].

    Columns without a token are zero, also beside a poisoned token. A block, or a rowwise group, without one has the
    scale of zeros.
    """
    x = _float32("x", x, 2)
    (M, C), groups = x.shape, token_layout(offs, x.shape[0])
    zeros = np.zeros((C, padded_tokens(M, len(groups))), np.float32)
    data, scale = _quantize_last_axis(zeros, fmt)
    if fmt == "fp8_rowwise":
        scale = np.empty((len(groups), C), np.float32)
    for g, group in enumerate(groups):
        data[:, group.columns], group_scale = _quantize_last_axis(x[group.start : group.end].T, fmt)
        if fmt == "fp8_rowwise":
            scale[g] = group_scale
        else:
            first = group.column // SCALE_BLOCKS[fmt]
            scale[:, first : first + group_scale.shape[1]] = group_scale
    return _operand(data, scale, "tokens", fmt)


def quantize_tensor(x: Array, element: Element | str = "e4m3", *, axis: str = "K") -> Operand:
    """Quantizes x [R, C] with one scale: e4m3 or e5m2 [R, C]; scale float32 []. ``axis`` is the name C goes by."""
    x = _float32("x", x, 2)
    data, scale = _quantize_blocks(x.reshape(1, -1), "fp8_tensorwise", element)
    data = data.reshape(x.shape).view(_ELEMENTS[element].dtype)
    return QuantizedOperand(data, scale[0], axis, "fp8_tensorwise")


def dequantize(operand: Operand, offs: ArrayLike | None = None) -> Float64:
    """data * scale in the layout of ``operand.data``, exact in float64 (float32 may overflow to Inf: see the design).

    A rowwise "tokens" operand has a scale per group and needs ``offs`` [G]; its padding is zero.
    """
    data = operand.data.astype(np.float64)
    if operand.format == "fp8_tensorwise":
        return data * np.float64(operand.scale)
    if operand.format != "fp8_rowwise":
        scale = operand.scale.astype(np.float64)
        if operand.format != "fp8_blockwise":
            byte = operand.scale.view(np.uint8).astype(np.int32)
            scale = np.where(byte == _E8M0_NAN, np.nan, np.ldexp(1.0, byte - 127))
        elif data.ndim == 3:  # weights
            scale = np.repeat(scale, FP8_BLOCK, axis=1)[:, : data.shape[1]]
        return data * np.repeat(scale, SCALE_BLOCKS[operand.format], axis=-1)[..., : data.shape[-1]]
    if operand.axis != "tokens":
        return data * operand.scale[..., None].astype(np.float64)
    if offs is None:
        raise ValueError("offs=None: a rowwise tokens operand has one scale per group; give the group ends, int [G]")
    for g, group in enumerate(_operand_groups(offs, data)):
        data[:, group.columns] *= operand.scale[g, :, None].astype(np.float64)
    return data


def tokens_to_rows(x: Array, offs: ArrayLike, M: int) -> Array:
    """Undoes the wgrad layout: x [C, Mp] -> [M, C]; rows past the last group are zero."""
    rows = np.zeros((M, x.shape[0]), x.dtype)
    for group in token_layout(offs, M):
        rows[group.start : group.end] = x[:, group.columns].T
    return rows


# --- GEMMs ------------------------------------------------------------------------------------------------------------


def grouped_mm(a: Operand, b: Operand, offs: ArrayLike) -> Float64:
    """a rows [M, C], b weights [G, P, C] -> [M, P] = a_g @ b_g^T; rows past the last group are zero."""
    return _rows_by_weights(dequantize(a), dequantize(b), offs)


def grouped_mm_tokens(a: Operand, b: Operand, offs: ArrayLike) -> Float64:
    """a tokens [P, Mp], b tokens [Q, Mp] -> [G, P, Q] = a_g @ b_g^T; an empty group gives exact zeros."""
    a64, b64 = dequantize(a, offs), dequantize(b, offs)
    groups = _operand_groups(offs, a64)
    return _stack([a64[:, g.columns] @ b64[:, g.columns].T for g in groups], (a64.shape[0], b64.shape[0]))


def forward(A: Array, B: Array, offs: ArrayLike, config: GroupedMMConfig) -> Float64:
    """out [M, N] = A_g @ B_g in the config's format. A [M, K], B [G, K, N]."""
    if config.format == "bf16":
        return _rows_by_weights(_bf16("A", A, 2), _bf16("B", B, 3).swapaxes(1, 2), offs)
    return grouped_mm(quantize_rows(A, config.format), quantize_weights(B, "K", config.format), offs)


def dgrad(dOut: Array, B: Array, offs: ArrayLike, config: GroupedMMConfig) -> Float64:
    """dA [M, K] = dOut_g @ B_g^T in the config's format. dOut [M, N], B [G, K, N]."""
    if config.format == "bf16":
        return _rows_by_weights(_bf16("dOut", dOut, 2), _bf16("B", B, 3), offs)
    return grouped_mm(quantize_rows(dOut, config.format, axis="N"), quantize_weights(B, "N", config.format), offs)


def wgrad(A: Array, dOut: Array, offs: ArrayLike, config: GroupedMMConfig) -> Float64:
    """dB [G, K, N] = A_g^T @ dOut_g in the config's format, or in bf16 (``wgrad_with_hp``). A [M, K], dOut [M, N]."""
    if config.format == "bf16" or config.wgrad_with_hp:
        a, d = _bf16("A", A, 2), _bf16("dOut", dOut, 2)
        groups = token_layout(offs, a.shape[0])
        return _stack([a[g.start : g.end].T @ d[g.start : g.end] for g in groups], (a.shape[1], d.shape[1]))
    a, d = (quantize_tokens(x, offs, config.format) for x in (A, dOut))
    return grouped_mm_tokens(a, d, offs)


def linear(x: Array, weight: Array, config: LinearConfig) -> Float64:
    """out [M, N] = x @ weight^T in the config's format. x [M, K], weight [N, K]."""
    grouped = config.grouped(Gemm.OUTPUT)
    if grouped is None:
        return dequantize(quantize_tensor(x)) @ dequantize(quantize_tensor(weight)).T
    return forward(x, weight.T[None], [x.shape[0]], grouped)


def linear_dgrad(dOut: Array, weight: Array, config: LinearConfig) -> Float64:
    """dx [M, K] = dOut @ weight in the config's format. dOut [M, N], weight [N, K]."""
    grouped = config.grouped(Gemm.GRAD_INPUT)
    if grouped is None:
        return dequantize(_quantize_gradient(dOut, config)) @ dequantize(quantize_tensor(weight))
    return dgrad(dOut, weight.T[None], [dOut.shape[0]], grouped)


def linear_wgrad(x: Array, dOut: Array, config: LinearConfig) -> Float64:
    """dweight [N, K] = dOut^T @ x in the config's format, or in bf16 (``wgrad_with_hp``). x [M, K], dOut [M, N]."""
    grouped = config.grouped(Gemm.GRAD_WEIGHT)
    if grouped is None:
        return dequantize(_quantize_gradient(dOut, config)).T @ dequantize(quantize_tensor(x))
    return wgrad(x, dOut, [x.shape[0]], grouped)[0].T


def _quantize_gradient(dOut: Array, config: LinearConfig) -> Operand:
    return quantize_tensor(dOut, getattr(config, "grad_dtype", Element.E4M3), axis="N")


# --- Measures ---------------------------------------------------------------------------------------------------------


def sqnr(reference: ArrayLike, x: ArrayLike) -> float:
    """Signal to quantization noise in dB: 10 log10(sum reference^2 / sum (reference - x)^2).

    +inf where the two are equal (also when empty), NaN where either has a NaN: every ``sqnr(...) >= bound`` fails then.
    """
    reference, x = np.asarray(reference, np.float64), np.asarray(x, np.float64)
    if reference.shape != x.shape:
        raise ValueError(f"x has shape {x.shape} and reference {reference.shape}; give arrays of one shape")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        noise = np.sum(np.square(reference - x))
        return float("inf") if noise == 0 else float(10 * np.log10(np.sum(np.square(reference)) / noise))


def sqnr_per_group(reference: ArrayLike, x: ArrayLike, offs: ArrayLike | None = None) -> list[float]:
    """``sqnr`` of every group: of its rows where ``offs`` [G] says which they are, else of ``reference[g]``.

    A whole-tensor figure misses a dead small expert; this one doesn't.
    """
    reference, x = np.asarray(reference), np.asarray(x)
    if offs is None:
        return [sqnr(r, y) for r, y in zip(reference, x, strict=True)]
    rows = [slice(group.start, group.end) for group in token_layout(offs, reference.shape[0])]
    return [sqnr(reference[r], x[r]) for r in rows]


# --- Internals --------------------------------------------------------------------------------------------------------


def _checked(fmt: str) -> str:
    if fmt not in FORMATS:
        raise ValueError(f"fmt={fmt!r} is not a quantized format; use one of {', '.join(FORMATS)}")
    return fmt


def _float32(name: str, x: Array, ndim: int) -> NDArray[np.float32]:
    if x.ndim != ndim:
        raise ValueError(f"{name} has shape {x.shape}; give an array of {ndim} dimensions")
    if x.dtype not in (ml_dtypes.bfloat16, np.float16, np.float32):
        raise ValueError(f"{name} has dtype {x.dtype}; give bfloat16, float16 or float32")
    return x.astype(np.float32)


def _bf16(name: str, x: Array, ndim: int) -> Float64:
    return _float32(name, x, ndim).astype(ml_dtypes.bfloat16).astype(np.float64)


def _operand(data: Array, scale: Array, axis: str, fmt: str) -> Operand:
    scale = scale.view(ml_dtypes.float8_e8m0fnu) if scale.dtype == np.uint8 else scale
    return QuantizedOperand(np.ascontiguousarray(data).view(ml_dtypes.float8_e4m3fn), scale, axis, fmt)


def _quantize_last_axis(x: NDArray[np.float32], fmt: str) -> tuple[NDArray[np.uint8], Array]:
    """x [..., C] -> e4m3 bytes [..., C] and scales: float32 [...] or [..., ceil(C/128)], or E8M0 [..., ceil(C/32)]."""
    if _checked(fmt) == "fp8_rowwise":
        return _quantize_blocks(x, fmt)
    *lead, C = x.shape
    size = SCALE_BLOCKS[fmt]
    count = -(-C // size)
    padding = [(0, 0)] * len(lead) + [(0, count * size - C)]
    data, scale = _quantize_blocks(np.pad(x, padding).reshape(*lead, count, size), fmt)
    return data.reshape(*lead, count * size)[..., :C], scale


def _quantize_squares(x: NDArray[np.float32], fmt: str) -> tuple[NDArray[np.uint8], Array]:
    """x [G, P, C] -> e4m3 bytes [G, P, C] and float32 scales [G, ceil(P/128), ceil(C/128)]."""
    G, P, C = x.shape
    rows, cols = -(-P // FP8_BLOCK), -(-C // FP8_BLOCK)
    x = np.pad(x, [(0, 0), (0, rows * FP8_BLOCK - P), (0, cols * FP8_BLOCK - C)])
    squares = x.reshape(G, rows, FP8_BLOCK, cols, FP8_BLOCK).swapaxes(2, 3)
    data, scale = _quantize_blocks(squares.reshape(G, rows, cols, FP8_BLOCK * FP8_BLOCK), fmt)
    return data.reshape(squares.shape).swapaxes(2, 3).reshape(x.shape)[:, :P, :C], scale


def _quantize_blocks(
    x: NDArray[np.float32], fmt: str, element: Element | str = "e4m3"
) -> tuple[NDArray[np.uint8], Array]:
    """x [..., B], one block in each row -> fp8 bytes [..., B] and scales [...], float32 or E8M0 bytes."""
    fp8 = _ELEMENTS[element]
    amax = _amax_bits(x)
    poisoned = amax >= _INF_BITS
    if fmt.startswith("mxfp8"):
        byte = np.clip(_exponent(amax, fp8, ceil=fmt == "mxfp8_rceil") + 127, 0, _E8M0_MAX_FINITE)
        return _cast(x, byte - 127, poisoned, fp8), np.where(poisoned, _E8M0_NAN, byte).astype(np.uint8)
    exponent = _exponent(np.maximum(amax, _MIN_FP8_AMAX_BITS), fp8, ceil=True)
    scale_bits = np.where(poisoned, _NAN_BITS, (exponent + 127) << 23).astype(np.int32)
    return _cast(x, exponent, poisoned, fp8), scale_bits.view(np.float32)


def _amax_bits(x: NDArray[np.float32]) -> NDArray[np.int32]:
    """The bits of max |x| over the last axis. As integers they order like the values, with Inf and NaN on top."""
    bits = np.ascontiguousarray(x).view(np.int32) & 0x7FFFFFFF
    return bits.max(-1, initial=0)


def _exponent(amax_bits: NDArray[np.int32], fp8: _Fp8, *, ceil: bool) -> NDArray[np.int32]:
    """floor(log2 amax) - 8, or ceil(log2(amax/448)), from the bits of a normal float32 amax; of e5m2 15 and 57344.

    For zero and subnormals it comes out below every E8M0 exponent; for Inf and NaN it means nothing.
    """
    exponent = (amax_bits >> 23) - 127 - fp8.exponent
    return exponent + ((amax_bits & 0x7FFFFF) > _MANTISSA_OF_LARGEST) if ceil else exponent


def _cast(
    x: NDArray[np.float32], exponent: NDArray[np.int32], poisoned: NDArray[np.bool_], fp8: _Fp8
) -> NDArray[np.uint8]:
    """The fp8 bytes of x * 2^-exponent, saturating, to nearest even; NaN where poisoned. One exponent per block."""
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.ldexp(x.astype(np.float64), -exponent[..., None])
        data = np.clip(scaled, -fp8.largest, fp8.largest).astype(fp8.dtype)
    return np.where(poisoned[..., None], np.uint8(_FP8_NAN), data.view(np.uint8))


def _operand_groups(offs: ArrayLike, data: Array) -> list[TokenGroup]:
    """The groups of a wgrad operand [C, Mp]. M is not known here; Mp in its place only adds zero columns to groups."""
    return token_layout(offs, data.shape[1])


def _rows_by_weights(a: Float64, b: Float64, offs: ArrayLike) -> Float64:
    """a [M, C], b [G, P, C] -> [M, P]."""
    out = np.zeros((a.shape[0], b.shape[1]))
    with np.errstate(invalid="ignore"):
        for g, group in enumerate(token_layout(offs, a.shape[0])):
            out[group.start : group.end] = a[group.start : group.end] @ b[g].T
    return out


def _stack(products: list[Float64], shape: tuple[int, int]) -> Float64:
    return np.stack(products) if products else np.zeros((0, *shape))
