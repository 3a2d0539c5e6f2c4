"""Linears in low precision on a GPU: ``torch._scaled_mm`` and the kernels, through autograd, compiled and captured."""

from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.backends import arrays
from xmoe.config import LINEAR_RECIPES, any_config
from xmoe.oracle import linear, linear_dgrad, linear_wgrad, sqnr
from xmoe.torch_backend import ScaledLinearTensor, quantize_
from xmoe.torch_backend.bench.gpu import capture

pytestmark = pytest.mark.gpu

M, K, N = 1000, 384, 256
KERNEL_TIER_DB, FAST_TIER_DB = 50, 45
"""Beside the oracle's exact sums on the same bytes; with cuBLAS's fast accumulation (an assumption, not measured)."""


def wrapped(weight: Tensor, recipe: Any) -> nn.Parameter:
    return nn.Parameter(ScaledLinearTensor(weight, any_config(recipe)))


def step(x: Tensor, weight: Tensor, dOut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = F.linear(x, weight)
    return out.detach(), *torch.autograd.grad(out, (x, weight), dOut)


def operands(rows: int = M, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, dOut = (torch.randn(shape, device="cuda", dtype=dtype) for shape in ((rows, K), (N, K), (rows, N)))
    return x.requires_grad_(), weight, dOut


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [M, 1, 17, 0])
@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
def test_forward_and_backward(recipe: str, rows: int, dtype: torch.dtype) -> None:
    x, weight, dOut = operands(rows, dtype)
    got = step(x, wrapped(weight, recipe), dOut)
    config, (a, w, d) = any_config(recipe), map(arrays, (x, weight, dOut))
    want = linear(a, w, config), linear_dgrad(d, w, config), linear_wgrad(a, d, config)
    for y, oracles in zip(got, want, strict=True):
        assert y.dtype == dtype
        least = FAST_TIER_DB if recipe == "tensorwise" and y is got[0] else KERNEL_TIER_DB
        assert y.isfinite().all()
        assert sqnr(oracles, arrays(y)) >= least


def test_tensorwise_gradients_need_no_layout() -> None:
    """That of a sum has stride 0; a view's input and weight have strides of their own."""
    weight = operands()[1]
    wide = torch.randn(M, 2 * K, device="cuda", dtype=torch.bfloat16)[:, :K].requires_grad_()
    other = wrapped(weight.t().contiguous(), "tensorwise")
    F.linear(wide, other.t()).sum().backward()
    config = any_config("tensorwise")
    ones = np.ones((M, N), np.float32)
    assert sqnr(linear_wgrad(arrays(wide), ones, config).T, arrays(other.grad)) >= KERNEL_TIER_DB


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise", "mxfp8_cublas_rceil"])
def test_step_does_not_wait_and_replays(recipe: str) -> None:
    """No host sync; a CUDA graph gives the eager step's bits for values that it has not seen."""
    x, weight, dOut = operands()
    weight = wrapped(weight, recipe)
    step(x, weight, dOut)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(x, weight, dOut)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    replay, written = capture(lambda: step(x, weight, dOut), torch.device("cuda"))
    with torch.no_grad():
        for leaf in (x, weight, dOut):
            leaf.copy_(torch.randn_like(leaf))
    for value in written:
        value.fill_(float("nan"))
    replay()
    for got, want in zip(written, step(x, weight, dOut), strict=True):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore")  # inductor warns about torch, itself and the GPU
@torch._inductor.config.patch(emulate_precision_casts=True)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "mxfp8_cublas_rceil"])
def test_compiled(recipe: str) -> None:
    """One graph for any number of rows; nearly eager's numbers (inductor rounds elsewhere, and fp8 steps follow)."""
    model = nn.Sequential(nn.LayerNorm(K), nn.Linear(K, N), nn.SiLU()).to("cuda", torch.bfloat16)
    quantize_(model, recipe, verbose=False)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows in (256, 100, 37):
        x, results = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16), []
        for f in (model, compiled):
            model.zero_grad()
            y = f(x)
            y.float().square().mean().backward()
            results.append((y.detach(), *(p.grad for p in model.parameters())))
        for eager, fused in zip(*results, strict=True):
            assert sqnr(arrays(eager), arrays(fused)) > 25
    assert counter.frame_count <= 2


def test_fp8_of_a_gradient_is_e5m2() -> None:
    """The same bytes as the emulation's: two gradients in different elements differ."""
    x, weight, dOut = operands()
    found = {}
    for element in ("e4m3", "e5m2"):
        recipe = type(any_config("tensorwise"))(grad_dtype=element)
        _, dx, dw = step(x, nn.Parameter(ScaledLinearTensor(weight, recipe)), dOut)
        found[element] = sqnr(arrays(dOut) @ arrays(weight), arrays(dx)), sqnr(arrays(dOut).T @ arrays(x), arrays(dw))
    assert all(db > 27 for db in found["e4m3"])
    assert all(24 < db < 26 for db in found["e5m2"])
