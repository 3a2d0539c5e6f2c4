"""What a folder of runs came to: a table, the merged metrics and the curves."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xmoe.config import RECIPES
from xmoe.train.checkpoint import Result, all_folders, json_lines
from xmoe.train.files import UserError, write_atomically

BASELINE = "bf16"
COLUMNS = ("framework", "recipe", "train loss", "held-out loss", "gap to bf16", "tokens/s", "peak memory")
_COLORS = ("#B7C0CE", "#C2410C", "#5E81AC", "#A3BE8C", "#B48EAD", "#BF616A", "#88C0D0", "#EBCB8B", "#2E3440")


def write_report(out: Path) -> list[Result]:
    """Write OUT/metrics.jsonl and OUT/loss.png over all finished runs in ``out``, and return their results.

    Raises UserError for a damaged file, and when the disk is full.
    """
    runs = [(folder, result) for folder in all_folders(out) if (result := folder.read_result())]
    metrics = [folder.read_metrics() for folder, _ in runs]
    for (folder, _), lines in zip(runs, metrics, strict=True):
        if not all(any(kind in line for line in lines) for kind in ("loss", "heldout_loss")):
            raise UserError(f"{folder.metrics}: holds no losses; delete {folder.path} and train it again")
    write_atomically(out / "metrics.jsonl", json_lines(line for lines in metrics for line in lines))
    results = [result for _, result in runs]
    write_atomically(out / "loss.png", loss_chart(results, metrics))
    return results


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``COLUMNS``."""
    baselines = {result.framework: result.heldout_loss for result in results if result.recipe == BASELINE}
    return [
        (
            result.framework,
            result.recipe,
            f"{result.loss:.4f}",
            f"{result.heldout_loss:.4f}",
            _gap(result.heldout_loss, baselines.get(result.framework)),
            f"{result.tokens_per_second:,.0f}",
            _bytes(result.peak_memory),
        )
        for result in results
    ]


def print_table(results: Sequence[Result]) -> None:
    """Print the table; losses are cross-entropy in nats per byte."""
    from rich.table import Table

    from xmoe.train.screen import make_console

    devices = ", ".join(dict.fromkeys(result.device for result in results))
    table = Table(title=f"{results[0].steps} steps on {devices}; losses in nats per byte")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows(results):
        table.add_row(*row)
    make_console().print(table)


def loss_chart(results: Sequence[Result], metrics: Sequence[Sequence[dict[str, Any]]]) -> bytes:
    """All runs' training loss (smoothed) as lines and held-out loss as markers, one panel a framework: a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    frameworks = list(dict.fromkeys(result.framework for result in results))
    figure = Figure(figsize=(6.4 * len(frameworks), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(frameworks), sharey=True, squeeze=False)[0]
    for panel, framework in zip(panels, frameworks, strict=True):
        for result, lines in zip(results, metrics, strict=True):
            if result.framework != framework:
                continue
            color = _COLORS[RECIPES.index(result.recipe) % len(_COLORS)]
            train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
            heldout = [(line["step"], line["heldout_loss"]) for line in lines if "heldout_loss" in line]
            steps, losses = zip(*train, strict=True)
            label = f"{result.recipe}: held-out {result.heldout_loss:.3f}"
            # The baseline is a broad band under the others: where the curves coincide, both can still be seen.
            width, size = (5.0, 10) if result.recipe == BASELINE else (1.4, 5)
            panel.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
            panel.plot(steps, _smooth(losses), color=color, linewidth=width, label=label)
            panel.plot(*zip(*heldout, strict=True), color=color, marker="o", linestyle="none", markersize=size)
        panel.set_title(framework)
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
        panel.legend(title="line: training, smoothed; dot: held-out", frameon=False)
    panels[0].set_ylabel("cross-entropy, nats per byte")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _smooth(values: Sequence[float]) -> list[float]:
    """An exponential moving average over about a fortieth of the curve, without a bias towards zero at its start."""
    decay = math.exp(-1 / max(1.0, len(values) / 40))
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + value
        weight = decay * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _gap(loss: float, baseline: float | None) -> str:
    return "-" if baseline is None else f"{(loss / baseline - 1):+.2%}"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
