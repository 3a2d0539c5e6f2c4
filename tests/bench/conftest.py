"""What the benchmark's tests share: a timer, a memory and events without a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from xmoe.bench.results import Row


class ScriptedTimer:
    """Runs what it times once and gives 1, 2, 3, ... milliseconds."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, fn: Callable[[], Any]) -> float:
        fn()
        self.calls += 1
        return float(self.calls)


class Events:
    """Collects what is emitted."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.all.append({"event": event, **fields})

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.all if event["event"] == kind]

    def rows(self) -> dict[tuple[str, str, str, bool], Row]:
        """The last state of every row."""
        return {(row := Row(**event["row"])).key: row for event in self.of("row")}


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, and on busy cores lose 50-fold waiting for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
