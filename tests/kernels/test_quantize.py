"""Triton quantizers: the oracle's bytes, for every format, axis, dtype and layout."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.backends import arrays, awkward, same_bytes
from xmoe import oracle
from xmoe.kernels import quantize, quantize_blocks, tiles
from xmoe.operands import FORMATS, TOKEN_TILE, padded_tokens

DTYPES = (torch.float32, torch.bfloat16)
fixture_per_test = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)


def empty_like(array, device) -> torch.Tensor:
    """A poisoned tensor of an oracle array's shape and dtype."""
    dtype = getattr(torch, array.dtype.name)
    byte = torch.full((array.size * array.itemsize,), 0xA5, dtype=torch.uint8, device=device)
    return byte.view(dtype).view(array.shape)


def token_map(offs: torch.Tensor, M: int, tile: int = TOKEN_TILE) -> tuple[torch.Tensor, torch.Tensor]:
    G = offs.shape[0]
    token_tiles = torch.full((max(1, tiles.max_tiles(M, G, tile)), 4), -7, dtype=torch.int32, device=offs.device)
    groups = torch.full((G + 1, 4), -7, dtype=torch.int32, device=offs.device)
    tiles.prepare(offs, M, {tile: (token_tiles, groups)})
    return token_tiles, groups


def to_kernel(x: torch.Tensor, backend) -> torch.Tensor:
    """x on the backend's device, less what its conversions lose."""
    if not backend.hardware and x.dtype == torch.bfloat16:
        x = torch.where(x.abs() < 1.2e-38, 0.0, x)  # the interpreter's bf16 subnormals
    return x.to(backend.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("strides", ["rows", "columns", "sliced"])
def test_rows(backend, fmt, dtype, strides):
    x = to_kernel(awkward(37, 144).to(dtype), backend)
    expected = oracle.quantize_rows(arrays(x), fmt)
    if strides == "columns":
        x = x.T.contiguous().T
    elif strides == "sliced":
        wide = torch.full((37, 300), float("nan"), dtype=dtype, device=x.device)
        wide[:, 5:149] = x
        x = wide[:, 5:149]
    data, scale = empty_like(expected.data, x.device), empty_like(expected.scale, x.device)
    quantize.quantize_rows(x, fmt, data, scale, 4)
    assert same_bytes(data, expected.data)
    assert same_bytes(scale, expected.scale)


@pytest.mark.parametrize("cols", [16, 48, 1168, 16400])
def test_rows_of_any_length(backend, cols):
    x = awkward(3, cols, poison=False).to(backend.device)
    for fmt in FORMATS:
        expected = oracle.quantize_rows(arrays(x), fmt)
        data, scale = empty_like(expected.data, x.device), empty_like(expected.scale, x.device)
        quantize.quantize_rows(x, fmt, data, scale, 4)
        assert same_bytes(data, expected.data)
        assert same_bytes(scale, expected.scale)


@fixture_per_test
@given(
    M=st.sampled_from([0, 1, 31, 129, 300]),
    raw=st.lists(st.integers(-3, 330), min_size=1, max_size=6),
    bad=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.parametrize("fmt", FORMATS)
def test_tokens(backend, fmt, M, raw, bad, dtype):
    """Empty groups, one group with all, offs[-1] < M, M = 0, and offsets that decrease or leave [0, M]."""
    offs = torch.tensor(raw if bad else sorted(min(max(o, 0), M) for o in raw), dtype=torch.int32)
    x = to_kernel(awkward(M, 80).to(dtype), backend)
    expected = oracle.quantize_tokens(arrays(x), offs.numpy(), fmt)
    data, scale = empty_like(expected.data, x.device), empty_like(expected.scale, x.device)
    amax = torch.zeros((len(raw), 80), dtype=torch.int32, device=x.device)
    quantize.quantize_tokens(x, fmt, data, scale, amax, *token_map(offs.to(x.device), M))
    assert data.shape[1] == padded_tokens(M, len(raw))
    assert same_bytes(data, expected.data)
    assert same_bytes(scale, expected.scale)

    if fmt == "fp8_rowwise":
        owned, maps = max(0, *np.clip(offs.numpy(), 0, M)), token_map(offs.to(x.device), M)
        rows = oracle.quantize_rows(arrays(x), fmt)
        both = [empty_like(array, x.device) for array in (rows.data, rows.scale, expected.data, expected.scale)]
        rows_and_tokens(x, both[:2], both[2:], amax.zero_(), maps)
        for got, array in zip(both[:2], (rows.data, rows.scale), strict=True):
            assert same_bytes(got[:owned], array[:owned])
        for got, array in zip(both[2:], (expected.data, expected.scale), strict=True):
            assert same_bytes(got, array)


def rows_and_tokens(x, rows, tokens, amax, maps) -> None:
    """Both fp8_rowwise operands, the maxima of the columns found in the pass over the rows."""
    known = quantize.quantize_rows(x, "fp8_rowwise", *rows, 4, (amax, maps[1]))
    assert known == (x.shape[1] <= quantize.LONGEST_ROW)
    quantize.quantize_tokens(x, "fp8_rowwise", *tokens, amax, *maps, amax_is_known=known)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blockwise_scales_block_after_block(backend, dtype):
    """Scales [blocks, rows], as the warp-specialized GEMMs read them."""
    x, offs = to_kernel(awkward(300, 272).to(dtype), backend), np.array([150, 150, 290], np.int32)
    rows, tokens = (
        oracle.quantize_rows(arrays(x), "fp8_blockwise"),
        oracle.quantize_tokens(arrays(x), offs, "fp8_blockwise"),
    )
    data, scale = empty_like(rows.data, x.device), empty_like(rows.scale.T, x.device)
    quantize.quantize_rows(x, "fp8_blockwise", data, scale.mT, 4)
    assert same_bytes(data, rows.data)
    assert same_bytes(scale, rows.scale.T)
    data, scale = empty_like(tokens.data, x.device), empty_like(tokens.scale.T, x.device)
    maps = token_map(torch.from_numpy(offs).to(x.device), 300)
    quantize.quantize_tokens(x, "fp8_blockwise", data, scale.mT, None, *maps)
    assert same_bytes(data, tokens.data)
    assert same_bytes(scale, tokens.scale.T)


@pytest.mark.parametrize(("M", "C", "G"), [(40, 16, 150), (3, 16400, 1)])
def test_rows_and_tokens_of_many_groups_and_long_rows(backend, M, C, G):
    """More groups than a program looks at at once, most of them empty; rows that do not fit into registers."""
    offs = np.minimum(np.arange(G) // 2, M).astype(np.int32)
    x = to_kernel(awkward(M, C), backend)
    rows, tokens = (
        oracle.quantize_rows(arrays(x), "fp8_rowwise"),
        oracle.quantize_tokens(arrays(x), offs, "fp8_rowwise"),
    )
    expected = [rows.data[: offs[-1]], rows.scale[: offs[-1]], tokens.data, tokens.scale]
    data, scale, *of_tokens = (
        empty_like(x, backend.device) for x in (rows.data, rows.scale, tokens.data, tokens.scale)
    )
    amax = torch.zeros((2, G, C), dtype=torch.int32, device=x.device)
    maps = token_map(torch.from_numpy(offs).to(x.device), M)
    rows_and_tokens(x, (data, scale), of_tokens, amax, maps)
    for got, want in zip([data[: offs[-1]], scale[: offs[-1]], *of_tokens], expected, strict=True):
        assert same_bytes(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("fmt", "M", "ends"),
    [
        ("mxfp8_rceil", 70, [33, 33, 66]),
        ("mxfp8_floor", 150, [-5, 140]),
        ("mxfp8_floor", 40, [70, 20]),
        ("mxfp8_rceil", 0, [0]),
    ],
)
def test_straight_tokens(backend, fmt, M, ends, dtype):
    """The oracle's bytes where they were, and data * scale as bf16, at once or from the bytes."""
    offs = np.array(ends, np.int32)
    x = to_kernel(awkward(M, 144).to(dtype), backend)
    expected = oracle.quantize_tokens(arrays(x), offs, fmt)
    owned, maps = max(0, *np.clip(offs, 0, M)), token_map(torch.from_numpy(offs).to(x.device), M)
    straight = oracle.tokens_to_rows(expected.data, offs, M)
    data, scale = empty_like(straight, x.device), empty_like(expected.scale.T, x.device)
    quantize_blocks.quantize_tokens_straight(x, fmt, data, scale, *maps)
    assert same_bytes(data[:owned], straight[:owned])
    assert same_bytes(scale, expected.scale.T)

    value = oracle.tokens_to_rows(oracle.dequantize(expected, offs), offs, M)[:owned]
    normal = torch.from_numpy(~(np.abs(value) < 1e-30))  # below, bf16 loses bits
    fused, separate = (torch.full((M, 144), 7.0, dtype=torch.bfloat16, device=x.device) for _ in range(2))
    quantize_blocks.quantize_tokens_straight(x, fmt, fused, None, *maps)
    quantize_blocks.dequantize_tokens_straight(data, scale, separate, *maps)
    for got in (fused, separate):
        assert bool((got[owned:] == 7.0).all())
        exact = torch.from_numpy(value).to(torch.bfloat16)
        torch.testing.assert_close(got[:owned].cpu()[normal], exact[normal], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", ["K", "N"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("stored", ["GKN", "GNK", "half of a fused weight"])
def test_weights(backend, fmt, axis, dtype, stored):
    G, K, N = (2, 144, 272) if fmt == "fp8_blockwise" else (3, 80, 144)
    B = to_kernel(awkward(G * K, N).view(G, K, N).to(dtype), backend)
    expected = oracle.quantize_weights(arrays(B), axis, fmt)
    if stored == "GNK":
        B = B.mT.contiguous().mT
    elif stored == "half of a fused weight":
        B = torch.cat([torch.full_like(B.mT, float("nan")), B.mT], 1)[:, N:].mT
    data, scale = empty_like(expected.data, B.device), empty_like(expected.scale, B.device)
    amax = torch.zeros(expected.data.shape[:2], dtype=torch.int32, device=B.device)
    quantize.quantize_weights(B.mT if axis == "K" else B, fmt, data, scale, amax, 4)
    assert same_bytes(data, expected.data)
    assert same_bytes(scale, expected.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("G", "P", "C"), [(3, 40, 144), (9, 4, 48), (1, 4, 1168)])
def test_maxima_of_one_axis_found_along_the_other(backend, G, P, C, dtype):
    """Both orientations of weights, the second from the maxima that the first has found: of matrices that several
    programs share, and of several that one program has. Two weights with the same columns leave the maxima of both."""
    both = to_kernel(awkward(2 * G * P, C).view(2, G, P, C).to(dtype), backend)
    columns = torch.zeros(G, C, dtype=torch.int32, device=both.device)
    for x in both:
        expected = oracle.quantize_weights(arrays(x), "N", "fp8_rowwise")
        data, scale = empty_like(expected.data, x.device), empty_like(expected.scale, x.device)
        quantize.quantize_weights(x, "fp8_rowwise", data, scale, None, 4, columns=columns)
        assert same_bytes(data, expected.data)
        assert same_bytes(scale, expected.scale)
    assert torch.equal(columns.cpu(), both.cpu().float().abs().view(torch.int32).amax((0, 2)))
    parts = [x.mT for x in both]
    expected = oracle.quantize_weights(arrays(torch.cat(parts, 2)), "N", "fp8_rowwise")
    data, scale = empty_like(expected.data, both.device), empty_like(expected.scale, both.device)
    quantize.quantize_weights(parts, "fp8_rowwise", data, scale, columns, 4, amax_is_known=True)
    assert same_bytes(data, expected.data)
    assert same_bytes(scale, expected.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_side_by_side(backend, fmt, dtype):
    """[G, K, 2N] of two weights stored [G, N, K], quantized along 2N as if they were one."""
    G, K, N = (2, 144, 128) if fmt == "fp8_blockwise" else (3, 80, 96)
    whole = to_kernel(awkward(G * K, 2 * N).view(G, K, 2 * N).to(dtype), backend)
    expected = oracle.quantize_weights(arrays(whole), "N", fmt)
    parts = [half.mT.contiguous().mT for half in whole.split(N, 2)]
    data, scale = empty_like(expected.data, whole.device), empty_like(expected.scale, whole.device)
    amax = torch.zeros((G, K), dtype=torch.int32, device=whole.device)
    quantize.quantize_weights(parts, fmt, data, scale, amax, 4)
    assert same_bytes(data, expected.data)
    assert same_bytes(scale, expected.scale)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # NumPy's Inf * 0
@pytest.mark.parametrize("fmt", ["mxfp8_rceil", "mxfp8_floor"])
def test_dequantized_bf16(backend, fmt):
    """data * scale, exactly where bf16 holds it: of rows, and of weights along either axis, in the layout of the
    weights."""
    B = awkward(3 * 80, 144).view(3, 80, 144).to(backend.device)
    B[torch.isfinite(B) & (B.abs() < 1e-30)] = 0  # below bf16's normal range after scaling
    for axis, b in (("N", B), ("K", B.mT)):
        value = torch.from_numpy(oracle.dequantize(oracle.quantize_weights(arrays(B), axis, fmt))).to(torch.bfloat16)
        data = torch.empty_like(b, dtype=torch.bfloat16)
        assert data.stride() == b.stride()
        quantize.quantize_weights(b, fmt, data, None, None, 4)
        torch.testing.assert_close(data.cpu(), value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_every_bf16_value():
    """All 65536 bf16 values, each beside 448 (scale 1) and alone in its row or block."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for column in (torch.full_like(x, 448.0), torch.zeros_like(x)):
        rows = torch.stack([x, column], 1).repeat_interleave(8, 1).cuda()
        for fmt in FORMATS:
            expected = oracle.quantize_rows(arrays(rows), fmt)
            data, scale = empty_like(expected.data, "cuda"), empty_like(expected.scale, "cuda")
            quantize.quantize_rows(rows, fmt, data, scale, 4)
            assert same_bytes(data, expected.data)
            assert same_bytes(scale, expected.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_that_lie_anywhere(backend, fmt, dtype):
    """Through an index: the bytes of the rows in order."""
    M, C, offs = 70, 144, np.array([33, 66], np.int32)
    x = to_kernel(awkward(37, C).to(dtype), backend)
    index = torch.from_numpy(np.random.default_rng(0).integers(0, 37, M).astype(np.int32)).to(x.device)
    maps, G = token_map(torch.from_numpy(offs).to(x.device), M), len(offs)
    sorted_x = arrays(x)[index.cpu().numpy()]
    rows, tokens = oracle.quantize_rows(sorted_x, fmt), oracle.quantize_tokens(sorted_x, offs, fmt)
    data, scale = empty_like(rows.data, x.device), empty_like(rows.scale, x.device)
    quantize.quantize_rows(x, fmt, data, scale, 4, index=index)
    assert same_bytes(data, rows.data)
    assert same_bytes(scale, rows.scale)
    amax = torch.zeros((G, C), dtype=torch.int32, device=x.device)
    data, scale = empty_like(tokens.data, x.device), empty_like(tokens.scale, x.device)
    quantize.quantize_tokens(x, fmt, data, scale, amax, *maps, index=index)
    assert same_bytes(data, tokens.data)
    assert same_bytes(scale, tokens.scale)
    if fmt.startswith("mxfp8"):
        straight = oracle.tokens_to_rows(tokens.data, offs, M)
        data, scale = empty_like(straight, x.device), empty_like(tokens.scale.T, x.device)
        quantize_blocks.quantize_tokens_straight(x, fmt, data, scale, *maps, index=index)
        assert same_bytes(data[: offs[-1]], straight[: offs[-1]])
        assert same_bytes(scale, tokens.scale.T)


@pytest.mark.parametrize("C", [144, 16400])
def test_maxima_of_rows_that_lie_anywhere(backend, C):
    M, offs = 40, np.array([20, 40], np.int32)
    x = to_kernel(awkward(9, C), backend)
    index = torch.arange(M, dtype=torch.int32, device=x.device) % 9
    maps = token_map(torch.from_numpy(offs).to(x.device), M)
    sorted_x = x[index.long()]
    amax = torch.zeros((2, 2, C), dtype=torch.int32, device=x.device)
    rows = oracle.quantize_rows(arrays(sorted_x), "fp8_rowwise")
    data, scale = empty_like(rows.data, x.device), empty_like(rows.scale, x.device)
    known = quantize.quantize_rows(x, "fp8_rowwise", data, scale, 4, (amax[0][None], maps[1]), index=index)
    assert known == (C <= quantize.LONGEST_ROW)
    assert same_bytes(data, rows.data)
    quantize.quantize_rows(sorted_x, "fp8_rowwise", data, scale, 4, (amax[1][None], maps[1]))
    assert torch.equal(amax[0], amax[1])
