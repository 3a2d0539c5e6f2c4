"""A writer for the few TOML types that xmoe's files hold; the standard library's ``tomllib`` reads them back."""

import json
import re
from collections.abc import Mapping
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dumps(table: Mapping[str, Any], *, sections: int = 2) -> str:
    """``table`` as TOML text: strings, booleans, numbers, lists and tables.

    Tables become ``[sections]`` down to that depth and inline tables below it, which keeps their order among other
    values; at one level TOML wants plain values before sections, so they come first. Raises ValueError for a value
    without a TOML form.
    """
    lines: list[str] = []
    _write(lines, table, (), sections)
    return "\n".join(lines).strip() + "\n"


def _write(lines: list[str], table: Mapping[str, Any], path: tuple[str, ...], sections: int) -> None:
    opens_section = {key for key, value in table.items() if isinstance(value, Mapping) and len(path) < sections}
    plain = [key for key in table if key not in opens_section]
    if path and (plain or not opens_section):
        lines += ["", f"[{'.'.join(map(_key, path))}]"]
    lines += [f"{_key(key)} = {_value(table[key], (*path, key))}" for key in plain]
    for key in table:
        if key in opens_section:
            _write(lines, table[key], (*path, key), sections)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, except that TOML forbids a raw DEL and takes no surrogate pairs.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any, path: tuple[str, ...]) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _string(value)
        case int() | float():
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(_value(item, path) for item in value)}]"
        case Mapping():
            items = ", ".join(f"{_key(key)} = {_value(item, (*path, key))}" for key, item in value.items())
            return f"{{ {items} }}" if items else "{}"
    raise ValueError(f"{'.'.join(path)}={value!r} has no TOML form; use a string, boolean, number, list or table")
