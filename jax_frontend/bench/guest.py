"""JAX's systems in a run of ``xmoe bench``, in one process with PyTorch's."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax

from xmoe.bench.events import Emit
from xmoe.bench.harness import Case
from xmoe.bench.options import Options
from xmoe.jax_frontend.bench import overhead, ragged_dot
from xmoe.jax_frontend.bench.program import WallTimer
from xmoe.shapes import Shape, StackShape


def invite(options: Options, emit: Emit) -> "JaxGuest | None":
    """JAX's systems on its first GPU; without one a note says so."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        emit("note", text=f"JAX finds no GPU (its first device: {device.device_kind}), so its systems are left out.")
        return None
    text = (
        "JAX's times, those in µs too, are wall-clock means of calls enqueued together, less the cache flushes between"
    )
    emit("note", text=f"{text} them (none where launching is timed).")
    major, minor = device.compute_capability.split(".")
    return JaxGuest(options, (int(major), int(minor)), WallTimer(), WallTimer(flush_bytes=0))


@dataclasses.dataclass(frozen=True, slots=True)
class JaxGuest:
    """`xmoe.bench.harness.Guest`, on a device of ``capability`` (None: no GPU)."""

    options: Options
    capability: tuple[int, int] | None
    timer: WallTimer
    overhead_timer: WallTimer
    """Where launching is timed: a write between calls would give the host time to launch."""

    def join(self, case: Case, shape: Shape) -> Case:
        """``case`` with JAX's grouped GEMMs of that shape, forward and backward."""
        systems, missing = ragged_dot.systems(self.options, shape, self.capability)
        timed = [dataclasses.replace(system, time=partial(self.timer, system.step)) for system in systems]
        return dataclasses.replace(case, systems=[*case.systems, *timed], missing={**case.missing, **missing})

    def overheads(self, shape: Shape | StackShape) -> Iterator[tuple[str, Callable[[], Case]]]:
        """JAX's own tables of ``xmoe bench overhead``."""
        if isinstance(shape, StackShape):
            make = partial(overhead.step_case, self.options, shape, self.capability, self.overhead_timer)
        else:
            make = partial(overhead.op_case, self.options, shape, self.overhead_timer)
        yield f"{shape.name} in JAX", make
