"""`monitor` on linears: the same measurements, of a group of one, and of operands with one scale."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from xmoe import LINEAR_RECIPES
from xmoe.torch_backend import MoE, monitor, quantize_


def trained(recipe: str, watched: bool) -> tuple[list[Any], list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 32, bias=False)).to(torch.bfloat16)
    quantize_(model, recipe, verbose=False)
    handle = monitor(model, every=1) if watched else None
    x = torch.randn(2, 40, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        x[0, :8] *= torch.exp2(torch.randint(-20, 2, (8, 64)).float())
    y = model(x)
    y.float().square().mean().backward()
    if handle:
        handle.step()
        handle.close()
    return [y, x.grad, *(p.grad for p in model.parameters())], handle.records if handle else []


@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
def test_training_does_not_notice(recipe: str) -> None:
    bits, _ = trained(recipe, False)
    watched, records = trained(recipe, True)
    for a, b in zip(bits, watched, strict=True):
        assert torch.equal(a, b)
    assert [(record["parameter"], record["products"]) for record in records] == [("0.weight", 1), ("2.weight", 1)]
    for record in records:
        for gemm in ("fwd", "dgrad", "wgrad"):
            hp = gemm == "wgrad" and recipe.endswith("_with_gw_hp")
            assert ("sqnr" in record[gemm]) != hp
            # e5m2 has two bits of mantissa, so about 25 dB alone
            assert hp or (20 if recipe == "tensorwise" and gemm != "fwd" else 25) < record[gemm]["sqnr"] < 35


def test_tensorwise_counts() -> None:
    """By hand: the scale of a tensor is a power of two that takes its largest magnitude to at most 448 (57344)."""
    linear = nn.Linear(32, 32, bias=False)
    quantize_(linear, "tensorwise", verbose=False)
    x = torch.randn(16, 32) * torch.exp2(torch.randint(-30, 2, (16, 32)).float())
    gradient = torch.randn(16, 32) * torch.exp2(torch.randint(-40, 2, (16, 32)).float())
    with monitor(linear, every=1) as handle:
        linear(x.requires_grad_()).backward(gradient)
        handle.step()
    (record,) = handle.records
    for values, largest, least, found in (
        (x, 448, -9, record["fwd"]["activation"]),
        (gradient, 57344, -16, record["dgrad"]["gradient"]),
    ):
        amax = float(values.detach().abs().max())
        scale = 2.0 ** math.ceil(math.log2(amax / largest))
        flushed = ((values != 0) & (values.abs() / scale <= 2.0 ** (least - 1))).double().mean()  # to even: zero
        assert found == {"amax": amax, "saturated": 0, "flushed": pytest.approx(float(flushed))}
        assert found["flushed"] > 0.1
    assert record["wgrad"]["activation"] == record["fwd"]["activation"]
    assert record["wgrad"]["gradient"] == record["dgrad"]["gradient"]


def test_experts_and_linears_together() -> None:
    model = MoE(64, 64, 4, 2, shared_hidden_dim=64, dtype=torch.bfloat16)
    quantize_(model, "fp8_rowwise", verbose=False)
    quantize_(model, "rowwise", verbose=False)
    with monitor(model, every=1) as handle:
        model(torch.randn(16, 64, dtype=torch.bfloat16))[0].float().square().mean().backward()
        handle.step()
    names = [record["parameter"] for record in handle.records]
    assert {"experts.w1", "shared.w1.weight", "shared.w2.weight"} <= set(names)
    assert all(25 < record["fwd"]["sqnr"] < 33 for record in handle.records)
