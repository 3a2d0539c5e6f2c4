"""The one training loop, over whatever framework stands behind ``Learner``."""

import math
import signal
import statistics
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, SupportsFloat

import numpy as np

from xmoe.train.checkpoint import Result, RunFolder, State
from xmoe.train.config import TrainConfig
from xmoe.train.data import Corpus
from xmoe.train.files import UserError

LAST_STEPS = 20
"""The training loss reported is the mean over this many last steps."""


class Learner(Protocol):
    """A model with its optimiser in one framework. Batches are uint8 [B, S + 1], losses nats per byte."""

    device: str
    """What it runs on, for people: "cpu", "NVIDIA H200"."""

    def step(self, tokens: np.ndarray, learning_rate: float) -> SupportsFloat:
        """One AdamW step; the batch's cross-entropy before it, perhaps still being computed until float() asks."""
        ...

    def evaluate(self, batches: Iterable[np.ndarray]) -> float:
        """The mean cross-entropy over ``batches``."""
        ...

    def state(self) -> State:
        """Weights and moments, as ``xmoe.train.checkpoint`` names them."""
        ...

    def load_state(self, state: State, step: int) -> None:
        """Go on from ``state``, after ``step`` steps."""
        ...

    def peak_memory(self) -> int:
        """Bytes so far."""
        ...


class Interrupted(Exception):
    """Ctrl-C came; the run's state is on disk."""


def train(config: TrainConfig, learner: Learner, corpus: Corpus, folder: RunFolder) -> Result:
    """Train one framework with one recipe, log and checkpoint in ``folder``, and return the result.

    Goes on from the folder's checkpoint, if it has one. Raises UserError when the loss is no longer finite or a file
    can't be written, Interrupted after Ctrl-C.
    """
    start = 0
    folder.create()
    if folder.checkpoint.exists():
        state, start = folder.load(corpus.digest)
        learner.load_state(state, start)
        folder.rewind_metrics(start)
    else:
        folder.clear()

    def evaluate(step: int) -> float:
        loss = learner.evaluate(corpus.heldout_batches(config.eval_batches, config.batch_size, config.seq_len))
        folder.log(step=step, heldout_loss=loss)
        return loss

    with _Progress(config, folder, start) as progress, _interrupt_flag() as interrupted:
        clock, pending = time.perf_counter(), None

        def settle() -> None:
            """Wait for the step in flight and log it."""
            nonlocal clock, pending
            if pending is None:
                return
            step, learning_rate, loss = pending[0], pending[1], float(pending[2])
            now = time.perf_counter()
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {step}; lower learning_rate, now {config.learning_rate}")
            folder.log(step=step, loss=loss, learning_rate=learning_rate, seconds=round(now - clock, 6))
            progress.update(step, loss, now - clock)
            clock, pending = now, None

        for step in range(start + 1, config.steps + 1):
            learning_rate = config.learning_rate_at(step - 1)
            loss = learner.step(corpus.batch(config.seed, step, config.batch_size, config.seq_len), learning_rate)
            settle()  # the step before: reading a loss one step late keeps the device busy
            pending = step, learning_rate, loss
            evaluates = config.eval_every and step % config.eval_every == 0 and step < config.steps
            saves = step % config.checkpoint_every == 0 or step == config.steps or interrupted.is_set()
            if evaluates or saves:
                settle()
                if evaluates:
                    evaluate(step)
                if saves:
                    folder.save(learner.state(), step, corpus.digest)
                clock = time.perf_counter()
            if interrupted.is_set():
                raise Interrupted(f"{folder.path.name} stopped after step {step}; continue with --resume")

    heldout_loss = evaluate(config.steps)
    lines = [line for line in folder.read_metrics() if "loss" in line]
    seconds = statistics.median(line["seconds"] for line in lines)
    result = Result(
        framework=folder.framework,
        recipe=folder.recipe,
        device=learner.device,
        steps=config.steps,
        loss=statistics.fmean(line["loss"] for line in lines[-LAST_STEPS:]),
        heldout_loss=heldout_loss,
        tokens_per_second=config.batch_size * config.seq_len / seconds,
        peak_memory=learner.peak_memory(),
    )
    folder.finish(result)
    return result


@contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """An event that Ctrl-C (or a polite kill) sets instead of stopping the step midway. Main thread only, else inert."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    earlier = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


class _Progress:
    """A progress bar with loss and tokens/s."""

    def __init__(self, config: TrainConfig, folder: RunFolder, start: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._tokens = config.batch_size * config.seq_len
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeRemainingColumn(),
            expand=True,
        )
        name = f"{folder.framework} {folder.recipe}"
        self._task = self._progress.add_task(name, total=config.steps, completed=start, loss="-", rate="-")

    def __enter__(self) -> "_Progress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float, seconds: float) -> None:
        rate = f"{self._tokens / seconds:,.0f}"
        self._progress.update(self._task, completed=step, loss=f"{loss:.3f}", rate=rate)
