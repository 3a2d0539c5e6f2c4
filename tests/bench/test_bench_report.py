"""Rows, files and what is read off them, against figures worked out by hand."""

import json
from pathlib import Path

import pytest

from xmoe.bench import report
from xmoe.bench.chart import bar_chart
from xmoe.bench.report import BOTH, FORWARD, Table, cells, markdown, number, readme_section, table_lines, update_readme
from xmoe.bench.results import BF16, TORCHAO, Results, Row, free_stem, save
from xmoe.train.files import UserError

ROOT = Path(__file__).parent.parent.parent
RECORDED = "benchmarks/results/2026-11-21-grouped_mm.json"
DIMS = {"M": 128000, "N": 8192, "K": 5120, "G": 8}


def row(system: str, ms: float | None, table: str = BOTH, shape: str = "llama4_g8", **fields: object) -> Row:
    made = Row(table=table, shape=shape, dims=DIMS, system=system, **fields)  # type: ignore
    if ms is not None:
        made.add_round(ms)
    return made


@pytest.fixture
def results() -> Results:
    """Ceilings of 2 (fp8) and 1 (bf16) PFLOP/s and 4 TB/s."""
    results = Results(
        name="grouped-mm",
        facts={"date": "2026-01-02", "device": "GPU", "smi": {"power.limit": "700 W"}, "versions": {"torch": "2"}},
        ceiling={"fp8": 2e12, "bf16": 1e12, "copy": 4e9},
    )
    for made in (
        row(BF16, 40.0, work={"bf16": 20e12}),
        row(BF16, 32.0, work={"bf16": 20e12}, compiled=True),
        row(TORCHAO, 24.0, work={"fp8": 20e12}),
        row("xmoe fp8_rowwise", 16.0, work={"fp8": 20e12}, peak_bytes=3 * 2**30, saved_bytes_per_token=5124.0),
        row("xmoe fp8_rowwise_wgrad_with_hp", 20.0, work={"fp8": 16e12, "bf16": 4e12}),
        row("xmoe mxfp8_rceil", None),
        row("xmoe fp8_rowwise", 4.0, FORWARD, work={"fp8": 7e12}),
        row("torch._scaled_grouped_mm", 5.0, FORWARD, work={"fp8": 7e12}),
        row("xmoe rows", 0.5, "quantizers", work={"copy": 1e9}),
    ):
        results.put(made)
    results.rows[5].fail("wrong: out is 3.0 dB from bf16")
    return results


def test_derived_figures(results: Results) -> None:
    tables = results.tables()
    table = Table(results, tables[BOTH])
    bf16, compiled, torchao, fp8, hp, failed = tables[BOTH]
    # The faster of eager and compiled is what the others are compared to.
    assert [table.speedup(r, BF16) for r in (bf16, compiled, fp8, failed)] == [32 / 40, 1.0, 2.0, None]
    assert table.speedup(fp8, TORCHAO) == 1.5
    assert table.tflops(fp8) == 1250
    assert table.of_ceiling(fp8) == pytest.approx(10 / 16)
    assert table.of_ceiling(hp) == pytest.approx((8 + 4) / 20)  # each part at its own ceiling
    assert table.of_ceiling(torchao) == pytest.approx(10 / 24)
    assert table.of_ceiling(failed) is None
    (rows,) = tables["quantizers"]
    assert Table(results, [rows]).gigabytes_per_second(rows) == 2000
    assert Table(results, [rows]).of_ceiling(rows) == 0.5
    del results.ceiling["copy"]
    assert Table(results, [rows]).of_ceiling(rows) is None


def test_rounds() -> None:
    timed = row("a", None)
    for ms in (3.0, 1.0, 1.5):
        timed.add_round(ms)
    assert (timed.ms, timed.spread_ms, timed.rounds_ms) == (1.5, 2.0, [3.0, 1.0, 1.5])
    timed.fail("cannot run: it")
    assert (timed.ms, timed.spread_ms, timed.rounds_ms, timed.note) == (None, None, [], "cannot run: it")


def test_a_row_replaces_the_one_with_its_key(results: Results) -> None:
    before = len(results.rows)
    results.put(row(BF16, 1.0))
    assert len(results.rows) == before
    assert results.rows[0].ms == 1.0
    results.put(row("xmoe fp8_rowwise", 1.0, compiled=True))
    assert len(results.rows) == before + 1


def test_markdown(results: Results) -> None:
    text = markdown(results, "chart.png")
    assert "2026-01-02, GPU, power limit 700 W, torch 2" in text
    assert "dense fp8 2000 TFLOP/s, dense bf16 1000 TFLOP/s, copy 4.00 TB/s" in text
    lines = [line for line in text.splitlines() if line.startswith("| llama4_g8")]
    assert len(lines) == len(results.rows)
    assert (
        "| llama4_g8 | 128000 | 8192 | 5120 | 8 | xmoe fp8_rowwise | 16.0 | 0.00 | 2.00 | 1.50 | 1250 | 62% | 3.00 | "
        "5124 |  |" in lines
    )
    assert any("| torch bf16, compiled | 32.0 |" in line for line in lines)
    assert any(line.endswith("| wrong: out is 3.0 dB from bf16 |") for line in lines)
    assert "![grouped-mm](chart.png)" in text
    # A column nobody has a value for is left out.
    titles, _ = cells(results, results.tables()["quantizers"])
    assert titles == ["shape", "M", "N", "K", "G", "system", "ms", "spread ms", "GB/s", "of ceiling"]


def test_host_times_are_in_microseconds(results: Results) -> None:
    assert "Host times" not in markdown(results)
    timed = row("xmoe fp8_rowwise", 0.0754, "host time", unit="µs")
    timed.add_round(0.0912)
    results.put(timed)
    results.put(row(BF16, 0.0357, "host time", unit="µs"))
    assert table_lines(*cells(results, results.tables()["host time"])) == [
        "| shape | M | N | K | G | system | µs | spread µs | x bf16 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| llama4_g8 | 128000 | 8192 | 5120 | 8 | xmoe fp8_rowwise | 83.3 | 15.8 | 0.43 |",
        "| llama4_g8 | 128000 | 8192 | 5120 | 8 | torch bf16 | 35.7 | 0.00 | 1.00 |",
    ]
    assert "Host times" in markdown(results)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(None, None, None), (52.0, None, "52.0"), (4.139, None, "4.14"), (0.0515, None, "0.0515"), (1283.4, None, "1283"),
     (99.96, None, "100"), (99.94, None, "99.9"), (1.876, 2, "1.88"), (28.0, 0, "28")],
)  # fmt: skip
def test_number(value: float | None, digits: int | None, text: str | None) -> None:
    assert number(value, digits) == text


def test_files_come_back(results: Results, tmp_path: Path) -> None:
    files = save(results, tmp_path / "2026-01-02-grouped_mm", "text")
    assert Results.load(files["json"]) == results
    assert files["md"].read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "2026-01-02-grouped_mm.json",
        "2026-01-02-grouped_mm.md",
    ]


def test_an_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    names = []
    for ending in (".json", ".md", ".png"):
        stem = free_stem(tmp_path, "2026-01-02", "layer")
        names.append(stem.name)
        stem.with_name(stem.name + ending).touch()
    assert names == ["2026-01-02-layer", "2026-01-02-layer-2", "2026-01-02-layer-3"]


def test_bad_result_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match="No such file"):
        Results.load(path)
    for text, message in (
        ("{", "is not a JSON file"),
        ("[]", "is no result file"),
        (json.dumps({"name": "a", "rows": [{"x": 1}]}), "is no result file of xmoe bench"),
        (json.dumps({"name": "a", "environment": {}}), "is no result file of xmoe bench"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            Results.load(path)


def test_readme_section(results: Results, tmp_path: Path) -> None:
    section = readme_section(results, "results/run.json")
    assert "| 128000, 8192, 5120, 8 (Llama 4) | 32.0 | 24.0 | 16.0 (2.00×) |" in section
    assert "[the whole run](results/run.md)" in section
    assert (
        "runs at 1750–1750 TFLOP/s over the Llama 4 and DeepSeek-V3 shapes, `torch._scaled_grouped_mm` at 1400"
        in section
    )
    for system in ("xmoe fp8_rowwise", "torch._scaled_grouped_mm"):  # with fewer tokens: no part of what it says
        results.put(row(system, 1.0, FORWARD, "llama4_g8_m4096", work={"fp8": 1e11}))
    assert readme_section(results, "results/run.json") == section
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        update_readme(readme, section)
        assert readme.read_text() == f"before\n{report.BEGIN}\n{section}\n{report.END}\nafter\n"
    for text in ("", report.BEGIN, f"{report.END}{report.BEGIN}", f"{report.BEGIN}{report.END}" * 2):
        readme.write_text(text)
        with pytest.raises(UserError, match="add the lines <!-- speed: begin --> and <!-- speed: end -->, once each"):
            update_readme(readme, section)
        assert readme.read_text() == text
    results.rows = [r for r in results.rows if r.table != BOTH]
    with pytest.raises(UserError, match="has no table 'forward and backward'"):
        readme_section(results, "run.json")


def test_the_readme_is_generated() -> None:
    """README.md's speed section is what `xmoe bench report … --readme` writes from the run that it links to."""
    text = (ROOT / "README.md").read_text()
    section = text.split(report.BEGIN)[1].split(report.END)[0].strip()
    source = section.split("[the whole run](")[1].split(")")[0].replace(".md", ".json")
    assert section == readme_section(Results.load(ROOT / source), source)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_recorded_runs_are_readable(path: Path) -> None:
    chart = path.with_suffix(".png")
    assert path.with_suffix(".md").read_text() == markdown(Results.load(path), chart.name if chart.exists() else "")


def test_chart(results: Results) -> None:
    png = bar_chart(results)
    assert png is not None
    assert png.startswith(b"\x89PNG")
    for made in results.rows:
        made.fail("cannot run: x")
    assert bar_chart(results) is None
