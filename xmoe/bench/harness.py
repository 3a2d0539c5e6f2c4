"""One shape at a time: every system is checked, those that are right are timed, in turns."""

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from xmoe.bench.events import Emit, emit_row
from xmoe.bench.exactness import Exactness, WrongResult
from xmoe.bench.results import Row
from xmoe.bench.workload import Work
from xmoe.shapes import Shape, StackShape


class Timer(Protocol):
    """Times calls on one device."""

    def __call__(self, fn: Callable[[], Any]) -> float:
        """Milliseconds of a call of ``fn``, the median or mean of many, each with cold caches."""
        ...


class Memory(Protocol):
    """The allocations of one device, in bytes; None where they cannot be counted."""

    def allocated(self) -> int | None: ...

    def peak(self) -> int | None:
        """The most since `reset_peak`."""
        ...

    def reset_peak(self) -> None: ...

    def release(self) -> None:
        """Gives memory that nothing uses back to the device."""
        ...


class NoMemory:
    """Where allocations cannot be counted."""

    def allocated(self) -> int | None:
        return None

    def peak(self) -> int | None:
        return None

    def reset_peak(self) -> None:
        pass

    def release(self) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One way to do a case's work."""

    name: str
    step: Callable[[], Any]
    """What is timed. It leaves nothing behind: what it made is freed when it returns, or with `Case.clean`."""
    check: Callable[[], Exactness]
    """Runs it once and compares; raises WrongResult."""
    work: Work
    forward: Callable[[], Any] | None = None
    """The forward alone, with grad, on an input that autograd alone may keep; its output has ``nbytes``."""
    time: Callable[[], float] | None = None
    """Milliseconds of a step, where the run's `Timer` does not measure it."""
    steps: int = 1
    """So many steps are one call of ``step``: times are divided by it."""
    peak: Callable[[], int | None] | None = None
    """The memory of a step over the operands (bytes), where it is known without counting."""
    compiled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape of one table, and everybody who is to be measured there."""

    table: str
    shape: str
    dims: dict[str, int]
    tokens: int
    """What saved bytes are counted per."""
    systems: Sequence[System]
    unit: str = "ms"
    """`Row.unit`."""
    missing: dict[str, str] = field(default_factory=dict)
    """Systems that cannot be tried here: their names, and why."""
    clean: Callable[[], None] = lambda: None
    """Drops the gradients that a step has left."""


class Guest(Protocol):
    """Systems of another framework, in the same process."""

    def join(self, case: Case, shape: Shape) -> Case:
        """``case``, a grouped GEMM forward and backward, with the guest's systems."""
        ...

    def overheads(self, shape: Shape | StackShape) -> Iterator[tuple[str, Callable[[], Case]]]:
        """The guest's own tables of what launching costs, as for `run_cases`."""
        ...


def run_cases(
    makers: Iterable[tuple[str, Callable[[], Case]]], rounds: int, timer: Timer, memory: Memory, emit: Emit
) -> list[Row]:
    """`measure` every case; each is made when its turn comes and freed after it.

    ``makers``: names, for the note about a case that cannot be made, and what makes the case.
    """
    rows = []
    for name, make in makers:
        try:
            case = make()
        except Exception as error:  # operands that do not fit, a recipe that the device does not have
            emit("note", text=f"{name} cannot be measured: {_first_line(error)}")
        else:
            rows += measure(case, rounds, timer, memory, emit)
            del case
        _free(memory)
    return rows


def measure(case: Case, rounds: int, timer: Timer, memory: Memory, emit: Emit) -> list[Row]:
    """Check all systems, then time those that are right: ``rounds`` rounds, in each all of them, and each round begins
    with another, so that clocks and heat hit all alike. Every change of a row is emitted.

    A system that raises, or whose result is wrong, is a row that says so.
    """
    new_row = partial(Row, table=case.table, shape=case.shape, dims=case.dims, unit=case.unit)
    rows = [new_row(system=s.name, compiled=s.compiled, work=s.work) for s in case.systems]
    for name, why in case.missing.items():
        row = new_row(system=name)
        row.fail(f"cannot run: {why}")
        emit_row(emit, row)
    done, total = 0, len(rows) * (rounds + 1)

    def attempt(i: int, what: str, part: Callable[[System, Row], None]) -> bool:
        """Whether system i got through ``part``."""
        nonlocal done
        system, row, fault = case.systems[i], rows[i], ""
        emit("progress", text=f"{case.shape}: {what}, {row.name}", done=done, total=total)
        try:
            part(system, row)
        except WrongResult as error:
            fault = f"wrong: {error}"
        except Exception as error:  # whatever a system raises, the others go on
            fault = f"cannot run: {_first_line(error)}"
        case.clean()
        if fault:
            row.fail(fault)
            _free(memory)
        done += 1
        emit_row(emit, row)
        return not fault

    def check(system: System, row: Row) -> None:
        memory.release()  # what a framework keeps of the systems before may be what this one lacks
        exactness = system.check()
        row.sqnr_db, row.worst_expert_db = (_finite(x) for x in (exactness.sqnr, exactness.worst_expert))
        row.note = exactness.note
        case.clean()
        row.peak_bytes = _peak(system, memory)
        case.clean()
        row.saved_bytes_per_token = _saved(system, memory, case.tokens)

    def time(system: System, row: Row) -> None:
        row.add_round((system.time() if system.time else timer(system.step)) / system.steps)

    right = [i for i in range(len(rows)) if attempt(i, "checking", check)]
    for turn in range(rounds):
        first = turn % max(len(right), 1)
        what = f"round {turn + 1} of {rounds}"
        right = [i for i in right[first:] + right[:first] if attempt(i, what, time)]
        right.sort()
    return rows


def _peak(system: System, memory: Memory) -> int | None:
    if system.peak is not None:
        return system.peak()
    before = memory.allocated()
    memory.reset_peak()
    system.step()
    peak = memory.peak()
    return None if before is None or peak is None else peak - before


def _saved(system: System, memory: Memory, tokens: int) -> float | None:
    """Bytes a token that live from the forward to the backward: allocated by it, less its output."""
    if system.forward is None:
        return None
    before = memory.allocated()
    out = system.forward()
    after = memory.allocated()
    own = out.nbytes
    del out
    return None if before is None or after is None else (after - before - own) / max(tokens, 1)


def _finite(value: float) -> float | None:
    """JSON has no infinity; equal results have no noise to state."""
    return value if math.isfinite(value) else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _free(memory: Memory) -> None:
    gc.collect()
    memory.release()
