"""Rows and tokens from one read: the oracle's bytes, and those of the quantizers of either."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.backends import arrays, awkward, same_bytes
from tests.kernels.test_quantize import empty_like, to_kernel, token_map
from xmoe import oracle
from xmoe.kernels import e4m3, quantize, quantize_blocks, quantize_both, swiglu

FORMATS = ("fp8_blockwise", "mxfp8_rceil", "mxfp8_floor")
CASES = {"uneven": (150, 144, [20, 20, 149]), "bad offsets": (40, 48, [70, 20]), "none": (0, 32, [0])}


@pytest.mark.parametrize(
    ("case", "rows_of"),
    [("uneven", "x"), ("uneven", "a slice"), ("bad offsets", "an index"), ("none", "x")],
)
@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_and_tokens(backend, fmt, case, rows_of):
    M, C, ends = CASES[case]
    offs = np.array(ends, np.int32)
    x, index = to_kernel(awkward(M, C).to(torch.bfloat16), backend), None
    rows, tokens = oracle.quantize_rows(arrays(x), fmt), oracle.quantize_tokens(arrays(x), offs, fmt)
    owned, maps = max(0, *np.clip(offs, 0, M)), token_map(torch.from_numpy(offs).to(x.device), M)
    if rows_of == "an index":
        index = torch.randperm(M, generator=torch.Generator().manual_seed(0)).to(x.device)
        x = x[index.argsort()]
        index = index.int()
    elif rows_of == "a slice":
        wide = torch.full((M, C + 24), float("nan"), dtype=x.dtype, device=x.device)
        wide[:, 8:-16] = x
        x = wide[:, 8:-16]
    if fmt == "fp8_blockwise":
        data, scale = empty_like(rows.data, x.device), empty_like(rows.scale.T, x.device)
        t_data, t_scale = empty_like(tokens.data, x.device), empty_like(tokens.scale.T, x.device)
        quantize_both.quantize_rows_and_tokens(x, fmt, data, scale.mT, t_data, t_scale.mT, *maps, index=index)
        assert same_bytes(data[:owned], rows.data[:owned])
        assert same_bytes(scale[:, :owned].contiguous(), rows.scale.T[:, :owned])
        assert same_bytes(t_data, tokens.data)
    else:
        straight = oracle.tokens_to_rows(tokens.data, offs, M)
        data = torch.full((M, C), 7.0, dtype=torch.bfloat16, device=x.device)
        t_data, t_scale = empty_like(straight, x.device), empty_like(tokens.scale.T, x.device)
        quantize_both.quantize_rows_and_tokens(x, fmt, data, None, t_data, t_scale, *maps, index=index)
        apart = torch.empty_like(data)
        quantize.quantize_rows(x, fmt, apart, None, 4, index=index)
        assert torch.equal(data[:owned].view(torch.int16), apart[:owned].view(torch.int16))
        assert bool((data[owned:] == 7.0).all())
        assert same_bytes(t_data[:owned], straight[:owned])
    assert same_bytes(t_scale, tokens.scale.T)


@pytest.mark.parametrize("fmt", FORMATS)
def test_of_a_swiglu(backend, fmt):
    """What the quantizers of rows and of tokens make of the same gates and values."""
    M, C = 70, 160
    x = to_kernel(torch.randn(M, 2 * C).to(torch.bfloat16), backend)
    maps = token_map(torch.tensor([33, 70], dtype=torch.int32, device=x.device), M)
    blockwise = fmt == "fp8_blockwise"
    rows = oracle.quantize_rows(np.zeros((M, C), np.float32), fmt)
    tokens = oracle.quantize_tokens(np.zeros((M, C), np.float32), np.array([33, 70], np.int32), fmt)

    def outputs() -> list[torch.Tensor | None]:
        if blockwise:
            return [empty_like(array, x.device) for array in (rows.data, rows.scale, tokens.data, tokens.scale)]
        straight = empty_like(rows.data, x.device), empty_like(tokens.scale.T, x.device)
        return [torch.zeros(M, C, dtype=torch.bfloat16, device=x.device), None, *straight]

    both, apart = outputs(), outputs()
    quantize_both.quantize_rows_and_tokens(x, fmt, *both, *maps, gated=True)
    quantize.quantize_rows(x, fmt, *apart[:2], 4, gated=True)
    if blockwise:
        quantize.quantize_tokens(x, fmt, *apart[2:], None, *maps, gated=True)
    else:
        quantize_blocks.quantize_tokens_straight(x, fmt, *apart[2:], *maps, gated=True)
    for got, want in zip(both, apart, strict=True):
        if want is not None:
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def gradient(backend, M: int, H: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate_up, dh, and the gradient that the kernel of its own makes of them."""
    draw = torch.Generator().manual_seed(0)
    gate_up, dh = (to_kernel(torch.randn(M, C, generator=draw).to(torch.bfloat16), backend) for C in (2 * H, H))
    apart = gate_up.clone()
    swiglu.swiglu_gradient_(dh, apart)
    return gate_up, dh, apart


@pytest.mark.parametrize(
    ("fmt", "H", "in_place"),
    [("fp8_blockwise", 128, False), ("mxfp8_rceil", 96, False), ("mxfp8_rceil", 96, True), ("mxfp8_floor", 128, True)],
)
def test_of_a_gradient(backend, fmt, H, in_place):
    """What the quantizers of rows and of tokens make of the gradient; tokens as bf16 (of MX) in its own place."""
    M, ends = 70, np.array([33, 60], np.int32)
    gate_up, dh, apart = gradient(backend, M, H)
    maps = token_map(torch.from_numpy(ends).to(gate_up.device), M)
    zeros = np.zeros((M, 2 * H), np.float32)
    rows, tokens = oracle.quantize_rows(zeros, fmt), oracle.quantize_tokens(zeros, ends, fmt)
    half = torch.full((M, 2 * H), 7.0, dtype=torch.bfloat16, device=gate_up.device)
    if fmt == "fp8_blockwise":
        got, want = (
            [empty_like(array, half.device) for array in (rows.data, rows.scale, tokens.data, tokens.scale)]
            for _ in range(2)
        )
        quantize.quantize_rows(apart, fmt, *want[:2], 4)
        quantize.quantize_tokens(apart, fmt, *want[2:], None, *maps)
    else:
        straight = (lambda: (gate_up, None)) if in_place else (
            lambda: (empty_like(rows.data, half.device), empty_like(tokens.scale.T, half.device))
        )  # fmt: skip
        got, want = [half.clone(), None, *straight()], [half.clone(), None, *straight()]
        want[2] = torch.empty_like(want[2])
        quantize.quantize_rows(apart, fmt, *want[:2], 4)
        quantize_blocks.quantize_tokens_straight(apart, fmt, *want[2:], *maps)
    quantize_both.quantize_rows_and_tokens(gate_up, fmt, *got, *maps, dh=dh)
    for index, (x, y) in enumerate(zip(got, want, strict=True)):
        if x is not None:
            owned = slice(ends[-1]) if x.shape[0] == M else slice(None)
            assert torch.equal(x[owned].view(torch.uint8), y[owned].view(torch.uint8)), index


@pytest.mark.parametrize(("H", "maxima"), [(48, True), (640, True), (48, False)])
def test_rowwise_rows_of_a_gradient(backend, H, maxima):
    """The rows lie where the gradient of the SwiGLU was, the gradient where its two halves were."""
    M, ends = 99, torch.tensor([70, 70, 90], dtype=torch.int32)
    gate_up, dh, apart = gradient(backend, M, H)
    _, groups = token_map(ends.to(gate_up.device), M)
    got, want = (torch.zeros(2, 3, 2 * H, dtype=torch.int32, device=dh.device) for _ in range(2))
    scale, expected_scale = torch.empty(2, M, device=dh.device)
    data, expected = dh.view(torch.float8_e4m3fn), torch.empty(M, 2 * H, dtype=torch.float8_e4m3fn, device=dh.device)
    quantize.quantize_rows(apart, "fp8_rowwise", expected, expected_scale, 4, (want, groups) if maxima else None)
    columns = (got, groups) if maxima else None
    quantize.quantize_rows(gate_up, "fp8_rowwise", data, scale, 4, columns, dh=dh, kept=gate_up)
    for x, y in ((data, expected), (scale, expected_scale), (gate_up, apart)):
        assert torch.equal(x[:90].view(torch.uint8), y[:90].view(torch.uint8))
    assert torch.equal(got.amax(0), want.amax(0))
    assert bool(got.any()) == maxima


def test_pairs_are_for_bf16_and_for_scales_of_blocks():
    half, single = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    assert quantize_both.fuses("fp8_blockwise", half, False)
    assert quantize_both.fuses("mxfp8_floor", half, True)
    assert not quantize_both.fuses("mxfp8_floor", half, False)  # no faster where tokens are transposed
    assert not quantize_both.fuses("fp8_rowwise", half, False)
    assert not quantize_both.fuses("fp8_blockwise", single, False)


@triton.jit
def _multipliers(
    pairs_ptr, of_pairs_ptr, of_low_ptr, SCALING: tl.constexpr, RCEIL: tl.constexpr, HARDWARE: tl.constexpr
):
    i = tl.program_id(0) * 256 + tl.arange(0, 256)
    pairs = tl.load(pairs_ptr + i)
    tl.store(of_pairs_ptr + i, e4m3.pair_inverse(pairs, RCEIL, -127 if SCALING == "mx" else -48, HARDWARE))
    amax = pairs << 16
    inverse = e4m3.mx_inverse(e4m3.mx_byte(amax, RCEIL)) if SCALING == "mx" else e4m3.fp8_inverse(amax)
    tl.store(of_low_ptr + i, inverse)


@pytest.mark.parametrize(("scaling", "rceil"), [("mx", True), ("mx", False), ("blockwise", True)])
def test_multipliers_of_every_bf16_maximum(backend, scaling, rceil):
    """`pair_inverse` beside the rules of one float32 maximum."""
    bits = torch.arange(0x8000, dtype=torch.int32, device=backend.device)
    pairs = bits | bits.flip(0) << 16
    of_pairs, of_low = torch.empty_like(pairs), torch.empty(0x8000, device=backend.device)
    _multipliers[(128,)](pairs, of_pairs, of_low, SCALING=scaling, RCEIL=rceil, HARDWARE=e4m3.HARDWARE)
    low, high = (of_pairs << 16).view(torch.float32), (of_pairs & -0x10000).view(torch.float32)
    torch.testing.assert_close(low, of_low, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(high, of_low.flip(0), rtol=0, atol=0, equal_nan=True)
