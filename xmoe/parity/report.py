"""What a comparison came to: lines for people, JSON for CI."""

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from typing import Any

import xmoe
from xmoe.parity.contract import CONTRACT
from xmoe.parity.run import Case, Finding
from xmoe.testing import Comparison

_PACKAGES = ("numpy", "ml_dtypes", "torch", "triton", "jax", "flax")


def lines(findings: Sequence[Finding]) -> list[str]:
    """The findings of one recipe: a line for every pair, and below it the worst element of what is not equal."""
    text = []
    for pair in dict.fromkeys(f.pair for f in findings):
        of_pair = [f for f in findings if f.pair == pair]
        operands, results = ([f for f in of_pair if f.what == what] for what in ("operands", "results"))
        holds = all(f.holds for f in of_pair)
        text.append(
            f"  {pair[0]:<14} {pair[1]:<14}  {_operands(operands):<24}  {_results(results):<34}  "
            f"{results[0].rule.demand if results else '':<17}  {'holds' if holds else 'BROKEN'}"
        )
        shown = [f for f in of_pair if not f.holds] or [f for f in of_pair if f.worst and f.what == "results"]
        if shown:
            text.append(f"      {_worst(min(shown, key=lambda f: (f.least_db, f.array)))}")
    return text


def _operands(findings: Sequence[Finding]) -> str:
    if not findings:
        return "no operands"
    equal = sum(f.equal == f.cases for f in findings)
    return f"operands {'equal' if equal == len(findings) else f'{len(findings) - equal} of {len(findings)} differ'}"


def _results(findings: Sequence[Finding]) -> str:
    unequal = [f.array for f in findings if f.equal < f.cases]
    if not unequal:
        return "results equal"
    return f"{', '.join(unequal)} differ {_db(min(f.least_db for f in findings))}"


def _worst(finding: Finding) -> str:
    found = finding.worst
    if found is None:  # a rule broken by values alone cannot be: NaN against a number is a difference
        return f"{finding.array}: equal values of different dtypes in {', '.join(finding.broken)}"
    return f"{finding.array} of {finding.worst_case}: {found}"


def _db(value: float) -> str:
    """Of arrays that differ."""
    if math.isfinite(value):
        return f"by {value:.1f} dB"
    return "a NaN or Inf in one alone" if value < 0 else "in signs of zeros alone"


def to_json(findings: Sequence[Finding], cases: Sequence[Case], notes: Sequence[str]) -> dict[str, Any]:
    """Everything, as plain data: ``holds`` is what CI asks for. Infinite dB are strings, which JSON can hold."""
    return {
        "holds": all(f.holds for f in findings),
        "facts": facts(),
        "notes": list(notes),
        "contract": [dataclasses.asdict(rule) | {"demand": rule.demand} for rule in CONTRACT],
        "cases": [case.name for case in cases],
        "findings": [_finding(f) for f in findings],
    }


def facts() -> dict[str, str]:
    """The versions of what is compared."""
    found = {"xmoe": xmoe.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _finding(f: Finding) -> dict[str, Any]:
    return {
        "recipe": f.recipe,
        "pair": list(f.pair),
        "what": f.what,
        "array": f.array,
        "demand": f.rule.demand,
        "holds": f.holds,
        "cases": f.cases,
        "equal_cases": f.equal,
        "broken_cases": f.broken,
        "least_db": number(f.least_db),
        "worst_case": f.worst_case,
        "worst": None if f.worst is None else comparison(f.worst),
    }


def comparison(found: Comparison) -> dict[str, Any]:
    """A comparison as plain data."""
    return {
        "equal": found.equal,
        "different": found.different,
        "size": found.size,
        "sqnr_db": number(found.sqnr_db),
        "index": None if found.worst is None else list(found.worst),
        "values": None if found.values is None else [number(x) for x in found.values],
        "bytes": None if found.bytes is None else list(found.bytes),
    }


def number(x: float) -> float | str:
    """As JSON can hold it."""
    return x if math.isfinite(x) else str(x)


def dumps(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"
