"""The whole path on the CPU: systems, checks, events, tables and files, with shapes that take milliseconds."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench.conftest import Events, ScriptedTimer
from tests.torch_backend.compiling import BACKEND
from xmoe.bench import run
from xmoe.bench.harness import NoMemory
from xmoe.bench.options import Options
from xmoe.bench.report import BOTH, FORWARD, markdown
from xmoe.bench.results import BF16, TORCHAO, Results
from xmoe.bench.run import WorkerFailed
from xmoe.bench.screen import LiveScreen, PlainScreen
from xmoe.kernels import emulation
from xmoe.shapes import LayerShape, Shape
from xmoe.torch_backend.bench import gpu, grouped_mm, peers
from xmoe.torch_backend.bench.layer import BLOCK, EXPERTS, LAYER, moe
from xmoe.torch_backend.bench.quantize import TABLE
from xmoe.torch_backend.bench.run import measure_all

CPU = torch.device("cpu")
GEMM = Shape("tiny", 160, 64, 48, 3)
LAYERS = LayerShape("tiny", 128, 64, 96, 4, 2)
SMALL: dict[str, Any] = {"M": 32, "N": 32, "K": 32, "copy_bytes": 1024}


def measured(options: Options, events: Events) -> dict[tuple[str, str, str, bool], Any]:
    measure_all(options, CPU, ScriptedTimer(), NoMemory(), events, backend=BACKEND, ceiling_sizes=SMALL)
    return events.rows()


def test_grouped_mm(events: Events) -> None:
    recipes = ("bf16", "fp8_rowwise", "fp8_rowwise_wgrad_with_hp", "mxfp8_floor")
    rows = measured(Options("grouped-mm", (GEMM,), recipes, ("torch",), cached=True, rounds=2), events)
    assert next(event["event"] for event in events.all) == "facts"
    facts = events.of("facts")[0]
    assert facts["facts"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert all(facts["ceiling"][kind] > 0 for kind in ("bf16", "copy"))
    for recipe in recipes:
        row = rows[BOTH, "tiny", f"xmoe {recipe}", False]
        assert len(row.rounds_ms) == 2
        assert sum(row.work.values()) == 3 * GEMM.flops
        assert row.note == ""
        cached = rows[BOTH, "tiny", f"xmoe {recipe}, weights cached over 8", False]
        assert cached.sqnr_db == row.sqnr_db
        assert all((8 * ms).is_integer() for ms in cached.rounds_ms)  # the timer counts whole milliseconds
        assert cached.ms < row.ms / 4
    # The accuracy of each format, in both tables; the worst expert is no better than the whole.
    for table in (FORWARD, BOTH):
        for recipe, least, most in (("fp8_rowwise", 27.5, 30), ("mxfp8_floor", 26.5, 29)):
            row = rows[table, "tiny", f"xmoe {recipe}", False]
            assert least <= row.worst_expert_db <= row.sqnr_db <= most, row
    assert rows[FORWARD, "tiny", BF16, False].sqnr_db is None  # equal to itself
    assert rows[BOTH, "tiny", BF16, False].ms is not None
    assert (FORWARD, "tiny", "xmoe fp8_rowwise_wgrad_with_hp", False) not in rows  # its forward is fp8_rowwise's
    torchs = rows[FORWARD, "tiny", "torch._scaled_grouped_mm", False]
    assert torchs.ms is None
    assert torchs.note.startswith("cannot run: NotImplementedError")


def test_more_groups_than_their_multiples_leave_tokens_for(events: Events) -> None:
    """Ten groups of 64 tokens: most are empty, and torch leaves their weight gradients undefined."""
    shape = Shape("tiny_m64", 64, 32, 32, 10)
    rows = measured(Options("grouped-mm", (shape,), ("bf16", "fp8_rowwise"), (), rounds=1), events)
    assert len(rows) == 6
    assert all(row.ms for row in rows.values()), rows


def test_a_wrong_grouped_gemm_is_not_timed(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert of three is wrong, and everything but fp8 is right."""
    right = grouped_mm.scaled_grouped_mm

    def wrong(A: torch.Tensor, B_t: torch.Tensor, offs: torch.Tensor, config: Any) -> torch.Tensor:
        out = right(A, B_t, offs, config)
        if config.format != "fp8_rowwise":
            return out
        scale = torch.ones(out.shape[0], 1, dtype=out.dtype)
        scale[: int(offs[0])] = 1.1
        return out * scale

    monkeypatch.setattr(grouped_mm, "scaled_grouped_mm", wrong)
    rows = measured(Options("grouped-mm", (GEMM,), ("bf16", "fp8_rowwise"), ("torch",), rounds=1), events)
    assert rows[BOTH, "tiny", "xmoe bf16", False].ms is not None
    row = rows[BOTH, "tiny", "xmoe fp8_rowwise", False]
    assert row.ms is None
    assert row.note.startswith("wrong: ")
    assert "dB from bf16, at least 27.5 is right" in row.note


@pytest.mark.parametrize("format", ["fp8_rowwise", "mxfp8_rceil"])
def test_quantize(events: Events, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    # After the two calls of each quantizer that make its outputs and its check, one of the tokens goes wrong.
    rows = measured(Options("quantize", (GEMM,), ("bf16", f"{format}_wgrad_with_hp"), rounds=1), events)
    names = {"rows", "tokens", "rows and tokens", "weights K", "weights N"}
    assert {key[:3] for key in rows} == {(TABLE, "tiny", f"{format} {name}") for name in names}
    assert all(row.note == "equal bytes" and row.ms for row in rows.values())
    scales = 4 * 160 if format == "fp8_rowwise" else 160 * 2
    assert rows[TABLE, "tiny", f"{format} rows", False].work == {"copy": 160 * 48 * 3 + scales}

    right, calls = emulation.quantize_weights, iter(range(100))

    def wrong(B: torch.Tensor, axis: str, fmt: str) -> Any:
        operand = right(B, axis, fmt)
        operand.data.view(torch.uint8)[0, 0, 0] ^= next(calls) + 1
        return operand

    monkeypatch.setattr(emulation, "quantize_weights", wrong)
    rows = measured(Options("quantize", (GEMM,), (format,), rounds=1), events)
    row = rows[TABLE, "tiny", f"{format} weights K", False]
    assert (row.ms, row.note) == (None, "wrong: 1 bytes of output 0 [3, 64, 48] differ from the emulation's")
    assert rows[TABLE, "tiny", f"{format} rows", False].ms is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, inside its compiler
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in transformers
@pytest.mark.parametrize("compiled", [False, True])
def test_layer(events: Events, compiled: bool) -> None:
    recipes = ("fp8_rowwise",) if compiled else ("bf16", "fp8_rowwise", "mxfp8_floor")
    options = Options("layer", (LAYERS,), recipes, ("torch", "transformers"), compile=compiled, rounds=1)
    rows = measured(options, events)
    for table in (EXPERTS, LAYER, BLOCK):
        for name in (BF16, *(f"xmoe {recipe}" for recipe in recipes)):
            for kind in {False, compiled}:
                row = rows[table, "tiny", name, kind]
                assert row.ms is not None, row.note
                assert sum(row.work.values()) == 3 * LAYERS.flops
        fp8 = rows[table, "tiny", "xmoe fp8_rowwise", compiled]
        assert 18 <= fp8.worst_expert_db <= fp8.sqnr_db < 27.5  # several GEMMs deep


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_router_has_a_gradient(events: Events, top_k: int) -> None:
    """Of the output, besides that of the load-balance loss: a single score that is normalised has 2e-8."""
    shape = LayerShape("tiny", 128, 64, 96, 4, top_k)
    layer = moe(shape, "cpu")
    y, _ = layer(torch.randn(128, 64, dtype=torch.bfloat16))
    y.sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().max() > 0.01
    rows = measured(Options("layer", (shape,), ("bf16", "fp8_rowwise", "mxfp8_floor"), (), rounds=1), events)
    assert all(row.ms for row in rows.values()), rows


def test_torchao_is_kept_from_groups_that_it_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "grouped_mm", lambda: torch._grouped_mm)
    assert peers.obstacle([32, 0, 128]) == ""
    assert peers.obstacle([32, 25, 7]) == "a group has 25 tokens; torchao takes multiples of 16"

    def missing() -> Any:
        raise ImportError("no torchao here")

    monkeypatch.setattr(peers, "grouped_mm", missing)
    assert peers.obstacle([32]) == "ImportError: no torchao here"


def test_a_peer_runs_beside_the_others(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        peers, "grouped_mm", lambda: lambda A, B_t, offs: grouped_mm.scaled_grouped_mm(A, B_t, offs, "mxfp8_rceil")
    )
    rows = measured(Options("grouped-mm", (GEMM, Shape("odd", 150, 32, 32, 2)), (), ("torchao",), rounds=1), events)
    assert rows[BOTH, "tiny", TORCHAO, False].ms is not None
    assert rows[BOTH, "odd", TORCHAO, False].note.startswith("cannot run: a group has ")


# ------------------------------------------------------------------------------------------------------ the whole run


@pytest.fixture(scope="module")
def whole_run() -> Events:
    """The events of a run."""
    events = Events()
    measured(Options("grouped-mm", (GEMM,), ("fp8_rowwise",), ("torch",), rounds=2), events)
    return events


def piped(events: Events) -> list[dict[str, Any]]:
    """As they come out of a pipe."""
    return json.loads(json.dumps(events.all))


@pytest.mark.parametrize("screen", [PlainScreen, LiveScreen])
def test_run_leaves_files(
    whole_run: Events, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, screen: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = piped(whole_run)
    monkeypatch.setattr(run, "make_screen", screen)
    monkeypatch.setattr(run, "start_worker", lambda _: stream)
    options = Options("grouped-mm", (GEMM,), ("fp8_rowwise",), ("torch",), rounds=2)
    results = run.run(options, tmp_path / "out")
    date = results.facts["date"]
    stem = f"{date}-grouped_mm"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{stem}.json", f"{stem}.md", f"{stem}.png"}
    stored = Results.load(tmp_path / "out" / f"{stem}.json")
    assert stored == results
    assert {row.key: row for row in stored.rows} == whole_run.rows()
    printed = capsys.readouterr()
    assert markdown(results) in printed.out
    assert (tmp_path / "out" / f"{stem}.md").read_text() == markdown(results, f"{stem}.png")
    assert "xmoe fp8_rowwise" in (printed.err if screen is PlainScreen else printed.out)
    run.run(options, tmp_path / "out")  # leaves the first run's files alone
    assert Results.load(tmp_path / "out" / f"{stem}.json") == stored
    assert (tmp_path / "out" / f"{stem}-2.json").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), WorkerFailed("the process was ended by SIGKILL")])
def test_an_interrupted_run_keeps_its_rows(
    whole_run: Events, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    stream = piped(whole_run)
    last = max(i for i, event in enumerate(stream) if event["event"] == "row")

    def start_worker(*_: object) -> Any:
        yield from stream[:last]
        raise error

    monkeypatch.setattr(run, "start_worker", start_worker)
    with pytest.raises(type(error)):
        run.run(Options("grouped-mm", (GEMM,), ("fp8_rowwise",)), tmp_path)
    (path,) = tmp_path.glob("*.json")
    rounds = {row.key: len(row.rounds_ms) for row in Results.load(path).rows}
    whole = {key: len(row.rounds_ms) for key, row in whole_run.rows().items()}
    assert rounds.keys() == whole.keys()
    assert sum(rounds.values()) == sum(whole.values()) - 1
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -9 $$", "the measuring process was ended by SIGKILL; its rows until then are kept"),
        ("exit 3", "the measuring process failed, see above; its rows until then are kept"),
    ],
)
def test_a_worker_that_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str) -> None:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\ncat > {tmp_path / "stdin"}\necho \'{{"event": "note"}}\'\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    options = Options("layer", (LAYERS,), ("bf16",))
    stream = run.start_worker(options)
    assert next(stream) == {"event": "note"}
    with pytest.raises(WorkerFailed, match=message):
        next(stream)
    assert Options.from_dict(json.loads((tmp_path / "stdin").read_text())) == options


def test_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    program.write_text('#!/bin/sh\n[ "$2" = GPU-12 ] && echo "580.1, 700.00 W, 1980 MHz, 3201 MHz, 1755 MHz"\n')
    program.chmod(0o755)
    found = gpu.nvidia_smi("12")
    assert found["power.limit"] == "700.00 W"
    assert found["clocks.sm"] == "1755 MHz"
    assert gpu.nvidia_smi("13") == {}
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpu.nvidia_smi("12") == {}
