"""Results as Markdown: tables, and the README's speed section."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xmoe.bench.options import BASE_RECIPES
from xmoe.bench.results import BF16, TORCHAO, Results, Row
from xmoe.shapes import DEEPSEEK_V3, LLAMA4
from xmoe.train.files import UserError, write_atomically

FORWARD = "forward GEMM, operands quantized"
BOTH = "forward and backward"
LINEAR = "norm, linear, activation, forward and backward"
EMPTY = "–"
_PER_MS = {"ms": 1, "µs": 1e3}
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
README_SHAPES = {
    "llama4_g8": "Llama 4", "deepseek_v3_g8": "DeepSeek-V3", "deepseek_v2_lite": "DeepSeek-V2-Lite",
    "qwen3_30b_a3b": "Qwen3-30B-A3B",
}  # fmt: skip
"""The rows of the README's table, as far as the run has them; else all its shapes."""


class Table:
    """The figures of one table that follow from its rows and the run's ceilings."""

    def __init__(self, results: Results, rows: Sequence[Row]) -> None:
        self.rows, self._ceiling = rows, results.ceiling

    def baseline_ms(self, row: Row, system: str) -> float | None:
        """The time of ``system`` at the row's shape: of its eager and its compiled one the faster."""
        times = [r.ms for r in self.rows if r.shape == row.shape and r.system == system and r.ms is not None]
        return min(times, default=None)

    def speedup(self, row: Row, system: str) -> float | None:
        """How many times as fast as ``system`` the row's system is. For torchao it is that of the row's recipe, where
        the run has several."""
        base = self.baseline_ms(row, system)
        if system == TORCHAO and base is None:
            base = self.baseline_ms(row, f"torchao {row.system.partition(' ')[2]}")
        return None if base is None or row.ms is None else base / row.ms

    def tflops(self, row: Row) -> float | None:
        flops = row.work.get("fp8", 0.0) + row.work.get("bf16", 0.0)
        return flops / row.ms / 1e9 if flops and row.ms else None

    def gigabytes_per_second(self, row: Row) -> float | None:
        moved = row.work.get("copy", 0.0)
        return moved / row.ms / 1e6 if moved and row.ms else None

    def of_ceiling(self, row: Row) -> float | None:
        """The time that the row's work would take at the GPU's measured ceilings, over that which it took."""
        if not row.ms or not row.work or any(kind not in self._ceiling for kind in row.work):
            return None
        return sum(amount / self._ceiling[kind] for kind, amount in row.work.items()) / row.ms


def _columns(table: Table) -> list[tuple[str, Callable[[Row], Any]]]:
    dims = list(dict.fromkeys(letter for row in table.rows for letter in row.dims))
    return [
        ("shape", lambda row: row.shape),
        *((letter, lambda row, letter=letter: row.dims.get(letter)) for letter in dims),
        ("system", lambda row: row.name),
        ("ms", lambda row: _time(row, row.ms, "ms")),
        ("spread ms", lambda row: _time(row, row.spread_ms, "ms")),
        ("µs", lambda row: _time(row, row.ms, "µs")),
        ("spread µs", lambda row: _time(row, row.spread_ms, "µs")),
        ("x bf16", lambda row: number(table.speedup(row, BF16), 2)),
        ("x torchao", lambda row: number(table.speedup(row, TORCHAO), 2)),
        ("TFLOP/s", lambda row: number(table.tflops(row), 0)),
        ("GB/s", lambda row: number(table.gigabytes_per_second(row), 0)),
        ("of ceiling", lambda row: None if (x := table.of_ceiling(row)) is None else f"{x:.0%}"),
        ("peak GiB", lambda row: None if row.peak_bytes is None else number(row.peak_bytes / 2**30)),
        ("saved B/token", lambda row: number(row.saved_bytes_per_token, 0)),
        ("SQNR dB", lambda row: number(row.sqnr_db, 1)),
        ("worst expert dB", lambda row: number(row.worst_expert_db, 1)),
        ("note", lambda row: row.note or None),
    ]


def _time(row: Row, ms: float | None, unit: str) -> str | None:
    """A time of ``row``, for the column of ``unit``."""
    return None if ms is None or row.unit != unit else number(ms * _PER_MS[unit])


def number(value: float | None, digits: int | None = None) -> str | None:
    """``value`` with that many decimals, or with three significant digits."""
    if value is None:
        return None
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def cells(results: Results, rows: Sequence[Row], among: Sequence[Row] | None = None) -> tuple[list[str], list[Any]]:
    """(column titles, a list of cells for each row); columns without a value in any row are left out.

    ``among``: the rows of the same table, baselines included (default: ``rows``).
    """
    columns = _columns(Table(results, rows if among is None else among))
    values = [[column(row) for _, column in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] is not None for line in values)]
    lines = [[EMPTY if line[i] is None else str(line[i]) for i in kept] for line in values]
    for line in lines:
        if kept and columns[kept[-1]][0] == "note":
            line[-1] = line[-1].removeprefix(EMPTY)
    return [columns[i][0] for i in kept], lines


def table_lines(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in (titles, ["---"] * len(titles), *escaped)]


def machine(results: Results) -> str:
    """One line: date, device, clocks, power limit, versions."""
    facts = results.facts
    parts = [facts.get("date"), facts.get("device")]
    clocks = facts.get("smi") or {}
    parts += [f"{name.replace('.', ' ').replace('_', ' ')} {value}" for name, value in clocks.items()]
    parts += [f"CUDA {facts['cuda']}"] if facts.get("cuda") else []
    parts += [f"{package} {version}" for package, version in facts.get("versions", {}).items() if version]
    return ", ".join(str(part) for part in parts if part)


def ceilings(results: Results) -> str:
    """One line: what this GPU does at most; "" where it was not measured."""
    names = {"fp8": "dense fp8 {:.0f} TFLOP/s", "bf16": "dense bf16 {:.0f} TFLOP/s", "copy": "copy {:.2f} TB/s"}
    parts = [text.format(results.ceiling[kind] / 1e9) for kind, text in names.items() if kind in results.ceiling]
    return f"Ceilings measured in the same run: {', '.join(parts)}." if parts else ""


def markdown(results: Results, chart: str = "") -> str:
    """The whole report. ``chart``: the name of a picture to show."""
    text = [f"# {results.name}", "", machine(results)]
    if line := ceilings(results):
        text += ["", line]
    for title, rows in results.tables().items():
        text += ["", f"## {title}", "", *table_lines(*cells(results, rows))]
    if results.rows:
        text += ["", _LEGEND]
    if any(row.unit == "µs" for row in results.rows):
        text += ["", _HOST_LEGEND]
    for note in results.notes:
        text += ["", note]
    if chart:
        text += ["", f"![{results.name}]({chart})"]
    return "\n".join(text) + "\n"


_LEGEND = (
    "Times are medians, the spread is that of the rounds' medians. “x bf16” and “x torchao” count from the faster of "
    f"the eager and the compiled `{BF16}` and `{TORCHAO}`. “Of ceiling”: the time of the work (GEMMs; for quantizers "
    "each input read and each output written once) at the measured ceilings, over the time taken. “Peak” is memory "
    "over the operands, gradients included; “saved” what autograd keeps of the forward, the weights excepted."
)


_HOST_LEGEND = (
    "Host times are what a call takes until it returns, the GPU idle before a burst of calls and not waited for after "
    "one; the median of single calls."
)


def readme_section(results: Results, source: str) -> str:
    """The README's paragraph and table, from a grouped-mm run recorded in ``source``. Raises UserError for another."""
    tables = results.tables()
    if BOTH not in tables:
        raise UserError(f"{source} has no table {BOTH!r}; the README shows that of xmoe bench grouped-mm")
    rows = [row for row in tables[BOTH] if row.ms is not None]
    present = {row.shape: row for row in rows}
    shapes = [name for name in README_SHAPES if name in present] or list(present)
    ours = [f"xmoe {recipe}" for recipe in BASE_RECIPES if recipe not in ("bf16", "mxfp8_floor")]
    systems = [name for name in (BF16, TORCHAO, *ours) if any(row.system == name for row in rows)]
    table = Table(results, rows)
    lines = []
    for shape in shapes:
        model = f" ({README_SHAPES[shape]})" if shape in README_SHAPES else ""
        line = [", ".join(map(str, present[shape].dims.values())) + model]
        for system in systems:
            ms, base = table.baseline_ms(present[shape], system), table.baseline_ms(present[shape], BF16)
            ratio = f" ({base / ms:.2f}×)" if ms and base and system.startswith("xmoe") else ""
            line.append(f"{number(ms)}{ratio}" if ms else EMPTY)
        lines.append(line)
    text = (
        "Forward and backward of one grouped GEMM, medians in ms, all systems in one process, in brackets the speed "
        f"over bf16 ([the whole run]({Path(source).with_suffix('.md').as_posix()}))."
    )
    if forward := _forward_sentence(Table(results, tables.get(FORWARD, []))):
        text += f" {forward}"
    titles = [", ".join(present[shapes[0]].dims), *(_title(system) for system in systems)]
    return "\n".join([text, "", *table_lines(titles, lines), "", f"{machine(results)}."])


def _title(system: str) -> str:
    if system in (BF16, TORCHAO):
        return {BF16: "`torch._grouped_mm` bf16", TORCHAO: "torchao fp8"}[system]
    return "xmoe `{}`".format(system.removeprefix("xmoe "))


def _forward_sentence(table: Table) -> str:
    """What the bare fp8 GEMM reaches where many tokens share an expert; "" without both systems."""

    def reach(system: str) -> str:
        large = {shape.name for shape in (*LLAMA4, *DEEPSEEK_V3)}  # as they are named with their own tokens
        rows = [row for row in table.rows if row.system == system and row.shape in large]
        found = [sum(row.work.values()) / ms / 1e9 for row in rows for ms in row.rounds_ms]
        return f"{min(found):.0f}–{max(found):.0f}" if found else ""

    ours, peer = reach("xmoe fp8_rowwise"), reach("torch._scaled_grouped_mm")
    if not ours or not peer:
        return ""
    return (
        f"The fp8 forward GEMM alone runs at {ours} TFLOP/s over the Llama 4 and DeepSeek-V3 shapes, "
        f"`torch._scaled_grouped_mm` at {peer}."
    )


def linear_filter(results: Results, source: str) -> str:
    """The text of ``linear_filter.toml``: how many times as fast as bf16 each recipe is at each shape, both by the
    faster of eager and compiled. ``source``: the run's name. Raises UserError where it is none of linears."""
    rows = results.tables().get(LINEAR, [])
    table, lines, seen = Table(results, rows), [], set()
    for row in rows:
        ours, base = table.baseline_ms(row, row.system), table.baseline_ms(row, BF16)
        recipe = row.system.removeprefix("xmoe ")
        if recipe == row.system or (recipe, row.shape) in seen or ours is None or base is None:
            continue
        seen.add((recipe, row.shape))
        sizes = ", ".join(f"{letter} = {row.dims[letter]}" for letter in ("M", "K", "N"))
        lines.append(f'    {{ recipe = "{recipe}", {sizes}, value = {base / ours:.3f} }},')
    if not lines:
        raise UserError(f"{source} has no times of linears; give a run of xmoe bench linear")
    head = [
        "# How many times as fast as in bf16 linears are: norm, linear and activation, forward and backward, both the",
        f"# faster of eager and torch.compile. Written by `xmoe bench report {source} --linear-filter`.",
        f"# {machine(results)}.",
    ]
    return "\n".join([*head, "", "measured = true", "speedup = [", *sorted(lines), "]", ""])


def update_readme(readme: Path, section: str) -> None:
    """Put ``section`` between the two markers of ``readme``. Raises UserError where they are not, once each."""
    try:
        text = readme.read_text()
    except OSError as error:
        raise UserError(f"--readme {readme}: {error.strerror}; give a Markdown file") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"--readme {readme}: add the lines {BEGIN} and {END}, once each, where the section goes")
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    new = re.sub(pattern, lambda _: f"{BEGIN}\n{section}\n{END}", text, flags=re.DOTALL)
    write_atomically(readme, new.encode())
