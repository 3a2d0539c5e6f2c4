"""Operands that come quantized: taken back to values, and in the layouts that implementations multiply."""

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.kernels.backends import INTERPRETER_WORKS, arrays, awkward
from tests.kernels.test_pipeline import NATIVE_MX, Float64Gemm, Run, TritonGemm, poisoned
from tests.kernels.test_quantize import to_kernel
from xmoe import config_from_recipe, oracle
from xmoe.kernels import call, dequantize, e4m3, emulation, operands, pipeline
from xmoe.kernels.dispatch import Device
from xmoe.operands import FORMATS


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # NumPy's Inf * 0
@pytest.mark.parametrize("shape", [(37, 144), (3, 48), (2, 150, 80)], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_dequantize(backend, fmt, shape):
    """data * scale of rows and of weights, rounded once; strided scales too."""
    x = to_kernel(awkward(int(np.prod(shape[:-1])), shape[-1]).view(shape), backend)
    quantize = emulation.quantize_rows if len(shape) == 2 else lambda x, fmt: emulation.quantize_weights(x, "N", fmt)
    operand = quantize(x, fmt)
    want = torch.from_numpy(oracle.dequantize(operand.map(to_numpy))).float()
    strided = operand.scale
    if fmt == "fp8_blockwise":
        strided = strided.mT.contiguous().mT
    for scale in (operand.scale, strided):
        out = torch.full(shape, 7.0, device=x.device)
        dequantize.dequantize(operand.data, scale, fmt, out)
        torch.testing.assert_close(out.cpu(), want, rtol=0, atol=0, equal_nan=True)
    if backend.hardware:
        out = out.bfloat16()
        dequantize.dequantize(operand.data, operand.scale, fmt, out)
        torch.testing.assert_close(out.cpu(), want.bfloat16(), rtol=0, atol=0, equal_nan=True)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    if x.element_size() > 1:
        return x.cpu().numpy()
    return x.cpu().view(torch.uint8).numpy().view(getattr(ml_dtypes, str(x.dtype).removeprefix("torch.")))


@pytest.mark.skipif(e4m3.HARDWARE or not INTERPRETER_WORKS, reason="for a working interpreter")
@pytest.mark.usefixtures("dot_scaled")
@pytest.mark.parametrize(
    ("recipe", "device"),
    [
        ("fp8_rowwise", Device("cuda", (9, 0))),
        ("fp8_blockwise", Device("cuda", (9, 0))),
        ("mxfp8_rceil", Device("cuda", (9, 0))),
        ("mxfp8_rceil", NATIVE_MX),
        ("mxfp8_floor", Device("cpu")),
    ],
    ids=str,
)
def test_forward_in_the_interpreter(recipe, device, monkeypatch):
    """The same bits from operands as from what they were quantized from."""
    monkeypatch.setattr(call, "programs", lambda index: 3)
    monkeypatch.setattr(call, "grouped_gemm_hopper", TritonGemm())
    if recipe == "mxfp8_rceil" and device is not NATIVE_MX:
        monkeypatch.setattr(call, "grouped_gemm", Float64Gemm())
    config = config_from_recipe(recipe)
    run = Run(config, "short", dtype=torch.float32, device=device, M=150, K=48, N=144, where="cpu")
    run()
    a = operands.quantize_rows(run.A, config.format)
    b = operands.as_weights(operands.quantize_weights(run.B, config.format), config, device)
    takes = operands.takes_rows(config, device)
    assert takes == (device is not NATIVE_MX)
    rows = operands.as_rows(a, config, device) if takes else None
    spec = pipeline.forward_spec(run.problem, config, device, prepared=True, rows=takes)
    assert not {"b", *(["a"] if takes else [])} & spec.scratch.keys()
    outputs, scratch = poisoned(spec.outputs, "cpu"), poisoned(spec.scratch, "cpu")
    pipeline.forward(run.problem, config, device, run.A, b, run.offs, outputs, scratch, rows, not takes)
    assert outputs.keys() == run.outputs.keys()
    for name, tensor in outputs.items():
        assert np.array_equal(to_bytes(tensor), to_bytes(run.outputs[name])), name
    assert not np.array_equal(arrays(outputs["out"]), np.zeros_like(arrays(outputs["out"])))


def to_bytes(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(torch.uint8).numpy()


@pytest.mark.skipif(e4m3.HARDWARE or not INTERPRETER_WORKS, reason="for a working interpreter")
@pytest.mark.usefixtures("dot_scaled")
def test_foreign_scales_in_tiles(monkeypatch):
    """Blocks whose largest element FLOOR would let saturate keep their values where they are quantized again."""
    monkeypatch.setattr(call, "programs", lambda index: 3)
    config = config_from_recipe("mxfp8_floor")
    run = Run(config, "short", dtype=torch.float32, device=NATIVE_MX, M=150, K=48, N=144, where="cpu")
    run.A.fill_(240.0)
    spec = pipeline.forward_spec(run.problem, config, NATIVE_MX)
    outputs, scratch = poisoned(spec.outputs, "cpu"), poisoned(spec.scratch, "cpu")
    B = emulation.dequantize(emulation.quantize_weights(run.B, "K", "mxfp8_floor")).mT
    pipeline.forward(run.problem, config, NATIVE_MX, run.A, run.B, run.offs, outputs, scratch, exact=True)
    want, start = torch.zeros_like(outputs["out"]), 0
    for g, end in enumerate(run.offs.tolist()):
        want[start:end] = run.A[start:end] @ B[g]
        start = end
    assert oracle.sqnr(arrays(want), arrays(outputs["out"])) >= 50
    pipeline.forward(run.problem, config, NATIVE_MX, run.A, run.B, run.offs, outputs, scratch)
    assert oracle.sqnr(arrays(want), arrays(outputs["out"])) < 30


def test_readable():
    """Contiguous, from a multiple of 16 bytes on, and with the strides that a descriptor is made of."""
    x = torch.arange(64, dtype=torch.uint8).view(4, 16)
    assert operands.readable(x).data_ptr() == x.data_ptr()
    shifted = torch.empty(72, dtype=torch.uint8)[8:].copy_(x.view(-1)).view(4, 16)
    for y in (shifted, x.mT.contiguous().mT, torch.zeros(1, 1000, dtype=torch.uint8)[:, :16]):
        got = operands.readable(y)
        assert got.data_ptr() % 16 == 0
        assert got.stride() == (16, 1)
        assert torch.equal(got, y)
