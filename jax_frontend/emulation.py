"""The pure-JAX path: every quantizer and grouped GEMM in plain jax.numpy, on any backend, under any transformation.

M = tokens, K = contraction of the forward GEMM, N = output features, G = groups, C = any row length, R = any row count,
T = tiles of TOKEN_TILE tokens.

Formats, scale rules and operand layouts are those of ``docs/design.md``; the bytes are those of the NumPy oracle.
Rounding and scale exponents are done on float32 bits, in integers: XLA's CPU backend flushes subnormals, and its casts
to e4m3 do not saturate. Everything is traceable: the offsets stay on the device, every shape is static.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xmoe.config import GroupedMMConfig
from xmoe.jax_frontend.varying import vary_over, varying_axes
from xmoe.operands import FORMATS, FP8_BLOCK, SCALE_BLOCKS, TOKEN_TILE, QuantizedOperand, padded_tokens

Operand = QuantizedOperand[jax.Array]

jax.tree_util.register_dataclass(QuantizedOperand, data_fields=["data", "scale"], meta_fields=["axis", "format"])

_ABS, _INF, _MANTISSA = 0x7FFFFFFF, 0x7F800000, 0x7FFFFF
_MIN_AMAX_BITS = 0x2B8CBCCC
"""The bits of float32(1e-12), the least amax that gives an FP8 scale."""
_E4M3_MAX, _E4M3_NAN = 0x7E, 0x7F
_E8M0_NAN = 0xFF


# ---------------------------------------------------------------------------------------------------------- quantizers


def quantize_rows(x: jax.Array, fmt: str, *, axis: str = "K") -> Operand:
    """Quantizes x [R, C] along C: data e4m3 [R, C]; scale float32 [R] or [R, ceil(C/128)], or E8M0 [R, ceil(C/32)]."""
    _check_input("x", x, 2, fmt)
    return _quantize_along_last(x, fmt, axis)


def quantize_weights(B: jax.Array, axis: str, fmt: str) -> Operand:
    """Quantizes B [G, K, N] along ``axis``, which becomes the last axis of the data.

    "K" gives e4m3 [G, N, K] with float32 [G, N] or [G, ceil(N/128), ceil(K/128)], or E8M0 [G, N, ceil(K/32)]; "N" gives
    e4m3 [G, K, N] with float32 [G, K] or [G, ceil(K/128), ceil(N/128)], or E8M0 [G, K, ceil(N/32)].
    """
    _check_input("B", B, 3, fmt)
    if axis not in ("K", "N"):
        raise ValueError(f"axis={axis!r} is not known; use 'K' (forward operand) or 'N' (dgrad operand)")
    quantize = _quantize_squares if fmt == "fp8_blockwise" else _quantize_along_last
    return quantize(B.swapaxes(1, 2) if axis == "K" else B, fmt, axis)


def quantize_tokens(x: jax.Array, offs: jax.Array, fmt: str) -> Operand:
    """Quantizes x [M, C] along the tokens of each group: the wgrad operand.

    Data e4m3 [C, Mp] with Mp = ``padded_tokens(M, G)``; scale float32 [G, C] or [C, Mp/128], or E8M0 [C, Mp/32].
    Each group begins at a multiple of TOKEN_TILE columns; every column without a token is zero.
    """
    _check_input("x", x, 2, fmt)
    (M, C), G = x.shape, offs.shape[0]
    tiles = _Tiles(offs, M)
    rows = tiles.rows()  # [T, TOKEN_TILE], M where there is no token
    x = jnp.take(x, rows, axis=0, mode="fill", fill_value=0) if M else jnp.zeros((*rows.shape, C), x.dtype)
    bits = _float32_bits(x)
    if fmt == "fp8_rowwise":
        tile_amax = (bits & _ABS).max(axis=1)
        amax = jax.ops.segment_max(tile_amax, tiles.group, num_segments=G, indices_are_sorted=True)
        byte, poisoned = _scale_byte(amax, fmt)
        data = _cast(bits, byte[tiles.group, None], poisoned[tiles.group, None])
        scale = _scale(byte, poisoned, fmt)
    else:
        bits = bits.reshape(-1, SCALE_BLOCKS[fmt], C)
        byte, poisoned = _scale_byte((bits & _ABS).max(axis=1, keepdims=True), fmt)
        data = _cast(bits, byte, poisoned)
        scale = _scale(byte, poisoned, fmt)[:, 0].T
    data = jnp.where((rows < M)[..., None], data.reshape(*rows.shape, C), 0)  # the padding of a poisoned block, too
    data = jax.lax.bitcast_convert_type(data.reshape(-1, C).T, jnp.float8_e4m3fn)
    return QuantizedOperand(data, scale, "tokens", fmt)


def dequantize(operand: Operand, offs: jax.Array | None = None) -> jax.Array:
    """Float32 data * scale in the layout of ``operand.data``, exact but for results that the backend flushes to zero.

    A "tokens" operand in ``fp8_rowwise`` has one scale per group: it needs ``offs``, int32 [G].
    """
    data, scale = operand.data.astype(jnp.float32), operand.scale
    if operand.format == "fp8_blockwise":
        if data.ndim == 3:  # weights
            scale = jnp.repeat(scale, FP8_BLOCK, axis=1)[:, : data.shape[1]]
        return data * jnp.repeat(scale, FP8_BLOCK, axis=-1)[..., : data.shape[-1]]
    if operand.format != "fp8_rowwise":
        # Two normal factors in place of one: 2^-127 is a float32 subnormal.
        exponent = jax.lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32) - 127
        half = exponent >> 1
        factors = (jnp.where(exponent == 128, jnp.nan, _exp2(e)) for e in (half, exponent - half))
        for factor in factors:
            data = data * jnp.repeat(factor, SCALE_BLOCKS[operand.format], axis=-1)[..., : data.shape[-1]]
        return data
    if operand.axis != "tokens":
        return data * scale[..., None]
    if offs is None:
        raise ValueError("offs=None: a rowwise wgrad operand has one scale per group; give the group ends, int32 [G]")
    group = jnp.repeat(_Tiles(offs, data.shape[-1]).group, TOKEN_TILE)[: data.shape[-1]]
    return data * scale[group].T


# ------------------------------------------------------------------------------------------------------- grouped GEMMs


def grouped_mm(a: Operand, b: Operand, offs: jax.Array, out_dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
    """[M, P] = a_g @ b_g^T for the rows of each group; rows past the last group are zero.

    ``a`` from `quantize_rows` [M, C], ``b`` from `quantize_weights` [G, P, C]. Float32 sums of the
    elements (rowwise: then the epilogue (acc * scale_a) * scale_b) or of the dequantized values (block scales), one
    rounding to ``out_dtype``.
    """
    weights = _elements(b)  # once, not once a tile

    def product(tile: Operand, group: jax.Array) -> jax.Array:
        acc = _dot_last(_elements(tile), weights[group])
        if b.format == "fp8_rowwise":
            acc = acc * tile.scale[:, None] * b.scale[group]
        return acc

    return _for_each_row_tile(product, a, weights, offs, out_dtype)


def grouped_mm_bf16(
    A: jax.Array, B: jax.Array, offs: jax.Array, out_dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> jax.Array:
    """[M, N] = A_g @ B_g without scales: A [M, K] and B [G, K, N] rounded to bfloat16, float32 sums."""
    weights = _round_to_bf16(B.swapaxes(1, 2))

    def product(tile: jax.Array, group: jax.Array) -> jax.Array:
        return _dot_last(_round_to_bf16(tile), weights[group])

    return _for_each_row_tile(product, A, weights, offs, out_dtype)


def grouped_mm_tokens(
    a: Operand, b: Operand, offs: jax.Array, out_dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> jax.Array:
    """[G, P, Q] = a_g @ b_g^T over the tokens of each group; an empty group gives exact zeros.

    ``a`` [P, Mp] and ``b`` [Q, Mp] from `quantize_tokens` with the same ``offs``.
    """

    def product(t: jax.Array, tiles: "_Tiles") -> jax.Array:
        return _dot_last(_elements(_column_tile(a, t)), _elements(_column_tile(b, t)))

    acc = _sum_over_token_tiles(product, _Tiles(offs, a.data.shape[1]), (a.data.shape[0], b.data.shape[0]), a, b)
    if a.format == "fp8_rowwise":
        acc = acc * a.scale[:, :, None] * b.scale[:, None, :]
    return acc.astype(out_dtype)


def grouped_mm_tokens_bf16(
    A: jax.Array, dOut: jax.Array, offs: jax.Array, out_dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> jax.Array:
    """[G, K, N] = A_g^T @ dOut_g without scales: A [M, K] and dOut [M, N] rounded to bfloat16, float32 sums."""
    A_rows, dOut_rows = _pad_rows(A), _pad_rows(dOut)

    def product(t: jax.Array, tiles: "_Tiles") -> jax.Array:
        valid = tiles.valid_rows(t)[:, None]  # on both sides: 0 * NaN is NaN
        x, y = (jnp.where(valid, _row_tile(rows, tiles.first[t]), 0) for rows in (A_rows, dOut_rows))
        return _dot_last(_round_to_bf16(x).T, _round_to_bf16(y).T)

    tiles = _Tiles(offs, A.shape[0])
    return _sum_over_token_tiles(product, tiles, (A.shape[1], dOut.shape[1]), A, dOut).astype(out_dtype)


# ------------------------------------------------------------------------------- a differentiable op's two directions

Saved = tuple[jax.Array, ...]
"""What the wgrad needs of A: ``(a_tokens, a_tokens_scale)``, or ``(A,)`` where the wgrad runs in bf16."""


def forward(
    A: jax.Array, B: jax.Array, offs: jax.Array, config: GroupedMMConfig, out_dtype: str, *, save_tokens: bool
) -> tuple[jax.Array, Saved]:
    """out [M, N] = A_g @ B_g under ``config``, and, with ``save_tokens``, what `wgrad` needs of A (else ``()``)."""
    fmt = config.format
    if fmt == "bf16":
        out = grouped_mm_bf16(A, B, offs, out_dtype)
    else:
        out = grouped_mm(quantize_rows(A, fmt), quantize_weights(B, "K", fmt), offs, out_dtype)
    return out, (wgrad_operand(A, offs, config) if save_tokens else ())


def wgrad_operand(A: jax.Array, offs: jax.Array, config: GroupedMMConfig) -> Saved:
    """What `wgrad` needs of A [M, K]."""
    if config.format == "bf16" or config.wgrad_with_hp:
        return (A,)
    tokens = quantize_tokens(A, offs, config.format)
    return tokens.data, tokens.scale


def dgrad(dOut: jax.Array, B: jax.Array, offs: jax.Array, config: GroupedMMConfig, out_dtype: str) -> jax.Array:
    """dA [M, K] = dOut_g @ B_g^T under ``config``."""
    fmt = config.format
    if fmt == "bf16":
        return grouped_mm_bf16(dOut, B.swapaxes(1, 2), offs, out_dtype)
    return grouped_mm(quantize_rows(dOut, fmt, axis="N"), quantize_weights(B, "N", fmt), offs, out_dtype)


def wgrad(saved: Saved, dOut: jax.Array, offs: jax.Array, config: GroupedMMConfig, out_dtype: str) -> jax.Array:
    """dB [G, K, N] = A_g^T @ dOut_g under ``config``, from what `forward` saved of A."""
    if len(saved) == 1:
        return grouped_mm_tokens_bf16(saved[0], dOut, offs, out_dtype)
    data, scale = saved
    a = QuantizedOperand(data, scale, "tokens", config.format)
    return grouped_mm_tokens(a, quantize_tokens(dOut, offs, config.format), offs, out_dtype)


# ------------------------------------------------------------------------------------------------------------- SwiGLU


def swiglu(gate_up: jax.Array) -> jax.Array:
    """h [M, H] = silu(g) u of gate_up [M, 2H] = [g | u]: float32, rounded once to the dtype of gate_up."""
    g, u = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    return _rounded(g / (1 + jnp.exp(-g)) * u, gate_up.dtype)


def swiglu_gradient(dh: jax.Array, gate_up: jax.Array) -> jax.Array:
    """[dg | du] [M, 2H] of dh [M, H], each rounded once to the dtype of gate_up."""
    g, u = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    dh, s = dh.astype(jnp.float32), 1 / (1 + jnp.exp(-g))
    return _rounded(jnp.concatenate([dh * u * (s * (1 + g * (1 - s))), dh * (g * s)], axis=1), gate_up.dtype)


def _rounded(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return (_round_to_bf16(x) if dtype == jnp.bfloat16 else x).astype(dtype)


# ----------------------------------------------------------------------------------------------------- scales and casts


def _check_input(name: str, x: jax.Array, ndim: int, fmt: str) -> None:
    if x.ndim != ndim:
        raise ValueError(f"{name} has shape {x.shape}; give an array with {ndim} dimensions")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"{name} is {x.dtype}; give bfloat16, float16 or float32")
    if fmt not in FORMATS:
        raise ValueError(f"fmt={fmt!r} is not known; use one of {', '.join(FORMATS)}")


def _quantize_along_last(x: jax.Array, fmt: str, axis: str) -> Operand:
    bits = _float32_bits(x)
    if fmt == "fp8_rowwise":
        byte, poisoned = _scale_byte((bits & _ABS).max(axis=-1, initial=0), fmt)
        data = _cast(bits, byte[..., None], poisoned[..., None])
    else:
        length, size = x.shape[-1], SCALE_BLOCKS[fmt]
        bits = jnp.pad(bits, [(0, 0)] * (x.ndim - 1) + [(0, -length % size)])
        blocks = bits.reshape(*bits.shape[:-1], bits.shape[-1] // size, size)
        byte, poisoned = _scale_byte((blocks & _ABS).max(axis=-1), fmt)
        data = _cast(blocks, byte[..., None], poisoned[..., None]).reshape(bits.shape)[..., :length]
    data = jax.lax.bitcast_convert_type(data, jnp.float8_e4m3fn)
    return QuantizedOperand(data, _scale(byte, poisoned, fmt), axis, fmt)


def _quantize_squares(x: jax.Array, fmt: str, axis: str) -> Operand:
    """x [G, P, C] with a scale for every block of 128 x 128: float32 [G, ceil(P/128), ceil(C/128)]."""
    G, P, C = x.shape
    bits = jnp.pad(_float32_bits(x), [(0, 0), (0, -P % FP8_BLOCK), (0, -C % FP8_BLOCK)])
    squares = bits.reshape(G, bits.shape[1] // FP8_BLOCK, FP8_BLOCK, bits.shape[2] // FP8_BLOCK, FP8_BLOCK)
    byte, poisoned = _scale_byte((squares & _ABS).max(axis=(2, 4), keepdims=True), fmt)
    data = _cast(squares, byte, poisoned).reshape(bits.shape)[:, :P, :C]
    data = jax.lax.bitcast_convert_type(data, jnp.float8_e4m3fn)
    return QuantizedOperand(data, _scale(byte, poisoned, fmt)[:, :, 0, :, 0], axis, fmt)


def _float32_bits(x: jax.Array) -> jax.Array:
    """The bits of float32(x) as int32; bfloat16 is widened by a shift, so that no subnormal is flushed."""
    if x.dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def _exp2(exponent: jax.Array) -> jax.Array:
    """Float32 2^exponent by its bits; exponents (int32) are clamped to those of normal numbers."""
    return jax.lax.bitcast_convert_type((exponent + 127).clip(1, 254) << 23, jnp.float32)


def _scale_byte(amax: jax.Array, fmt: str) -> tuple[jax.Array, jax.Array]:
    """``(byte, poisoned)`` of the float32 bits of an amax: the scale's exponent + 127, and whether it is NaN or Inf.

    The exponent is floor(log2 amax) - 8, plus one (not under FLOOR) when amax's mantissa is beyond 448's, 1.75.
    """
    poisoned = amax >= _INF
    if not fmt.startswith("mxfp8"):
        amax = jnp.maximum(amax, _MIN_AMAX_BITS)
    byte = (amax >> 23) - 8
    if fmt != "mxfp8_floor":
        byte = byte + ((amax & _MANTISSA) > 0x600000)
    return jnp.maximum(byte, 0), poisoned


def _scale(byte: jax.Array, poisoned: jax.Array, fmt: str) -> jax.Array:
    """float32 or E8M0, as the format has it."""
    if not fmt.startswith("mxfp8"):
        return jnp.where(poisoned, jnp.float32(jnp.nan), _exp2(byte - 127))
    return jax.lax.bitcast_convert_type(jnp.where(poisoned, _E8M0_NAN, byte).astype(jnp.uint8), jnp.float8_e8m0fnu)


def _cast(bits: jax.Array, byte: jax.Array, poisoned: jax.Array) -> jax.Array:
    """The e4m3 bytes (uint8) of the float32 numbers in ``bits`` divided by their scale, saturating, nearest even."""
    magnitude = bits & _ABS
    # A float32 subnormal is its integer times 2^-149; as a float operand XLA might flush it.
    scaled = jnp.where(
        magnitude <= _MANTISSA,
        magnitude.astype(jnp.float32) * _exp2(127 - 149 - byte),
        jax.lax.bitcast_convert_type(magnitude, jnp.float32) * _exp2(127 - byte),
    )
    # Below 2^-6 e4m3 counts in steps of 2^-9: so does float32 once 2^14 is added. Above, drop 20 bits of mantissa.
    steps = jax.lax.bitcast_convert_type(scaled + 2.0**14, jnp.int32) - ((127 + 14) << 23)
    wide = jax.lax.bitcast_convert_type(scaled, jnp.int32)
    rounded = ((wide + 0x7FFFF + ((wide >> 20) & 1)) >> 20) - (120 << 3)
    code = jnp.where(scaled < 2.0**-6, steps, jnp.minimum(rounded, _E4M3_MAX))
    code = jnp.where(poisoned, _E4M3_NAN, code | ((bits >> 24) & 0x80))
    return code.astype(jnp.uint8)


# --------------------------------------------------------------------------------------------------------------- tiles


class _Tiles:
    """The tiles of TOKEN_TILE tokens that cover the groups: none holds tokens of two groups, an empty group has none.

    M tokens in G groups need at most T = padded_tokens(M, G) / TOKEN_TILE of them; ``used`` (a scalar) really exist.
    """

    def __init__(self, offs: jax.Array, M: int) -> None:
        ends = jax.lax.cummax(offs.clip(0, M))
        starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
        tile_ends = jnp.cumsum(-(-(ends - starts) // TOKEN_TILE), dtype=jnp.int32)
        index = jnp.arange(padded_tokens(M, offs.shape[0]) // TOKEN_TILE, dtype=jnp.int32)
        self.M = M
        self.groups = offs.shape[0]
        self.used = tile_ends[-1]
        self.group = jnp.searchsorted(tile_ends, index, side="right").astype(jnp.int32).clip(0, self.groups - 1)
        tile_starts = jnp.concatenate([jnp.zeros_like(tile_ends[:1]), tile_ends[:-1]])
        self.first = starts[self.group] + (index - tile_starts[self.group]) * TOKEN_TILE
        """[T]: the first row of each tile."""
        self.end = jnp.where(index < self.used, ends[self.group], 0)
        """[T]: the end row of its group; 0 for a tile not in use."""

    def rows(self) -> jax.Array:
        """[T, TOKEN_TILE]: every tile's rows; M in place of rows that are not the group's."""
        rows = self.first[:, None] + jnp.arange(TOKEN_TILE, dtype=jnp.int32)
        return jnp.where(rows < self.end[:, None], rows, self.M)

    def valid_rows(self, t: jax.Array) -> jax.Array:
        """[TOKEN_TILE]: which rows of tile ``t`` are its group's."""
        return self.first[t] + jnp.arange(TOKEN_TILE, dtype=jnp.int32) < self.end[t]

    def loop(self, step: Callable[[jax.Array, jax.Array], jax.Array], out: jax.Array) -> jax.Array:
        """``out`` after ``step(t, out)`` of every tile in use. (Of no tile, as of no token in one group, not even
        traced.)"""
        return jax.lax.fori_loop(0, self.used, step, out) if self.first.size else out


def _for_each_row_tile(
    product: Callable[..., jax.Array],
    a: Operand | jax.Array,
    weights: jax.Array,
    offs: jax.Array,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """out [M, P] of ``product(tile of a's rows, group) -> float32 [TOKEN_TILE, P]``; ``weights`` is [G, P, C].

    The work is that of a dense GEMM and at most half a tile a group. (On two CPU cores this loop is 4 to 8 times as
    fast as jax.lax.ragged_dot, which multiplies every row with every group.)
    """
    M = jax.tree.leaves(a)[0].shape[0]
    tiles = _Tiles(offs, M)
    a = jax.tree.map(_pad_rows, a)

    def step(t: jax.Array, out: jax.Array) -> jax.Array:
        acc = product(jax.tree.map(lambda rows: _row_tile(rows, tiles.first[t]), a), tiles.group[t])
        # A tile's rows past its group belong to the next tile, which overwrites them, or to nobody.
        acc = jnp.where(tiles.valid_rows(t)[:, None], acc, 0).astype(out_dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, acc, tiles.first[t], 0)

    out = _zeros_varying_like((M + TOKEN_TILE, weights.shape[1]), out_dtype, a, weights, offs)
    return tiles.loop(step, out)[:M]


def _sum_over_token_tiles(
    product: Callable[..., jax.Array], tiles: _Tiles, shape: tuple[int, int], *operands: Operand | jax.Array
) -> jax.Array:
    """float32 [G, P, Q]: the sum of ``product(t, tiles)`` over the tiles of each group, zero without any."""

    def step(t: jax.Array, out: jax.Array) -> jax.Array:
        return out.at[tiles.group[t]].add(product(t, tiles))

    out = _zeros_varying_like((tiles.groups, *shape), jnp.float32, *operands, tiles.used)
    return tiles.loop(step, out)


def _pad_rows(x: jax.Array) -> jax.Array:
    """x and a tile of zero rows: enough for a tile that begins at any row."""
    as_bytes = x.dtype.itemsize == 1  # XLA's CPU backend has no pad of 8-bit floats
    padded = jax.lax.bitcast_convert_type(x, jnp.uint8) if as_bytes else x
    padded = jnp.pad(padded, [(0, TOKEN_TILE)] + [(0, 0)] * (x.ndim - 1))
    return jax.lax.bitcast_convert_type(padded, x.dtype) if as_bytes else padded


def _row_tile(x: jax.Array, first: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, TOKEN_TILE, axis=0)


def _column_tile(operand: Operand, t: jax.Array) -> Operand:
    """Tile ``t`` of a wgrad operand; a rowwise scale is per group, and left to the epilogue."""

    def cut(x: jax.Array, size: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, t * size, size, axis=-1)

    rowwise = operand.format == "fp8_rowwise"
    scale = operand.scale if rowwise else cut(operand.scale, TOKEN_TILE // SCALE_BLOCKS[operand.format])
    return QuantizedOperand(cut(operand.data, TOKEN_TILE), scale, operand.axis, operand.format)


def _elements(operand: Operand) -> jax.Array:
    """What the GEMM multiplies, as float32: bare data where the scale is the epilogue's, else dequantized."""
    return operand.data.astype(jnp.float32) if operand.format == "fp8_rowwise" else dequantize(operand)


def _round_to_bf16(x: jax.Array) -> jax.Array:
    """As float32. (Two casts would not do: XLA may take them for excess precision, and drop them.)"""
    return jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)


def _dot_last(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y^T in float32. Both hold at most 8 significant bits, so bf16 and TF32 passes multiply them exactly."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _zeros_varying_like(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *trees: Any) -> jax.Array:
    """Zeros that a loop over ``trees`` can start from: its carry has to vary over their mesh axes from the start."""
    return vary_over(varying_axes(*jax.tree.leaves(trees)), jnp.zeros(shape, dtype))
