"""Every implementation on the same inputs, pair by pair."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xmoe.config import RECIPES, config_from_recipe
from xmoe.operands import QuantizedOperand
from xmoe.parity.contract import Rule, System, What, rule_of
from xmoe.parity.systems import find_systems
from xmoe.shapes import ALL, Shape
from xmoe.testing import GEMM_KINDS, PATTERNS, Comparison, Gemm, compare, gemm
from xmoe.train.files import UserError

DEFAULT_SHAPES = "short_last_block,short_block_of_128,more_groups_than_tokens"


class Case(NamedTuple):
    """Inputs with a name."""

    name: str
    inputs: Gemm


@dataclass(slots=True)
class Finding:
    """One array of one pair of systems, over all cases."""

    recipe: str
    pair: tuple[str, str]
    what: What
    array: str
    """"A rows data", "dB"."""
    rule: Rule
    cases: int = 0
    equal: int = 0
    """Cases in which the bytes are equal (any NaN of a result equals any other)."""
    broken: list[str] = field(default_factory=list)
    """The cases that the rule does not hold in."""
    least_db: float = float("inf")
    worst: Comparison | None = None
    """Of the case with the least dB among those with a difference."""
    worst_case: str = ""

    @property
    def holds(self) -> bool:
        return not self.broken

    def add(self, case: str, found: Comparison) -> None:
        self.cases += 1
        self.equal += found.equal
        keeps = found.equal if self.rule.least_db is None else found.sqnr_db >= self.rule.least_db
        if not keeps:
            self.broken.append(case)
        if not found.different:
            return
        # A difference that breaks the rule is shown before one that does not.
        rank, worst = (keeps, found.sqnr_db), (self.worst_case not in self.broken, self.least_db)
        if self.worst is None or rank < worst:
            self.worst, self.worst_case = found, case
        self.least_db = min(self.least_db, found.sqnr_db)


def find_recipes(names: str) -> list[str]:
    """ "all" or names separated by commas. Raises UserError for one that is not known."""
    found = list(RECIPES) if names == "all" else list(dict.fromkeys(name.strip() for name in names.split(",")))
    if unknown := [name for name in found if name not in RECIPES]:
        raise UserError(f"--recipe {unknown[0]!r} is not known; use all, {', '.join(RECIPES)}")
    return found


def find_shapes(names: str) -> list[Shape]:
    """Names of ``xmoe.shapes.ALL``, separated by commas. Raises UserError for one that is not known."""
    found = [name.strip() for name in names.split(",")]
    if unknown := [name for name in found if name not in ALL]:
        raise UserError(f"--shapes {unknown[0]!r} is not known; use {', '.join(ALL)}")
    return [ALL[name] for name in dict.fromkeys(found)]


def make_cases(shapes: Iterable[Shape], *, dtype: str = "bfloat16", seed: int = 0) -> list[Case]:
    """Of every shape every pattern of group sizes, with normal values, and every other kind of values."""
    kinds = [*((pattern, "normal") for pattern in PATTERNS), *(("short", kind) for kind in GEMM_KINDS[1:])]
    return [
        Case(f"{shape.name}/{pattern}/{kind}", gemm(shape, pattern, kind, seed=seed, dtype=dtype))
        for shape in shapes
        for pattern, kind in kinds
    ]


def compare_recipe(recipe: str, cases: Sequence[Case], device: str = "auto") -> list[Finding]:
    """Every array of every pair of systems that this machine has for ``recipe``."""
    return compare_systems(recipe, find_systems(config_from_recipe(recipe), device), cases)


def compare_systems(recipe: str, systems: Sequence[System], cases: Sequence[Case]) -> list[Finding]:
    """The quantized operands first, then the results. A system that raises ends the comparison with its exception."""
    findings: dict[tuple[Any, ...], Finding] = {}
    computations: tuple[tuple[What, Callable[[System, Gemm], dict[str, Any]]], ...] = (
        ("operands", lambda system, inputs: arrays_of(system.operands(inputs))),
        ("results", lambda system, inputs: system.results(inputs)),
    )
    for what, compute in computations:
        for case in cases:
            computed = [compute(system, case.inputs) for system in systems]
            for (a, of_a), (b, of_b) in itertools.combinations(zip(systems, computed, strict=True), 2):
                for array in (name for name in of_a if name in of_b):
                    key = what, a.name, b.name, array
                    fresh = Finding(recipe, (a.name, b.name), what, array, rule_of(what, a, b))
                    found = compare(of_a[array], of_b[array], any_nan=what == "results")
                    findings.setdefault(key, fresh).add(case.name, found)
    return list(findings.values())


def arrays_of(operands: dict[str, QuantizedOperand[Any]]) -> dict[str, Any]:
    """The data and scale of each operand: "A rows data", "A rows scale"."""
    found = {}
    for name, operand in operands.items():
        found |= {f"{name} data": operand.data, f"{name} scale": operand.scale}
    return found
