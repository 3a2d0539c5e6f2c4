"""The table, the merged metrics and the chart."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from xmoe.train.checkpoint import Result, RunFolder
from xmoe.train.files import UserError
from xmoe.train.report import COLUMNS, print_table, rows, write_report

RESULT = Result(
    framework="torch", recipe="bf16", device="cpu", steps=50, loss=2.5, heldout_loss=2.0,
    tokens_per_second=12345.6, peak_memory=300 * 2**20,
)  # fmt: skip


def results() -> list[Result]:
    quantized = dataclasses.replace(RESULT, recipe="fp8_rowwise", heldout_loss=2.01, peak_memory=3 * 2**30)
    return [RESULT, quantized, dataclasses.replace(quantized, framework="flax")]


def test_rows() -> None:
    assert rows(results()) == [
        ("torch", "bf16", "2.5000", "2.0000", "+0.00%", "12,346", "300 MiB"),
        ("torch", "fp8_rowwise", "2.5000", "2.0100", "+0.50%", "12,346", "3.00 GiB"),
        ("flax", "fp8_rowwise", "2.5000", "2.0100", "-", "12,346", "3.00 GiB"),  # no bf16 run in Flax to compare with
    ]


def test_table_is_whole_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(results())
    text = capsys.readouterr().out
    assert "50 steps on cpu" in text
    for cell in (*COLUMNS, *(cell for row in rows(results()) for cell in row)):
        assert cell in text


def test_finished_run_without_metrics_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "torch", "bf16")
    folder.create()
    folder.finish(RESULT)
    with pytest.raises(UserError, match=f"^{folder.metrics}: holds no losses; delete {folder.path} and train it again"):
        write_report(tmp_path)


def test_report_merges_finished_runs_and_draws_them(tmp_path: Path) -> None:
    for result in results():
        folder = RunFolder(tmp_path, result.framework, result.recipe)
        folder.create()
        for step in range(1, 51):
            folder.log(step=step, loss=2 + 3 / step, learning_rate=1e-3, seconds=0.1)
        folder.log(step=50, heldout_loss=result.heldout_loss)
        folder.finish(result)
    unfinished = RunFolder(tmp_path, "flax", "bf16")
    unfinished.create()
    unfinished.log(step=1, loss=9.0)

    assert write_report(tmp_path) == results()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {(line["framework"], line["recipe"]) for line in lines} == {(r.framework, r.recipe) for r in results()}
    assert len(lines) == 3 * 51
    picture = image.imread(tmp_path / "loss.png")
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1500  # two panels
    for column in np.split(picture[..., :3], [picture.shape[1] // 2], axis=1):
        assert (np.ptp(column, axis=-1) > 0.2).sum() > 1000  # coloured lines in each
