"""Recipes, configs and their three texts: dict, TOML and key."""

import copy
import dataclasses
import itertools
import pickle
import tomllib

import hypothesis.strategies as st
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given

import xmoe
from xmoe import toml
from xmoe.config import (
    RECIPES,
    Accumulation,
    BF16GroupedMMConfig,
    BF16GroupedMMRecipe,
    FP8GroupedMMConfig,
    FP8GroupedMMRecipe,
    Granularity,
    GroupedMMConfig,
    KernelPreference,
    MXFP8GroupedMMConfig,
    MXFP8GroupedMMRecipe,
    ScaleCalculationMode,
    as_config,
    config_from_key,
    config_from_recipe,
)

CLASSES = (BF16GroupedMMConfig, FP8GroupedMMConfig, MXFP8GroupedMMConfig)


def all_configs():
    """Every combination of every field's values."""
    common = itertools.product(
        KernelPreference, (None, "bfloat16", "float32"), (False, True), Accumulation, (False, True)
    )
    for preference, out_dtype, hp, accumulation, debug in common:
        fields = {"kernel_preference": preference, "out_dtype": out_dtype, "accumulation": accumulation, "debug": debug}
        if not hp:
            yield BF16GroupedMMConfig(**fields)
        for granularity in Granularity:
            yield FP8GroupedMMConfig(**fields, wgrad_with_hp=hp, granularity=granularity)
        for mode in ScaleCalculationMode:
            yield MXFP8GroupedMMConfig(**fields, wgrad_with_hp=hp, scale_calculation_mode=mode)


# --- Recipes ----------------------------------------------------------------------------------------------------------

EXPECTED = {
    "bf16": BF16GroupedMMConfig(),
    "fp8_rowwise": FP8GroupedMMConfig(),
    "fp8_rowwise_wgrad_with_hp": FP8GroupedMMConfig(wgrad_with_hp=True),
    "fp8_blockwise": FP8GroupedMMConfig(granularity=Granularity.BLOCKWISE),
    "fp8_blockwise_wgrad_with_hp": FP8GroupedMMConfig(granularity=Granularity.BLOCKWISE, wgrad_with_hp=True),
    "mxfp8_rceil": MXFP8GroupedMMConfig(),
    "mxfp8_rceil_wgrad_with_hp": MXFP8GroupedMMConfig(wgrad_with_hp=True),
    "mxfp8_emulated_rceil": MXFP8GroupedMMConfig(kernel_preference=KernelPreference.EMULATED),
    "mxfp8_floor": MXFP8GroupedMMConfig(scale_calculation_mode=ScaleCalculationMode.FLOOR),
    "mxfp8_floor_wgrad_with_hp": MXFP8GroupedMMConfig(
        scale_calculation_mode=ScaleCalculationMode.FLOOR, wgrad_with_hp=True
    ),
    "mxfp8_emulated_floor": MXFP8GroupedMMConfig(
        scale_calculation_mode=ScaleCalculationMode.FLOOR, kernel_preference=KernelPreference.EMULATED
    ),
}


def test_recipes_are_these_with_the_baseline_first():
    assert tuple(EXPECTED) == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_gives_its_config(recipe):
    config = config_from_recipe(recipe)
    assert config == EXPECTED[recipe]
    assert config.recipe == config.to_key() == recipe
    assert config.to_dict() == {"recipe": recipe}
    assert type(config).from_recipe(recipe) == config


@pytest.mark.parametrize("enum", [BF16GroupedMMRecipe, FP8GroupedMMRecipe, MXFP8GroupedMMRecipe])
def test_recipe_enums(enum):
    (cls,) = (c for c in CLASSES if c.recipe_enum is enum)
    for member in enum:
        assert member.name.lower() == member.value
        assert cls.from_recipe(member) == cls.from_recipe(member.value) == config_from_recipe(member)


@pytest.mark.parametrize(
    ("config", "fmt"),
    [
        (BF16GroupedMMConfig(), "bf16"),
        (FP8GroupedMMConfig(wgrad_with_hp=True), "fp8_rowwise"),
        (FP8GroupedMMConfig(granularity="blockwise"), "fp8_blockwise"),
        (MXFP8GroupedMMConfig(kernel_preference=KernelPreference.EMULATED), "mxfp8_rceil"),
        (MXFP8GroupedMMConfig(scale_calculation_mode=ScaleCalculationMode.FLOOR, wgrad_with_hp=True), "mxfp8_floor"),
    ],
)
def test_format(config, fmt):
    assert config.format == fmt


@pytest.mark.parametrize(
    ("cls", "recipe", "message"),
    [
        (FP8GroupedMMConfig, "mxfp8_rceil", "not a recipe of FP8GroupedMMConfig; use MXFP8GroupedMMConfig"),
        (MXFP8GroupedMMConfig, BF16GroupedMMRecipe.BF16, "'bf16' is not a recipe of .*; use BF16GroupedMMConfig"),
        (FP8GroupedMMConfig, "fp8", "'fp8' is not known; use one of fp8_rowwise, .*, fp8_blockwise_wgrad_with_hp$"),
        (GroupedMMConfig, "fp8", "'fp8' is not known; use one of bf16, fp8_rowwise, .*, mxfp8_emulated_floor$"),
        (GroupedMMConfig, None, "recipe=None is not known"),
    ],
)
def test_wrong_recipe(cls, recipe, message):
    with pytest.raises(ValueError, match=message):
        cls.from_recipe(recipe)


# --- Fields -----------------------------------------------------------------------------------------------------------


def test_enum_fields_take_strings():
    config = MXFP8GroupedMMConfig(kernel_preference="triton", scale_calculation_mode="floor", accumulation="precise")
    assert config.kernel_preference is KernelPreference.TRITON
    assert config.scale_calculation_mode is ScaleCalculationMode.FLOOR
    assert config.accumulation is Accumulation.PRECISE
    assert config == MXFP8GroupedMMConfig(
        kernel_preference=KernelPreference.TRITON,
        scale_calculation_mode=ScaleCalculationMode.FLOOR,
        accumulation=Accumulation.PRECISE,
    )


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        (
            "bfloat16",
            [
                "bfloat16",
                "bf16",
                "torch.bfloat16",
                torch.bfloat16,
                ml_dtypes.bfloat16,
                jnp.bfloat16,
                jnp.ones(1, "bfloat16").dtype,
            ],
        ),
        ("float32", ["float32", "fp32", "float", torch.float32, torch.float, jnp.float32, np.float32, np.dtype("f4")]),
    ],
)
def test_dtypes_become_one_neutral_name(name, dtypes):
    for dtype in dtypes:
        assert FP8GroupedMMConfig(out_dtype=dtype).out_dtype == name


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float16",
        torch.float16,
        np.float16,
        "garbage.bfloat16",
        "int8",
        torch.float8_e4m3fn,
        torch.float64,
        np.int32,
        float,
        3,
        "",
    ],
)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"^out_dtype=.* not supported; use one of bfloat16, float32$"):
        FP8GroupedMMConfig(out_dtype=dtype)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (FP8GroupedMMConfig, {"kernel_preference": "cuda"}, "kernel_preference='cuda'.*auto, triton, torch, emulated$"),
        (FP8GroupedMMConfig, {"kernel_preference": None}, "kernel_preference=None"),
        (FP8GroupedMMConfig, {"accumulation": "slow"}, "accumulation='slow'.*fast, precise$"),
        (MXFP8GroupedMMConfig, {"scale_calculation_mode": "even"}, "scale_calculation_mode='even'.*rceil, floor$"),
        (FP8GroupedMMConfig, {"granularity": "tensorwise"}, "granularity='tensorwise'.*rowwise, blockwise$"),
        (MXFP8GroupedMMConfig, {"granularity": "rowwise"}, "granularity: not a field of MXFP8"),
        (FP8GroupedMMConfig, {"wgrad_with_hp": "true"}, "wgrad_with_hp='true' is not a boolean"),
        (FP8GroupedMMConfig, {"debug": 1}, "debug=1 is not a boolean"),
        (
            FP8GroupedMMConfig,
            {"recipe": "fp8_rowwise"},
            "recipe: not a field of FP8GroupedMMConfig; .*debug, command_buffer, granularity$",
        ),
        (FP8GroupedMMConfig, {"scale_calculation_mode": "rceil"}, "scale_calculation_mode: not a field of FP8"),
        (FP8GroupedMMConfig, {"_key": ""}, "_key: not a field"),
        (BF16GroupedMMConfig, {"wgrad_with_hp": True}, "wgrad_with_hp=True means nothing to BF16GroupedMMConfig"),
        (GroupedMMConfig, {}, "base class; use one of BF16GroupedMMConfig, FP8GroupedMMConfig, MXFP8GroupedMMConfig$"),
    ],
)
def test_wrong_fields(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**fields)


def test_keywords_only():
    with pytest.raises(ValueError, match=r"takes keywords only, got \('fp8_rowwise',\)"):
        FP8GroupedMMConfig("fp8_rowwise")


def test_frozen_hashable_comparable():
    configs = list(all_configs())
    assert len(set(configs)) == len(configs)
    assert BF16GroupedMMConfig() != FP8GroupedMMConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        configs[0].debug = True
    with pytest.raises((AttributeError, TypeError)):  # slotted
        object.__setattr__(configs[0], "extra", 1)


def test_copies_are_equal():
    for config in all_configs():
        for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
            assert (other, hash(other), other.to_key()) == (config, hash(config), config.to_key())


def test_replace_makes_a_new_key():
    config = dataclasses.replace(FP8GroupedMMConfig(), out_dtype="bf16", debug=True)
    assert config.to_key() == "fp8_rowwise;out_dtype=bfloat16;debug=true"
    with pytest.raises(ValueError, match="depth: not a field"):
        dataclasses.replace(config, depth=1)


# --- Key, dict, TOML --------------------------------------------------------------------------------------------------


def test_every_config_round_trips():
    configs = list(all_configs())
    for config in configs:
        assert config_from_key(config.to_key()) == config
        assert "\n" not in config.to_key()
        assert GroupedMMConfig.from_dict(config.to_dict()) == config
        assert type(config).from_toml(config.to_toml()) == config
        assert tomllib.loads(config.to_toml()) == {"quantize": config.to_dict()}
        assert all(type(value) in (str, bool) for value in config.to_dict().values())
    assert len({config.to_key() for config in configs}) == len(configs)


def test_key_is_cached():
    assert config_from_key("fp8_rowwise;debug=true") is config_from_key("fp8_rowwise;debug=true")


def test_key_is_a_constant_to_the_compiler():
    config = MXFP8GroupedMMConfig(accumulation="precise")

    @torch.compile(backend="eager", fullgraph=True)
    def length(x):
        return x * len(config.to_key())

    assert length(torch.ones(())).item() == len("mxfp8_rceil;accumulation=precise")


def test_nearest_recipe_and_differences():
    config = MXFP8GroupedMMConfig(kernel_preference="emulated", wgrad_with_hp=True, out_dtype="float32")
    assert config.to_dict() == {"recipe": "mxfp8_emulated_rceil", "out_dtype": "float32", "wgrad_with_hp": True}
    triton = MXFP8GroupedMMConfig(kernel_preference="triton", wgrad_with_hp=True)
    assert triton.to_dict() == {"recipe": "mxfp8_rceil_wgrad_with_hp", "kernel_preference": "triton"}


def test_granularity_is_the_recipes():
    config = FP8GroupedMMConfig(granularity="blockwise", out_dtype="float32")
    assert config.to_key() == "fp8_blockwise;out_dtype=float32"
    assert config.to_dict() == {"recipe": "fp8_blockwise", "out_dtype": "float32"}
    assert FP8GroupedMMConfig().granularity is Granularity.ROWWISE


def test_a_recipes_own_field_can_be_overridden():
    config = GroupedMMConfig.from_dict({"recipe": "mxfp8_emulated_floor", "kernel_preference": "auto"})
    assert config == config_from_recipe("mxfp8_floor")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[quantize]\n", "recipe is missing in .*bf16, fp8_rowwise"),
        ('[quantize]\nrecipe = "fp9"', "recipe='fp9' is not known"),
        ("[quantize]\nrecipe = 8", "recipe=8 is not known"),
        ('[quantize]\nrecipe = "bf16"\nacumulation = "fast"', "acumulation: not a field of BF16.* are recipe, kernel_"),
        ('[quantize]\nrecipe = "bf16"\naccumulation = "exact"', "accumulation='exact'"),
        ('[quantise]\nrecipe = "bf16"', r"no \[quantize\] table \(found: quantise\)"),
        ("", r"no \[quantize\] table \(found: nothing\)"),
        ("quantize = 1", r"no \[quantize\] table"),
        ("[quantize", "not valid TOML"),
    ],
)
def test_bad_toml(text, message):
    with pytest.raises(ValueError, match=message):
        GroupedMMConfig.from_toml(text)


def test_other_tables_are_left_to_others():
    text = '[train]\nsteps = 3\n[quantize]\nrecipe = "fp8_rowwise"\n'
    assert GroupedMMConfig.from_toml(text) == FP8GroupedMMConfig()
    with pytest.raises(ValueError, match="use FP8GroupedMMConfig"):
        MXFP8GroupedMMConfig.from_toml(text)


# TOML texts hold no lone surrogates; every other character must survive, in keys too.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = (
    TEXT | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.lists(TEXT, max_size=3)
)
TABLES = st.dictionaries(TEXT, st.recursive(VALUES, lambda inner: st.dictionaries(TEXT, inner, max_size=4)), max_size=4)


@given(TABLES, st.integers(0, 3))
def test_toml_writer(table, sections):
    assert tomllib.loads(toml.dumps(table, sections=sections)) == table


def test_toml_writer_keeps_the_order_of_inline_tables():
    table = {"quantize": {"fqn_to_config": {"b": "x", "a.c": {"recipe": "y"}, "a": "z"}}}
    assert toml.dumps(table) == '[quantize.fqn_to_config]\nb = "x"\n"a.c" = { recipe = "y" }\na = "z"\n'


def test_toml_writer_names_what_it_cannot_write():
    with pytest.raises(ValueError, match=r"^a.b=None has no TOML form"):
        toml.dumps({"a": {"b": None}})


def test_package_exports():
    for name in ("FP8GroupedMMConfig", "FqnToConfig", "MoETrainingConfig", "config_from_recipe", "load_toml"):
        assert hasattr(xmoe, name)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = xmoe.quantise


@pytest.mark.parametrize("recipe", RECIPES)
def test_as_config(recipe):
    config = config_from_recipe(recipe)
    assert as_config(config) is config
    assert as_config(recipe) == config
    (member,) = (member for member in type(config).recipe_enum if member == recipe)
    assert as_config(member) == config


def test_as_config_of_nothing_is_the_baseline():
    assert as_config(None) == BF16GroupedMMConfig()


@pytest.mark.parametrize("value", [3, {"recipe": "bf16"}])
def test_as_config_refuses_other_things(value):
    with pytest.raises(ValueError, match=r"^config=.* is not a config; give a GroupedMMConfig or one of bf16, "):
        as_config(value)
    with pytest.raises(ValueError, match=r"^config is the class FP8GroupedMMConfig; give an instance"):
        as_config(FP8GroupedMMConfig)
    with pytest.raises(ValueError, match=r"^config='fp9' is not known; use one of bf16, .*, or None"):
        as_config("fp9")
