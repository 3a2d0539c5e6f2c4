"""What all configs share: their enums, their texts (key, dict, TOML), and the registry of recipes."""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, ClassVar, Self, TypeVar, cast

from xmoe import toml


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


_Enum = TypeVar("_Enum", bound=StrEnum)


def member(name: str, value: Any, enum: type[_Enum]) -> _Enum:
    """The member of `enum` that `value` is or names. Raises ValueError naming `name`, the value and the members."""
    if isinstance(value, str):
        try:
            return enum(value)
        except ValueError:
            pass
    raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(enum)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmConfig:
    """What the configs of all GEMMs share, those of experts (``GroupedMMConfig``) and of linears (``LinearConfig``).

    Raises ValueError for an unknown field, or for a wrong value, naming the field, the value and the accepted ones.
    """

    kernel_preference: KernelPreference = KernelPreference.AUTO

    _key: str = field(init=False, repr=False, compare=False)

    recipe_enum: ClassVar[type[StrEnum]]
    """The names of a class's recipes; a class without is a base."""

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        if not hasattr(cls, "recipe_enum"):
            names = sorted(known.__name__ for known in dict.fromkeys(_OWNERS.values()) if issubclass(known, cls))
            raise ValueError(f"{cls.__name__} is a base class; use one of {', '.join(names)}")
        if args:
            raise ValueError(f"{cls.__name__} takes keywords only, got {args!r}; a recipe goes to .from_recipe()")
        _check_names(cls, fields)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self._set("kernel_preference", member("kernel_preference", self.kernel_preference, KernelPreference))
        self._check_common()
        self._check()
        fields = self.to_dict()
        items = (f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in fields.items())
        self._set("_key", ";".join(items).removeprefix("recipe="))

    def _check_common(self) -> None:
        """Checks and normalises what a base class adds."""

    def _check(self) -> None:
        """Checks and normalises what a config class adds. (No ``super()``: a class with slots is made anew.)"""

    def _check_booleans(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a boolean; use True or False")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def format(self) -> str:
        """Of the operands (docs/design.md, Numerics)."""
        raise NotImplementedError

    @property
    def recipe(self) -> str:
        """The nearest recipe: what ``to_dict`` counts the other fields' differences from."""
        raise NotImplementedError

    @classmethod
    def recipe_fields(cls, recipe: str) -> dict[str, Any]:
        """What a recipe's name says, as fields of its config class."""
        raise NotImplementedError

    @classmethod
    def from_recipe(cls, recipe: StrEnum | str) -> Self:
        """The config of a recipe, given as an enum member or as its name. Raises ValueError on another class's one."""
        owner = _OWNERS.get(recipe) if isinstance(recipe, str) else None
        if owner is None:
            raise ValueError(f"recipe={recipe!r} is not known; use one of {', '.join(recipes(cls))}")
        if not issubclass(owner, cls):
            raise ValueError(f"recipe={str(recipe)!r} is not a recipe of {cls.__name__}; use {owner.__name__}")
        return cast(Self, _PRESETS[recipe])

    def to_key(self) -> str:
        """The config as one canonical line, "fp8_rowwise;accumulation=precise"; ``config_from_key`` reads it."""
        return self._key

    def to_dict(self) -> dict[str, Any]:
        """{"recipe": its name, and every field that differs from the recipe}; plain strings, booleans and numbers."""
        preset = _PRESETS.get(self.recipe, self)  # itself where it is the recipe's config that is being made
        differing = {}
        for f in _fields(type(self)):
            value = getattr(self, f.name)
            if value != getattr(preset, f.name):
                differing[f.name] = str(value) if isinstance(value, StrEnum) else value
        return {"recipe": self.recipe, **differing}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The config of ``to_dict``'s form. Raises ValueError on an unknown or missing key or a wrong value."""
        if "recipe" not in fields:
            raise ValueError(f"recipe is missing in {dict(fields)!r}; add recipe = one of {', '.join(recipes(cls))}")
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


_OWNERS: dict[str, type[GemmConfig]] = {}
"""The config class of every recipe."""
_PRESETS: dict[str, GemmConfig] = {}
"""Every recipe's config, made once: torch.compile looks it up, where it could not trace the making."""


def register(*classes: type[GemmConfig]) -> None:
    """Makes the recipes of config classes known, to ``from_recipe`` and to messages, in this order."""
    for cls in classes:
        for name in map(str, cls.recipe_enum):
            assert name not in _OWNERS, f"recipe {name} is one of {_OWNERS[name].__name__} already"
            _OWNERS[name] = cls
            _PRESETS[name] = cls(**cls.recipe_fields(name))


def recipes(cls: type[GemmConfig] = GemmConfig) -> tuple[str, ...]:
    """The names of the recipes of a class and those below it."""
    return tuple(name for name, owner in _OWNERS.items() if issubclass(owner, cls))


def _fields(cls: type[GemmConfig]) -> tuple[dataclasses.Field[Any], ...]:
    return tuple(f for f in dataclasses.fields(cls) if f.init)


def _check_names(cls: type[GemmConfig], given: Mapping[str, Any], *also: str) -> None:
    accepted = [*also, *(f.name for f in _fields(cls))]
    unknown = [name for name in given if name not in accepted]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a field of {cls.__name__}; the fields are {', '.join(accepted)}")


@cache
def config_from_key(key: str) -> Any:
    """The config that ``GemmConfig.to_key`` wrote as ``key``. Cached: custom ops call it every time they run."""
    recipe, *items = key.split(";")
    booleans = {"true": True, "false": False}
    fields = {name: booleans.get(value, value) for name, _, value in (item.partition("=") for item in items)}
    return GemmConfig.from_dict({"recipe": recipe, **fields})


def quantize_table(text: str) -> dict[str, Any]:
    """The ``[quantize]`` table of a TOML file's text; other tables are left to others. Raises ValueError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not valid TOML: {error}") from error
    table = document.get("quantize")
    if not isinstance(table, dict):
        found = ", ".join(document) or "nothing"
        raise ValueError(f"no [quantize] table (found: {found}); add one with recipe = one of {', '.join(recipes())}")
    return table
