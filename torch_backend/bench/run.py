"""The torch worker of ``xmoe bench``: the machine's facts and ceilings, then shape by shape."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from xmoe.bench.events import Emit
from xmoe.bench.harness import Case, Guest, Memory, Timer, run_cases
from xmoe.bench.options import Options
from xmoe.bench.results import Row
from xmoe.config import config_from_recipe
from xmoe.shapes import LayerShape, LinearShape, StackShape
from xmoe.torch_backend.bench import grouped_mm, layer, linear, overhead, quantize
from xmoe.torch_backend.bench.gpu import CudaMemory, CudaTimer, ceilings, facts
from xmoe.train.files import UserError

RECOMPILES = 256
"""How often torch.compile may compile one function of this package anew: it is the same one for all recipes."""


def run(options: Options, emit: Emit, guest: Callable[[Options, Emit], Guest | None]) -> None:
    """Measure ``options`` on the current CUDA GPU, with the systems of what ``guest`` makes, which is called after
    torch has found its GPU. Raises UserError where there is none."""
    if not torch.cuda.is_available():
        build = "has no CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        raise UserError(
            f"xmoe bench measures an NVIDIA GPU and torch finds none (torch {torch.__version__} {build}); "
            "run it on a machine with one, see xmoe doctor"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    measure_all(options, device, CudaTimer(device), CudaMemory(device), emit, guest(options, emit))


def measure_all(
    options: Options,
    device: torch.device,
    timer: Timer,
    memory: Memory,
    emit: Emit,
    guest: Guest | None = None,
    *,
    backend: str = "inductor",
    ceiling_sizes: dict[str, int] | None = None,
) -> list[Row]:
    """Facts, ceilings and every case of ``options`` on ``device``.

    Args:
        timer, memory: of that device.
        guest: another framework's systems.
        backend: torch.compile's, with ``options.compile``.
        ceiling_sizes: other sizes for `gpu.ceilings`.
    """
    torch.manual_seed(0)
    ceiling = ceilings(timer, device, **(ceiling_sizes or {}))
    found = facts(device)
    emit("facts", facts=found, ceiling=ceiling)
    capability = tuple(found["capability"]) if found["capability"] else None
    with _compiling(options.compile):
        return run_cases(makers(options, device, capability, backend, guest), options.rounds, timer, memory, emit)


def makers(
    options: Options,
    device: torch.device,
    capability: tuple[int, int] | None,
    backend: str,
    guest: Guest | None,
) -> Iterator[tuple[str, Callable[[], Case]]]:
    """All cases of ``options``, by the name of what they measure, to be made one at a time."""
    for shape in options.shapes:
        if isinstance(shape, LayerShape):
            of_transformers = (layer.transformers_case,) if "transformers" in options.peers else ()
            for make in (layer.experts_case, layer.layer_case, *of_transformers):
                yield shape.name, partial(make, options, shape, device, capability, backend)
        elif isinstance(shape, LinearShape):
            yield shape.name, partial(linear.case, options, shape, device, capability, backend)
        elif isinstance(shape, StackShape):
            for captured in (False, True):
                yield shape.name, partial(overhead.step_case, options, shape, device, capability, captured=captured)
            if guest is not None:
                yield from guest.overheads(shape)
        elif options.command == "overhead":
            for make in (overhead.host_forward_case, overhead.host_backward_case):
                yield shape.name, partial(make, options, shape, device)
            if guest is not None:
                yield from guest.overheads(shape)
        elif options.command == "quantize":
            for format in dict.fromkeys(config_from_recipe(recipe).format for recipe in options.recipes):
                if format != "bf16":
                    yield f"{format} at {shape.name}", partial(quantize.case, format, shape, device)
        else:
            yield shape.name, partial(grouped_mm.forward_case, options, shape, device, capability)
            both = partial(grouped_mm.forward_backward_case, options, shape, device, capability, backend)
            yield shape.name, both if guest is None else lambda shape=shape, both=both: guest.join(both(), shape)


@contextlib.contextmanager
def _compiling(wanted: bool) -> Iterator[None]:
    """torch.compile without its limit of recompilations, beyond which it would run eagerly without a word."""
    if not wanted:
        yield
        return
    import torch._dynamo
    import torch._dynamo.config as config

    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch._dynamo.reset()
    settings: Any = {"recompile_limit": RECOMPILES, "accumulated_recompile_limit": 8 * RECOMPILES}
    with config.patch(**settings):
        yield
