"""What a benchmark shows while it runs: a live table on a terminal, plain lines elsewhere or without rich."""

import importlib.util
import sys
from typing import Any, Protocol, Self

from xmoe.bench import report
from xmoe.bench.results import Results, Row


class Screen(Protocol):
    """A context; inside it, what there is to see."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *details: object) -> None: ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def show(self, results: Results, row: Row) -> None:
        """A row is new or has changed."""
        ...

    def progress(self, text: str, done: int, total: int) -> None:
        """What is being measured; ``done`` of ``total`` steps are."""
        ...


def rows_of(results: Results, table: str, shape: str) -> list[Row]:
    """The rows of one shape in one table."""
    return [row for row in results.rows if (row.table, row.shape) == (table, shape)]


class PlainScreen:
    """Lines on stderr: the rows of a shape once all of them are complete."""

    def __init__(self) -> None:
        self._results: Results | None = None
        self._shape = ("", "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._print_shape()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def show(self, results: Results, row: Row) -> None:
        if (row.table, row.shape) != self._shape:
            self._print_shape()
        self._results, self._shape = results, (row.table, row.shape)

    def progress(self, text: str, done: int, total: int) -> None:
        pass

    def _print_shape(self) -> None:
        if self._results is None:
            return
        rows = rows_of(self._results, *self._shape)
        titles, lines = report.cells(self._results, rows)
        self.say(f"{self._shape[1]}, {self._shape[0]}")
        for line in lines:
            named = zip(titles, line, strict=True)
            shown = [(title, cell) for title, cell in named if title != "shape" and title not in rows[0].dims]
            words = (cell if title in ("system", "note") else f"{title} {cell}" for title, cell in shown)
            self.say("  " + "  ".join(words))
        self._results = None


class LiveScreen:
    """The table of the shape being measured above a progress bar; a shape's table stays once the next one begins."""

    def __init__(self) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._group = Group
        self._console = Console()
        self._progress = Progress(
            TextColumn("{task.description:<40}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._progress.add_task("starting", total=None)
        self._live = Live(self._progress, console=self._console, refresh_per_second=4)
        self._shape = ("", "")
        self._table: Any = None

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def show(self, results: Results, row: Row) -> None:
        if (row.table, row.shape) != self._shape:
            if self._table is not None:
                self._console.print(self._table)
            self._shape = row.table, row.shape
        self._table = self._make_table(results, row)
        self._live.update(self._group(self._table, self._progress))

    def progress(self, text: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=text, completed=done, total=total)

    @staticmethod
    def _make_table(results: Results, row: Row) -> Any:
        from rich.table import Table

        rows = rows_of(results, row.table, row.shape)
        dims = ", ".join(f"{letter} {size}" for letter, size in row.dims.items())
        table = Table(title=f"{row.shape} ({dims}): {row.table}")
        titles, lines = report.cells(results, rows)
        shown = [i for i, title in enumerate(titles) if title != "shape" and title not in row.dims]
        for i in shown:
            left = titles[i] in ("system", "note")
            table.add_column(titles[i], justify="left" if left else "right", no_wrap=titles[i] != "note")
        for line in lines:
            table.add_row(*(line[i] for i in shown))
        return table


def make_screen() -> Screen:
    """A live one on a terminal where rich is installed."""
    live = sys.stderr.isatty() and sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
    return LiveScreen() if live else PlainScreen()
