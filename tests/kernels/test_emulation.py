"""The PyTorch emulation against the NumPy oracle: the same bytes, and GEMMs within the kernel tier."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.backends import arrays, awkward, same_bytes
from xmoe import oracle, shapes
from xmoe.kernels import emulation
from xmoe.operands import FORMATS, QuantizedOperand

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_TIER = 50.0
"""dB: rounding to bf16 alone leaves 55 (docs/design.md, Numerics)."""


def values(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """float32 of the ranges where the rules differ: all bit patterns, the smallest numbers, rows of mixed size."""
    rng = np.random.default_rng(seed)
    if kind == "rows":
        rows = int(np.prod(shape[:-1]))
        return awkward(rows, shape[-1], seed).view(shape) if rows else torch.empty(shape)
    bits = rng.integers(0, 2**32, shape, dtype=np.uint64).astype(np.uint32)
    if kind == "finite":
        bits = np.where((bits >> 23) & 0xFF == 0xFF, bits & 0x807FFFFF, bits)
    if kind == "tiny":  # rows whose scale is the smallest, or near it: their subnormals survive the cast
        exponent = rng.integers(0, rng.integers(1, 20, (*shape[:-1], 1)), shape).astype(np.uint32)
        bits = bits & 0x807FFFFF | exponent << 23
    return torch.from_numpy(bits.view(np.float32))


def same_operand(got: QuantizedOperand[torch.Tensor], expected: QuantizedOperand[np.ndarray]) -> bool:
    names = got.axis == expected.axis and got.format == expected.format
    return names and same_bytes(got.data, expected.data) and same_bytes(got.scale, expected.scale)


formats = st.sampled_from(FORMATS)
kinds = st.sampled_from(["rows", "bits", "finite", "tiny"])
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


@given(formats, kinds, dtypes, seeds, st.integers(0, 40), st.integers(1, 300))
def test_quantize_rows(fmt: str, kind: str, dtype: torch.dtype, seed: int, R: int, C: int) -> None:
    x = values(kind, (R, C), seed).to(dtype)
    assert same_operand(emulation.quantize_rows(x, fmt), oracle.quantize_rows(arrays(x), fmt))


@given(formats, kinds, dtypes, seeds, st.integers(1, 3), st.integers(1, 150), st.integers(1, 40), st.booleans())
def test_quantize_weights(
    fmt: str, kind: str, dtype: torch.dtype, seed: int, G: int, K: int, N: int, transposed: bool
) -> None:
    B = values(kind, (G, N, K) if transposed else (G, K, N), seed).to(dtype)
    B = B.mT if transposed else B
    for axis in ("K", "N"):
        got = emulation.quantize_weights(B, axis, fmt)
        assert same_operand(got, oracle.quantize_weights(arrays(B), axis, fmt)), axis


@given(formats, kinds, dtypes, seeds, st.integers(0, 300), st.integers(1, 6), st.sampled_from(list(shapes.PATTERNS)))
def test_quantize_tokens(fmt: str, kind: str, dtype: torch.dtype, seed: int, M: int, G: int, pattern: str) -> None:
    x = values(kind, (M, 5), seed).to(dtype)
    offs = shapes.offsets(pattern, M, G, seed=seed)
    got = emulation.quantize_tokens(x, torch.from_numpy(offs), fmt)
    assert same_operand(got, oracle.quantize_tokens(arrays(x), offs, fmt))


@given(formats, st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5), st.integers(0, 200))
def test_any_offsets(fmt: str, offs: list[int], M: int) -> None:
    """Bad offsets are data: the same running maximum everywhere, nothing out of bounds."""
    x, ends = awkward(M, 16), torch.tensor(offs, dtype=torch.int32)
    got, expected = emulation.quantize_tokens(x, ends, fmt), oracle.quantize_tokens(arrays(x), offs, fmt)
    assert same_operand(got, expected)
    out = emulation.grouped_mm_tokens(got, got, ends)
    assert out.shape == (len(offs), 16, 16)


@pytest.fixture
def flushed() -> Iterator[None]:
    """A process whose float unit takes subnormals for zero, as XLA's threads do."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_subnormals_survive_a_flushing_process(fmt: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    x = values("tiny", (64, 64), 0).to(dtype)
    offs = torch.tensor([10, 10, 64], dtype=torch.int32)
    rows, tokens = oracle.quantize_rows(arrays(x), fmt), oracle.quantize_tokens(arrays(x), offs.numpy(), fmt)
    smallest_block = oracle.dequantize(rows)
    request.getfixturevalue("flushed")
    assert same_operand(emulation.quantize_rows(x, fmt), rows)
    assert same_operand(emulation.quantize_tokens(x, offs, fmt), tokens)
    # What is a normal number after dequantization is there, although its scale, 2^-127, is not one.
    got = emulation.dequantize(emulation.quantize_rows(x, fmt)).numpy()
    normal = np.abs(smallest_block) >= 2.0**-126
    np.testing.assert_array_equal(got[normal], smallest_block[normal])


@given(formats, kinds, seeds)
def test_dequantize(fmt: str, kind: str, seed: int) -> None:
    x, offs = values(kind, (40, 48), seed), np.array([3, 3, 35], np.int32)
    got = emulation.dequantize(emulation.quantize_rows(x, fmt))
    tokens = emulation.dequantize(emulation.quantize_tokens(x, torch.from_numpy(offs), fmt), torch.from_numpy(offs))
    B = values(kind, (2, 144, 16), seed)
    weights = emulation.dequantize(emulation.quantize_weights(B, "K", fmt))
    with np.errstate(over="ignore"):  # RCEIL next to the largest float32
        expected = oracle.dequantize(oracle.quantize_rows(arrays(x), fmt)).astype(np.float32)
        expected_weights = oracle.dequantize(oracle.quantize_weights(arrays(B), "K", fmt)).astype(np.float32)
        expected_tokens = oracle.dequantize(oracle.quantize_tokens(arrays(x), offs, fmt), offs).astype(np.float32)
    np.testing.assert_array_equal(got.numpy(), expected)
    np.testing.assert_array_equal(tokens.numpy(), expected_tokens)
    np.testing.assert_array_equal(weights.numpy(), expected_weights)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("pattern", list(shapes.PATTERNS))
@pytest.mark.parametrize("shape", shapes.SMALL, ids=lambda shape: shape.name)
def test_gemms(fmt: str, pattern: str, shape: shapes.Shape) -> None:
    _, M, N, K, G = shape
    A, B, dOut = torch.randn(M, K), torch.randn(G, K, N), torch.randn(M, N)
    offs = shapes.offsets(pattern, M, G)
    ends = torch.from_numpy(offs)

    a, b = emulation.quantize_rows(A, fmt), emulation.quantize_weights(B, "K", fmt)
    out = emulation.grouped_mm(a, b, ends)
    expected = oracle.grouped_mm(
        oracle.quantize_rows(arrays(A), fmt), oracle.quantize_weights(arrays(B), "K", fmt), offs
    )
    assert min(oracle.sqnr_per_group(expected, arrays(out), offs)) >= KERNEL_TIER
    assert not out[int(offs[-1]) :].any()

    a, d = emulation.quantize_tokens(A, ends, fmt), emulation.quantize_tokens(dOut, ends, fmt)
    out = emulation.grouped_mm_tokens(a, d, ends, out=torch.full((G, N, K), torch.nan, dtype=torch.bfloat16).mT)
    expected = oracle.grouped_mm_tokens(
        oracle.quantize_tokens(arrays(A), offs, fmt), oracle.quantize_tokens(arrays(dOut), offs, fmt), offs
    )
    assert min(oracle.sqnr_per_group(expected, arrays(out))) >= KERNEL_TIER
    assert not out[np.diff(offs, prepend=0) == 0].any()


@pytest.mark.parametrize("fmt", FORMATS)
def test_float32_output_keeps_float32_sums(fmt: str) -> None:
    A, B, offs = torch.randn(64, 256), torch.randn(2, 256, 32), torch.tensor([30, 64], dtype=torch.int32)
    out = emulation.grouped_mm(
        emulation.quantize_rows(A, fmt), emulation.quantize_weights(B, "K", fmt), offs, torch.float32
    )
    a, b = oracle.quantize_rows(arrays(A), fmt), oracle.quantize_weights(arrays(B), "K", fmt)
    assert oracle.sqnr(oracle.grouped_mm(a, b, offs.numpy()), out.numpy()) >= 120


def test_bf16_gemms() -> None:
    A, B, dOut = torch.randn(50, 32), torch.randn(3, 32, 48), torch.randn(50, 48)
    offs = torch.tensor([20, 20, 41], dtype=torch.int32)
    out = emulation.grouped_mm_bf16(A, B, offs, torch.float32)
    dB = emulation.grouped_mm_tokens_bf16(A, dOut, offs, torch.float32)
    A, B, dOut = (x.bfloat16().double() for x in (A, B, dOut))
    for g, (start, end) in enumerate([(0, 20), (20, 20), (20, 41)]):
        torch.testing.assert_close(out[start:end].double(), A[start:end] @ B[g], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dB[g].double(), A[start:end].T @ dOut[start:end], rtol=1e-5, atol=1e-5)
    assert not out[41:].any()
    assert not dB[1].any()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_poison_stays_where_it_is(fmt: str, poison: float) -> None:
    """In a row of A: that row of the output. In a group's token: that column of that group's wgrad."""
    A, B = torch.randn(100, 32), torch.randn(3, 32, 48)
    offs = torch.tensor([40, 45, 90], dtype=torch.int32)
    A[42, 7] = poison
    A[95] = poison  # a row of no group
    a, b = emulation.quantize_rows(A, fmt), emulation.quantize_weights(B, "K", fmt)
    assert emulation.grouped_mm(a, b, offs).isnan().all(1).nonzero().flatten().tolist() == [42]
    assert emulation.grouped_mm(a, b, offs).isnan().any(1).nonzero().flatten().tolist() == [42]

    a, d = emulation.quantize_tokens(A, offs, fmt), emulation.quantize_tokens(torch.randn(100, 48), offs, fmt)
    dB = emulation.grouped_mm_tokens(a, d, offs).isnan()
    assert dB[1, 7].all()
    assert dB.sum() == dB[1, 7].numel()


def test_errors() -> None:
    x, offs = torch.zeros(4, 16), torch.tensor([4], dtype=torch.int32)
    with pytest.raises(ValueError, match="fmt is 'fp4'; give one of fp8_rowwise, fp8_blockwise"):
        emulation.quantize_rows(x, "fp4")
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 16\); give a tensor with 2 dimensions"):
        emulation.quantize_rows(x[None], "fp8_rowwise")
    with pytest.raises(ValueError, match=r"B is torch.float64; give bfloat16"):
        emulation.quantize_weights(x[None].double(), "K", "fp8_rowwise")
    with pytest.raises(ValueError, match="axis is 'M'; give 'K'"):
        emulation.quantize_weights(x[None], "M", "fp8_rowwise")
    with pytest.raises(ValueError, match="offs is None: a rowwise wgrad operand"):
        emulation.dequantize(emulation.quantize_tokens(x, offs, "fp8_rowwise"))
