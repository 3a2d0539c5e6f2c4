"""Tensorwise quantizers, Triton's and the emulation's, against the oracle: bytes equal."""

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.kernels.backends import arrays, awkward, same_bytes
from xmoe import oracle
from xmoe.config import KernelPreference
from xmoe.kernels import quantize_tensor, tensorwise
from xmoe.kernels.dispatch import Device, UnsupportedError

SHAPES = [(1, 32), (130, 48), (48, 144)]
"""Less than a tile; rows past the first; columns past the first."""
ELEMENTS = {"e4m3": False, "e5m2": True}


def expected(x: torch.Tensor, element: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, columns, scale) by the oracle."""
    R, C = x.shape
    operand = oracle.quantize_tensor(arrays(x), element)
    columns = np.zeros((C, tensorwise.padded_rows(R)), np.uint8)
    columns[:, :R] = operand.data.view(np.uint8).T
    return operand.data, columns, np.asarray(operand.scale)


def values(shape: tuple[int, int], case: str, dtype: torch.dtype) -> torch.Tensor:
    x = awkward(*shape, seed=1, poison=False).clamp(-1e30, 1e30)
    if case == "zero":
        x.zero_()
    elif case != "finite":
        x[-1, 3] = float(case)
    return x.to(dtype)


@pytest.mark.parametrize(("dtype", "element"), [(torch.bfloat16, "e4m3"), (torch.float32, "e5m2")], ids=str)
@pytest.mark.parametrize(("shape", "case"), [*((shape, "finite") for shape in SHAPES), (SHAPES[0], "nan")])
def test_bytes(backend, shape: tuple[int, int], case: str, dtype: torch.dtype, element: str) -> None:
    x, e5m2 = values(shape, case, dtype).to(backend.device), ELEMENTS[element]
    rows, columns, scale = expected(x, element)
    maxima = torch.full((quantize_tensor.count_maxima(x, 2),), -1.0, device=backend.device)
    quantize_tensor.find_maxima(x, maxima)
    got_scale = torch.empty((), device=backend.device)
    halves = [(True, False), (False, True)] if shape == SHAPES[0] else []
    for wanted in ((True, True), *halves):
        given = [
            torch.full(y.shape, 0x55, dtype=torch.uint8, device=backend.device).view(tensorwise.dtype_of(e5m2))
            if want
            else None
            for y, want in zip((rows, columns), wanted, strict=True)
        ]
        quantize_tensor.cast(x, maxima, *given, got_scale, e5m2)
        for got, want in zip(given, (rows, columns), strict=True):
            assert got is None or same_bytes(got, want)
        np.testing.assert_array_equal(arrays(got_scale), scale)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("case", ["finite", "zero", "nan", "-inf"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulation(shape: tuple[int, int], case: str, element: str) -> None:
    x = values(shape, case, torch.float32)
    want = expected(x, element)
    got = tensorwise.cast(x, tensorwise.find_maxima(x), ELEMENTS[element], True, True, emulated=True)
    assert same_bytes(got[0], want[0])
    assert same_bytes(got[1], want[1])
    np.testing.assert_array_equal(arrays(got[2]), want[2])


def test_maxima_of_several_parts(backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """More elements than a part, a last part that is short, and a NaN that wins."""
    monkeypatch.setattr(quantize_tensor, "PART", 64)
    x = torch.randn(10, 100).to(backend.device)
    for want in (x.abs().max().item(), float("nan")):
        maxima = torch.empty(5, device=backend.device)
        quantize_tensor.find_maxima(x, maxima)
        assert np.array_equal(maxima.max().item(), want, equal_nan=True)
        x[7, 3] = float("nan")
    assert quantize_tensor.count_maxima(x, 132) == 16
    assert quantize_tensor.count_maxima(x, 2) == 8


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_rounding(backend, element: str) -> None:
    """Each value of the elements, the middles between neighbours and what is next to these, in one tensor."""
    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[element]
    exact = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    exact = np.unique(exact[np.isfinite(exact)])
    middles = (exact[1:] + exact[:-1]) / 2
    near = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate([exact, middles, *near, [-0.0]]).astype(np.float32)
    x = torch.from_numpy(np.pad(x, (0, -len(x) % 16)).reshape(-1, 16))
    want = oracle.quantize_tensor(arrays(x), element)
    assert want.scale == 1  # so these are the values that are rounded
    assert same_bytes(tensorwise.cast(x, tensorwise.find_maxima(x), ELEMENTS[element], True, False)[0], want.data)
    x = x.to(backend.device)
    rows = torch.empty(x.shape, dtype=tensorwise.dtype_of(ELEMENTS[element]), device=backend.device)
    columns = torch.empty(16, tensorwise.padded_rows(x.shape[0]), dtype=rows.dtype, device=backend.device)
    scale = torch.empty((), device=backend.device)
    quantize_tensor.cast(x, tensorwise.find_maxima(x), rows, columns, scale, ELEMENTS[element])
    assert same_bytes(rows, want.data)
    assert same_bytes(columns[:, : x.shape[0]].contiguous(), want.data.T)


@pytest.mark.gpu
@pytest.mark.parametrize("e5m2", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fast", [False, True])
def test_scaled_mm(fast: bool, out_dtype: torch.dtype, e5m2: bool) -> None:
    """torch's GEMM on the same bytes as the emulated one: 50 dB is the kernel tier."""
    a, b = (torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16) for rows in (200, 144))
    operands = []
    for x, element in ((a, e5m2), (b, False)):
        data, _, scale = tensorwise.cast(x, tensorwise.find_maxima(x), element, True, False)
        operands += [data, scale]
    got = tensorwise.scaled_mm(*operands, out_dtype, fast=fast)
    want = tensorwise.scaled_mm(*operands, torch.float32, fast=fast, emulated=True)
    assert got.dtype == out_dtype
    assert oracle.sqnr(arrays(want), arrays(got)) >= 50


H200 = Device("cuda", (9, 0))


@pytest.mark.parametrize(
    ("preference", "device", "emulated"),
    [("auto", H200, False), ("torch", H200, False), ("emulated", H200, True), ("auto", Device("cpu"), True),
     ("auto", Device("cuda", (8, 0)), True), ("auto", Device("cuda", (8, 9), triton=False), False)],
)  # fmt: skip
def test_dispatch(preference: str, device: Device, emulated: bool) -> None:
    assert tensorwise.is_emulated(KernelPreference(preference), device) == emulated


@pytest.mark.parametrize(("preference", "device"), [("triton", H200), ("torch", Device("cpu"))])
def test_dispatch_refuses(preference: str, device: Device) -> None:
    with pytest.raises(UnsupportedError, match=f"kernel_preference={preference} .* use kernel_preference=auto"):
        tensorwise.is_emulated(KernelPreference(preference), device)
