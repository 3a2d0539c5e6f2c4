"""Runs the worker, shows what it tells and keeps it in files."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xmoe.bench import report
from xmoe.bench.options import Options
from xmoe.bench.results import Results, Row, free_stem, save
from xmoe.bench.screen import Screen, make_screen
from xmoe.train.files import write_atomically, writing


class WorkerFailed(Exception):
    """A worker has ended before it was done; what it had measured is kept. The message is one line."""


class Session:
    """One run: its results, its files, its screen."""

    def __init__(self, options: Options, out: Path, screen: Screen) -> None:
        self.results = Results(name=options.command)
        self.stem: Path | None = None
        self._out, self._screen = out, screen

    def take(self, event: dict[str, Any]) -> None:
        """Do what one event of a worker asks for. Raises WorkerFailed for its "error", UserError when a write fails."""
        kind, results = event["event"], self.results
        if kind == "error":
            raise WorkerFailed(event["text"])
        if kind == "facts":
            results.facts, results.ceiling = event["facts"], event["ceiling"]
            name = results.name.replace("-", "_")
            self.stem = free_stem(self._out, results.facts["date"], name)
            self._screen.say(report.machine(results))
            if line := report.ceilings(results):
                self._screen.say(line)
        elif kind == "row":
            row = Row(**event["row"])
            results.put(row)
            self._screen.show(results, row)
        elif kind == "note":
            results.notes.append(event["text"])
            self._screen.say(event["text"])
        elif kind == "progress":
            self._screen.progress(event["text"], event["done"], event["total"])
        if kind in ("facts", "row", "note"):
            self.save()

    def save(self) -> None:
        """Write the files as they stand."""
        if self.stem is not None:
            chart = self.stem.with_suffix(".png")
            save(self.results, self.stem, report.markdown(self.results, chart.name if chart.exists() else ""))

    def draw(self) -> None:
        """Write the chart, where matplotlib is installed and something was timed."""
        if self.stem is None or importlib.util.find_spec("matplotlib") is None:
            return
        from xmoe.bench.chart import bar_chart

        if png := bar_chart(self.results):
            write_atomically(self.stem.with_suffix(".png"), png)
            self.save()


def run(options: Options, out: Path) -> Results:
    """Measure what ``options`` names and leave DATE-NAME.json, .md and .png in ``out``, whatever happens on the way.

    Raises UserError, WorkerFailed or KeyboardInterrupt; what was measured until then is in the files.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit's way to say Ctrl-C
    with make_screen() as screen:
        session = Session(options, out, screen)
        try:
            for event in start_worker(options):
                session.take(event)
        finally:
            signal.signal(signal.SIGTERM, earlier)
            session.draw()
    print(report.markdown(session.results))
    print(f"kept in {session.stem}.json and .md")
    return session.results


def start_worker(options: Options) -> Iterator[dict[str, Any]]:
    """The events of the worker's process, until it ends. Raises WorkerFailed when it fails; ends it when left early."""
    # JAX takes three quarters of the GPU at its start, its default: what it allocated bit by bit it would not give back
    # to torch either, and it would be in pieces too small for `jax.lax.ragged_dot`.
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "xmoe.bench.worker"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:  # fmt: skip
        assert process.stdin is not None, "asked for"
        assert process.stdout is not None, "asked for"
        try:
            process.stdin.write(json.dumps(options.to_dict()))
            process.stdin.close()
            for line in process.stdout:
                yield json.loads(line)
        finally:
            if sys.exc_info()[0] is not None:
                process.kill()
            process.wait()
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise WorkerFailed(f"the measuring process was ended by {name}; its rows until then are kept")
    if process.returncode:
        raise WorkerFailed("the measuring process failed, see above; its rows until then are kept")


def write_report(path: Path, readme: Path | None, linear_filter: Path | None = None) -> str:
    """The Markdown of a recorded run; with ``readme``, also put its section there, with ``linear_filter`` the speeds of
    a run of linears. Raises UserError."""
    results = Results.load(path)
    if linear_filter is not None:
        text = report.linear_filter(results, path.name)
        with writing(linear_filter):
            write_atomically(linear_filter, text.encode())
    if readme is not None:
        source = Path(os.path.relpath(path, readme.parent)).as_posix()
        report.update_readme(readme, report.readme_section(results, source))
    chart = path.with_suffix(".png")
    return report.markdown(results, chart.name if chart.exists() else "")
