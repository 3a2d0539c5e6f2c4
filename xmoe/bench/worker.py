"""The worker's process: ``python -m xmoe.bench.worker``, with the options as JSON on its stdin.

Its events (``xmoe.bench.events``) go to stdout. All systems run in it, those of JAX beside those of PyTorch.
"""

import os
import signal

if __name__ == "__main__":  # before the slow imports: all that is to be kept has been told already
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
import sys

from xmoe.bench.events import Emit, stdout_emitter
from xmoe.bench.harness import Guest
from xmoe.bench.options import JAX_PEERS, Options
from xmoe.train.files import UserError


def guest(options: Options, emit: Emit) -> Guest | None:
    """JAX's systems, where a peer of JAX is asked for; without one nothing imports it."""
    if not set(options.peers) & set(JAX_PEERS):
        return None
    from xmoe.jax_frontend.bench.guest import invite

    return invite(options, emit)


def main() -> int:
    """Measure; the exit status."""
    emit = stdout_emitter()
    from xmoe.torch_backend.bench.run import run

    try:
        run(Options.from_dict(json.load(sys.stdin)), emit, guest)
    except UserError as error:
        emit("error", text=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
