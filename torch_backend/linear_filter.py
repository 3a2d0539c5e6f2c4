"""Which linears to convert: ``filter_fn``s for ``quantize_`` from names to leave out, and from measured speeds."""

import tomllib
from collections.abc import Iterable
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from torch import nn

from xmoe.config import LinearConfig
from xmoe.torch_backend.linear_ops import misfit
from xmoe.torch_backend.quantize import FilterFn

AUTO_FILTER_SMALL_KN = "auto_filter_small_kn"
"""The entry of `filter_fqns` that leaves small linears out."""
TABLE = Path(__file__).with_name("linear_filter.toml")
LEAST = 1.05
"""The speedup below which it does not pay."""


def filter_fqns(fqns: Iterable[str] = (), *, recipe: LinearConfig | StrEnum | str | None = None) -> FilterFn:
    """A ``filter_fn`` for `quantize_` that leaves modules out by their names:

        leave_out = filter_fqns(["output", "router", "auto_filter_small_kn"], recipe="rowwise")
        quantize_(model, "rowwise", filter_fn=leave_out)

    It takes the ``nn.Linear`` whose sizes the GEMMs can multiply (multiples of 16, unless the recipe pads), and the
    modules that hold experts. The embedding's counterpart at the end of a model ("output", "lm_head") is worth leaving
    out: its logits are what the loss sees, and it is often tied.

    Args:
        fqns: parts of names: a module with one of them anywhere in its name stays as it is; `quantize_` warns in the
            log of one that no name has. "auto_filter_small_kn" stands for all linears that are too small to gain from
            `recipe` (`gains`).
        recipe: what the linears will get, a recipe or a config; for "auto_filter_small_kn", and for padding.

    Raises:
        ValueError: `fqns` is one string; "auto_filter_small_kn" without a recipe, or with one that was not measured.
    """
    if isinstance(fqns, str):
        raise ValueError(f"fqns={fqns!r} is a string; give a list of parts of names: [{fqns!r}]")
    given = tuple(fqns)
    config = recipe if isinstance(recipe, LinearConfig) or recipe is None else LinearConfig.from_recipe(recipe)
    auto = AUTO_FILTER_SMALL_KN in given
    parts = [part for part in given if part != AUTO_FILTER_SMALL_KN]
    if auto:
        if config is None:
            raise ValueError(f"recipe=None: {AUTO_FILTER_SMALL_KN!r} needs the recipe that the linears will get")
        _points(config.recipe)

    unused = set(parts)

    def takes(module: nn.Module, fqn: str) -> bool:
        if found := [part for part in parts if part in fqn]:
            unused.difference_update(found)
            return False
        if not isinstance(module, nn.Linear):
            return any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        K, N = module.in_features, module.out_features
        if (config is None or not config.pad_inner_dim) and (misfit("in_features", K) or misfit("out_features", N)):
            return False
        return config is None or not auto or gains(K, N, config.recipe)

    takes.unused = unused  # type: ignore[attr-defined]
    return takes


def gains(K: int, N: int, recipe: str) -> bool:
    """Whether a linear of so many input and output features is expected to be faster than in bf16.

    It is if a linear that is no larger, in K and in N, was measured to be, by LEAST at least: more features give more
    operations for each element that is quantized. The figures, of an H200 and many rows, are in ``linear_filter.toml``.

    Raises ValueError for a recipe without figures.
    """
    return any(k <= K and n <= N for k, n, speedup in _points(recipe) if speedup >= LEAST)


def is_measured() -> bool:
    """Whether the table holds measurements, not guesses."""
    return _table()[0]


@lru_cache
def _table() -> tuple[bool, dict[str, list[tuple[int, int, float]]]]:
    raw = tomllib.loads(TABLE.read_text())
    points: dict[str, list[tuple[int, int, float]]] = {}
    for line in raw["speedup"]:
        points.setdefault(line["recipe"], []).append((line["K"], line["N"], line["value"]))
    return raw["measured"], points


def _points(recipe: str) -> list[tuple[int, int, float]]:
    """(K, N, speedup) of every measurement."""
    points = _table()[1]
    if recipe not in points:
        raise ValueError(f"recipe={recipe!r} has no measured speeds; use one of {', '.join(points)}")
    return points[recipe]
