"""``quantize_`` over linears and experts, and the filters for linears."""

import logging
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xmoe import (
    LINEAR_RECIPES,
    Float8LinearConfig,
    FqnToConfig,
    MXFP8GroupedMMConfig,
    MXFP8GroupedMMRecipe,
    MXLinearConfig,
    MXLinearRecipeName,
    load_toml,
    save_toml,
)
from xmoe.torch_backend import MoE, ScaledGroupedMMTensor, ScaledLinearTensor, filter_fqns, linear_filter, quantize_

ROWWISE = Float8LinearConfig.from_recipe_name("rowwise")


class Model(nn.Module):
    """A linear, a layer of experts, a linear; and one whose outputs are no multiple of 16."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.pre_moe = nn.Linear(dim, dim)
        self.moe = MoE(dim, 48, 4, 2)
        self.post_moe = nn.Linear(dim, 64)
        self.odd = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.post_moe(self.moe(self.pre_moe(x))[0])


def configs(model: nn.Module) -> dict[str, Any]:
    wrapped = (ScaledGroupedMMTensor, ScaledLinearTensor)
    return {name: p.config for name, p in model.named_parameters() if isinstance(p, wrapped)}


EXPERTS = [f"moe.experts.{w}" for w in ("w1", "w2", "w3")]
LINEARS = ["pre_moe.weight", "post_moe.weight"]


def test_experts_and_linears_in_one_call() -> None:
    """As torchao's refactored configs put it (pytorch/ao, pull request 3862), and it trains."""
    model = Model()
    grouped = MXFP8GroupedMMConfig.from_recipe(MXFP8GroupedMMRecipe.MXFP8_RCEIL)
    linear = MXLinearConfig.from_recipe_name(MXLinearRecipeName.MXFP8_CUBLAS_RCEIL)
    config = FqnToConfig(fqn_to_config=OrderedDict([("re:.*experts.*", grouped), ("re:^(pre_moe|post_moe)$", linear)]))
    quantize_(model, config, filter_fn=None)
    assert configs(model) == {
        **dict.fromkeys(EXPERTS, grouped), **dict.fromkeys(["pre_moe.weight", "post_moe.weight"], linear),
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, target, losses = torch.randn(64, 32), torch.randn(64, 64), []
    for _ in range(5):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(type(p.grad) is Tensor for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
def test_a_linear_config_takes_linears_only(recipe: str) -> None:
    model = Model()
    quantize_(model, recipe)
    assert list(configs(model)) == LINEARS


def test_a_grouped_config_takes_experts_only() -> None:
    model = Model()
    quantize_(model, "mxfp8_rceil")
    assert list(configs(model)) == EXPERTS


def test_whole_models_leave_odd_sizes_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    caplog.set_level(logging.INFO, "xmoe.torch_backend.quantize")
    quantize_(model, "rowwise")
    message = (
        "left alone: odd.weight has out_features=10 is not a positive multiple of 16: use 16, or use pad_inner_dim"
    )
    assert message.replace(" has ", ": ") in caplog.text
    assert "quantize_: 2 of 3 linears" in caplog.text
    caplog.clear()
    quantize_(model, FqnToConfig({"re:.*experts": "fp8_rowwise", "_default": "tensorwise"}))
    assert "quantize_: 3 of 3 expert parameters, 2 of 3 linears" in caplog.text


def test_padding_takes_them_all() -> None:
    model = Model(dim=40)
    quantize_(model, Float8LinearConfig(granularity="rowwise", pad_inner_dim=True))
    assert list(configs(model)) == [*LINEARS, "odd.weight"]
    assert model.pre_moe(torch.randn(3, 40)).shape == (3, 40)


def test_one_file() -> None:
    config = FqnToConfig({"re:.*experts": "mxfp8_rceil", "_default": Float8LinearConfig(grad_dtype="e4m3")})
    assert FqnToConfig.from_toml(config.to_toml()) == config


def test_file_of_a_linear_config(tmp_path: Any) -> None:
    for config in (ROWWISE, MXLinearConfig(kernel_preference="emulated", scale_calculation_mode="rceil")):
        save_toml(tmp_path / "linear.toml", config)
        assert load_toml(tmp_path / "linear.toml") == config


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "up": nn.Linear(32, 64), "lm_head": nn.Linear(32, 64)})
    model["lm_head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize("config", [ROWWISE, FqnToConfig({"lm_head": ROWWISE}), FqnToConfig({"_default": ROWWISE})])
def test_a_linear_tied_to_an_embedding_is_refused(config: Any) -> None:
    model = tied()
    message = (
        r"^lm_head\.weight is tied to embed\.weight, which is no linear.*filter_fqns\(\['lm_head'\]\).*or untie it"
    )
    with pytest.raises(ValueError, match=message):
        quantize_(model, config)
    assert not configs(model)


@pytest.mark.parametrize(
    ("config", "filter_fn"),
    [(ROWWISE, filter_fqns(["lm_head"])), (FqnToConfig({"lm_head": None, "_default": ROWWISE}), None)],
)
def test_a_tied_linear_may_be_left_out(config: Any, filter_fn: Any) -> None:
    model = tied()
    quantize_(model, config, filter_fn)
    assert list(configs(model)) == ["up.weight"]
    assert model["lm_head"].weight is model["embed"].weight


def test_tied_linears_stay_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    model["a"].weight = model["b"].weight
    quantize_(model, ROWWISE)
    assert model["a"].weight is model["b"].weight
    assert isinstance(model["a"].weight, ScaledLinearTensor)


def test_attention_of_torch_is_left_alone() -> None:
    """nn.MultiheadAttention reads its projection's weight without calling the module."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2), "up": nn.Linear(32, 64)})
    quantize_(model, ROWWISE)
    assert list(configs(model)) == ["up.weight"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            FqnToConfig({"pre_moe": "fp8_rowwise"}),
            r"config: 'pre_moe' has a FP8GroupedMMConfig and matches only linear weights, such as pre_moe.weight; "
            "give it a LinearConfig",
        ),
        (
            FqnToConfig({"_default": None, "moe.experts.w1": ROWWISE}),
            r"'moe.experts.w1' has a Float8LinearConfig and matches only expert weights, such as moe.experts.w1; give "
            "it a GroupedMMConfig",
        ),
        (FqnToConfig({"post_moe": ROWWISE, "re:.*experts.*": ROWWISE}), r"'re:\.\*experts\.\*' has a Float8Linear"),
        (FqnToConfig({"re:odd": ROWWISE}), r"^odd\.weight: out_features=10 is not a positive multiple of 16: use 16"),
        (
            FqnToConfig({"attention": ROWWISE}),
            r"^config \(keys: 'attention'\) matches none of the weights of nn.L",
        ),
        ("rowwisely", "recipe='rowwisely' is not known; use one of bf16, .*, tensorwise, rowwise"),
    ],
)
def test_refusals(config: Any, message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        quantize_(model, config)
    assert not configs(model)


def test_a_model_without_linears() -> None:
    with pytest.raises(ValueError, match=r"^model has no nn.Linear; a LinearConfig is for the weights of those only"):
        quantize_(nn.Conv1d(16, 16, 3), ROWWISE)


def test_load_state_dict_assign_keeps_the_wrapper() -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    quantize_(model, ROWWISE)
    state = {name: torch.randn_like(x) for name, x in nn.Sequential(nn.Linear(32, 48)).state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert isinstance(model[0].weight, ScaledLinearTensor)
    assert model[0].weight.data_ptr() == state["0.weight"].data_ptr()


# --- Filters ----------------------------------------------------------------------------------------------------------


def test_names_to_leave_out() -> None:
    model = Model()
    quantize_(model, FqnToConfig({"re:.*experts": "fp8_rowwise", "_default": ROWWISE}), filter_fqns(["post", "router"]))
    assert list(configs(model)) == ["pre_moe.weight", *EXPERTS]


def test_what_cannot_be_multiplied_is_left_out() -> None:
    """Odd sizes are no error here, and taken where the recipe pads."""
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "odd": nn.Linear(32, 10)})
    quantize_(model, ROWWISE, filter_fqns())
    assert list(configs(model)) == ["a.weight"]
    padding = Float8LinearConfig(pad_inner_dim=True)
    quantize_(model, padding, filter_fqns(recipe=padding))
    assert list(configs(model)) == ["a.weight", "odd.weight"]


@pytest.fixture
def speeds(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "measured = true\n"
    for K, N, value in ((64, 64, 0.8), (64, 128, 1.06), (128, 64, 1.04), (128, 128, 1.3)):
        table += f'[[speedup]]\nrecipe = "rowwise"\nM = 4096\nK = {K}\nN = {N}\nvalue = {value}\n'
    (tmp_path / "speeds.toml").write_text(table)
    monkeypatch.setattr(linear_filter, "TABLE", tmp_path / "speeds.toml")
    linear_filter._table.cache_clear()
    yield
    linear_filter._table.cache_clear()


@pytest.mark.usefixtures("speeds")
@pytest.mark.parametrize(
    ("K", "N", "gains"),
    [(64, 64, False), (64, 127, False), (64, 128, True), (80, 4096, True), (4096, 64, False), (256, 256, True)],
)
def test_small_linears_are_left_out(K: int, N: int, gains: bool) -> None:
    takes = filter_fqns(["auto_filter_small_kn"], recipe="rowwise")
    module = nn.Linear(K, N, device="meta")
    assert takes(module, "a") == (gains and N % 16 == 0)
    assert linear_filter.gains(K, N, "rowwise") == gains
    assert filter_fqns()(module, "a") == (N % 16 == 0)


def test_the_table_knows_the_recipes_of_torchao() -> None:
    for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
        assert linear_filter.gains(8192, 28672, recipe)
        assert not linear_filter.gains(512, 512, recipe)


def test_names_that_nothing_has_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(32, 32), last=nn.Linear(32, 32)))
    quantize_(model, ROWWISE, filter_fqns(["lasst", "first"]), verbose=False)
    assert "no module has 'lasst' in its name" in caplog.text
    assert [isinstance(layer.weight, ScaledLinearTensor) for layer in model] == [False, True]


@pytest.mark.parametrize(
    ("fqns", "recipe", "message"),
    [
        ("output", None, r"fqns='output' is a string; give a list of parts of names: \['output'\]"),
        (["auto_filter_small_kn"], None, "recipe=None: 'auto_filter_small_kn' needs the recipe"),
        (
            ["auto_filter_small_kn"],
            "mxfp8_emulated",
            "recipe='mxfp8_emulated' has no measured speeds; use",
        ),
        ([], "fp8_rowwise", "is not a recipe of LinearConfig"),
    ],
)
def test_filters_that_cannot_be(fqns: Any, recipe: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filter_fqns(fqns, recipe=recipe)
