"""The rows of a benchmark and the file that keeps them, written anew after every row."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from xmoe.train.files import UserError, write_atomically

BF16 = "torch bf16"
TORCHAO = "torchao fp8_rowwise"
"""The systems that the others are compared to."""


@dataclass(slots=True, kw_only=True)
class Row:
    """One system at one shape. What was not measured is None."""

    table: str
    shape: str
    dims: dict[str, int]
    """The shape's sizes, by their letters."""
    system: str
    compiled: bool = False
    unit: str = "ms"
    """What its times are shown in: "ms", or "µs" for those of the host. They are kept in ms."""
    work: dict[str, float] = field(default_factory=dict)
    """`xmoe.bench.workload.Work`."""
    ms: float | None = None
    """Median of the rounds' medians."""
    spread_ms: float | None = None
    """Largest minus smallest of the rounds."""
    rounds_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    """The most memory allocated over the operands, gradients included."""
    saved_bytes_per_token: float | None = None
    """What autograd keeps from the forward for the backward, the weights excepted."""
    sqnr_db: float | None = None
    """The worst of the results (output, gradients) against bf16; None for equal results too."""
    worst_expert_db: float | None = None
    """The same of the worst expert."""
    note: str = ""
    """Why there is no time, or what else is worth knowing."""

    @property
    def key(self) -> tuple[str, str, str, bool]:
        return self.table, self.shape, self.system, self.compiled

    @property
    def name(self) -> str:
        return f"{self.system}, compiled" if self.compiled else self.system

    def add_round(self, ms: float) -> None:
        """Another round took ``ms``."""
        self.rounds_ms.append(ms)
        self.ms = statistics.median(self.rounds_ms)
        self.spread_ms = max(self.rounds_ms) - min(self.rounds_ms)

    def fail(self, note: str) -> None:
        """The system has no (right) result: ``note`` says why. What was timed before is no time of it."""
        self.note, self.ms, self.spread_ms, self.rounds_ms = note, None, None, []


@dataclass(slots=True, kw_only=True)
class Results:
    """A whole run: facts of the machine, its measured ceilings, and rows."""

    name: str
    """The command: "grouped-mm", "quantize", "layer"."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Date, device, clocks, power limit, driver, versions."""
    ceiling: dict[str, float] = field(default_factory=dict)
    """Of this very GPU: "fp8" and "bf16" in operations a millisecond, "copy" in bytes a millisecond."""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, row: Row) -> None:
        """Add the row, or put it in the place of that of the same table, shape and system."""
        for i, other in enumerate(self.rows):
            if other.key == row.key:
                self.rows[i] = row
                return
        self.rows.append(row)

    def tables(self) -> dict[str, list[Row]]:
        """Rows by table and, in a table, by shape, in the order in which they came."""
        tables: dict[str, dict[str, list[Row]]] = {}
        for row in self.rows:
            tables.setdefault(row.table, {}).setdefault(row.shape, []).append(row)
        return {table: [row for rows in shapes.values() for row in rows] for table, shapes in tables.items()}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> "Results":
        """The file's results. Raises UserError naming the file and what is wrong with it."""
        try:
            data = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give a result file of xmoe bench") from error
        except ValueError as error:
            raise UserError(f"{path} is not a JSON file ({error}); give a result file of xmoe bench") from error
        try:
            return cls(**{**data, "rows": [Row(**row) for row in data["rows"]]})
        except (TypeError, KeyError) as error:
            names = ", ".join(f.name for f in fields(cls))
            raise UserError(f"{path} is no result file of xmoe bench (an object with {names}): {error}") from error


def free_stem(folder: Path, date: str, name: str) -> Path:
    """FOLDER/DATE-NAME without its ending, or with -2, -3, ... where a run of that day has left its files."""
    number, stem = 1, folder / f"{date}-{name}"
    while any(stem.with_name(f"{stem.name}{ending}").exists() for ending in (".json", ".md", ".png")):
        number += 1
        stem = folder / f"{date}-{name}-{number}"
    return stem


def save(results: Results, stem: Path, markdown: str) -> Mapping[str, Path]:
    """Write STEM.json and STEM.md, each in one step. Raises UserError where that fails; the old ones then stay."""
    files = {ending: stem.with_name(f"{stem.name}.{ending}") for ending in ("json", "md")}
    write_atomically(files["json"], results.to_json().encode())
    write_atomically(files["md"], markdown.encode())
    return files
