"""What a run shows: a progress bar with loss and tokens/s."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def make_console() -> Console:
    """A console on stdout. Into a file rich assumes 80 columns, which cut the table off: give it 120."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


class TrainProgress:
    """The bar of one run, as a context."""

    def __init__(self, name: str, steps: int, start: int, tokens: int) -> None:
        """``tokens`` in a step; the run goes on after ``start`` steps."""
        self._tokens, self._seconds = tokens, 0.0
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeRemainingColumn(),
            console=make_console(),
            expand=True,
        )
        self._task = self._progress.add_task(name, total=steps, completed=start, loss="-", rate="-")

    def __enter__(self) -> "TrainProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float, seconds: float) -> None:
        """Step ``step`` took ``seconds``; the rate shown is averaged over about ten steps."""
        self._seconds = 0.9 * self._seconds + 0.1 * seconds if self._seconds else seconds
        rate = f"{self._tokens / self._seconds:,.0f}"
        self._progress.update(self._task, completed=step, loss=f"{loss:.3f}", rate=rate)
