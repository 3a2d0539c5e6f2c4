"""What ``xmoe bench`` was asked to measure: shapes, recipes and peers, checked before anything slow starts."""

import dataclasses
import importlib.util
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xmoe.config import LINEAR_RECIPES, RECIPES, config_from_recipe
from xmoe.operands import FEATURE_MULTIPLE
from xmoe.shapes import LAYERS, LINEARS, MODELS, OVERHEADS, LayerShape, LinearShape, Shape, StackShape
from xmoe.train.files import UserError

COMMANDS = ("grouped-mm", "quantize", "layer", "linear", "overhead")
PEERS = {
    "torch": "pip install torch",
    "torchao": "pip install torchao",
    "transformers": 'pip install "xmoe[hf]"',
    "jax": 'pip install "xmoe[jax,cuda]"',
    "tokamax": "pip install tokamax",
}
"""Other systems, with what installs each."""
JAX_PEERS = ("jax", "tokamax")
"""Those that are JAX's: with one of them xmoe's own JAX frontend is measured too."""
PEERS_OF = {
    "grouped-mm": ("torch", "torchao", "jax", "tokamax"),
    "layer": ("torch", "torchao", "transformers"),
    "linear": ("torchao",),
    "quantize": (),
    "overhead": ("torchao", "jax"),
}
AnyShape = Shape | LayerShape | LinearShape | StackShape
SHAPES: dict[str, tuple[AnyShape, ...]] = {
    "grouped-mm": MODELS,
    "quantize": MODELS,
    "layer": tuple(LAYERS.values()),
    "linear": LINEARS,
    "overhead": OVERHEADS,
}
"""Those with names."""
DEFAULT_SHAPES = {
    "grouped-mm": "llama4_g8,deepseek_v3_g8",
    "quantize": "llama4_g8,deepseek_v3_g8",
    "layer": "all",
    "linear": "linear",
    "overhead": "all",
}
BASE_RECIPES = tuple(recipe for recipe in RECIPES if recipe == config_from_recipe(recipe).format)
"""One recipe for each format: the default."""
BASE_LINEAR_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise", "mxfp8_cublas_rceil")
"""The same of linears."""


@dataclass(frozen=True, slots=True)
class Options:
    """A benchmark run. ``shapes`` are of the `shape_classes` of ``command``."""

    command: str
    shapes: tuple[AnyShape, ...]
    recipes: tuple[str, ...]
    peers: tuple[str, ...] = ()
    compile: bool = False
    cached: bool = False
    rounds: int = 5

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them."""
        return {**dataclasses.asdict(self), "shapes": [shape._asdict() for shape in self.shapes]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Options":
        kinds = {frozenset(kind._fields): kind for kind in shape_classes(fields["command"])}
        shapes = tuple(kinds[frozenset(shape)](**shape) for shape in fields["shapes"])
        lists = {name: tuple(fields[name]) for name in ("recipes", "peers")}
        return cls(**{**fields, **lists, "shapes": shapes})


def shape_classes(command: str) -> tuple[type[AnyShape], ...]:
    """What the shapes of ``command`` are; no two of these have the same fields."""
    return tuple(dict.fromkeys(type(shape) for shape in SHAPES[command]))


def make_options(
    command: str,
    *,
    shapes: str | None = None,
    tokens: str | None = None,
    recipes: str | None = None,
    peers: str | None = None,
    compile: bool = False,
    cached: bool = False,
    rounds: int = 5,
) -> Options:
    """Options from the command line's strings, lists separated by commas. None: the default, for peers those installed,
    for ``tokens`` those of each shape.

    Raises UserError naming the option, its value and the fix.
    """
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: give 1 or more")
    known, base = (LINEAR_RECIPES, BASE_LINEAR_RECIPES) if command == "linear" else (RECIPES, BASE_RECIPES)
    names = base if recipes is None else tuple(_names(recipes))
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--recipes: {unknown[0]!r} is not known; use {', '.join(known)}")
    found = find_shapes(command, DEFAULT_SHAPES[command] if shapes is None else shapes)
    if tokens is not None:
        found = with_tokens(found, tokens)
    return Options(command, found, tuple(dict.fromkeys(names)), find_peers(command, peers), compile, cached, rounds)


def find_peers(command: str, text: str | None) -> tuple[str, ...]:
    """The peers named, or those of ``command`` that are installed. Raises UserError where one is not."""
    known = PEERS_OF[command]
    if text is None:
        return tuple(peer for peer in known if _is_installed(peer))
    names = tuple(dict.fromkeys(_names(text)))
    for name in names:
        if name not in known:
            raise UserError(f"--peers: {name!r} is not a peer of {command}; use {', '.join(known)}")
        if not _is_installed(name):
            raise UserError(f"--peers: {name} is not installed; run: {PEERS[name]}")
    return names


def find_shapes(command: str, text: str) -> tuple[AnyShape, ...]:
    """Shapes by name, by the prefix of several ("llama4"), "all", or from TOML files; - and _ are one.

    Raises UserError for a name or a file that gives none.
    """
    table = {shape.name: shape for shape in SHAPES[command]}
    found: list[AnyShape] = []
    for name in _names(text):
        if name.endswith(".toml"):
            found += load_shapes(command, Path(name))
            continue
        key = name.replace("-", "_").lower()
        exact = [table[key]] if key in table else []
        matches = exact or [shape for other, shape in table.items() if key and other.startswith(key)]
        if name == "all":
            matches = list(table.values())
        if not matches:
            raise UserError(f"--shapes: {name!r} is not known; use a name or the start of one: {', '.join(table)}")
        found += matches
    return tuple({shape.name: shape for shape in found}.values())


def with_tokens(shapes: Sequence[AnyShape], text: str) -> tuple[Shape, ...]:
    """Every grouped GEMM of ``shapes`` with each of the numbers of tokens in ``text`` in the place of its own, its name
    with _mTOKENS behind it. Raises UserError for what is not a number of 1 or more."""
    numbers = []
    for word in _names(text):
        if not (word.isascii() and word.isdigit()) or int(word) < 1:
            raise UserError(f"--tokens: {word!r} is not a number of tokens; give integers of 1 or more: 4096,16384")
        numbers.append(int(word))
    return tuple(
        shape._replace(name=f"{shape.name}_m{M}", M=M)
        for shape in shapes
        if isinstance(shape, Shape)
        for M in dict.fromkeys(numbers)
    )


def load_shapes(command: str, path: Path) -> list[AnyShape]:
    """The ``[[shape]]`` tables of a file, with the fields of one of the `shape_classes` of ``command`` each.

    Raises UserError naming the file and what is wrong in it.
    """
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--shapes: {path}: {error.strerror}; give a readable TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--shapes: {path} is not valid TOML: {error}") from error
    tables = document.get("shape")
    kinds = shape_classes(command)
    if not isinstance(tables, list) or not tables:
        raise UserError(f"--shapes: {path} has no [[shape]] table; add some, with {_fields(kinds)}")
    return [_shape(kinds, table, path) for table in tables]


def _fields(kinds: Sequence[type[AnyShape]]) -> str:
    return ", or ".join(", ".join(kind._fields) for kind in kinds)


def _shape(kinds: Sequence[type[AnyShape]], table: Any, path: Path) -> AnyShape:
    kind = next((kind for kind in kinds if isinstance(table, dict) and set(table) == set(kind._fields)), None)
    if kind is None:
        raise UserError(f"--shapes: {path}: the keys of a [[shape]] are {_fields(kinds)}; found {table!r}")
    name, *sizes = kind._fields
    if not isinstance(table[name], str) or not table[name]:
        raise UserError(f"--shapes: {path}: name={table[name]!r}; give a string")
    features = ("N", "K", "dim", "hidden")
    for size in sizes:
        least = FEATURE_MULTIPLE if size in features else 1
        if type(table[size]) is not int or table[size] < least or table[size] % least:
            what = f"a multiple of {least}" if least > 1 else "an integer of 1 or more"
            raise UserError(f"--shapes: {path}: {size}={table[size]!r} of {table[name]!r}; give {what}")
    if table.get("top_k", 0) > table.get("experts", 0):
        raise UserError(f"--shapes: {path}: top_k={table['top_k']} of {table[name]!r}; give at most experts")
    return kind(**table)


def _names(text: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in (text.split(",") if isinstance(text, str) else text)]


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
