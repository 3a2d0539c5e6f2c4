"""The rule for which experts gain from 8 bits, against what was measured."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from xmoe.torch_backend import ScaledGroupedMMTensor, auto_filter, quantize_
from xmoe.torch_backend.auto_filter import expected_speedup
from xmoe.torch_backend.moe import GroupedExperts


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.large = GroupedExperts(5120, 8192, 8)
            self.small = GroupedExperts(2048, 768, 128)
            self.dense = nn.Linear(8192, 8192)


def converted(model: Model) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, ScaledGroupedMMTensor)}


def test_small_experts_stay_in_bf16() -> None:
    model = Model()
    quantize_(model, "fp8_rowwise", filter_fn=auto_filter(tokens_per_expert=512), verbose=False)
    assert converted(model) == {"large.w1", "large.w2", "large.w3"}


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise"])
def test_few_tokens_leave_everything_in_bf16(recipe: str) -> None:
    with pytest.raises(ValueError, match="filter_fn matches none"):
        quantize_(Model(), recipe, filter_fn=auto_filter(tokens_per_expert=64, recipe=recipe))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="recipe='mxfp8_rceil' has no measured rule; use fp8_rowwise"):
        auto_filter(1024, "mxfp8_rceil")
    with pytest.raises(ValueError, match="tokens_per_expert=0; give"):
        auto_filter(0)


@pytest.mark.parametrize(("recipe", "within"), [("fp8_rowwise", 0.04), ("fp8_blockwise", 0.08)])
def test_rule_against_the_recorded_run(recipe: str, within: float) -> None:
    """That to which it was fitted."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-21-grouped_mm-4.json"
    rows = [row for row in json.loads(path.read_text())["rows"] if row["table"] == "forward and backward"]
    bf16 = {row["shape"]: row["ms"] for row in rows if row["system"] == "torch bf16"}
    measured = [row for row in rows if row["system"] == f"xmoe {recipe}"]
    assert len(measured) == 11
    for row in measured:
        M, N, K, G = (row["dims"][name] for name in "MNKG")
        assert expected_speedup(N, K, M / G, recipe) == pytest.approx(bf16[row["shape"]] / row["ms"], rel=within)
