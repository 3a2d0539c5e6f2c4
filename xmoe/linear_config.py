"""Recipes and configs of linear layers. Their names, and what the recipes choose, are torchao's, of ``Float8Linear``
(``torchao.float8``) and ``MXLinear`` (``torchao.prototype.mx_formats``); ``docs/linears.md`` lists what differs.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from xmoe.gemm_config import Accumulation, GemmConfig, KernelPreference, ScaleCalculationMode, member, register
from xmoe.grouped_config import FP8GroupedMMConfig, Granularity, GroupedMMConfig, MXFP8GroupedMMConfig
from xmoe.operands import MX_BLOCK


class LinearGranularity(StrEnum):
    """What shares one scale of ``Float8LinearConfig``."""

    TENSORWISE = "tensorwise"
    """The whole operand."""
    ROWWISE = "rowwise"
    """A row of the operand, all along its contraction."""
    BLOCKWISE = "blockwise"
    """128 elements of a row, or a block of 128x128 weights, as in DeepSeek-V3."""


class Element(StrEnum):
    """8-bit floating-point elements (OCP 8-bit Floating Point Specification)."""

    E4M3 = "e4m3"
    """Up to 448, steps of 1/8 of the power of two."""
    E5M2 = "e5m2"
    """Up to 57344, steps of 1/4 of the power of two."""


class Gemm(StrEnum):
    """The GEMMs of a linear layer, by what they give."""

    OUTPUT = "output"
    GRAD_INPUT = "grad_input"
    GRAD_WEIGHT = "grad_weight"


class Float8LinearRecipeName(StrEnum):
    """Recipes of ``Float8LinearConfig``."""

    TENSORWISE = "tensorwise"
    ROWWISE = "rowwise"
    ROWWISE_WITH_GW_HP = "rowwise_with_gw_hp"
    BLOCKWISE = "blockwise"


class MXLinearRecipeName(StrEnum):
    """Recipes of ``MXLinearConfig``. "cublas" names native block-scaled GEMMs, whose numerics any device has here."""

    MXFP8_CUBLAS = "mxfp8_cublas"
    MXFP8_CUBLAS_RCEIL = "mxfp8_cublas_rceil"
    MXFP8_EMULATED = "mxfp8_emulated"


LINEAR_RECIPES: tuple[str, ...] = tuple(
    str(recipe) for family in (Float8LinearRecipeName, MXLinearRecipeName) for recipe in family
)
"""The name of every recipe of linears."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearConfig(GemmConfig):
    """What the configs of linears share; use one of the subclasses. The output has the dtype of the input.

    Raises ValueError for an unknown field, or for a wrong value, naming the field, the value and the accepted ones.
    """

    wgrad_with_hp: bool = False
    """Compute the weight gradient from bfloat16 operands."""
    pad_inner_dim: bool = False
    """Pad in_features and out_features with zeros, at every call, to what the GEMMs need (multiples of 16)."""

    def _check_common(self) -> None:
        self._check_booleans("wgrad_with_hp", "pad_inner_dim")

    def grouped(self, gemm: Gemm) -> GroupedMMConfig | None:
        """The config of the same GEMM as that of a single group; None for a tensorwise operand, which has none."""
        raise NotImplementedError

    @classmethod
    def from_recipe_name(cls, recipe_name: StrEnum | str) -> Self:
        """``from_recipe``, under the name that it has in torchao."""
        return cls.from_recipe(recipe_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8LinearConfig(LinearConfig):
    """fp8 with float32 power-of-two scales, one for a whole operand, for a row along its contraction, or for a block.

    What is None follows from the granularity, as in torchao's recipes: "tensorwise" has gradients in e5m2 and precise
    sums in the two GEMMs of the backward, the others have e4m3 and fast sums throughout.
    """

    granularity: LinearGranularity = LinearGranularity.TENSORWISE
    grad_dtype: Element | None = None
    """Of the gradient of the output; e5m2 with tensorwise scales only. Inputs and weights are e4m3."""
    accumulation_output: Accumulation = Accumulation.FAST
    accumulation_grad_input: Accumulation | None = None
    accumulation_grad_weight: Accumulation | None = None
    """These three have no effect on blockwise operands."""

    recipe_enum = Float8LinearRecipeName

    def _check(self) -> None:
        self._set("granularity", member("granularity", self.granularity, LinearGranularity))
        tensorwise = self.granularity is LinearGranularity.TENSORWISE
        grad_dtype = (Element.E5M2 if tensorwise else Element.E4M3) if self.grad_dtype is None else self.grad_dtype
        self._set("grad_dtype", _element("grad_dtype", grad_dtype))
        if self.grad_dtype is Element.E5M2 and not tensorwise:
            raise ValueError(
                f"grad_dtype='e5m2' goes with granularity='tensorwise' only, got {str(self.granularity)!r}; finer "
                "scales leave e4m3 range enough: leave grad_dtype out"
            )
        for gemm in Gemm:
            name = f"accumulation_{gemm}"
            value = getattr(self, name)
            if value is None:
                value = Accumulation.PRECISE if tensorwise else Accumulation.FAST
            self._set(name, member(name, value, Accumulation))

    @property
    def format(self) -> str:
        """Of the operands: "fp8_tensorwise", "fp8_rowwise" or "fp8_blockwise"."""
        return f"fp8_{self.granularity}"

    @property
    def recipe(self) -> str:
        with_hp = self.wgrad_with_hp and self.granularity is LinearGranularity.ROWWISE
        return f"{self.granularity}_with_gw_hp" if with_hp else str(self.granularity)

    @classmethod
    def recipe_fields(cls, recipe: str) -> dict[str, Any]:
        granularity = recipe.removesuffix("_with_gw_hp")
        return {"granularity": granularity, "wgrad_with_hp": granularity != recipe}

    def grouped(self, gemm: Gemm) -> GroupedMMConfig | None:
        granularity = self.granularity
        if granularity is LinearGranularity.TENSORWISE:
            if gemm is not Gemm.GRAD_WEIGHT or not self.wgrad_with_hp:
                return None
            granularity = LinearGranularity.ROWWISE  # of no consequence to a GEMM in bf16
        return FP8GroupedMMConfig(
            kernel_preference=self.kernel_preference,
            wgrad_with_hp=self.wgrad_with_hp,
            accumulation=getattr(self, f"accumulation_{gemm}"),
            granularity=Granularity(str(granularity)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MXLinearConfig(LinearConfig):
    """e4m3 with one E8M0 scale per 32 elements along the contraction (OCP Microscaling Formats v1.0)."""

    scale_calculation_mode: ScaleCalculationMode = ScaleCalculationMode.FLOOR
    elem_dtype: Element = Element.E4M3
    block_size: int = MX_BLOCK

    recipe_enum = MXLinearRecipeName

    def _check(self) -> None:
        mode = member("scale_calculation_mode", self.scale_calculation_mode, ScaleCalculationMode)
        self._set("scale_calculation_mode", mode)
        self._set("elem_dtype", _element("elem_dtype", self.elem_dtype))
        if self.elem_dtype is not Element.E4M3:
            raise ValueError(f"elem_dtype={str(self.elem_dtype)!r} has no MX kernels here; use e4m3")
        if self.block_size != MX_BLOCK:
            raise ValueError(f"block_size={self.block_size!r} is not that of OCP Microscaling Formats; use {MX_BLOCK}")

    @property
    def format(self) -> str:
        """Of the operands: "mxfp8_rceil" or "mxfp8_floor"."""
        return f"mxfp8_{self.scale_calculation_mode}"

    @property
    def recipe(self) -> str:
        if self.kernel_preference is KernelPreference.EMULATED:
            return "mxfp8_emulated"
        rceil = self.scale_calculation_mode is ScaleCalculationMode.RCEIL
        return "mxfp8_cublas_rceil" if rceil else "mxfp8_cublas"

    @classmethod
    def recipe_fields(cls, recipe: str) -> dict[str, Any]:
        rceil, emulated = recipe.endswith("_rceil"), "emulated" in recipe
        return {
            "scale_calculation_mode": ScaleCalculationMode.RCEIL if rceil else ScaleCalculationMode.FLOOR,
            "kernel_preference": KernelPreference.EMULATED if emulated else KernelPreference.AUTO,
        }

    def grouped(self, gemm: Gemm) -> GroupedMMConfig | None:
        return MXFP8GroupedMMConfig(
            kernel_preference=self.kernel_preference,
            wgrad_with_hp=self.wgrad_with_hp,
            scale_calculation_mode=self.scale_calculation_mode,
        )


def _element(name: str, value: Any) -> Element:
    """``Element`` from a member, its name, or a torch, numpy or JAX dtype ("float8_e4m3fn")."""
    text = getattr(value, "__name__", None) or str(value)
    for element in Element:
        if text.removeprefix("torch.") in (str(element), f"float8_{element}", f"float8_{element}fn"):
            return element
    raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(Element)}")


register(Float8LinearConfig, MXLinearConfig)
