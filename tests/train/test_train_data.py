"""The corpus and the numbers that both frameworks start from."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xmoe.train.config import TrainConfig
from xmoe.train.data import STRETCH, load_corpus
from xmoe.train.files import UserError
from xmoe.train.model import initial_weights, parameter_shapes, rotary_tables


def test_a_tail_is_held_out(text_file: Path) -> None:
    corpus, text = load_corpus([text_file], 32), text_file.read_bytes()
    assert corpus.train.tobytes() + corpus.heldout.tobytes() == text
    assert len(corpus.heldout) == len(text) // 10


def test_the_tail_of_every_stretch_is_held_out(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 256, 5 * STRETCH // 2, np.uint8)
    (tmp_path / "text").write_bytes(text)
    corpus, half = load_corpus([tmp_path / "text"], 32), 5 * STRETCH // 4
    tail = half // 10
    heldout = np.concatenate([text[half - tail : half], text[-tail:]])
    np.testing.assert_array_equal(corpus.heldout, heldout)
    np.testing.assert_array_equal(corpus.train, np.concatenate([text[: half - tail], text[half:-tail]]))


def test_files_follow_each_other_in_the_order_given(tmp_path: Path) -> None:
    names = ["b.txt", "a.txt"]
    for name in names:
        (tmp_path / name).write_text(name[0] * 1000)
    corpus = load_corpus([tmp_path / name for name in names], 32)
    assert corpus.train.tobytes() + corpus.heldout.tobytes() == b"b" * 1000 + b"\n" + b"a" * 1000


def test_batches_are_windows_of_the_training_part(text_file: Path) -> None:
    corpus = load_corpus([text_file], 32)
    batch = corpus.batch(seed=0, step=1, batch_size=64, seq_len=32)
    assert (batch.shape, batch.dtype) == ((64, 33), np.uint8)
    text = corpus.train.tobytes()
    assert all(row.tobytes() in text for row in batch)
    assert len({row.tobytes() for row in batch}) > 32


def test_batches_depend_on_seed_and_step_only(text_file: Path) -> None:
    corpus, again = load_corpus([text_file], 32), load_corpus([text_file], 32)
    again.batch(0, 1, 4, 32)
    np.testing.assert_array_equal(corpus.batch(3, 7, 4, 32), again.batch(3, 7, 4, 32))
    for seed, step in ((3, 8), (4, 7)):
        assert (corpus.batch(3, 7, 4, 32) != again.batch(seed, step, 4, 32)).any()


def test_every_window_can_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(np.random.default_rng(0).bytes(330))
    corpus = load_corpus([path], 32)
    seen = {row.tobytes() for step in range(100) for row in corpus.batch(0, step, 32, 32)}
    assert seen == {corpus.train[i : i + 33].tobytes() for i in range(len(corpus.train) - 32)}


def test_heldout_batches_span_the_heldout_part(text_file: Path) -> None:
    corpus = load_corpus([text_file], 32)
    batches = list(corpus.heldout_batches(3, 4, 32))
    assert [batch.shape for batch in batches] == [(4, 33)] * 3
    text = corpus.heldout.tobytes()
    assert text.startswith(batches[0][0].tobytes())
    assert text.endswith(batches[-1][-1].tobytes())


def test_default_corpus_is_python_source() -> None:
    corpus = load_corpus([], 128)
    assert len(corpus.train) > 1_000_000
    assert b"def __init__(self" in corpus.train.tobytes()
    assert corpus.digest == load_corpus([], 128).digest


def test_default_corpus_is_the_same_in_another_process() -> None:
    code = "from xmoe.train.data import STRETCH, load_corpus; print(load_corpus([], 128).digest)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == load_corpus([], 128).digest


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "the file is empty"), (b"short", "too short for --seq-len 32: give at least 341")],
)
def test_bad_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_corpus([path], 32)


@pytest.mark.parametrize("seq_len", [32, 60000])
def test_the_advice_for_short_data_is_enough(tmp_path: Path, seq_len: int) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"short")
    with pytest.raises(UserError, match="give at least") as raised:
        load_corpus([path], seq_len)
    (advice,) = re.findall(r"at least (\d+)", str(raised.value))
    path.write_bytes(b"x" * int(advice))
    assert len(load_corpus([path], seq_len).heldout) > seq_len


def test_folder_as_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Is a directory; give readable text files"):
        load_corpus([tmp_path], 32)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    config = TrainConfig(shared_hidden_dim=64)
    weights, again = initial_weights(config), initial_weights(config)
    assert {name: w.shape for name, w in weights.items()} == parameter_shapes(config)
    for name, w in weights.items():
        assert w.dtype == np.float32
        np.testing.assert_array_equal(w, again[name])
    other = initial_weights(TrainConfig(seed=1))
    assert (other["head.weight"] != weights["head.weight"]).any()
    assert (weights["blocks.0.moe.experts.w1"] != weights["blocks.1.moe.experts.w1"]).any()


def test_initial_weights_have_the_stated_spread() -> None:
    config = TrainConfig()
    weights = initial_weights(config)
    for name, fan_in, writers in (("blocks.0.moe.experts.w1", 128, 1), ("blocks.0.moe.experts.w2", 256, 4)):
        assert weights[name].std() == pytest.approx((fan_in * writers) ** -0.5, rel=0.01)
    assert (weights["blocks.0.moe_norm.weight"] == 1).all()


def test_rotary_tables_turn_by_position() -> None:
    config = TrainConfig()
    cos, sin = rotary_tables(config)
    assert cos.shape == sin.shape == (config.seq_len, config.dim // config.heads // 2)
    np.testing.assert_allclose(cos[:, 0], np.cos(np.arange(config.seq_len)), atol=1e-6)
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
