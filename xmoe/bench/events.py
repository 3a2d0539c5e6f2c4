"""What a worker tells ``xmoe bench``, one JSON object a line: {"event": name, ...}.

facts     {"facts": ..., "ceiling": ...}      the machine, once, before any row
progress  {"text": ..., "done": ..., "total": ...}
row       {"row": the fields of a Row}        new, or in the place of the one with the same key
note      {"text": ...}                       for the report
error     {"text": ...}                       the worker stops: one line for the user
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from xmoe.bench.results import Row

Emit = Callable[..., None]
"""Called with an event's name and, as keywords, its fields."""


def emit_row(emit: Emit, row: Row) -> None:
    """Emit the row as it stands."""
    emit("row", row=dataclasses.asdict(row))


def stdout_emitter() -> Emit:
    """Events to this process's stdout, and whatever else is printed from now on to its stderr."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout.flush()
    os.dup2(2, 1)

    def emit(event: str, **fields: Any) -> None:
        channel.write(json.dumps({"event": event, **fields}) + "\n")

    return emit
