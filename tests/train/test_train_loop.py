"""The loop, over a learner that is a few lines of NumPy: what a framework does is tested in test_train_learners."""

import dataclasses
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from xmoe.train.checkpoint import Result, RunFolder, State
from xmoe.train.config import TrainConfig
from xmoe.train.data import Corpus
from xmoe.train.files import UserError
from xmoe.train.loop import Interrupted, train


class Unigram:
    """Logits of a byte that ignore its context, trained by momentum."""

    device = "numpy"

    def __init__(self) -> None:
        self.logits, self.momentum = np.zeros(256, np.float32), np.zeros(256, np.float32)
        self.steps = 0

    def _loss(self, tokens: np.ndarray) -> tuple[float, np.ndarray]:
        p = np.exp(self.logits) / np.exp(self.logits).sum()
        frequencies = np.bincount(tokens[:, 1:].ravel(), minlength=256) / tokens[:, 1:].size
        return float(-(frequencies * np.log(p)).sum()), (p - frequencies).astype(np.float32)

    def step(self, tokens: np.ndarray, learning_rate: float) -> float:
        loss, gradient = self._loss(tokens)
        self.momentum = np.float32(0.5) * self.momentum + gradient
        self.logits = self.logits - np.float32(100 * learning_rate) * self.momentum
        self.steps += 1
        return loss

    def evaluate(self, batches: Iterable[np.ndarray]) -> float:
        return float(np.mean([self._loss(tokens)[0] for tokens in batches]))

    def state(self) -> State:
        return {"weights.logits": self.logits, "exp_avg.logits": self.momentum}

    def load_state(self, state: State, step: int) -> None:
        self.logits, self.momentum, self.steps = state["weights.logits"], state["exp_avg.logits"], step

    def peak_memory(self) -> int:
        return 12345


class Stops(Unigram):
    """Gets a signal in its third step, or fails there."""

    def __init__(self, action: object) -> None:
        super().__init__()
        self.action = action

    def step(self, tokens: np.ndarray, learning_rate: float) -> float:
        loss = super().step(tokens, learning_rate)
        if self.steps == 3:
            if isinstance(self.action, signal.Signals):
                os.kill(os.getpid(), self.action)
            elif isinstance(self.action, Exception):
                raise self.action
            else:
                return float("nan")
        return loss


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "out", "torch", "bf16")


def losses(folder: RunFolder) -> list[tuple[int, float]]:
    return [(line["step"], line.get("loss") or line.get("heldout_loss")) for line in folder.read_metrics()]


def test_trains_and_reports(config: TrainConfig, corpus: Corpus, folder: RunFolder) -> None:
    config = dataclasses.replace(config, steps=40, eval_every=10)
    result = train(config, Unigram(), corpus, folder)
    lines = folder.read_metrics()
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert [line["step"] for line in lines if "heldout_loss" in line] == [10, 20, 30, 40]
    train_losses = [line["loss"] for line in lines if "loss" in line]
    assert train_losses[-1] < train_losses[0] - 0.5
    assert result.loss == pytest.approx(np.mean(train_losses[-20:]))
    assert result.heldout_loss == lines[-1]["heldout_loss"]
    seconds = np.median([line["seconds"] for line in lines if "loss" in line])
    assert result.tokens_per_second == pytest.approx(4 * 32 / seconds)
    assert (result.device, result.peak_memory, result.steps) == ("numpy", 12345, 40)
    assert folder.read_result() == result
    assert folder.load(corpus.digest)[1] == 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_resume_goes_on(
    config: TrainConfig, corpus: Corpus, tmp_path: Path, folder: RunFolder, number: signal.Signals
) -> None:
    config = dataclasses.replace(config, checkpoint_every=100)
    whole = RunFolder(tmp_path / "whole", "torch", "bf16")
    train(config, Unigram(), corpus, whole)
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match="torch-bf16 stopped after step 3; continue with --resume"):
        train(config, Stops(number), corpus, folder)
    assert signal.getsignal(number) is handler
    assert folder.load(corpus.digest)[1] == 3
    assert folder.read_result() is None
    train(config, Unigram(), corpus, folder)
    assert losses(folder) == losses(whole)
    (state, step), (expected, expected_step) = folder.load(corpus.digest), whole.load(corpus.digest)
    assert step == expected_step == config.steps
    assert {name: a.tobytes() for name, a in state.items()} == {name: a.tobytes() for name, a in expected.items()}


def test_crash_then_resume_logs_each_step_once(config: TrainConfig, corpus: Corpus, folder: RunFolder) -> None:
    config = dataclasses.replace(config, checkpoint_every=2)
    with pytest.raises(RuntimeError):
        train(config, Stops(RuntimeError("a bug")), corpus, folder)
    assert folder.load(corpus.digest)[1] == 2
    train(config, Unigram(), corpus, folder)
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4, 5, 6, 6]


def test_finished_run_only_evaluates(config: TrainConfig, corpus: Corpus, folder: RunFolder) -> None:
    train(config, Unigram(), corpus, folder)
    folder.result.unlink()
    learner = Stops(RuntimeError("no step is left"))
    result = train(config, learner, corpus, folder)
    assert isinstance(result, Result)
    assert learner.steps == config.steps


def test_loss_that_is_not_finite_stops_the_run(config: TrainConfig, corpus: Corpus, folder: RunFolder) -> None:
    with pytest.raises(UserError, match=r"the loss is nan at step 3; lower learning_rate, now 0\.003"):
        train(config, Stops("nan"), corpus, folder)
    assert [step for step, _ in losses(folder)] == [1, 2]
