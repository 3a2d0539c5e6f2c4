"""Recipes and configs of expert layers: their grouped GEMMs."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from xmoe.dtypes import dtype_name
from xmoe.gemm_config import Accumulation, GemmConfig, KernelPreference, ScaleCalculationMode, member, register


class Granularity(StrEnum):
    """What shares one scale of ``FP8GroupedMMConfig`` (``docs/design.md``, Operand layouts)."""

    ROWWISE = "rowwise"
    """A row of the operand, all along its contraction (wgrad: a group's tokens)."""
    BLOCKWISE = "blockwise"
    """128 elements of a row (wgrad: 128 tokens), or a block of 128x128 weights, as in DeepSeek-V3."""


class BF16GroupedMMRecipe(StrEnum):
    """Recipes of ``BF16GroupedMMConfig``."""

    BF16 = "bf16"


class FP8GroupedMMRecipe(StrEnum):
    """Recipes of ``FP8GroupedMMConfig``."""

    FP8_ROWWISE = "fp8_rowwise"
    FP8_ROWWISE_WGRAD_WITH_HP = "fp8_rowwise_wgrad_with_hp"
    FP8_BLOCKWISE = "fp8_blockwise"
    FP8_BLOCKWISE_WGRAD_WITH_HP = "fp8_blockwise_wgrad_with_hp"


class MXFP8GroupedMMRecipe(StrEnum):
    """Recipes of ``MXFP8GroupedMMConfig``."""

    MXFP8_RCEIL = "mxfp8_rceil"
    MXFP8_RCEIL_WGRAD_WITH_HP = "mxfp8_rceil_wgrad_with_hp"
    MXFP8_EMULATED_RCEIL = "mxfp8_emulated_rceil"
    MXFP8_FLOOR = "mxfp8_floor"
    MXFP8_FLOOR_WGRAD_WITH_HP = "mxfp8_floor_wgrad_with_hp"
    MXFP8_EMULATED_FLOOR = "mxfp8_emulated_floor"


RECIPES: tuple[str, ...] = tuple(
    str(recipe) for family in (BF16GroupedMMRecipe, FP8GroupedMMRecipe, MXFP8GroupedMMRecipe) for recipe in family
)
"""Every recipe's name, the baseline first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedMMConfig(GemmConfig):
    """What the configs of all expert formats share; use one of the subclasses, or ``config_from_recipe``.

    Raises ValueError for an unknown field, or for a wrong value, naming the field, the value and the accepted ones.
    """

    out_dtype: str | None = None
    """Of the forward's output: "bfloat16" or "float32", or that torch, numpy or JAX dtype; None: that of A."""
    wgrad_with_hp: bool = False
    """Compute the weight gradient from bfloat16 operands."""
    accumulation: Accumulation = Accumulation.FAST
    """No effect on blockwise operands: their partial products are scaled and added in float32 registers anyway."""
    debug: bool = False
    """Check the offsets at every call, which waits for the device: for debugging only. On a bad one PyTorch raises
    ValueError and JAX logs an error: an exception on one shard would leave the others waiting for it. JAX also checks
    that an ``order`` is a permutation."""
    command_buffer: bool = True
    """In JAX on a GPU: let XLA record the kernels into a CUDA graph and replay them without Python. No effect in
    PyTorch, where who calls decides what is captured, nor on any number."""

    def _check_common(self) -> None:
        self._set("accumulation", member("accumulation", self.accumulation, Accumulation))
        if self.out_dtype is not None:
            self._set("out_dtype", dtype_name(self.out_dtype, "out_dtype"))
        self._check_booleans("wgrad_with_hp", "debug", "command_buffer")

    @property
    def format(self) -> str:
        """Of the operands: "bf16", "fp8_rowwise", "fp8_blockwise", "mxfp8_rceil" or "mxfp8_floor"."""
        raise NotImplementedError

    @property
    def recipe(self) -> str:
        return self.format + ("_wgrad_with_hp" if self.wgrad_with_hp else "")

    @classmethod
    def recipe_fields(cls, recipe: str) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if recipe.startswith("fp8"):
            fields["granularity"] = Granularity.BLOCKWISE if "blockwise" in recipe else Granularity.ROWWISE
        if recipe.startswith("mxfp8"):
            floor = "floor" in recipe
            fields["scale_calculation_mode"] = ScaleCalculationMode.FLOOR if floor else ScaleCalculationMode.RCEIL
        if "emulated" in recipe:
            fields["kernel_preference"] = KernelPreference.EMULATED
        if recipe.endswith("_wgrad_with_hp"):
            fields["wgrad_with_hp"] = True
        return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class BF16GroupedMMConfig(GroupedMMConfig):
    """The bfloat16 baseline: every GEMM on bfloat16 operands, no scales."""

    recipe_enum = BF16GroupedMMRecipe

    def _check(self) -> None:
        if self.wgrad_with_hp:
            raise ValueError("wgrad_with_hp=True means nothing to BF16GroupedMMConfig, all of it is bf16; leave it out")

    @property
    def format(self) -> str:
        return "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class FP8GroupedMMConfig(GroupedMMConfig):
    """e4m3 with float32 power-of-two scales, one for a row of each operand along its contraction or for a block."""

    granularity: Granularity = Granularity.ROWWISE

    recipe_enum = FP8GroupedMMRecipe

    def _check(self) -> None:
        self._set("granularity", member("granularity", self.granularity, Granularity))

    @property
    def format(self) -> str:
        return f"fp8_{self.granularity}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MXFP8GroupedMMConfig(GroupedMMConfig):
    """e4m3 with one E8M0 scale per 32 elements along the contraction (OCP Microscaling Formats v1.0)."""

    scale_calculation_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL

    recipe_enum = MXFP8GroupedMMRecipe

    def _check(self) -> None:
        mode = member("scale_calculation_mode", self.scale_calculation_mode, ScaleCalculationMode)
        self._set("scale_calculation_mode", mode)

    @property
    def format(self) -> str:
        return f"mxfp8_{self.scale_calculation_mode}"

    @property
    def recipe(self) -> str:
        if self.kernel_preference is KernelPreference.EMULATED:
            return f"mxfp8_emulated_{self.scale_calculation_mode}"
        return self.format + ("_wgrad_with_hp" if self.wgrad_with_hp else "")


register(BF16GroupedMMConfig, FP8GroupedMMConfig, MXFP8GroupedMMConfig)
