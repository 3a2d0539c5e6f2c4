"""Recipes and configs: what to quantize, how, and with which kernels. Framework-neutral, immutable, hashable.

A *recipe* is a name ("mxfp8_rceil_wgrad_with_hp"). A *config* is a recipe's fields, open to change one by one:

    config = config_from_recipe("fp8_rowwise")
    config = FP8GroupedMMConfig(accumulation="precise")      # enum fields take a member or its string

Experts have a ``GroupedMMConfig`` (`xmoe.grouped_config`), linears a ``LinearConfig`` (`xmoe.linear_config`).
"""

from enum import StrEnum
from typing import Any

from xmoe.gemm_config import (
    Accumulation,
    GemmConfig,
    KernelPreference,
    ScaleCalculationMode,
    config_from_key,
    quantize_table,
    recipes,
)
from xmoe.grouped_config import (
    RECIPES,
    BF16GroupedMMConfig,
    BF16GroupedMMRecipe,
    FP8GroupedMMConfig,
    FP8GroupedMMRecipe,
    Granularity,
    GroupedMMConfig,
    MXFP8GroupedMMConfig,
    MXFP8GroupedMMRecipe,
)
from xmoe.linear_config import (
    LINEAR_RECIPES,
    Element,
    Float8LinearConfig,
    Float8LinearRecipeName,
    Gemm,
    LinearConfig,
    LinearGranularity,
    MXLinearConfig,
    MXLinearRecipeName,
)

__all__ = [
    "LINEAR_RECIPES", "RECIPES", "Accumulation", "BF16GroupedMMConfig", "BF16GroupedMMRecipe", "Element",
    "FP8GroupedMMConfig", "FP8GroupedMMRecipe", "Float8LinearConfig", "Float8LinearRecipeName", "Gemm", "GemmConfig",
    "Granularity", "GroupedMMConfig", "KernelPreference", "LinearConfig", "LinearGranularity", "MXFP8GroupedMMConfig",
    "MXFP8GroupedMMRecipe", "MXLinearConfig", "MXLinearRecipeName", "ScaleCalculationMode", "any_config", "as_config",
    "config_from_key", "config_from_recipe", "quantize_table", "recipes",
]  # fmt: skip


def config_from_recipe(recipe: StrEnum | str) -> GroupedMMConfig:
    """The config of any expert recipe: a member of a recipe enum or a name in ``RECIPES``. Raises ValueError on
    others."""
    return GroupedMMConfig.from_recipe(recipe)


def as_config(config: Any) -> GroupedMMConfig:
    """A config of experts as it is, a recipe (enum member or name) as its config, None as the bfloat16 baseline.

    Raises ValueError on anything else.
    """
    if isinstance(config, GroupedMMConfig):
        return config
    if isinstance(config, str) and config not in RECIPES and config not in LINEAR_RECIPES:
        raise ValueError(f"config={config!r} is not known; use one of {', '.join(RECIPES)}, or None for bfloat16")
    if config is None or isinstance(config, str):
        return config_from_recipe(BF16GroupedMMRecipe.BF16 if config is None else config)
    if isinstance(config, GemmConfig):
        raise ValueError(f"config is a {type(config).__name__}, for linears; give a GroupedMMConfig, for experts")
    if isinstance(config, type):
        raise ValueError(f"config is the class {config.__name__}; give an instance, {config.__name__}()")
    from xmoe.fqn import FqnToConfig  # which imports this module

    if isinstance(config, FqnToConfig):
        raise ValueError("config is a FqnToConfig, which is for models; give the GroupedMMConfig of this call")
    raise ValueError(f"config={config!r} is not a config; give a GroupedMMConfig or one of {', '.join(RECIPES)}")


def any_config(config: Any) -> GemmConfig:
    """A config of experts or linears as it is, a recipe of either (enum member or name) as its config.

    Raises ValueError on anything else.
    """
    return config if isinstance(config, GemmConfig) else GemmConfig.from_recipe(config)
