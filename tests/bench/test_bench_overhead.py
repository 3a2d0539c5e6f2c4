"""`xmoe bench overhead`: host times with a clock by hand, steps on the CPU, and both on a GPU."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.bench.conftest import Events, ScriptedTimer
from xmoe.bench.harness import NoMemory
from xmoe.bench.options import BASE_RECIPES, Options
from xmoe.bench.results import BF16, TORCHAO
from xmoe.config import config_from_key
from xmoe.shapes import Shape, StackShape
from xmoe.torch_backend import tensor
from xmoe.torch_backend.bench import gpu, grouped_mm, peers
from xmoe.torch_backend.bench.gpu import CudaMemory, CudaTimer, HostTimer
from xmoe.torch_backend.bench.overhead import CAPTURED, EAGER, HOST_BACKWARD, HOST_FORWARD
from xmoe.torch_backend.bench.run import measure_all

CPU = torch.device("cpu")
OP = Shape("op", 64, 64, 64, 4)
STACK = StackShape("stack", 2, 256, 64, 96, 4, 2)
SMALL: dict[str, Any] = {"M": 32, "N": 32, "K": 32, "copy_bytes": 1024}
Key = tuple[str, str, str, bool]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bursts of a few calls each are enough to see that it works."""
    monkeypatch.setattr(HostTimer, "BURST", 3)
    monkeypatch.setattr(HostTimer.__init__, "__defaults__", (0.0,))


def measured(options: Options, events: Events) -> dict[Key, Any]:
    measure_all(options, CPU, ScriptedTimer(), NoMemory(), events, ceiling_sizes=SMALL)
    return events.rows()


class Clock:
    """In the place of `time`: it goes on only where a test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_host_time_is_that_of_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(), []
    monkeypatch.setattr(gpu, "time", clock)
    monkeypatch.setattr(HostTimer, "_synchronize", lambda _: calls.append("synchronize"))

    def prepare() -> int:
        clock.now += 1.0
        calls.append("prepare")
        return len(calls)

    def call(prepared: int) -> None:
        assert calls[prepared - 1] == "prepare"
        # The first burst compiles; of the others one call in three is slow.
        clock.now += 5.0 if len(calls) < 9 else 0.002 if calls[-1] == "call" else 0.04
        calls.append("call")

    assert HostTimer(CPU)(prepare, call) == pytest.approx(2.0)
    burst = ["prepare"] * 3 + ["synchronize"] + ["call"] * 3 + ["synchronize"]
    assert calls == burst * 4

    calls.clear()
    HostTimer(CPU, round_ms=20e3)(prepare, call)  # each burst takes 3.044 seconds, one comes before
    assert calls == burst * 8


def test_rows(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    def torchao() -> Any:
        return lambda A, B_t, offs: grouped_mm.scaled_grouped_mm(A, B_t, offs, "fp8_rowwise")

    monkeypatch.setattr(peers, "grouped_mm", torchao)
    recipes = ("bf16", "fp8_rowwise", "fp8_blockwise", "mxfp8_floor")
    odd = Shape("odd", 50, 64, 64, 2)
    rows = measured(Options("overhead", (OP, odd, STACK), recipes, ("torchao",), rounds=2), events)
    systems = [BF16, *(f"xmoe {recipe}" for recipe in recipes)]
    for table in (HOST_FORWARD, HOST_BACKWARD):
        for system in (*systems, TORCHAO):
            row = rows[table, "op", system, False]
            assert len(row.rounds_ms) == 2, row.note
            assert 0 < row.ms < 1000
            assert (row.unit, row.peak_bytes, row.work) == ("µs", None, {})
        assert "torchao takes multiples of 16" in rows[table, "odd", TORCHAO, False].note
    for system in systems:
        row = rows[EAGER, "stack", system, False]
        assert (row.unit, len(row.rounds_ms)) == ("ms", 2), row.note
        assert sum(row.work.values()) == 3 * STACK.flops
        assert row.dims == {"layers": 2, "T": 256, "D": 64, "H": 96, "E": 4, "k": 2}
        row = rows[CAPTURED, "stack", system, False]
        assert (row.ms, row.note) == (None, "cannot run: RuntimeError: device=cpu has no CUDA graphs; use a CUDA GPU")
    fp8 = rows[EAGER, "stack", "xmoe fp8_rowwise", False]
    assert 18 <= fp8.worst_expert_db <= fp8.sqnr_db < 27.5
    assert len(rows) == 2 * (2 * len(systems) + 2) + 2 * len(systems)


def test_a_wrong_result_is_not_timed(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first expert is 10% off in fp8, and everything else is right."""
    right = tensor.swiglu_experts_by_key, grouped_mm.scaled_grouped_mm

    def wrong(index: int, *args: Any) -> torch.Tensor:
        out, (offs, key) = right[index](*args), args[4:6] if index == 0 else args[2:4]
        if (config_from_key(key) if isinstance(key, str) else key).format == "bf16":
            return out
        end = int(offs[offs > 0][0])
        return out * torch.where(torch.arange(out.shape[0]) < end, 1.1, 1.0).to(out.dtype)[:, None]

    monkeypatch.setattr(tensor, "swiglu_experts_by_key", functools.partial(wrong, 0))
    monkeypatch.setattr(grouped_mm, "scaled_grouped_mm", functools.partial(wrong, 1))
    rows = measured(Options("overhead", (OP, STACK), ("bf16", "fp8_rowwise"), (), rounds=1), events)
    for table, shape in ((HOST_FORWARD, "op"), (HOST_BACKWARD, "op"), (EAGER, "stack")):
        assert rows[table, shape, "xmoe bf16", False].ms is not None
        row = rows[table, shape, "xmoe fp8_rowwise", False]
        assert row.ms is None, table
        assert row.note.startswith("wrong: ")
        assert "dB from bf16, at least" in row.note


# ---------------------------------------------------------------------------------------------------- captured steps


class Recording:
    """`gpu.capture` without a GPU: a replay runs the step again, and leaves its results in the first ones' memory."""

    def __init__(self, fault: str = "") -> None:
        self.replays, self._fault = 0, fault

    def __call__(self, step: Callable[[], dict[str, torch.Tensor]], device: torch.device) -> Any:
        written = {name: value.clone() for name, value in step().items()}

        def replay() -> None:
            self.replays += 1
            for name, value in step().items():
                if name != self._fault:
                    written[name].copy_(value)

        return replay, written


def test_captured_steps(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Recording()
    monkeypatch.setattr(gpu, "capture", capture)
    rows = measured(Options("overhead", (STACK,), ("bf16", "fp8_rowwise"), rounds=3), events)
    for system in (BF16, "xmoe bf16", "xmoe fp8_rowwise"):
        row = rows[CAPTURED, "stack", system, False]
        assert len(row.rounds_ms) == 3, row.note
        assert row.note == "equal bits to eager's"
        assert row.peak_bytes is None
    assert capture.replays == 3 * (1 + 3)  # of each system one for its check, one a round


@pytest.mark.parametrize("fault", ["out", "dx", "dlayers.1.experts.w2", "dlayers.0.router.weight"])
def test_a_replay_that_leaves_something_out_is_wrong(
    events: Events, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(gpu, "capture", Recording(fault))
    rows = measured(Options("overhead", (STACK,), ("fp8_rowwise",), rounds=1), events)
    row = rows[CAPTURED, "stack", "xmoe fp8_rowwise", False]
    least = 41 if "router" in fault else 45
    assert row.ms is None
    assert row.note == f"wrong: {fault} is nan dB from the eager step's, at least {least} is right"


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.fixture
def sleep() -> Iterator[Callable[[object], None]]:
    """A kernel of some milliseconds, none of which is left when the test ends."""
    yield lambda _: torch.cuda._sleep(10**7)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_host_time_does_not_wait_for_the_gpu(sleep: Callable[[object], None]) -> None:
    device = torch.device("cuda", 0)
    taken = CudaTimer(device, 5)(lambda: sleep(None))
    assert taken > 2
    assert HostTimer(device)(lambda: None, sleep) < 0.5


@pytest.mark.gpu
def test_on_a_gpu(events: Events) -> None:
    """Everything is right and timed; a graph gives the eager step's bits."""
    device = torch.device("cuda", 0)
    stack = StackShape("stack", 3, 512, 256, 128, 4, 2)
    options = Options("overhead", (OP, stack), BASE_RECIPES, rounds=2)
    sizes = {"M": 4096, "N": 1024, "K": 1024, "copy_bytes": 2**26}
    measure_all(options, device, CudaTimer(device, 5), CudaMemory(device), events, ceiling_sizes=sizes)
    assert events.of("note") == []
    rows = events.rows()
    assert len(rows) == 4 * (1 + len(BASE_RECIPES))
    for (table, _, system, _), row in rows.items():
        assert len(row.rounds_ms) == 2, (table, system, row.note)
        if table == CAPTURED:
            assert row.note == "equal bits to eager's", system
        if table == EAGER:
            assert row.peak_bytes
            assert row.saved_bytes_per_token
