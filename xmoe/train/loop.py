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
from xmoe.train.screen import TrainProgress

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

    tokens = config.batch_size * config.seq_len
    with (
        TrainProgress(f"{folder.framework} {folder.recipe}", config.steps, start, tokens) as progress,
        _interrupt_flag() as interrupted,
    ):
        pending: tuple[int, float, float, SupportsFloat] | None = None

        def settle() -> None:
            """Log the step that is pending, once its loss is known."""
            nonlocal pending
            if pending is None:
                return
            step, learning_rate, seconds, loss = *pending[:3], float(pending[3])
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {step}; lower learning_rate, now {config.learning_rate}")
            folder.log(step=step, loss=loss, learning_rate=learning_rate, seconds=round(seconds, 6))
            progress.update(step, loss, seconds)
            pending = None

        for step in range(start + 1, config.steps + 1):
            began = time.perf_counter()
            learning_rate = config.learning_rate_at(step - 1)
            loss = learner.step(corpus.batch(config.seed, step, config.batch_size, config.seq_len), learning_rate)
            settle()  # the step before: reading a loss one step late keeps the device busy
            evaluates = config.eval_every and step % config.eval_every == 0 and step < config.steps
            stops = interrupted.is_set()
            saves = step % config.checkpoint_every == 0 or step == config.steps or stops
            if evaluates or saves:
                float(loss)  # waits, so that neither counts as the step's time
            pending = step, learning_rate, time.perf_counter() - began, loss
            if evaluates or saves:
                settle()
            if evaluates:
                evaluate(step)
            if saves:
                folder.save(learner.state(), step, corpus.digest)
            if stops:
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
        tokens_per_second=tokens / seconds,
        peak_memory=learner.peak_memory(),
    )
    folder.finish(result)
    return result


@contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a polite kill sets, instead of stopping a step midway. Inert off the main thread."""
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
