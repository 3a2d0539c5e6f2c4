"""JAX's systems as guests of PyTorch's, on the CPU."""

from typing import Any

import jax
import pytest
import torch

from tests.bench.conftest import Events, ScriptedTimer
from xmoe.bench import worker
from xmoe.bench.harness import NoMemory
from xmoe.bench.options import Options
from xmoe.bench.report import BOTH
from xmoe.bench.results import BF16
from xmoe.jax_frontend.bench import guest, overhead, ragged_dot
from xmoe.jax_frontend.bench.program import WallTimer
from xmoe.shapes import Shape, StackShape
from xmoe.torch_backend.bench.overhead import EAGER, HOST_FORWARD
from xmoe.torch_backend.bench.run import measure_all

GEMM = Shape("tiny", 160, 64, 48, 3)
SMALL: dict[str, Any] = {"M": 32, "N": 32, "K": 32, "copy_bytes": 1024}


@pytest.fixture(autouse=True)
def _two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "CALLS", 2)


def measured(options: Options, events: Events) -> dict[tuple[str, str], Any]:
    """Rows by table and system, of a run with JAX as a guest."""
    timers = WallTimer(0.1, 1024), WallTimer(0.1, 0)
    invited = guest.JaxGuest(options, None, *timers)
    measure_all(
        options, torch.device("cpu"), ScriptedTimer(), NoMemory(), events, invited, ceiling_sizes=SMALL
    )  # fmt: skip
    return {(row.table, row.system): row for row in events.rows().values()}


def test_grouped_mm(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(implementation: str) -> Any:
        raise ImportError(f"no tokamax with {implementation} here")

    monkeypatch.setattr(ragged_dot, "tokamax_ragged_dot", missing)
    options = Options("grouped-mm", (GEMM,), ("bf16", "fp8_rowwise"), ("torch", "jax", "tokamax"), rounds=2)
    rows = {system: row for (table, system), row in measured(options, events).items() if table == BOTH}
    absent = {system: row.note for system, row in rows.items() if system.startswith("tokamax")}
    assert absent == {
        f"tokamax bf16, {name}": f"cannot run: ImportError: no tokamax with {name} here" for name in ragged_dot.TOKAMAX
    }
    jaxs = {"jax.lax.ragged_dot bf16", "xmoe bf16, JAX", "xmoe fp8_rowwise, JAX"}
    assert set(rows) - set(absent) == {BF16, "xmoe bf16", "xmoe fp8_rowwise", *jaxs}
    outputs = 2 * (160 * 64 + 160 * 48 + 3 * 64 * 48)
    for system in jaxs:
        assert len(rows[system].rounds_ms) == 2
        assert rows[system].ms > 0
        assert rows[system].peak_bytes >= outputs
    assert 27.5 <= rows["xmoe fp8_rowwise, JAX"].worst_expert_db < 30


def test_most_groups_are_empty(events: Events) -> None:
    shape = Shape("tiny_m64", 64, 32, 32, 10)
    rows = measured(Options("grouped-mm", (shape,), ("fp8_rowwise",), ("jax",), rounds=1), events)
    assert (BOTH, "xmoe fp8_rowwise, JAX") in rows
    assert all(row.ms for row in rows.values()), rows


@pytest.mark.parametrize(
    ("shape", "table", "torchs", "recipe", "least_db"),
    [
        (Shape("op", 64, 64, 64, 4), overhead.OP, HOST_FORWARD, "fp8_rowwise", 27.5),
        (StackShape("stack", 1, 64, 32, 32, 4, 2), overhead.STEP, EAGER, "bf16", 40),
    ],
    ids=["op", "stack"],
)
def test_overhead(shape: Any, table: str, torchs: str, recipe: str, least_db: float, events: Events) -> None:
    rows = measured(Options("overhead", (shape,), (recipe,), ("jax",), rounds=1), events)
    assert rows[torchs, BF16].ms is not None
    found = {system: row for (of, system), row in rows.items() if of == table}
    ours = {f"xmoe {recipe}, JAX", f"xmoe {recipe}, JAX, command_buffer=False"}
    assert set(found) == (ours if table == overhead.STEP else {*ours, "jax.lax.ragged_dot bf16"})
    for system, row in found.items():
        assert row.ms > 0, row.note
        assert (row.peak_bytes is None) == (table == overhead.OP)  # a program's, which has many calls there
        assert row.sqnr_db is None or row.sqnr_db >= least_db, system


def test_calls_of_a_program_are_calls() -> None:
    """XLA makes one of equal ones."""
    problem = ragged_dot.Problem(GEMM)
    text = {}
    for calls in (1, 3):
        program = problem.program(jax.lax.ragged_dot, calls)
        assert len(program()) == calls
        text[calls] = program.compiled.as_text().count(" dot(")
    assert text[3] >= 3 * text[1] > 0


@pytest.mark.parametrize("module", [ragged_dot, overhead])
def test_a_wrong_ragged_dot_is_not_timed(module: Any, events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ragged_dot.ragged_dot
    monkeypatch.setattr(module, "ragged_dot", lambda *a, config: right(*a, config=config).at[-1].multiply(3))
    command = "grouped-mm" if module is ragged_dot else "overhead"
    rows = measured(Options(command, (GEMM,), ("fp8_rowwise",), ("jax",), rounds=1), events)
    row = rows[BOTH if module is ragged_dot else overhead.OP, "xmoe fp8_rowwise, JAX"]
    assert row.ms is None
    assert row.note.startswith("wrong: out")


def test_who_is_invited(events: Events) -> None:
    """Nobody imports JAX unless one of its peers is asked for; without a GPU it stays out, and a note says so."""
    assert worker.guest(Options("grouped-mm", (GEMM,), ("bf16",), ("torch", "torchao")), events) is None
    assert events.all == []
    if jax.devices()[0].platform == "gpu":
        pytest.skip("JAX has a GPU")
    assert worker.guest(Options("grouped-mm", (GEMM,), ("bf16",), ("jax",)), events) is None
    assert [event["event"] for event in events.all] == ["note"]
    assert "JAX finds no GPU" in events.all[0]["text"]
