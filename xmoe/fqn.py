"""Which parameter gets which config: names, patterns, their precedence, and the file that holds them.

One implementation serves torch names ("layers.0.experts.w1"), Flax parameter paths (("layers", 0, "experts", "w1")) and
slash-separated ones: all of them are turned into dots first.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from xmoe import toml
from xmoe.config import GemmConfig, quantize_table
from xmoe.files import write_atomically

DEFAULT = "_default"
_REGEX = "re:"
_NONE = "none"
"""TOML has no null: this stands for None there."""

Name = str | Sequence[Any]
"""A parameter's name, or its path: strings, integers, or the key objects of ``jax.tree_util``."""


class Unmatched(Enum):
    """``FqnToConfig.resolve`` on a name that no key matches, where there is no default."""

    UNMATCHED = "unmatched"


UNMATCHED = Unmatched.UNMATCHED


def dotted(name: Name) -> str:
    """A parameter's name or path, with dots: "a/b" and ("a", "b") and (DictKey("a"), GetAttrKey("b")) give "a.b"."""
    if isinstance(name, str):
        return name.replace("/", ".").strip(".")
    return ".".join(str(_part(part)) for part in name)


def _part(part: Any) -> Any:
    for attribute in ("key", "name", "idx"):  # of jax.tree_util's DictKey, GetAttrKey and SequenceKey
        if hasattr(part, attribute):
            return getattr(part, attribute)
    return part


def enclosing(name: str) -> tuple[str, ...]:
    """The modules around a parameter or module, the nearest first: "a.b.w" is in "a.b", "a" and "", the model."""
    parts = name.split(".")[:-1]
    return tuple(".".join(parts[:n]) for n in range(len(parts), -1, -1))


class FqnToConfig:
    """An ordered mapping from names to configs, resolved parameter by parameter. Immutable, hashable, comparable.

    A key is a parameter's or a module's fully qualified name, "re:" and a regular expression that must match such a
    name in full, or "_default". A module's key reaches everything inside it: "moe" and "moe.experts" both match
    "moe.experts.w1", and "" is the whole model. A value is a config, a recipe's name, or None (or "none") to leave the
    parameter alone. The first of these classes with a match decides; in 2 and 4 the nearest module, and then (in 3 and
    4) the key that comes first:

    1. the exact parameter name; 2. an exact module name; 3. a regex on the parameter name; 4. a regex on a module name;
    5. "_default".

    Raises ValueError for a bad regex, two keys for one name, or a wrong value, naming the key.
    """

    __slots__ = ("_exact", "_patterns", "fqn_to_config")

    fqn_to_config: Mapping[str, GemmConfig | None]

    def __init__(self, fqn_to_config: Mapping[str, GemmConfig | Mapping[str, Any] | str | None]) -> None:
        if not isinstance(fqn_to_config, Mapping):
            raise ValueError(f"fqn_to_config is a {type(fqn_to_config).__name__}; give a mapping from names to configs")
        configs: dict[str, GemmConfig | None] = {}
        self._exact: dict[str, str] = {}
        self._patterns: list[tuple[re.Pattern[str], str]] = []
        for key, value in fqn_to_config.items():
            if not isinstance(key, str):
                raise ValueError(f"fqn_to_config: the key {key!r} is not a string; use a name, 're:...' or '_default'")
            configs[key] = _config(key, value)
            if key.startswith(_REGEX):
                self._patterns.append((_compiled(key), key))
            elif key != DEFAULT:
                other = self._exact.setdefault(dotted(key), key)
                if other != key:
                    raise ValueError(f"fqn_to_config: {other!r} and {key!r} are the same name; keep one")
        self.fqn_to_config = MappingProxyType(configs)

    def resolve(self, parameter: Name) -> GemmConfig | Literal[Unmatched.UNMATCHED] | None:
        """The config of a parameter; None: leave it alone; UNMATCHED: no key says anything about it."""
        key = self.key_for(parameter)
        return UNMATCHED if key is None else self.fqn_to_config[key]

    def key_for(self, parameter: Name) -> str | None:
        """The key that decides about a parameter, "_default" among them; None where there is none."""
        name = dotted(parameter)
        modules = enclosing(name)
        for exact in (name, *modules):
            if exact in self._exact:
                return self._exact[exact]
        for candidate in (name, *modules):
            for pattern, key in self._patterns:
                if pattern.fullmatch(candidate):
                    return key
        return DEFAULT if DEFAULT in self.fqn_to_config else None

    def unused(self, parameters: Iterable[Name]) -> tuple[str, ...]:
        """The keys that match none of the parameters nor their modules, precedence aside: typing errors, mostly."""
        names = {dotted(parameter) for parameter in parameters}
        names |= {module for name in names for module in enclosing(name)}
        unused = {key for exact, key in self._exact.items() if exact not in names}
        unused |= {key for pattern, key in self._patterns if not any(map(pattern.fullmatch, names))}
        return tuple(key for key in self.fqn_to_config if key in unused)

    def to_dict(self) -> dict[str, Any]:
        """{"fqn_to_config": {key: a recipe's name, "none", or a config's ``to_dict()``}}, in order."""
        return {"fqn_to_config": {key: _plain(config) for key, config in self.fqn_to_config.items()}}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "FqnToConfig":
        """The mapping of ``to_dict``'s form. Raises ValueError naming what is wrong and what is accepted."""
        unknown = [name for name in fields if name != "fqn_to_config"]
        if unknown or not isinstance(fields.get("fqn_to_config"), Mapping):
            found = ", ".join(fields) or "nothing"
            raise ValueError(f"found {found}; give one table, fqn_to_config, or a config with a recipe, not both")
        return cls(fields["fqn_to_config"])

    def to_toml(self) -> str:
        """The mapping as a file's text: one table, ``[quantize.fqn_to_config]``."""
        return toml.dumps({"quantize": self.to_dict()})

    @classmethod
    def from_toml(cls, text: str) -> "FqnToConfig":
        """The mapping in the ``[quantize]`` table of ``text``. Raises ValueError."""
        return cls.from_dict(quantize_table(text))

    def _items(self) -> tuple[tuple[str, GemmConfig | None], ...]:
        return tuple(self.fqn_to_config.items())

    def __eq__(self, other: object) -> bool:
        return self._items() == other._items() if isinstance(other, FqnToConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._items())

    def __repr__(self) -> str:
        return f"FqnToConfig({dict(self.fqn_to_config)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return FqnToConfig, (dict(self.fqn_to_config),)


def save_toml(path: str | os.PathLike[str], config: GemmConfig | FqnToConfig) -> None:
    """Writes the file that configures both frontends. A failed write (OSError) leaves an existing file as it was."""
    write_atomically(path, config.to_toml().encode())


def load_toml(path: str | os.PathLike[str]) -> GemmConfig | FqnToConfig:
    """The config, or mapping of configs, in a file's ``[quantize]`` table. Raises OSError, or ValueError naming it."""
    try:
        table = quantize_table(Path(path).read_text(encoding="utf-8"))
        return FqnToConfig.from_dict(table) if "fqn_to_config" in table else GemmConfig.from_dict(table)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _compiled(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key.removeprefix(_REGEX))
    except re.error as error:
        raise ValueError(f"fqn_to_config: {key!r} is not a regular expression: {error}") from error


def _config(key: str, value: Any) -> GemmConfig | None:
    if value is None or value == _NONE:
        return None
    if isinstance(value, GemmConfig):
        return value
    try:
        if isinstance(value, str):
            return GemmConfig.from_recipe(value)
        if isinstance(value, Mapping):
            return GemmConfig.from_dict(value)
    except ValueError as error:
        hint = "; in TOML, quote names that have dots" if isinstance(value, Mapping) and "recipe" not in value else ""
        raise ValueError(f"fqn_to_config[{key!r}]: {error}{hint}") from error
    raise ValueError(f"fqn_to_config[{key!r}]={value!r} is not a config; give a config, a recipe's name, or None")


def _plain(config: GemmConfig | None) -> Any:
    if config is None:
        return _NONE
    fields = config.to_dict()
    return fields["recipe"] if len(fields) == 1 else fields
