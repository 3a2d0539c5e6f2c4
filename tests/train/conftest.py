"""A run small enough for a test, on text of its own."""

from pathlib import Path

import pytest

from xmoe.train.config import TrainConfig
from xmoe.train.data import Corpus, load_corpus

TEXT = b"".join(b"def f%d(x): return x + %d\n" % (i, i * i % 97) for i in range(400))


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
