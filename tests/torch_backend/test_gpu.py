"""The PyTorch ops, the wrapper and the MoE layer on a GPU."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

from tests.cuda_graphs import recording
from tests.kernels.backends import arrays
from tests.torch_backend.layouts import LAYOUTS
from xmoe import RECIPES, config_from_recipe, oracle
from xmoe.bench.options import BASE_RECIPES
from xmoe.shapes import offsets
from xmoe.torch_backend import MoE, ScaledGroupedMMTensor, quantize_, scaled_grouped_mm

pytestmark = pytest.mark.gpu

KERNEL_TIER_DB = 50
M, N, K, G = 1000, 384, 256, 6


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    A, B, dOut = (torch.randn(shape, device="cuda", dtype=dtype) for shape in ((M, K), (G, N, K), (M, N)))
    return A.requires_grad_(), B.requires_grad_(), torch.from_numpy(offsets("uneven", M, G)).cuda(), dOut


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_op(recipe: str, dtype: torch.dtype) -> None:
    A, B, offs, dOut = operands(dtype)
    config = config_from_recipe(recipe)
    out = scaled_grouped_mm(A, B.mT, offs, config)
    out.backward(dOut)
    assert out.dtype == A.grad.dtype == B.grad.dtype == dtype
    assert B.grad.is_contiguous()
    a, b, d, ends = arrays(A), arrays(B.mT), arrays(dOut), offs.cpu().numpy()
    for got, want in (
        (out, oracle.forward(a, b, ends, config)),
        (A.grad, oracle.dgrad(d, b, ends, config)),
        (B.grad.mT, oracle.wgrad(a, d, ends, config)),
    ):
        assert oracle.sqnr(want, arrays(got)) >= KERNEL_TIER_DB


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_blockwise", "mxfp8_rceil"])
def test_expanded_gradient(recipe: str) -> None:
    """The gradient of a sum has stride 0."""
    A, B, offs, _ = operands()
    scaled_grouped_mm(A, B.mT, offs, config_from_recipe(recipe)).sum().backward()
    want = oracle.dgrad(np.ones((M, N), np.float32), arrays(B.mT), offs.cpu().numpy(), config_from_recipe(recipe))
    assert oracle.sqnr(want, arrays(A.grad)) >= KERNEL_TIER_DB


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_of_the_inputs_does_not_matter(recipe: str, layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The same values as from contiguous inputs."""
    A, W, offs, dOut = operands()
    inputs = [layout(x.detach()) for x in (A, W.mT, dOut, offs)]
    config = config_from_recipe(recipe)
    runs = []
    for a, b, d, ends in ([x.contiguous() for x in inputs], inputs):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        out = scaled_grouped_mm(a, b, ends, config)
        runs.append([out, *torch.autograd.grad(out, (a, b), d)])
    for want, got in zip(*runs, strict=True):
        assert oracle.sqnr(arrays(want), arrays(got)) >= KERNEL_TIER_DB


@pytest.mark.filterwarnings("ignore")  # inductor warns about torch, itself and the GPU
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil"])
@torch._inductor.config.patch(emulate_precision_casts=True)  # else float32 between fused ops, 29.6 dB off behind e4m3
def test_compiled_moe_layer(recipe: str) -> None:
    """One graph, forward and backward, for any number of tokens; the same numbers as eager."""
    moe = MoE(128, 256, 4, 2).cuda()
    moe.init_weights(0.02)
    quantize_(moe, config_from_recipe(recipe), lambda module, fqn: "experts" in fqn, verbose=False)
    compiles = CompileCounterWithBackend("inductor")
    compiled = torch.compile(moe, backend=compiles, fullgraph=True)
    for tokens in (64, 100, 36, 260):
        x = torch.randn(tokens, 128, device="cuda", dtype=torch.bfloat16)
        results = []
        for layer in (moe, compiled):
            moe.zero_grad()
            y, aux = layer(x)
            (y.float().square().mean() + aux).backward()
            results.append((y, moe.experts.w1.grad))
        for eager, fused in zip(*results, strict=True):
            assert oracle.sqnr(arrays(eager), arrays(fused)) > 30
    assert compiles.frame_count <= 2


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_blockwise", "mxfp8_rceil", "fp8_rowwise_wgrad_with_hp"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_step_does_not_wait_and_replays(recipe: str) -> None:
    """Forward and backward through autograd: no host sync, and the same bits from a CUDA graph."""
    A, B, offs, dOut = operands()
    config = config_from_recipe(recipe)

    def step() -> tuple[torch.Tensor, ...]:
        out = scaled_grouped_mm(A, B.mT, offs, config)
        return out.detach(), *torch.autograd.grad(out, (A, B), dOut)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
        try:
            torch.cuda.set_sync_debug_mode("error")
            eager = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with recording(graph):
        replayed = step()
    for x in replayed:
        x.fill_(float("nan"))
    graph.replay()
    for got, want in zip(replayed, eager, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("recipe", BASE_RECIPES)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_moe_layer_does_not_wait_and_replays_new_values(recipe: str) -> None:
    """The whole layer, router included, forward and backward: no host sync; and a CUDA graph of it gives the eager
    step's bits for inputs, groups and weights that it has not seen."""
    moe = MoE(128, 256, 8, 2, shared_hidden_dim=64, device="cuda", dtype=torch.bfloat16)
    moe.init_weights(0.05)
    quantize_(moe, config_from_recipe(recipe), lambda module, fqn: fqn == "experts", verbose=False)
    x, dOut = (torch.randn(500, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    one = torch.ones((), device="cuda")
    leaves = {"x": x.requires_grad_(), **dict(moe.named_parameters())}

    def step() -> dict[str, torch.Tensor]:
        for leaf in leaves.values():
            leaf.grad = None
        y, loss = moe(x)
        torch.autograd.backward((y, loss), (dOut, one))
        return {"y": y.detach(), "loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}

    def counts() -> list[int]:
        with torch.no_grad():
            return moe.router(x)[2].tolist()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
        try:
            torch.cuda.set_sync_debug_mode("error")
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with recording(graph):
        replayed = step()

    seen = counts()
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.copy_(torch.randn_like(leaf) * leaf.std())
        dOut.normal_()
    assert counts() != seen
    for value in replayed.values():
        value.fill_(float("nan"))
    graph.replay()
    for name, want in step().items():
        assert torch.isfinite(want).all(), name
        assert torch.equal(replayed[name], want), name


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise", "mxfp8_rceil", "mxfp8_floor"])
def test_moe_layer_learns(recipe: str) -> None:
    """Twenty fused AdamW steps on one batch: the converted layer's loss falls at least 95% as far as the plain one's,
    and its weights stay wrapped. (How training runs compare is for `xmoe train` to show.)"""
    falls = []
    for converted in (False, True):
        torch.manual_seed(0)
        moe = MoE(128, 256, 4, 2).cuda()
        moe.init_weights(0.05)
        if converted:
            quantize_(moe, config_from_recipe(recipe), lambda module, fqn: "experts" in fqn, verbose=False)
        optimizer = torch.optim.AdamW(moe.parameters(), lr=3e-3, fused=True)
        x = torch.randn(512, 128, device="cuda", dtype=torch.bfloat16)
        target = torch.randn(512, 128, device="cuda")
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            y, aux = moe(x)
            loss = (y.float() - target).square().mean() + 0.01 * aux
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        falls.append(losses[0] - losses[-1])
    assert isinstance(moe.experts.w1, ScaledGroupedMMTensor)
    assert falls[1] >= 0.95 * falls[0] > 0.5
