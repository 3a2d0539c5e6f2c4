"""Writes that never leave a half-written file in place of a good one, and the error that users get to read."""

import contextlib
import errno
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from xmoe import files


class UserError(ValueError):
    """A wrong input or a machine that lacks something. The message is one line that says what to do about it."""


def require(extra: str, *modules: str) -> None:
    """Raise UserError, naming the extra to install, when one of the modules is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f'{", ".join(missing)} not installed; run: pip install "xmoe[{extra}]"')


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step: readers see the old file or the new one, also after a power cut.

    Raises UserError when that fails (a full disk); whatever was at ``path`` is then untouched.
    """
    with writing(path):
        files.write_atomically(path, data)


def append_line(path: Path, line: str) -> None:
    """Append one line, all of it or (when the disk is full) nothing of it. Raises UserError."""
    data = line.encode() + b"\n"
    with writing(path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            try:
                written = 0
                while written < len(data):
                    written += os.write(file, data[written:])
            except BaseException:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError raised inside into a UserError with the file's name: a write's own error has none."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space, or choose another --out" if full else "choose another --out"
        raise UserError(f"cannot write {path}: {error.strerror}; {advice}") from error
