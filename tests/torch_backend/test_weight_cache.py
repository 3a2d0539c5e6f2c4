"""Weights quantized once for several micro-batches: the same numbers, and never those of older weights."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xmoe import RECIPES
from xmoe.kernels import emulation
from xmoe.torch_backend import MoE, ScaledGroupedMMTensor, cache_weights, quantize_, scaled_grouped_mm
from xmoe.torch_backend.moe import GroupedExperts

M, D, H, G = 64, 64, 128, 4
OFFS = torch.tensor([10, 10, 40, 60], dtype=torch.int32)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The axes along which weights have been quantized."""
    calls: list[str] = []
    plain = emulation.quantize_weights

    def counted(B: Tensor, axis: str, fmt: str) -> Any:
        calls.append(axis)
        return plain(B, axis, fmt)

    monkeypatch.setattr(emulation, "quantize_weights", counted)
    return calls


def experts(recipe: str, dtype: torch.dtype = torch.bfloat16) -> GroupedExperts:
    module = GroupedExperts(D, H, G, dtype=dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    quantize_(module, recipe, verbose=False)
    return module


def gradients(module: nn.Module, run: Callable[[Tensor], Tensor], batches: int = 3) -> list[Tensor]:
    """Of the parameters over some micro-batches, and of the last input."""
    module.zero_grad()
    generator = torch.Generator().manual_seed(0)
    for _ in range(batches):
        x = torch.randn(M, D, generator=generator).bfloat16().requires_grad_()
        run(x).float().square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_same_gradients(recipe: str, checkpointed: bool, quantized: list[str]) -> None:
    module = experts(recipe)

    def run(x: Tensor) -> Tensor:
        return checkpoint(module, x, OFFS, use_reentrant=False) if checkpointed else module(x, OFFS)

    plain = gradients(module, run)
    quantized.clear()
    with cache_weights(), cache_weights():
        cached = gradients(module, run)
    assert len(quantized) == (0 if recipe == "bf16" else 5)  # w1, w2, w3 forward; w2, w1 with w3 backward
    assert all(map(torch.equal, plain, cached))
    quantized.clear()
    assert all(map(torch.equal, plain, gradients(module, run)))  # and nothing stays
    assert len(quantized) > 5 or recipe == "bf16"


@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_checkpoint_with_one_direction_in_the_block(inside: str) -> None:
    module = experts("fp8_rowwise")
    x = torch.randn(M, D).bfloat16()
    module(x, OFFS).float().sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    forward, backward = (cache_weights() if inside == side else nullcontext() for side in ("forward", "backward"))
    with forward:
        out = checkpoint(module, x, OFFS, use_reentrant=False)
    with backward:
        out.float().sum().backward()
    assert all(torch.equal(p.grad, want) for p, want in zip(module.parameters(), expected, strict=True))


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil", "fp8_blockwise_wgrad_with_hp"])
@pytest.mark.parametrize("stored", ["GNK", "GKN"])
def test_grouped_mm(recipe: str, stored: str, quantized: list[str]) -> None:
    """One GEMM with a wrapped or a plain parameter, stored either way."""
    shape = (G, H, D) if stored == "GNK" else (G, D, H)
    module = nn.ParameterList([nn.Parameter(torch.randn(shape).bfloat16()) for _ in range(2)])
    module[1] = nn.Parameter(
        ScaledGroupedMMTensor(module[1].detach(), pytest.importorskip("xmoe").config_from_recipe(recipe))
    )

    def run(x: Tensor) -> Tensor:
        plain, wrapped = (w.mT if stored == "GNK" else w for w in module)
        return F.relu(scaled_grouped_mm(x, plain, OFFS, recipe)) + torch._grouped_mm(x, wrapped, offs=OFFS)

    plain = gradients(module, run)
    quantized.clear()
    with cache_weights():
        assert all(map(torch.equal, plain, gradients(module, run)))
    assert len(quantized) == 4


def test_changed_parameters_are_quantized_anew() -> None:
    module = experts("fp8_rowwise")
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)

    def train(module: GroupedExperts) -> list[Tensor]:
        x = torch.ones(M, D).bfloat16()
        outs = []
        for _ in range(3):
            outs.append(module(x, OFFS))
            outs[-1].float().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return outs

    start = [p.detach().clone() for p in module.parameters()]
    expected = train(module)
    with torch.no_grad():
        for p, value in zip(module.parameters(), start, strict=True):
            p.copy_(value)
    with cache_weights():
        got = train(module)
    assert all(map(torch.equal, expected, got))
    assert not torch.equal(got[0], got[2])


def test_what_is_not_a_parameter_is_not_kept(quantized: list[str]) -> None:
    """A cast weight is a new tensor each time, maybe where an old one was."""
    moe = MoE(D, H, G, 2)
    quantize_(moe, "fp8_rowwise", verbose=False)  # float32 parameters, bf16 input
    x = torch.randn(M, D).bfloat16()
    with cache_weights():
        first = moe(x)[0]
        quantized.clear()
        with torch.no_grad():
            moe.experts.w1.mul_(2)
        assert not torch.equal(moe(x)[0], first)
        assert len(quantized) == 3


def test_bad_arguments_come_first() -> None:
    w = nn.Parameter(torch.randn(G, H, D))
    with cache_weights(), pytest.raises(ValueError, match="A has K=32"):
        scaled_grouped_mm(torch.randn(M, 32), w.mT, OFFS, "fp8_rowwise")
