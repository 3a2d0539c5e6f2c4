"""Tile shapes of the GEMM kernels: read from tuning.toml, which `python -m xmoe.kernels.tune` measures and writes."""

import math
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TABLE = Path(__file__).with_name("tuning.toml")

FEW_TOKENS = 256
"""Tokens a group below which a problem is of the class "few"."""
MULTIPROCESSORS = 132
"""Of the GPUs whose table has lines of the class "half"."""
HALF_TIME = 0.53
"""Of a tile of "half", in tiles of "many", on an H200."""


@dataclass(frozen=True, slots=True)
class GemmTiles:
    """One line of the table. Output tiles are rows x cols; `depth` elements of the contraction a step."""

    rows: int
    cols: int
    depth: int
    warps: int
    """Those that multiply; a warp-specialized kernel has more."""
    stages: int
    band: int
    """Row tiles that walk the columns together (L2 reuse)."""
    parts: int
    """1, or 2 to store an output tile as its left and then its right columns, through half the shared memory."""


@lru_cache
def table() -> dict[str, dict[str, dict[str, dict[str, GemmTiles]]]]:
    """arch -> kernel -> element -> shape class -> tiles."""
    raw = tomllib.loads(TABLE.read_text())
    raw.pop("measured")
    return {
        arch: {
            kernel: {el: {cls: GemmTiles(**t) for cls, t in classes.items()} for el, classes in elements.items()}
            for kernel, elements in kernels.items()
        }
        for arch, kernels in raw.items()
    }


def arch(capability: tuple[int, int]) -> str:
    """The table's architecture for a compute capability: the newest that it knows and that is not newer."""
    known = sorted((int(name[2:]), name) for name in table())
    number = capability[0] * 10 + capability[1]
    return next((name for n, name in reversed(known) if n <= number), known[0][1])


def measured() -> list[str]:
    """The architectures whose lines `xmoe.kernels.tune` has written; the others' only fit the device's limits."""
    return tomllib.loads(TABLE.read_text())["measured"]


def is_tuned(capability: tuple[int, int]) -> bool:
    """Whether the table has lines measured for this very capability."""
    return f"sm{capability[0] * 10 + capability[1]}" in measured()


@lru_cache(maxsize=4096)
def lookup(
    kernel: str, element: str, capability: tuple[int, int], M: int, G: int, P: int, heavy: bool = False
) -> GemmTiles:
    """Tiles for a kernel and a problem.

    Args:
        kernel: "grouped_mm" or "grouped_mm_tokens".
        element: "fp8", "blockwise", "mx" or "bf16".
        M, G: tokens and groups.
        P: columns of the output.
        heavy: float32 output or (not "blockwise") precise accumulation: twice the shared memory or registers.
    """
    classes = table()[arch(capability)][kernel][element]
    if heavy:
        return classes["heavy"]
    many, half = classes["many"], classes.get("half")
    if M < FEW_TOKENS * G:
        return classes.get("few", many)
    if half is not None and _waves(half, M, G, P) * HALF_TIME < _waves(many, M, G, P):
        return half
    return many


def _waves(t: GemmTiles, M: int, G: int, P: int) -> int:
    """How many tiles a multiprocessor gets, of groups that end anywhere in a tile."""
    return math.ceil((M / t.rows + G / 2) * math.ceil(P / t.cols) / MULTIPROCESSORS)
