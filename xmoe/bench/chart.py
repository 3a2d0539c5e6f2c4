"""The picture of a benchmark: one bar for each system at each shape."""

import io

from xmoe.bench.report import Table
from xmoe.bench.results import BF16, Results

COLORS = ("#B7C0CE", "#C2410C", "#5E81AC", "#A3BE8C", "#B48EAD", "#BF616A", "#88C0D0", "#EBCB8B", "#2E3440")


def bar_chart(results: Results) -> bytes | None:
    """A PNG file with one panel for each table: the speed over `BF16`, or the fraction of the ceiling where a table has
    no such system. None where nothing was timed. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = []
    for title, rows in results.tables().items():
        table = Table(results, rows)
        relative = any(row.system == BF16 and row.ms for row in rows)
        values = {
            (row.shape, row.name): value
            for row in rows
            if (value := table.speedup(row, BF16) if relative else table.of_ceiling(row)) is not None
        }
        if values:
            panels.append((title, "× bf16" if relative else "fraction of the measured ceiling", values))
    if not panels:
        return None
    width = max(6.4, *(3 + 0.32 * len(values) for _, _, values in panels))
    figure = Figure(figsize=(width, 3.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, unit, values) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        shapes, systems = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
        width = 0.8 / len(systems)
        for i, system in enumerate(systems):
            places = [j for j, shape in enumerate(shapes) if (shape, system) in values]
            bars = axes.bar(
                [j - 0.4 + (i + 0.5) * width for j in places], [values[shapes[j], system] for j in places], width,
                label=system, color=COLORS[i % len(COLORS)],
            )  # fmt: skip
            axes.bar_label(bars, fmt="%.2f", fontsize=6, rotation=90, padding=2)
        axes.set_xticks(range(len(shapes)), shapes)
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.margins(y=0.2)
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
