"""Older names, kept working: each warns and says what to write instead."""

import warnings
from enum import StrEnum

from xmoe.config import FP8GroupedMMConfig, GroupedMMConfig, MXFP8GroupedMMConfig


class MoEScalingType(StrEnum):
    """What ``MoETrainingConfig`` quantizes to."""

    FP8_ROWWISE = "fp8_rowwise"
    MXFP8 = "mxfp8"


_REPLACEMENTS: dict[MoEScalingType, tuple[type[GroupedMMConfig], str]] = {
    MoEScalingType.FP8_ROWWISE: (FP8GroupedMMConfig, "FP8_ROWWISE"),
    MoEScalingType.MXFP8: (MXFP8GroupedMMConfig, "MXFP8_RCEIL"),
}


class MoETrainingConfig:
    """Deprecated: ``MoETrainingConfig(scaling_type)`` gives the new config of that type, with a DeprecationWarning.

    Raises ValueError for an unknown ``scaling_type``.
    """

    def __new__(cls, scaling_type: MoEScalingType | str = MoEScalingType.FP8_ROWWISE) -> GroupedMMConfig:
        try:
            kind = MoEScalingType(scaling_type)
        except ValueError:
            accepted = ", ".join(MoEScalingType)
            raise ValueError(f"scaling_type={scaling_type!r} is not known; use one of {accepted}") from None
        config, member = _REPLACEMENTS[kind]
        recipe = config.recipe_enum[member]
        warnings.warn(
            f"MoETrainingConfig(scaling_type=MoEScalingType.{kind.name}) is deprecated; write "
            f"{config.__name__}.from_recipe({config.recipe_enum.__name__}.{recipe.name})",
            DeprecationWarning,
            stacklevel=2,
        )
        return config.from_recipe(recipe)
