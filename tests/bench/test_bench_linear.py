"""`xmoe bench linear` on the CPU, and the table that its results become."""

import tomllib
from typing import Any

import pytest
import torch
from torch import nn

from tests.bench.conftest import Events, ScriptedTimer
from xmoe.bench import report
from xmoe.bench.harness import NoMemory
from xmoe.bench.options import BASE_LINEAR_RECIPES, Options, find_shapes, make_options
from xmoe.bench.results import BF16, Results, Row
from xmoe.bench.run import write_report
from xmoe.config import LinearConfig
from xmoe.shapes import LinearShape
from xmoe.torch_backend import linear_filter, quantize_
from xmoe.torch_backend.bench import linear, peers
from xmoe.torch_backend.bench.run import measure_all
from xmoe.train.files import UserError

SHAPE = LinearShape("small", 64, 96, 48)
SMALL: dict[str, Any] = {"M": 32, "N": 32, "K": 32, "copy_bytes": 1024}


def test_rows(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe is right and timed; torchao's is counted from its own of the same name."""
    monkeypatch.setattr(peers, "convert_linears", lambda model, recipe: quantize_(model, recipe, verbose=False))
    options = Options("linear", (SHAPE,), BASE_LINEAR_RECIPES, ("torchao",), rounds=1)
    rows = measure_all(options, torch.device("cpu"), ScriptedTimer(), NoMemory(), events, ceiling_sizes=SMALL)
    assert [row.note for row in rows] == [""] * 9
    assert all(row.ms for row in rows)
    systems = [row.system for row in rows]
    assert systems[:5] == [BF16, "xmoe tensorwise", "torchao tensorwise", "xmoe rowwise", "torchao rowwise"]
    titles, lines = report.cells(Results(name="linear", rows=rows), rows)
    of_torchao = {line[titles.index("system")]: line[titles.index("x torchao")] for line in lines}
    ms = {row.system: row.ms for row in rows}
    assert of_torchao["xmoe tensorwise"] == f"{ms['torchao tensorwise'] / ms['xmoe tensorwise']:.2f}"
    assert of_torchao["xmoe rowwise"] == f"{ms['torchao rowwise'] / ms['xmoe rowwise']:.2f}"
    assert of_torchao["xmoe blockwise"] == "–"
    assert {row.dims["K"] for row in rows} == {96}


def test_a_wrong_result_is_no_time(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, recipe: str) -> None:
        model[1] = nn.Linear(96, 48, bias=False, dtype=torch.bfloat16)  # type: ignore[index]

    monkeypatch.setattr(peers, "convert_linears", wrong)
    options = Options("linear", (SHAPE,), ("rowwise",), ("torchao",), rounds=1)
    rows = measure_all(options, torch.device("cpu"), ScriptedTimer(), NoMemory(), events, ceiling_sizes=SMALL)
    assert rows[2].note.startswith("wrong: out is ")
    assert rows[2].ms is None


@pytest.mark.parametrize(
    ("recipe", "capability", "work"),
    [
        ("tensorwise", (9, 0), {"fp8": 3.0}), ("rowwise_with_gw_hp", (9, 0), {"fp8": 2.0, "bf16": 1.0}),
        ("mxfp8_cublas", (9, 0), {"bf16": 3.0}), ("mxfp8_cublas", (10, 0), {"fp8": 3.0}),
        ("tensorwise", None, {"bf16": 3.0}),
    ],
)  # fmt: skip
def test_work(recipe: str, capability: tuple[int, int] | None, work: dict[str, float]) -> None:
    assert linear.work(LinearConfig.from_recipe(recipe), 1.0, capability) == work


def test_options() -> None:
    options = make_options("linear")
    assert options.recipes == BASE_LINEAR_RECIPES
    assert options.shapes[0] == LinearShape("linear_4096_4096", 16384, 4096, 4096)
    assert all(shape.name.startswith("linear") for shape in options.shapes)
    assert len(find_shapes("linear", "sweep")) == 9
    assert Options.from_dict(options.to_dict()) == options
    with pytest.raises(UserError, match="--recipes: 'fp8_rowwise' is not known; use tensorwise, rowwise"):
        make_options("linear", recipes="fp8_rowwise")


def recorded() -> Results:
    times = {
        BF16: (8.0, 6.0),
        "xmoe rowwise": (5.0, 4.0),
        "xmoe tensorwise": (9.0, None),
        "torchao rowwise": (3.0, 3.0),
    }
    rows = []
    for system, both in times.items():
        for compiled, ms in zip((False, True), both, strict=True):
            row = Row(
                table=report.LINEAR, shape="a", dims={"M": 64, "K": 96, "N": 48}, system=system, compiled=compiled
            )
            if ms is not None:
                row.add_round(ms)
            rows.append(row)
    return Results(name="linear", facts={"date": "2026-01-01", "device": "GPU"}, rows=rows)


def test_the_filter_goes_by_what_was_measured(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.json").write_text(recorded().to_json())
    table = tmp_path / "speeds.toml"
    write_report(tmp_path / "run.json", None, table)
    found = tomllib.loads(table.read_text())
    assert found == {
        "measured": True,
        "speedup": [
            {"recipe": "rowwise", "M": 64, "K": 96, "N": 48, "value": 1.5},
            {"recipe": "tensorwise", "M": 64, "K": 96, "N": 48, "value": 0.667},
        ],
    }
    monkeypatch.setattr(linear_filter, "TABLE", table)
    linear_filter._table.cache_clear()
    try:
        assert linear_filter.is_measured()
        assert linear_filter.gains(96, 48, "rowwise")
        assert not linear_filter.gains(96, 48, "tensorwise")
    finally:
        linear_filter._table.cache_clear()


def test_a_run_of_something_else(tmp_path: Any) -> None:
    (tmp_path / "run.json").write_text(Results(name="layer").to_json())
    with pytest.raises(UserError, match=r"run\.json has no times of linears"):
        write_report(tmp_path / "run.json", None, tmp_path / "speeds.toml")


def test_the_packages_table_reads() -> None:
    measured, points = linear_filter._table()
    assert isinstance(measured, bool)
    assert all(K % 16 == N % 16 == 0 and value > 0 for found in points.values() for K, N, value in found)
