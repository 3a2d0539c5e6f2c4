"""Configs of linears: recipes, what follows from them, texts, refusals."""

import itertools
import pickle
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import pytest
import torch

from xmoe import config_from_key
from xmoe.config import (
    LINEAR_RECIPES,
    RECIPES,
    Accumulation,
    Element,
    Float8LinearConfig,
    Float8LinearRecipeName,
    FP8GroupedMMConfig,
    GemmConfig,
    GroupedMMConfig,
    KernelPreference,
    LinearConfig,
    LinearGranularity,
    MXLinearConfig,
    MXLinearRecipeName,
    ScaleCalculationMode,
    any_config,
    as_config,
    config_from_recipe,
)


def all_configs():
    for hp, pad, preference in itertools.product((False, True), (False, True), KernelPreference):
        common = {"wgrad_with_hp": hp, "pad_inner_dim": pad, "kernel_preference": preference}
        for granularity, accumulation in itertools.product(LinearGranularity, Accumulation):
            for gemm in ("output", "grad_input", "grad_weight"):
                yield Float8LinearConfig(**common, granularity=granularity, **{f"accumulation_{gemm}": accumulation})
        yield Float8LinearConfig(**common, grad_dtype="e4m3")
        for mode in ScaleCalculationMode:
            yield MXLinearConfig(**common, scale_calculation_mode=mode)


def test_every_config_round_trips() -> None:
    configs = set(all_configs())
    assert len({config.to_key() for config in configs}) == len(configs)
    for config in configs:
        assert config_from_key(config.to_key()) == config
        assert GemmConfig.from_dict(config.to_dict()) == config
        assert type(config).from_toml(config.to_toml()) == config
        assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
def test_recipe_gives_its_config(recipe: str) -> None:
    config = any_config(recipe)
    assert config.recipe == config.to_key() == recipe
    assert config == LinearConfig.from_recipe(recipe) == type(config).from_recipe_name(recipe)
    (member,) = (member for member in type(config).recipe_enum if member == recipe)
    assert type(config).from_recipe_name(member) is config
    assert member.name.lower() == member.value


def test_no_recipe_is_of_both_kinds() -> None:
    assert not set(RECIPES) & set(LINEAR_RECIPES)
    with pytest.raises(ValueError, match="'rowwise' is not a recipe of GroupedMMConfig; use Float8LinearConfig"):
        config_from_recipe("rowwise")
    with pytest.raises(ValueError, match="config is a Float8LinearConfig, for linears; give a GroupedMMConfig"):
        as_config(Float8LinearConfig())
    with pytest.raises(ValueError, match="'mxfp4_cutlass' is not known; use one of mxfp8_cublas, "):
        MXLinearConfig.from_recipe_name("mxfp4_cutlass")


def test_what_the_recipes_choose() -> None:
    """As torchao's recipes of these names do."""
    fast, precise = Accumulation.FAST, Accumulation.PRECISE
    for recipe, grad, sums in (
        (Float8LinearRecipeName.TENSORWISE, Element.E5M2, (fast, precise, precise)),
        (Float8LinearRecipeName.ROWWISE, Element.E4M3, (fast, fast, fast)),
        (Float8LinearRecipeName.ROWWISE_WITH_GW_HP, Element.E4M3, (fast, fast, fast)),
    ):
        config = Float8LinearConfig.from_recipe_name(recipe)
        found = config.accumulation_output, config.accumulation_grad_input, config.accumulation_grad_weight
        assert (config.grad_dtype, found) == (grad, sums)
        assert config.wgrad_with_hp == (recipe is Float8LinearRecipeName.ROWWISE_WITH_GW_HP)
    modes = {name: MXLinearConfig.from_recipe_name(name).scale_calculation_mode for name in MXLinearRecipeName}
    assert [name for name, mode in modes.items() if mode == "rceil"] == [MXLinearRecipeName.MXFP8_CUBLAS_RCEIL]
    assert MXLinearConfig() == any_config("mxfp8_cublas")
    assert Float8LinearConfig() == any_config("tensorwise")


def test_keys() -> None:
    config = Float8LinearConfig(granularity="rowwise", accumulation_grad_weight="precise", pad_inner_dim=True)
    assert config.to_key() == "rowwise;pad_inner_dim=true;accumulation_grad_weight=precise"
    rceil = MXLinearConfig(kernel_preference="emulated", scale_calculation_mode="rceil")
    assert rceil.to_key() == "mxfp8_emulated;scale_calculation_mode=rceil"
    assert Float8LinearConfig(wgrad_with_hp=True).to_key() == "tensorwise;wgrad_with_hp=true"


@pytest.mark.parametrize(
    "dtype", ["e4m3", "float8_e4m3fn", torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn, jnp.float8_e4m3fn]
)
def test_dtypes_of_elements(dtype: Any) -> None:
    assert Float8LinearConfig(grad_dtype=dtype).grad_dtype is Element.E4M3
    assert MXLinearConfig(elem_dtype=dtype) == MXLinearConfig()
    assert Float8LinearConfig(grad_dtype=torch.float8_e5m2) == Float8LinearConfig()


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (
            Float8LinearConfig,
            {"granularity": "axiswise"},
            "granularity='axiswise' is not known; use one of tensorw",
        ),
        (Float8LinearConfig, {"grad_dtype": "e3m4"}, "grad_dtype='e3m4' is not known; use one of e4m3, e5m2"),
        (
            Float8LinearConfig,
            {"grad_dtype": "e5m2", "granularity": "rowwise"},
            "grad_dtype='e5m2' goes with granularity='tensorwise' only, got 'rowwise'.*leave grad_dtype out",
        ),
        (
            Float8LinearConfig,
            {"accumulation_output": "slow"},
            "accumulation_output='slow' is not known; use one of",
        ),
        (Float8LinearConfig, {"pad_inner_dim": 1}, "pad_inner_dim=1 is not a boolean"),
        (
            Float8LinearConfig,
            {"emulate": True},
            "emulate: not a field of Float8LinearConfig; the fields are",
        ),
        (MXLinearConfig, {"elem_dtype": "e5m2"}, "elem_dtype='e5m2' has no MX kernels here; use e4m3"),
        (MXLinearConfig, {"block_size": 16}, "block_size=16 is not that of OCP .*; use 32"),
        (LinearConfig, {}, "LinearConfig is a base class; use one of Float8LinearConfig, MXLinearConfig$"),
        (GemmConfig, {}, "GemmConfig is a base class; use one of BF16GroupedMMConfig, .*, MXLinearConfig$"),
    ],
)
def test_wrong_fields(cls: type[GemmConfig], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**fields)


def test_any_config() -> None:
    for config in (FP8GroupedMMConfig(), Float8LinearConfig()):
        assert any_config(config) is config
    assert isinstance(any_config("fp8_rowwise"), GroupedMMConfig)
    with pytest.raises(ValueError, match=r"recipe=3 is not known; use one of bf16, .*, mxfp8_emulated$"):
        any_config(3)
