"""The corpus: bytes of text files, split into a training part and a held-out part.

A batch is a pure function of (seed, step), so both frameworks and a resumed run see the same ones.
Legend: B = sequences in a batch, S = ``seq_len`` (tokens; one token is one byte).
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xmoe.train.files import UserError

HELDOUT_FRACTION = 0.1
"""The part of the corpus that is never trained on."""
STRETCH = 2**18
"""About so many bytes at a time are cut: the held-out end of each is of the same kind as the text before it."""
STDLIB_BYTES = 16 * 2**20
"""At most this much of the standard library's source is read (all of Python 3.13's fits)."""
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "encodings"}
"""Not the standard library, or not installed everywhere, or (encodings) tables of code points rather than text."""


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to evaluate on, both uint8 [bytes]."""

    train: np.ndarray
    heldout: np.ndarray
    digest: str
    """SHA-256 of one part after the other: a checkpoint belongs to one corpus and one split of it."""

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
        """The training batch of ``step``: uint8 [B, S + 1], windows at random places."""
        starts = np.random.default_rng([seed, step]).integers(0, len(self.train) - seq_len, batch_size)
        return self.train[starts[:, None] + np.arange(seq_len + 1)]

    def heldout_batches(self, count: int, batch_size: int, seq_len: int) -> Iterator[np.ndarray]:
        """``count`` batches uint8 [B, S + 1], their windows spread evenly over the held-out part."""
        starts = np.linspace(0, len(self.heldout) - seq_len - 1, count * batch_size).astype(np.int64)
        for rows in starts.reshape(count, batch_size):
            yield self.heldout[rows[:, None] + np.arange(seq_len + 1)]


def load_corpus(files: Sequence[str | os.PathLike[str]], seq_len: int) -> Corpus:
    """Read ``files`` in the order given, or the Python standard library's source when there are none.

    Raises UserError for a missing, unreadable or empty file, or when a part is shorter than one window.
    """
    parts = [_read(Path(file)) for file in files] if files else _standard_library()
    data = np.frombuffer(b"\n".join(parts), np.uint8)
    stretches = np.array_split(data, max(1, len(data) // STRETCH))
    cuts = [len(stretch) - int(len(stretch) * HELDOUT_FRACTION) for stretch in stretches]
    train = np.concatenate([stretch[:cut] for stretch, cut in zip(stretches, cuts, strict=True)])
    heldout = np.concatenate([stretch[cut:] for stretch, cut in zip(stretches, cuts, strict=True)])
    if min(len(train), len(heldout)) < seq_len + 1:
        need = int((seq_len + 1) / HELDOUT_FRACTION) + 1
        need += int(need / STRETCH + 1) * int(1 / HELDOUT_FRACTION)  # each stretch rounds its part down
        raise UserError(
            f"--data holds {len(data)} bytes, too short for --seq-len {seq_len}: "
            f"give at least {need} bytes or a shorter --seq-len"
        )
    return Corpus(train, heldout, hashlib.sha256(train.tobytes() + heldout.tobytes()).hexdigest())


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror}; give readable text files") from error
    if not data:
        raise UserError(f"--data {path}: the file is empty; give text files with content")
    return data


def _standard_library() -> list[bytes]:
    """The source files of the running Python's standard library, in the order of their relative paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(("config-", "."))
        ]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    parts, size = [], 0
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            data = path.read_bytes()
        except OSError:  # a dangling link of the distribution's packaging
            continue
        if size + len(data) > STDLIB_BYTES:
            break
        parts.append(data)
        size += len(data)
    if not parts:
        raise UserError(f"no Python source in {root} to train on; give text files with --data")
    return parts
