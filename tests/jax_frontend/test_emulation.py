"""The pure-JAX quantizers and grouped GEMMs against the NumPy oracle."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.jax_frontend.values import KERNEL_TIER, KINDS, assert_same_operand, values
from xmoe import oracle, shapes
from xmoe.config import BF16GroupedMMConfig
from xmoe.jax_frontend import emulation
from xmoe.operands import FORMATS

quantize_rows = jax.jit(emulation.quantize_rows, static_argnames=("fmt", "axis"))
quantize_tokens = jax.jit(emulation.quantize_tokens, static_argnames="fmt")
quantize_weights = jax.jit(emulation.quantize_weights, static_argnames=("axis", "fmt"))
grouped_mm = jax.jit(emulation.grouped_mm, static_argnames="out_dtype")
grouped_mm_tokens = jax.jit(emulation.grouped_mm_tokens, static_argnames="out_dtype")
grouped_mm_bf16 = jax.jit(emulation.grouped_mm_bf16, static_argnames="out_dtype")
grouped_mm_tokens_bf16 = jax.jit(emulation.grouped_mm_tokens_bf16, static_argnames="out_dtype")

each_format = pytest.mark.parametrize("fmt", FORMATS)
small_shapes = pytest.mark.parametrize("shape", shapes.SMALL, ids=lambda shape: shape.name)

any_offs = st.lists(st.integers(-50, 250), min_size=4, max_size=4).map(lambda offs: np.array(offs, np.int32))
"""Group ends as a kernel may find them: out of order, negative, past the end."""


@each_format
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_weights_have_the_oracles_bytes(fmt: str, kind: str) -> None:
    x, B = values(kind, (67, 144)), values(kind, (2, 144, 272), seed=1)
    assert_same_operand(quantize_rows(jnp.asarray(x), fmt), oracle.quantize_rows(x, fmt))
    assert_same_operand(quantize_rows(jnp.asarray(x), fmt, axis="N"), oracle.quantize_rows(x, fmt, axis="N"))
    for axis in ("K", "N"):
        assert_same_operand(quantize_weights(jnp.asarray(B), axis, fmt), oracle.quantize_weights(B, axis, fmt))


@pytest.mark.parametrize("fmt", ["fp8_rowwise", "mxfp8_rceil"])
def test_eager_equals_jit(fmt: str) -> None:
    x, offs = jnp.asarray(values("wide", (200, 48))), jnp.array([70, 70, 150], jnp.int32)
    assert_same_operand(emulation.quantize_rows(x, fmt), quantize_rows(x, fmt))
    assert_same_operand(emulation.quantize_tokens(x, offs, fmt), quantize_tokens(x, offs, fmt))


@each_format
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_every_16_bit_value(fmt: str, dtype: type) -> None:
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(-1, 32)
    assert_same_operand(quantize_rows(jnp.asarray(x), fmt), oracle.quantize_rows(x, fmt))


@each_format
@given(offs=any_offs, kind=st.sampled_from(KINDS), seed=st.integers(0, 1000))
def test_tokens_have_the_oracles_bytes(fmt: str, offs: np.ndarray, kind: str, seed: int) -> None:
    x = values(kind, (200, 16), seed)
    got = quantize_tokens(jnp.asarray(x), jnp.asarray(offs), fmt)
    assert_same_operand(got, oracle.quantize_tokens(x, offs, fmt))


@pytest.mark.parametrize(
    ("fmt", "shape"),
    [
        *((fmt, shape) for fmt in FORMATS if fmt != "mxfp8_floor" for shape in shapes.SMALL),
        ("mxfp8_floor", shapes.ALL["short_last_block"]),  # to a GEMM both MX formats are one
    ],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("pattern", shapes.PATTERNS)
def test_gemms_of_every_shape_and_pattern(fmt: str, shape: shapes.Shape, pattern: str) -> None:
    (_, M, N, K, G), offs = shape, shapes.offsets(pattern, shape.M, shape.G)
    A, B, dOut = values("normal", (M, K)), values("normal", (G, K, N), 1), values("normal", (M, N), 2)
    a, b = oracle.quantize_rows(A, fmt), oracle.quantize_weights(B, "K", fmt)
    out = grouped_mm(a.map(jnp.asarray), b.map(jnp.asarray), offs)
    assert (out.shape, out.dtype) == ((M, N), jnp.bfloat16)
    assert oracle.sqnr(oracle.grouped_mm(a, b, offs), out) >= KERNEL_TIER
    assert not np.asarray(out)[max(offs) :].any()

    a, d = (oracle.quantize_tokens(x, offs, fmt) for x in (A, dOut))
    dB = np.asarray(grouped_mm_tokens(a.map(jnp.asarray), d.map(jnp.asarray), offs))
    assert dB.shape == (G, K, N)
    assert min(oracle.sqnr_per_group(oracle.grouped_mm_tokens(a, d, offs), dB)) >= KERNEL_TIER
    assert not dB[np.diff(offs, prepend=0) == 0].any()


@small_shapes
@pytest.mark.parametrize("pattern", ["uneven", "empty", "short"])
def test_bf16_gemms_of_every_shape(shape: shapes.Shape, pattern: str) -> None:
    (_, M, N, K, G), offs = shape, shapes.offsets(pattern, shape.M, shape.G)
    A, B, dOut = values("normal", (M, K)), values("normal", (G, K, N), 1), values("normal", (M, N), 2)
    bf16 = BF16GroupedMMConfig()
    out, dB = grouped_mm_bf16(A, B, offs), grouped_mm_tokens_bf16(A, dOut, offs)
    assert oracle.sqnr(oracle.forward(A, B, offs, bf16), out) >= KERNEL_TIER
    assert min(oracle.sqnr_per_group(oracle.wgrad(A, dOut, offs, bf16), dB)) >= KERNEL_TIER
    assert not np.asarray(dB)[np.diff(offs, prepend=0) == 0].any()


@each_format
def test_float32_output_is_not_rounded_to_bf16(fmt: str) -> None:
    A, B, offs = values("normal", (100, 96)), values("normal", (2, 96, 32), 1), np.array([40, 100], np.int32)
    a, b = oracle.quantize_rows(A, fmt), oracle.quantize_weights(B, "K", fmt)
    out = grouped_mm(a.map(jnp.asarray), b.map(jnp.asarray), offs, out_dtype=jnp.float32)
    assert oracle.sqnr(oracle.grouped_mm(a, b, offs), out) >= 130  # 53 with bf16; float32 itself holds some 145


@pytest.mark.parametrize("fmt", ["bf16", *FORMATS])
def test_poison_stays_in_its_rows_and_groups(fmt: str) -> None:
    offs = jnp.array([60, 60, 130], jnp.int32)
    A, B, dOut = values("normal", (200, 32)), values("normal", (3, 32, 48), 1), values("normal", (200, 48), 2)
    A[[3, 150]], dOut[[70, 160]] = np.nan, np.inf  # the second of each lies past the last group
    if fmt == "bf16":
        out, dB = grouped_mm_bf16(A, B, offs), grouped_mm_tokens_bf16(A, dOut, offs)
    else:
        out = grouped_mm(quantize_rows(A, fmt), quantize_weights(B, "K", fmt), offs)
        dB = grouped_mm_tokens(quantize_tokens(A, offs, fmt), quantize_tokens(dOut, offs, fmt), offs)
    out, dB = np.asarray(out, np.float32), np.asarray(dB, np.float32)
    assert np.isnan(out[3]).all()
    assert np.isfinite(np.delete(out, 3, axis=0)).all()
    assert not out[130:].any()
    assert not np.isfinite(dB[[0, 2]]).any()  # every column of A in group 0, of dOut in group 2
    assert not dB[1].any()


@each_format
def test_dequantize_is_the_oracles(fmt: str) -> None:
    x, offs = values("wide", (200, 48)), np.array([70, 70, 150], np.int32)
    x = np.where(np.abs(x) > 2.0**-100, x, 0).astype(np.float32)  # XLA's CPU backend flushes subnormal results
    B = np.stack([x, x[::-1]])
    for got, want in (
        (quantize_weights(B, "K", fmt), oracle.quantize_weights(B, "K", fmt)),
        (quantize_rows(x, fmt), oracle.quantize_rows(x, fmt)),
        (quantize_tokens(x, offs, fmt), oracle.quantize_tokens(x, offs, fmt)),
    ):
        expected = oracle.dequantize(want, offs)
        with np.errstate(over="ignore"):  # next to the largest float32
            expected = expected.astype(np.float32)
        expected[np.abs(expected) < 2.0**-126] = 0
        np.testing.assert_array_equal(jax.jit(emulation.dequantize)(got, offs), expected)


def test_tokens_of_a_rowwise_operand_need_offsets() -> None:
    operand = quantize_tokens(jnp.ones((4, 16)), jnp.array([4], jnp.int32), "fp8_rowwise")
    with pytest.raises(ValueError, match="offs=None"):
        emulation.dequantize(operand)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (functools.partial(emulation.quantize_rows, jnp.ones((2, 2, 16)), "mxfp8_rceil"), "x has shape"),
        (functools.partial(emulation.quantize_rows, jnp.ones((2, 16), jnp.int32), "mxfp8_rceil"), "x is int32"),
        (functools.partial(emulation.quantize_rows, jnp.ones((2, 16)), "fp4"), "fmt='fp4'"),
        (functools.partial(emulation.quantize_weights, jnp.ones((2, 16, 16)), "M", "mxfp8_rceil"), "axis='M'"),
    ],
)
def test_wrong_arguments_are_named(call: functools.partial, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
