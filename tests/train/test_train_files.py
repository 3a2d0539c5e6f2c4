"""Writes: all or nothing, and one line when the disk is full."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xmoe.train.checkpoint import RunFolder
from xmoe.train.files import UserError, append_line, require, write_atomically


class FullDisk:
    """Stands for os.write and file.write on a disk with room for ``room`` more bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self._write, self._open = os.write, open
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr("builtins.open", self.open)

    def write(self, file: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(file, data[: self.room])
        self.room -= written
        return written

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return (
            self._open(path, mode, *args, **kwargs) if "w" not in mode else _FullFile(self._open(path, "wb", 0), self)
        )


class _FullFile:
    def __init__(self, file: Any, disk: FullDisk) -> None:
        self._file, self._disk = file, disk

    def __enter__(self) -> "_FullFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        while data:
            data = data[self._disk.write(self._file.fileno(), data) :]

    def flush(self) -> None: ...

    def fileno(self) -> int:
        return self._file.fileno()


RESULT = (
    b'{"framework": "torch", "recipe": "bf16", "device": "cpu", "steps": 5, "loss": 2.5, "heldout_loss": 2.5, '
    b'"tokens_per_second": 1.5, "peak_memory": 3}'
)
ADVICE = "No space left on device; free some space, or choose another --out"


def test_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"old", b"new"):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["file"]


def test_full_disk_leaves_the_good_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"good")
    FullDisk(monkeypatch, room=10)
    with pytest.raises(UserError, match=f"cannot write {path}: {ADVICE}"):
        write_atomically(path, b"x" * 100)
    assert path.read_bytes() == b"good"
    assert os.listdir(tmp_path) == ["file"]


def test_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    append_line(path, "one")
    FullDisk(monkeypatch, room=2)
    with pytest.raises(UserError, match=ADVICE):
        append_line(path, "two")
    assert path.read_text() == "one\n"


def test_full_disk_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path, "torch", "bf16")
    folder.create()
    folder.save({"weights.w": np.arange(5, dtype=np.float32)}, 5, "digest")
    FullDisk(monkeypatch, room=50)
    with pytest.raises(UserError, match=ADVICE):
        folder.save({"weights.w": np.zeros(5, np.float32)}, 6, "digest")
    state, step = folder.load("digest")
    assert step == 5
    np.testing.assert_array_equal(state["weights.w"], np.arange(5))


def test_read_only_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="Not a directory; choose another --out"):
        write_atomically(tmp_path / "file" / "inside", b"")
    with pytest.raises(UserError, match="Not a directory; choose another --out"):
        RunFolder(tmp_path / "file", "torch", "bf16").create()


def test_checkpoint_round_trip_is_exact(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "flax", "bf16")
    folder.create()
    state = {
        "weights.a": np.random.default_rng(0).standard_normal((3, 4), np.float32),
        "exp_avg.a": np.float32([[-0.0]]),
    }
    folder.save(state, 12, "digest")
    loaded, step = folder.load("digest")
    assert step == 12
    assert {name: a.tobytes() for name, a in loaded.items()} == {name: a.tobytes() for name, a in state.items()}


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_damaged_checkpoint(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder(tmp_path, "torch", "bf16")
    folder.create()
    folder.checkpoint.write_bytes(content)
    with pytest.raises(UserError, match=r"not a checkpoint of xmoe .*; start again without --resume"):
        folder.load("digest")


def test_checkpoint_of_other_data(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "torch", "bf16")
    folder.create()
    folder.save({"weights.w": np.zeros(1, np.float32)}, 1, "digest")
    with pytest.raises(UserError, match="the training text has changed since"):
        folder.load("another digest")


def test_metrics_drop_a_line_cut_short(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "torch", "bf16")
    folder.create()
    for step in (1, 2, 3):
        folder.log(step=step, loss=float(step))
    with folder.metrics.open("a") as file:
        file.write('{"framework": "torch", "st')
    folder.rewind_metrics(2)
    assert [line["step"] for line in folder.read_metrics()] == [1, 2]
    assert folder.metrics.read_text().endswith("}\n")


def test_damaged_metrics(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "torch", "bf16")
    folder.create()
    for damage in (
        b"{}\n",
        b"[]\n",
        b"{\n",
        b"\xff\n",
        b'{"step": 1, "loss": "2"}\n',
        b'{"step": null, "loss": 2.0}\n',
    ):
        folder.metrics.write_bytes(b'{"step": 1, "loss": 2.0}\n' + damage)
        with pytest.raises(UserError, match=f"^{folder.metrics}: damaged .*; delete {folder.path} and train it again$"):
            folder.read_metrics()


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff", RESULT.replace(b"2.5", b'"2.5"'), RESULT[:-9]])
def test_damaged_result(tmp_path: Path, damage: bytes) -> None:
    folder = RunFolder(tmp_path, "torch", "bf16")
    folder.create()
    folder.result.write_bytes(RESULT)
    assert folder.read_result()
    folder.result.write_bytes(damage)
    with pytest.raises(UserError, match=f"^{folder.result}: damaged .*; delete {folder.path} and train it again$"):
        folder.read_result()


def test_missing_extra_is_named() -> None:
    require("train", "json", "os")
    with pytest.raises(UserError, match=r'no_such_module not installed; run: pip install "xmoe\[flax\]"'):
        require("flax", "json", "no_such_module")
