"""Recipes and configs: what to quantize, how, and with which kernels. Framework-neutral, immutable, hashable.

A *recipe* is a name ("mxfp8_rceil_wgrad_with_hp"). A *config* is a recipe's fields, open to change one by one:

    config = config_from_recipe("fp8_rowwise")
    config = FP8GroupedMMConfig(accumulation="precise")      # enum fields take a member or its string
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, ClassVar, Self, TypeVar, cast

from xmoe import toml
from xmoe.dtypes import dtype_name


class KernelPreference(StrEnum):
    """Which implementation computes the quantizers and GEMMs."""

    AUTO = "auto"
    """The fastest that the device has."""
    TRITON = "triton"
    """xmoe's Triton kernels."""
    TORCH = "torch"
    """PyTorch's own scaled grouped GEMM, where it applies."""
    EMULATED = "emulated"
    """Plain PyTorch or plain JAX, on any device."""


class ScaleCalculationMode(StrEnum):
    """How a block's E8M0 scale follows from its amax (``docs/design.md``, Numerics)."""

    RCEIL = "rceil"
    """2^ceil(log2(amax/448)): nothing saturates."""
    FLOOR = "floor"
    """2^(floor(log2 amax) - 8): the rule of OCP Microscaling Formats v1.0; values above 448 scales saturate."""


class Accumulation(StrEnum):
    """How a GEMM's partial sums are kept."""

    FAST = "fast"
    """In the tensor core."""
    PRECISE = "precise"
    """Promoted to float32 registers after every K tile."""


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

_Enum = TypeVar("_Enum", bound=StrEnum)


def _member(name: str, value: Any, enum: type[_Enum]) -> _Enum:
    if isinstance(value, str):
        try:
            return enum(value)
        except ValueError:
            pass
    raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(enum)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedMMConfig:
    """What the configs of all formats share; use one of the subclasses, or ``config_from_recipe``.

    Raises ValueError for an unknown field, or for a wrong value, naming the field, the value and the accepted ones.
    """

    kernel_preference: KernelPreference = KernelPreference.AUTO
    out_dtype: str | None = None
    """Of the forward's output: "bfloat16" or "float32", or that torch, numpy or JAX dtype; None: that of A."""
    wgrad_with_hp: bool = False
    """Compute the weight gradient from bfloat16 operands."""
    accumulation: Accumulation = Accumulation.FAST
    """No effect on blockwise operands: their partial products are scaled and added in float32 registers anyway."""
    debug: bool = False
    """Check the offsets at every call, which waits for the device: for debugging only. On a bad one PyTorch raises
    ValueError and JAX logs an error: an exception on one shard would leave the others waiting for it."""

    _key: str = field(init=False, repr=False, compare=False)

    recipe_enum: ClassVar[type[StrEnum]]

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        if cls is GroupedMMConfig:
            raise ValueError(f"GroupedMMConfig is a base class; use one of {', '.join(sorted(_CLASSES))}")
        if args:
            raise ValueError(f"{cls.__name__} takes keywords only, got {args!r}; a recipe goes to .from_recipe()")
        _check_names(cls, fields)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self._set("kernel_preference", _member("kernel_preference", self.kernel_preference, KernelPreference))
        self._set("accumulation", _member("accumulation", self.accumulation, Accumulation))
        if self.out_dtype is not None:
            self._set("out_dtype", dtype_name(self.out_dtype, "out_dtype"))
        for name in ("wgrad_with_hp", "debug"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a boolean; use True or False")
        self._check()
        fields = self.to_dict()
        items = (f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in fields.items())
        self._set("_key", ";".join(items).removeprefix("recipe="))

    def _check(self) -> None:
        """Checks and normalises what a subclass adds."""

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def format(self) -> str:
        """Of the operands: "bf16", "fp8_rowwise", "fp8_blockwise", "mxfp8_rceil" or "mxfp8_floor"."""
        raise NotImplementedError

    @property
    def recipe(self) -> str:
        """The nearest recipe: what ``to_dict`` counts the other fields' differences from."""
        return self.format + ("_wgrad_with_hp" if self.wgrad_with_hp else "")

    @classmethod
    def from_recipe(cls, recipe: StrEnum | str) -> Self:
        """The config of a recipe, given as an enum member or as its name. Raises ValueError on another class's one."""
        owner = _OWNERS.get(recipe) if isinstance(recipe, str) else None
        if owner is None:
            names = [name for name in RECIPES if issubclass(_OWNERS[name], cls)]
            raise ValueError(f"recipe={recipe!r} is not known; use one of {', '.join(names)}")
        if not issubclass(owner, cls):
            raise ValueError(f"recipe={str(recipe)!r} is not a recipe of {cls.__name__}; use {owner.__name__}")
        return cast(Self, _PRESETS[recipe])

    def to_key(self) -> str:
        """The config as one canonical line, "fp8_rowwise;accumulation=precise"; ``config_from_key`` reads it."""
        return self._key

    def to_dict(self) -> dict[str, Any]:
        """{"recipe": its name, and every field that differs from the recipe}; plain strings and booleans."""
        preset = _recipe_fields(self.recipe)
        differing = {}
        for f in _fields(type(self)):
            value = getattr(self, f.name)
            if value != preset.get(f.name, f.default):
                differing[f.name] = str(value) if isinstance(value, StrEnum) else value
        return {"recipe": self.recipe, **differing}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The config of ``to_dict``'s form. Raises ValueError on an unknown or missing key or a wrong value."""
        if "recipe" not in fields:
            raise ValueError(f"recipe is missing in {dict(fields)!r}; add recipe = one of {', '.join(RECIPES)}")
        base = cls.from_recipe(fields["recipe"])
        overrides = {name: value for name, value in fields.items() if name != "recipe"}
        _check_names(type(base), overrides, "recipe")
        return dataclasses.replace(base, **overrides)

    def to_toml(self) -> str:
        """The config as a file's text: one table, ``[quantize]``."""
        return toml.dumps({"quantize": self.to_dict()})

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """The config in the ``[quantize]`` table of ``text``. Raises ValueError on bad TOML, keys or values."""
        return cls.from_dict(quantize_table(text))


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
        self._set("granularity", _member("granularity", self.granularity, Granularity))

    @property
    def format(self) -> str:
        return f"fp8_{self.granularity}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MXFP8GroupedMMConfig(GroupedMMConfig):
    """e4m3 with one E8M0 scale per 32 elements along the contraction (OCP Microscaling Formats v1.0)."""

    scale_calculation_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL

    recipe_enum = MXFP8GroupedMMRecipe

    def _check(self) -> None:
        mode = _member("scale_calculation_mode", self.scale_calculation_mode, ScaleCalculationMode)
        self._set("scale_calculation_mode", mode)

    @property
    def format(self) -> str:
        return f"mxfp8_{self.scale_calculation_mode}"

    @property
    def recipe(self) -> str:
        if self.kernel_preference is KernelPreference.EMULATED:
            return f"mxfp8_emulated_{self.scale_calculation_mode}"
        return self.format + ("_wgrad_with_hp" if self.wgrad_with_hp else "")


_CLASSES: dict[str, type[GroupedMMConfig]] = {
    cls.__name__: cls for cls in (BF16GroupedMMConfig, FP8GroupedMMConfig, MXFP8GroupedMMConfig)
}
_OWNERS: dict[str, type[GroupedMMConfig]] = {str(r): cls for cls in _CLASSES.values() for r in cls.recipe_enum}


def _recipe_fields(recipe: str) -> dict[str, Any]:
    """What a recipe's name says, as config fields."""
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


def _fields(cls: type[GroupedMMConfig]) -> tuple[dataclasses.Field[Any], ...]:
    return tuple(f for f in dataclasses.fields(cls) if f.init)


def _check_names(cls: type[GroupedMMConfig], given: Mapping[str, Any], *also: str) -> None:
    accepted = [*also, *(f.name for f in _fields(cls))]
    unknown = [name for name in given if name not in accepted]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a field of {cls.__name__}; the fields are {', '.join(accepted)}")


_PRESETS = {recipe: owner(**_recipe_fields(recipe)) for recipe, owner in _OWNERS.items()}
"""Every recipe's config, made once: torch.compile looks it up, where it could not trace the making."""


def config_from_recipe(recipe: StrEnum | str) -> GroupedMMConfig:
    """The config of any recipe: a member of a recipe enum or a name in ``RECIPES``. Raises ValueError on others."""
    return GroupedMMConfig.from_recipe(recipe)


def as_config(config: Any) -> GroupedMMConfig:
    """A config as it is, a recipe (enum member or name) as its config, None as the bfloat16 baseline.

    Raises ValueError on anything else.
    """
    if isinstance(config, GroupedMMConfig):
        return config
    if config is None or isinstance(config, str):
        return config_from_recipe(BF16GroupedMMRecipe.BF16 if config is None else config)
    raise ValueError(f"config={config!r} is not a config; give a GroupedMMConfig or one of {', '.join(RECIPES)}")


@cache
def config_from_key(key: str) -> GroupedMMConfig:
    """The config that ``GroupedMMConfig.to_key`` wrote as ``key``. Cached: custom ops call it every time they run."""
    recipe, *items = key.split(";")
    booleans = {"true": True, "false": False}
    fields = {name: booleans.get(value, value) for name, _, value in (item.partition("=") for item in items)}
    return GroupedMMConfig.from_dict({"recipe": recipe, **fields})


def quantize_table(text: str) -> dict[str, Any]:
    """The ``[quantize]`` table of a TOML file's text; other tables are left to others. Raises ValueError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not valid TOML: {error}") from error
    table = document.get("quantize")
    if not isinstance(table, dict):
        found = ", ".join(document) or "nothing"
        raise ValueError(f"no [quantize] table (found: {found}); add one with recipe = one of {', '.join(RECIPES)}")
    return table
