"""The harness: checks before times, turns, rows for whatever goes wrong."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.bench.conftest import Events, ScriptedTimer
from xmoe.bench.exactness import Exactness, WrongResult, judge, least_db, sqnr
from xmoe.bench.harness import Case, NoMemory, System, measure, run_cases
from xmoe.operands import FORMATS
from xmoe.torch_backend.bench.exactness import compare


def system(name: str, step: Callable[[], Any] = lambda: None, **fields: Any) -> System:
    return System(**{"name": name, "step": step, "check": Exactness, "work": {"bf16": 1.0}, **fields})


def case(*systems: System, **fields: Any) -> Case:
    return Case(table="t", shape="s", dims={"M": 4}, tokens=4, systems=systems, **fields)


def test_systems_take_turns(events: Events) -> None:
    order: list[str] = []
    systems = [system(name, lambda name=name: order.append(name)) for name in "abc"]
    rows = measure(case(*systems), 4, ScriptedTimer(), NoMemory(), events)
    timed = "".join(order[3:])  # each has run once before, for its memory
    assert timed == "abcbcacababc"
    assert [row.rounds_ms for row in rows] == [[1.0, 6.0, 8.0, 10.0], [2.0, 4.0, 9.0, 11.0], [3.0, 5.0, 7.0, 12.0]]
    done = [(event["done"], event["total"]) for event in events.of("progress")]
    assert done == [(i, 15) for i in range(15)]
    assert len(events.of("row")) == 15  # after every check and every timing


def test_a_wrong_result_is_not_timed(events: Events) -> None:
    def wrong() -> Exactness:
        raise WrongResult("out is 3.0 dB from bf16")

    def broken() -> Exactness:
        raise ValueError("K=5 is not a multiple\nof 16")

    steps: list[str] = []
    systems = [
        system("wrong", lambda: steps.append("wrong"), check=wrong),
        system("broken", lambda: steps.append("broken"), check=broken),
        system("right", lambda: steps.append("right"), check=lambda: Exactness(31.5, 30.0, "equal")),
    ]
    measure(case(*systems, missing={"absent": "no such GPU"}), 2, ScriptedTimer(), NoMemory(), events)
    assert set(steps) == {"right"}
    notes = {key[2]: (row.note, row.ms) for key, row in events.rows().items()}
    assert notes == {
        "wrong": ("wrong: out is 3.0 dB from bf16", None),
        "broken": ("cannot run: ValueError: K=5 is not a multiple", None),
        "right": ("equal", 1.5),
        "absent": ("cannot run: no such GPU", None),
    }
    right = events.rows()["t", "s", "right", False]
    assert (right.sqnr_db, right.worst_expert_db) == (31.5, 30.0)


def test_a_fault_while_timing_ends_that_system_alone(events: Events) -> None:
    calls = iter(range(100))

    def fails_in_the_second_round() -> None:
        if next(calls) == 2:
            raise RuntimeError("out of memory")

    cleaned: list[int] = []
    systems = [system("a", fails_in_the_second_round), system("b")]
    a, b = measure(case(*systems, clean=lambda: cleaned.append(1)), 3, ScriptedTimer(), NoMemory(), events)
    assert (a.note, a.ms) == ("cannot run: RuntimeError: out of memory", None)
    assert len(b.rounds_ms) == 3
    assert cleaned


class CountedMemory(NoMemory):
    """Allocations by hand."""

    live = high = 0

    def allocate(self, nbytes: int) -> None:
        self.live += nbytes
        self.high = max(self.high, self.live)

    def allocated(self) -> int:
        return self.live

    def peak(self) -> int:
        return self.high

    def reset_peak(self) -> None:
        self.high = self.live


def test_memory(events: Events) -> None:
    memory = CountedMemory()
    memory.allocate(1000)  # the operands

    def step() -> None:
        memory.allocate(300)
        memory.allocate(-300)

    class Out:
        nbytes = 64

    def forward() -> Out:
        memory.allocate(64 + 40)  # the output, and what the backward will need
        return Out()

    rows = measure(
        case(system("a", step, forward=forward), system("b", step, peak=lambda: 7)), 1, ScriptedTimer(), memory, events
    )
    assert [(row.peak_bytes, row.saved_bytes_per_token) for row in rows] == [(300, 10.0), (7, None)]


def test_a_case_that_cannot_be_made_is_a_note(events: Events) -> None:
    def make() -> Case:
        raise torch.OutOfMemoryError("tried to allocate 200 GiB")

    rows = run_cases([("big", make), ("s", lambda: case(system("a")))], 1, ScriptedTimer(), NoMemory(), events)
    assert [row.system for row in rows] == ["a"]
    assert events.of("note")[0]["text"] == "big cannot be measured: OutOfMemoryError: tried to allocate 200 GiB"


def test_sqnr() -> None:
    assert sqnr(1000.0, 1.0) == pytest.approx(30)
    assert sqnr(1.0, 0.0) == math.inf
    assert sqnr(0.0, 0.0) == math.inf
    assert sqnr(0.0, 1e-30) == -math.inf
    assert all(math.isnan(sqnr(1.0, noise)) for noise in (math.inf, math.nan))


@pytest.mark.parametrize("noise", [1.0, math.nan, math.inf])
def test_one_wrong_expert_is_wrong(noise: float) -> None:
    """A small one: over the whole tensor it would not show."""
    good = [[1e6, 1e3]] * 9
    assert judge({"out": good}, 27) == Exactness(pytest.approx(30), pytest.approx(30))
    with pytest.raises(WrongResult, match=r"dB of expert 9 is 0\.0 dB|dB is nan|out of expert 9 is 0\.0 dB|out is nan"):
        judge({"dA": good, "out": [*good, [1.0, noise]]}, 27)


def test_a_router_may_be_a_little_worse() -> None:
    energies = [[10.0**2.5, 1.0]]
    assert judge({"drouter.weight": energies}, 28).sqnr == pytest.approx(25)
    for name, least in (("dx", 28), ("drouter.weight", 30)):
        with pytest.raises(WrongResult, match=f"{name} is 25.0 dB from bf16, at least (28|26) is right"):
            judge({name: energies}, least)


def test_compare() -> None:
    ends = [2, 2, 6]
    rows, weights = torch.randn(6, 16), torch.randn(3, 16, 32)
    weights[1] = torch.nan  # torch leaves the gradient of an expert without tokens undefined
    reference = {"out": rows, "dB": weights}
    right = {"out": rows.clone(), "dB": torch.where(weights.isnan(), 0.0, weights)}
    assert compare(right, reference, ends, 45) == Exactness()
    assert compare({**right, "dB": weights}, reference, ends, 45, empty_experts=False) == Exactness()
    with pytest.raises(WrongResult, match="dB is nan dB"):
        compare({**right, "dB": weights}, reference, ends, 45)
    off = rows.clone()
    off[0] *= 1.01
    with pytest.raises(WrongResult, match="out"):
        compare({**right, "out": off}, reference, ends, 45)
    swapped = {**right, "dB": right["dB"].flip(0)}
    with pytest.raises(WrongResult, match="dB"):
        compare(swapped, reference, ends, 20)


def test_every_format_has_a_bound() -> None:
    for format in FORMATS:
        assert 20 <= least_db(format, layer=True) < least_db(format) < 31.5 < least_db("bf16")
