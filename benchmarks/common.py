"""What the benchmarks share: timing, the table, and the dated result file."""

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from xmoe.shapes import ALL, Shape, offsets

RESULTS = Path(__file__).parent / "results"


def median_ms(fn: Callable[[], Any], rep_ms: int = 200) -> float:
    """Median milliseconds of fn on the current device, caches flushed between runs."""
    return float(do_bench(fn, warmup=50, rep=rep_ms, return_mode="median"))


def spread_ms(fn: Callable[[], Any], rounds: int = 3, rep_ms: int = 150) -> tuple[float, float]:
    """(median, largest - smallest) of the medians of several rounds."""
    medians = [median_ms(fn, rep_ms) for _ in range(rounds)]
    return statistics.median(medians), max(medians) - min(medians)


def uneven_offs(shape: Shape, device: str = "cuda") -> torch.Tensor:
    """int32 [G] group ends: unequal, and multiples of 32 for the peers' sake (torchao's fp8 path needs 16)."""
    offs = torch.from_numpy(offsets("uneven", shape.M, shape.G))
    return (offs // 32 * 32).index_fill_(0, torch.tensor([shape.G - 1]), shape.M).to(device)


def shapes(names: Sequence[str]) -> list[Shape]:
    """Shapes of the table by name, or by the prefix of several ("llama4")."""
    found = []
    for name in names:
        matches = [ALL[name]] if name in ALL else [shape for key, shape in ALL.items() if key.startswith(name)]
        if not matches:
            raise SystemExit(f"--shapes: {name!r} is not known; names: {', '.join(ALL)}")
        found += matches
    return found


def environment() -> dict[str, Any]:
    """Versions, device and date."""
    versions = {}
    for package in ("xmoe", "torch", "triton", "torchao", "jax"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
    }


def progress(row: Sequence[Any]) -> list[Any]:
    """Show a row as soon as it is measured; returns it."""
    print(*(f"{cell:.4g}" if isinstance(cell, float) else cell for cell in row), file=sys.stderr, flush=True)
    return list(row)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    cells = [[f"{c:.3g}" if isinstance(c, float) and c < 100 else f"{c:.0f}" if isinstance(c, float) else str(c)
              for c in row] for row in rows]  # fmt: skip
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(name: str, tables: dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]], out: Path | None) -> None:
    """Print the tables, and write them with the environment to results/DATE-NAME.{md,json}, or below `out`."""
    facts = environment()
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    text = [f"# {name}", "", f"{facts['date']}, {facts['gpu']}, CUDA {facts['cuda']}, " +
            ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)]  # fmt: skip
    for title, (columns, rows) in tables.items():
        text += ["", f"## {title}", "", markdown(columns, rows)]
    text = "\n".join(text) + "\n"
    print(text)
    stem = folder / f"{facts['date']}-{name}"
    stem.with_suffix(".md").write_text(text)
    data = {title: [dict(zip(columns, row, strict=True)) for row in rows] for title, (columns, rows) in tables.items()}
    stem.with_suffix(".json").write_text(json.dumps({"environment": facts, "tables": data}, indent=1) + "\n")


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--shapes", default="llama4_g8,deepseek_v3_g8", help="names or prefixes of xmoe.shapes, by comma"
    )
    parser.add_argument("--out", type=Path, help="folder of the result files (default: benchmarks/results)")
    return parser
