"""``quantize_``: what it converts, what it says, and what it refuses."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

import xmoe
from xmoe import FP8GroupedMMConfig, FP8GroupedMMRecipe, FqnToConfig, MXFP8GroupedMMConfig
from xmoe.torch_backend import MoE, ScaledGroupedMMTensor, quantize_

FP8, MX = FP8GroupedMMConfig(), MXFP8GroupedMMConfig()


class Model(nn.Module):
    """Two MoE layers and 3D parameters that are no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MoE(32, 48, 4, 2, shared_hidden_dim=32) for _ in range(2)])
        self.conv = nn.Conv1d(16, 16, 16)
        self.position = nn.Parameter(torch.zeros(1, 5, 32))


def experts(module: nn.Module, fqn: str) -> bool:
    return "experts" in fqn


def configs(model: nn.Module) -> dict[str, Any]:
    return {name: p.config for name, p in model.named_parameters() if isinstance(p, ScaledGroupedMMTensor)}


def test_filter() -> None:
    model = Model()
    before = {name: (p, p.shape, p.dtype, p.data_ptr()) for name, p in model.named_parameters()}
    assert quantize_(model, FP8, filter_fn=experts) is None
    names = [f"layers.{i}.experts.{w}" for i in range(2) for w in ("w1", "w2", "w3")]
    assert configs(model) == dict.fromkeys(names, FP8)
    assert list(before) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        old, *rest = before[name]
        assert [p.shape, p.dtype, p.data_ptr()] == rest
        assert p is old


def test_fqn_to_config() -> None:
    model = Model()
    mapping = {"layers.0.experts.w2": None, "layers.0.experts": FP8, r"re:.*\.experts": MX}
    quantize_(model, FqnToConfig(mapping))
    assert configs(model) == {
        **{f"layers.0.experts.{w}": FP8 for w in ("w1", "w3")},
        **{f"layers.1.experts.{w}": MX for w in ("w1", "w2", "w3")},
    }


def test_filter_narrows_a_mapping() -> None:
    model = Model()
    quantize_(model, FqnToConfig({"_default": MX}), filter_fn=lambda module, fqn: fqn == "layers.1.experts")
    assert list(configs(model)) == [f"layers.1.experts.{w}" for w in ("w1", "w2", "w3")]


def test_shortcut() -> None:
    assert xmoe.quantize_ is quantize_
    assert "quantize_" in dir(xmoe)
    assert "FqnToConfig" in dir(xmoe)


def test_converting_again_replaces_the_config() -> None:
    model = Model()
    quantize_(model, FP8, filter_fn=experts)
    quantize_(model, MX, filter_fn=lambda module, fqn: fqn == "layers.0.experts")
    assert {c for n, c in configs(model).items() if n.startswith("layers.0")} == {MX}
    assert {c for n, c in configs(model).items() if n.startswith("layers.1")} == {FP8}


def tied() -> Model:
    model = Model()
    model.layers[1].experts.w1 = model.layers[0].experts.w1
    return model


def test_tied_weights_stay_tied_and_gradients_stay() -> None:
    model = tied()
    model.layers[0].experts.w1.grad = torch.ones(4, 48, 32)
    quantize_(model, FP8, filter_fn=experts)
    assert model.layers[1].experts.w1 is model.layers[0].experts.w1
    assert model.layers[0].experts.w1.grad.sum() == 4 * 48 * 32


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("by", ["filter", "key"])
def test_tied_weight_that_matches_under_one_name(layer: int, by: str) -> None:
    model, name = tied(), f"layers.{layer}.experts"
    if by == "filter":
        quantize_(model, FP8, filter_fn=lambda module, fqn: fqn == name)
    else:
        quantize_(model, FqnToConfig({name: FP8}))
    assert model.layers[0].experts.w1 is model.layers[1].experts.w1
    assert isinstance(model.layers[0].experts.w1, ScaledGroupedMMTensor)


def test_shared_module_matches_under_its_second_name() -> None:
    model = Model()
    model.layers[1] = model.layers[0]
    quantize_(model, FqnToConfig({"layers.1": FP8}))
    assert isinstance(model.layers[0].experts.w2, ScaledGroupedMMTensor)


@pytest.mark.parametrize("other", [MX, None])
def test_tied_weight_with_two_configs(other: MXFP8GroupedMMConfig | None) -> None:
    model = tied()
    message = r"several configs \(layers\.0\.experts\.w1: fp8_rowwise, layers\.1\.experts\.w1: (mxfp8_rceil|None)\)"
    with pytest.raises(ValueError, match=message):
        quantize_(model, FqnToConfig({"layers.0": FP8, "layers.1": other}))
    assert not configs(model)


@pytest.mark.parametrize(
    ("config", "filter_fn"),
    [
        (FP8, lambda module, fqn: isinstance(module, MoE)),
        (FqnToConfig({"layers": FP8}), None),
        (FqnToConfig({r"re:layers\.\d": FP8}), None),
        (FqnToConfig({"_default": FP8}), lambda module, fqn: fqn == "layers"),
    ],
)
def test_everything_inside_a_module(config: Any, filter_fn: Any) -> None:
    model = Model()
    quantize_(model, config, filter_fn)
    assert len(configs(model)) == 6


@pytest.mark.parametrize("recipe", ["fp8_rowwise", FP8GroupedMMRecipe.FP8_ROWWISE])
def test_recipe(recipe: str) -> None:
    model = Model()
    quantize_(model, recipe, filter_fn=experts)
    assert set(configs(model).values()) == {FP8}


def test_device() -> None:
    model = Model()
    quantize_(model, FP8, experts, "meta")
    assert len(configs(model)) == 6
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("mapping", [{"_default": None}, {"re:.*experts": None}, {}])
@pytest.mark.parametrize("model", [Model, lambda: nn.Linear(4, 4)])
def test_a_mapping_may_leave_everything_alone(mapping: dict[str, None], model: Any) -> None:
    module = model()
    quantize_(module, FqnToConfig(mapping))
    assert not configs(module)


def test_table(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "xmoe.torch_backend.quantize")
    quantize_(Model(), FP8, filter_fn=experts)
    assert "quantize_: 6 of 7 expert parameters" in caplog.text
    assert "layers.1.experts.w2  [4, 32, 48]  float32  fp8_rowwise" in caplog.text
    caplog.clear()
    quantize_(Model(), FP8, filter_fn=experts, verbose=False)
    assert not caplog.records


def test_unused_keys_are_named(caplog: pytest.LogCaptureFixture) -> None:
    quantize_(Model(), FqnToConfig({"re:.*experts": FP8, "layers.2.experts": MX}))
    assert "no expert parameter matches 'layers.2.experts'" in caplog.text


@pytest.mark.parametrize(
    ("model", "config", "filter_fn", "message"),
    [
        (
            Model,
            FP8,
            lambda m, f: "expertz" in f,
            r"^filter_fn matches none .* to match some of: position, l",
        ),
        (
            Model,
            FqnToConfig({"expertz": FP8}),
            None,
            r"^config \(keys: 'expertz'\) matches none .*layers\.0\.exp",
        ),
        (
            Model,
            FqnToConfig({"layers": FP8, "expertz": MX}),
            lambda m, f: "position" in f,
            r"^filter_fn with config \(keys: 'layers', 'expertz'\) matches none",
        ),
        (lambda: nn.Linear(4, 4), FP8, None, r"^model has no parameter with three dimensions"),
        (Model, None, None, r"^config is None; give a GroupedMMConfig, a LinearConfig, an FqnToConfig or one of b"),
        (Model, "fp9", None, r"^recipe='fp9' is not known; use one of bf16, "),
    ],
)
def test_refusals(model: Any, config: Any, filter_fn: Any, message: str) -> None:
    module = model()
    with pytest.raises(ValueError, match=message):
        quantize_(module, config, filter_fn)
    assert not configs(module)


def test_load_state_dict_assign_keeps_the_wrapper() -> None:
    model = Model()
    quantize_(model, FP8, filter_fn=experts)
    state = {name: torch.randn_like(x) for name, x in Model().state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert len(configs(model)) == 6
    assert model.layers[0].experts.w1.data_ptr() == state["layers.0.experts.w1"].data_ptr()
    assert isinstance(model.layers[0].experts.w1, nn.Parameter)
    assert type(state["layers.0.experts.w1"]) is torch.Tensor


def test_meta_model() -> None:
    with torch.device("meta"):
        model = MoE(32, 48, 4, 2)
    quantize_(model, FP8, filter_fn=experts)
    model.to_empty(device="cpu")
    model.init_weights()
    assert len(configs(model)) == 3
    y, _ = model(torch.randn(5, 32))
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_nothing_multiplies(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"experts": nn.ParameterDict({"w1": torch.zeros(2, 16, 16)})})
    model["experts"]["w1"] = nn.Parameter(torch.zeros(2, 16, 16).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=rf"experts\.w1 is {dtype}; cast the model with model\.to\(torch\.bfloat16\)"):
        quantize_(model, "fp8_rowwise")
    assert type(model["experts"]["w1"]) is nn.Parameter
    with pytest.raises(ValueError, match=r"filter_fn matches none"):
        quantize_(model, "fp8_rowwise", lambda module, fqn: False)
