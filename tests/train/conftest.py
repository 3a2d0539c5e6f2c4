"""A run small enough for a test, on text of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from xmoe.train.config import TrainConfig
from xmoe.train.data import Corpus, load_corpus

TEXT = b"".join(b"def f%d(x): return x + %d\n" % (i, i * i % 97) for i in range(400))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, and on busy cores lose 50-fold waiting for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def config(text_file: Path) -> TrainConfig:
    return TrainConfig(
        data=(str(text_file),), device="cpu", layers=1, dim=32, heads=2, num_experts=4, top_k=2, hidden_dim=32,
        seq_len=32, batch_size=4, steps=6, warmup_steps=2, eval_batches=2, checkpoint_every=3,
    )  # fmt: skip


@pytest.fixture
def corpus(config: TrainConfig) -> Corpus:
    return load_corpus(config.data, config.seq_len)
