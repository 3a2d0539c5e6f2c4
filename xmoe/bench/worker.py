"""A worker's process: ``python -m xmoe.bench.worker FRAMEWORK``, with the options as JSON on its stdin.

FRAMEWORK is torch or jax. Its events (``xmoe.bench.events``) go to stdout.
"""

import os
import signal

if __name__ == "__main__":  # before the slow imports: all that is to be kept has been told already
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
import sys
from types import ModuleType

from xmoe.bench.events import stdout_emitter
from xmoe.bench.options import Options
from xmoe.train.files import UserError


def bench_module(framework: str) -> ModuleType:
    """The framework's benchmark: ``run(options, emit)``, imported on first use."""
    if framework == "jax":
        from xmoe.jax_frontend import bench
    else:
        from xmoe.torch_backend.bench import run as bench
    return bench


def main(arguments: list[str]) -> int:
    """Measure; the exit status."""
    if arguments not in (["torch"], ["jax"]):
        raise SystemExit(__doc__)
    emit = stdout_emitter()
    try:
        bench_module(arguments[0]).run(Options.from_dict(json.load(sys.stdin)), emit)
    except UserError as error:
        emit("error", text=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
