"""torchao's quantize_ and FqnToConfig with xmoe's configs, and the claims of docs/torchao.md about torchao."""

import logging
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xmoe import FP8GroupedMMConfig, MXFP8GroupedMMConfig, config_from_recipe
from xmoe.torch_backend import MoE, ScaledGroupedMMTensor
from xmoe.torch_backend import quantize_ as our_quantize_

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchao", minversion="0.18")
    from torchao.core.config import AOBaseConfig
    from torchao.prototype.moe_training.config import Float8TrainingOpConfig, MXFP8TrainingOpConfig, MXFP8TrainingRecipe
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    import xmoe.torch_backend.torchao

MX = config_from_recipe("mxfp8_rceil")
FP8 = config_from_recipe("fp8_rowwise")
THEIRS = MXFP8TrainingOpConfig.from_recipe(MXFP8TrainingRecipe.MXFP8_EMULATED_RCEIL)


class Model(nn.Module):
    """Experts between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Linear(64, 64, dtype=torch.bfloat16)
        self.moe = MoE(64, 48, 4, 2, dtype=torch.bfloat16)
        self.post = nn.Linear(64, 64, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.post(self.moe(self.pre(x))[0])


def keys(model: nn.Module) -> dict[str, str]:
    """Of every wrapped parameter its config's key."""
    return {name: p.config_key for name, p in model.named_parameters() if isinstance(p, ScaledGroupedMMTensor)}


def fqn_to_config(*items: tuple[str, Any]) -> Any:
    return FqnToConfig(OrderedDict(items))


def test_every_config_is_registered() -> None:
    for config in map(config_from_recipe, xmoe.RECIPES):
        assert isinstance(config, AOBaseConfig)
        model = Model()
        quantize_(model, config, lambda module, fqn: fqn == "moe.experts")
        assert keys(model) == dict.fromkeys(("moe.experts.w1", "moe.experts.w2", "moe.experts.w3"), config.to_key())


def test_registration_is_one_explicit_line() -> None:
    """No other module of xmoe imports it, and so torchao."""
    room = Path(xmoe.torch_backend.torchao.__file__).parent
    named = [path.name for path in room.rglob("*.py") if "torch_backend.torchao" in path.read_text()]
    assert named == ["torchao.py"]  # its own docstring


def test_both_libraries_in_one_call() -> None:
    """Experts in MXFP8, linears in torchao's int8: each as its own library alone converts it, to the bit."""
    torch.manual_seed(1)
    model, expected = Model(), Model()
    expected.load_state_dict(model.state_dict())
    config = fqn_to_config(("re:.*experts.*", MX), ("re:^(pre|post)$", Int8WeightOnlyConfig()))
    quantize_(model, config, filter_fn=None)
    our_quantize_(expected, "mxfp8_rceil", verbose=False)
    quantize_(expected, Int8WeightOnlyConfig(), lambda module, fqn: fqn in ("pre", "post"))

    assert set(keys(model)) == {"moe.experts.w1", "moe.experts.w2", "moe.experts.w3"}
    assert type(model.pre.weight) is type(expected.pre.weight) is not nn.Parameter
    x = torch.randn(16, 64, dtype=torch.bfloat16)
    y, wanted = model(x), expected(x)
    assert torch.equal(y, wanted)
    y.float().square().mean().backward()
    wanted.float().square().mean().backward()
    gradient = model.moe.experts.w1.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    assert torch.equal(gradient, expected.moe.experts.w1.grad)


def test_linears() -> None:
    """xmoe's configs for linears, in the default of filter_fn and beside experts."""
    for recipe in xmoe.LINEAR_RECIPES:
        model = Model()
        config = xmoe.LinearConfig.from_recipe(recipe)
        quantize_(model, config)
        assert {name for name, p in model.named_parameters() if type(p) is not nn.Parameter} == {
            "pre.weight",
            "post.weight",
        }
    config = fqn_to_config(("re:.*experts.*", MX), ("re:^(pre|post)$", xmoe.MXLinearConfig()))
    quantize_(model := Model(), config, filter_fn=None)
    assert model.pre.weight.config == xmoe.MXLinearConfig()
    assert set(keys(model)) == {"moe.experts.w1", "moe.experts.w2", "moe.experts.w3"}
    with pytest.raises(ValueError, match="no parameter with 2 dimensions"):
        quantize_(Model(), xmoe.MXLinearConfig(), lambda module, fqn: fqn == "moe.experts")


@pytest.mark.parametrize(
    ("items", "w1", "others"),
    [
        ([("moe.experts.w1", MX), ("re:.*experts.*", FP8)], "mxfp8_rceil", "fp8_rowwise"),
        ([("re:.*w1", MX), ("re:.*experts.*", FP8)], "mxfp8_rceil", "fp8_rowwise"),
        ([("moe.experts.w1", None), ("re:.*experts.*", FP8)], None, "fp8_rowwise"),
        ([("moe", FP8)], "fp8_rowwise", "fp8_rowwise"),
        ([("moe.experts.w1", MX)], "mxfp8_rceil", None),
    ],
    ids=["exact-first", "first-pattern", "none", "module", "parameter"],
)
def test_precedence(items: list[tuple[str, Any]], w1: str | None, others: str | None) -> None:
    model = Model()
    quantize_(model, fqn_to_config(*items), filter_fn=None)
    found = keys(model)
    assert found.get("moe.experts.w1") == w1
    assert {found.get("moe.experts.w2"), found.get("moe.experts.w3")} == {others}


def test_what_another_key_has_converted_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    quantize_(model, fqn_to_config(("moe.experts.w1", THEIRS), ("re:.*experts.*", MX)), filter_fn=None)
    assert set(keys(model)) == {"moe.experts.w2", "moe.experts.w3"}
    assert "left alone: GroupedExperts.w1 is a MXFP8TrainingWeightWrapperTensor" in caplog.text
    quantize_(model, fqn_to_config(("moe.experts.w2", FP8)), filter_fn=None)
    assert "left alone: GroupedExperts.w2 has mxfp8_rceil, of an earlier key or call, not fp8_rowwise" in caplog.text


def test_a_bias_and_an_activation_under_the_pattern(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"experts": nn.Module()})
    experts = model["experts"]
    experts.weight = nn.Parameter(torch.randn(2, 64, 64))
    experts.bias = nn.Parameter(torch.zeros(2, 64))
    experts.activation = nn.SiLU()
    with caplog.at_level(logging.INFO):
        quantize_(model, fqn_to_config(("re:experts.*", MX)), filter_fn=None)
    assert keys(model) == {"experts.weight": "mxfp8_rceil"}
    assert "left alone: Module.bias (2, 64) is not for MXFP8GroupedMMConfig" in caplog.text
    assert "weight of a Module: mxfp8_rceil" in caplog.text


def test_linears_are_refused() -> None:
    with pytest.raises(ValueError, match=r"FP8GroupedMMConfig was given to a Linear, which holds no parameter with 3"):
        quantize_(Model(), FP8GroupedMMConfig())
    with pytest.raises(ValueError, match="MXFP8GroupedMMConfig was given to a Linear"):
        quantize_(Model(), fqn_to_config(("re:pre", MXFP8GroupedMMConfig())), filter_fn=None)


# ------------------------------------------------------- what docs/torchao.md says about torchao's own wrapper and ours


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 64, 64, dtype=torch.bfloat16))


def converted(config: Any) -> Experts:
    model = Experts()
    quantize_(model, config, lambda module, fqn: True)
    return model


x = torch.randn(64, 64, dtype=torch.bfloat16)
offs = torch.tensor([32, 64], dtype=torch.int32)


def test_positional_offs() -> None:
    theirs, ours = converted(THEIRS), converted(MX)
    assert torch._grouped_mm(x, theirs.w.mT, offs) is None
    assert torch.equal(torch._grouped_mm(x, ours.w.mT, offs), torch._grouped_mm(x, ours.w.mT, offs=offs))


def test_row_major_weights() -> None:
    with pytest.raises(AssertionError, match="unsupported"):
        torch._grouped_mm(x, converted(THEIRS).w, offs=offs)
    with pytest.raises(AssertionError, match="B must be column-major"):
        torch._grouped_mm(x, converted(Float8TrainingOpConfig()).w, offs=offs)
    assert torch._grouped_mm(x, converted(MX).w, offs=offs).shape == (64, 64)


def test_output_dtype_of_float32_activations() -> None:
    """torchao's default out_dtype is bfloat16, ours that of the activations."""
    assert torch._grouped_mm(x.float(), converted(THEIRS).w.mT, offs=offs).dtype == torch.bfloat16
    assert torch._grouped_mm(x.float(), converted(MX).w.mT, offs=offs).dtype == torch.float32


def test_rows_past_the_last_offset() -> None:
    assert not torch._grouped_mm(x, converted(MX).w.mT, offs=offs // 2)[32:].any()


def test_checkpoints(tmp_path: Path) -> None:
    for config, plain in ((THEIRS, False), (MX, True)):
        state = converted(config).state_dict()
        torch.save(state, tmp_path / "state.pt")
        if plain:
            loaded = torch.load(tmp_path / "state.pt", weights_only=True)
            assert type(loaded["w"]) is Tensor
            assert torch.equal(loaded["w"], state["w"])
        else:
            with pytest.raises(Exception, match="Weights only load failed"):
                torch.load(tmp_path / "state.pt", weights_only=True)


def test_load_with_assign() -> None:
    for config, kept in ((THEIRS, False), (MX, True)):
        model = converted(config)
        before = type(model.w)
        model.load_state_dict(Experts().state_dict(), assign=True)
        assert (type(model.w) is before) == kept


def test_what_matches_nothing() -> None:
    quantize_(Experts(), THEIRS, lambda module, fqn: False)  # torchao says nothing
    with pytest.raises(ValueError, match="filter_fn matches none"):
        our_quantize_(Experts(), MX, lambda module, fqn: False)


def test_converting_twice() -> None:
    other = MXFP8TrainingOpConfig.from_recipe(MXFP8TrainingRecipe.MXFP8_RCEIL_WGRAD_WITH_HP)
    theirs, ours = converted(THEIRS), converted(MX)
    quantize_(theirs, other, lambda module, fqn: True)
    quantize_(ours, FP8, lambda module, fqn: True)
    assert theirs.w.config == THEIRS
    assert ours.w.config == FP8


def test_bias_of_a_linear() -> None:
    linear = nn.Linear(64, 64, dtype=torch.bfloat16)
    quantize_(linear, THEIRS)
    assert not linear(torch.zeros(32, 64, dtype=torch.bfloat16)).any()  # torchao's MXFP8 wrapper leaves it out


def test_names_of_the_seeds_are_gone() -> None:
    """Names of earlier releases that 0.18 does not have any more."""
    import importlib

    for module, name in (
        ("torchao.prototype.moe_training.config", "MXFP8GroupedMMConfig"),
        ("torchao.prototype.moe_training.conversion_utils", "MoETrainingConfig"),
        ("torchao.prototype.mx_formats", "MXLinearConfig"),
    ):
        assert not hasattr(importlib.import_module(module), name)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("torchao.prototype.moe_quant")


def test_two_exact_nones_break_torchaos_mapping() -> None:
    items = ("moe.experts.w1", None), ("moe.experts.w3", None), ("re:.*experts.*", MX)
    with pytest.raises(IndexError):
        quantize_(Model(), fqn_to_config(*items), filter_fn=None)
    model = Model()
    our_quantize_(model, xmoe.FqnToConfig(dict(items)), verbose=False)
    assert set(keys(model)) == {"moe.experts.w2"}
