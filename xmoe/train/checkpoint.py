"""A run's folder: checkpoint, metrics and result, each written so that a crash leaves the last good one.

The checkpoint is one safetensors file of float32 arrays under framework-neutral names: ``weights.NAME`` and AdamW's
two moments ``exp_avg.NAME`` and ``exp_avg_sq.NAME``. Either framework can go on from the other's.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xmoe.config import RECIPES
from xmoe.train.config import FRAMEWORKS
from xmoe.train.files import UserError, append_line, write_atomically, writing

State = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the report says about a finished run."""

    framework: str
    recipe: str
    device: str
    steps: int
    loss: float
    """Training loss (cross-entropy, nats per byte), the mean of the last steps."""
    heldout_loss: float
    """Cross-entropy on the held-out text after the last step, nats per byte."""
    tokens_per_second: float
    """From the median step."""
    peak_memory: int
    """Bytes: of the GPU's allocator, on a CPU of the whole process."""


class RunFolder:
    """OUT/FRAMEWORK-RECIPE, the files of one run."""

    def __init__(self, out: Path, framework: str, recipe: str) -> None:
        self.framework, self.recipe = framework, recipe
        self.path = out / f"{framework}-{recipe}"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"

    def is_started(self) -> bool:
        """Whether it holds anything that --resume could go on with or the report could show."""
        return self.checkpoint.exists() or self.result.exists()

    def clear(self) -> None:
        """Forget an earlier run."""
        with writing(self.path):
            for path in (self.result, self.checkpoint, self.metrics):
                path.unlink(missing_ok=True)

    def create(self) -> None:
        """Make the folder itself."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def copy_from(self, other: "RunFolder") -> None:
        """Take over the files of a finished run, the result last. Raises UserError."""
        self.create()
        for name in ("checkpoint", "metrics", "result"):
            write_atomically(getattr(self, name), getattr(other, name).read_bytes())

    def save(self, state: State, step: int, corpus_digest: str) -> None:
        """Write the state after ``step`` steps. Raises UserError, the earlier checkpoint untouched."""
        import safetensors.numpy

        metadata = {"step": str(step), "corpus": corpus_digest}
        write_atomically(self.checkpoint, safetensors.numpy.save(state, metadata))

    def load(self, corpus_digest: str) -> tuple[State, int]:
        """The state and its step. Raises UserError for a damaged file, or a run on other data."""
        import safetensors
        import safetensors.numpy

        try:
            with safetensors.safe_open(self.checkpoint, framework="numpy") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            step = int(metadata["step"])
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            message = f"{self.checkpoint}: not a checkpoint of xmoe ({error}); start again without --resume"
            raise UserError(message) from error
        if metadata.get("corpus") != corpus_digest:
            raise UserError(f"{self.checkpoint}: the training text has changed since; start again without --resume")
        return state, step

    def log(self, **fields: Any) -> None:
        """Append one line to the metrics."""
        append_line(self.metrics, json.dumps({"framework": self.framework, "recipe": self.recipe, **fields}))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The metrics so far; a last line cut short by a crash is left out. Raises UserError for a damaged file."""
        with self._reading(self.metrics):
            if not self.metrics.exists():
                return []
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            records = [json.loads(line) for line in lines if line.endswith("\n")]
            for number, record in enumerate(records, 1):
                kind = "loss" if "loss" in record else "heldout_loss"
                if not isinstance(record["step"], int) or not isinstance(record[kind], float):
                    raise TypeError(f"line {number}: {record}")
            return records

    def rewind_metrics(self, step: int) -> None:
        """Drop what was logged after ``step`` steps: a resumed run logs it again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_atomically(self.metrics, json_lines(kept))

    def finish(self, result: Result) -> None:
        """Write the result: from now on the run counts as finished."""
        write_atomically(self.result, json.dumps(asdict(result), indent=2).encode() + b"\n")

    def read_result(self) -> Result | None:
        """The result of a finished run. Raises UserError for a damaged file."""
        with self._reading(self.result):
            if not self.result.exists():
                return None
            result = Result(**json.loads(self.result.read_text(encoding="utf-8")))
            for field in dataclasses.fields(result):
                if type(value := getattr(result, field.name)) is not field.type:
                    raise TypeError(f"{field.name}: {value!r}")
            return result

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Turn whatever a damaged file leads to into a UserError with its name."""
        try:
            yield
        except (OSError, ValueError, TypeError, KeyError) as error:
            message = f"{path}: damaged ({type(error).__name__}: {error}); delete {self.path} and train it again"
            raise UserError(" ".join(message.split())) from error


def all_folders(out: Path) -> list[RunFolder]:
    """The folders of every run that ``out`` may hold, in the order of frameworks and recipes."""
    return [RunFolder(out, framework, recipe) for framework in FRAMEWORKS for recipe in RECIPES]


def json_lines(records: Iterable[dict[str, Any]]) -> bytes:
    """Records as JSON, one a line."""
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)
