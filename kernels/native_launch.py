"""The C function that Triton's launcher ends in, and its arguments, to call it without the way there.

`CompiledKernel.run` is a `CudaLauncher`. Each time it is called, it looks for scratch to allocate and at each argument
for descriptors, encodes those anew, and calls a function in C. Of all that, only addresses change from one launch of a
compiled kernel to the next: `native` takes the rest apart, once; `tensor_map` keeps what it has encoded.

The arguments of the function in C are those of `CudaLauncher.__call__` of triton 3.6 and 3.7
(triton/backends/nvidia/driver.py), which tests/kernels/replay_launches.py runs beside this. Where a launcher is not as
it is known there, `native` gives None, and the launcher is called.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import triton

NESTED = triton.__version__.startswith("3.7.")
"""Whether the kernel's arguments are one argument, not the last ones."""

_META = {"swizzle", "elem_size", "elem_type", "block_size", "fp4_padded"}
"""What the compiler tells of a descriptor."""


class Box(NamedTuple):
    """What is compiled in of the copies through a descriptor."""

    fill: Callable[..., Any]
    """The driver's: (address, swizzle, bytes of an element, its type, block, shape, strides, padding) -> tensor map."""
    architecture: Any
    swizzle: int
    element_bytes: int
    element_type: int
    block: tuple[int, ...]


class Native(NamedTuple):
    """A kernel's launch in C: ``launch(*grid, stream, *fixed, arguments)``, or ``*arguments`` unless NESTED."""

    launch: Callable[..., None]
    fixed: tuple[Any, ...]
    boxes: tuple[Box, ...]
    """One for each descriptor, in order. Its arguments are a tensor map, the shape and the strides."""


def native(compiled: Any) -> Native | None:
    """What a loaded `CompiledKernel` launches; None if that is not known."""
    try:
        return _native(compiled)
    except AttributeError:  # something is not where it was
        return None


def _native(compiled: Any) -> Native | None:
    from triton.backends.nvidia import driver  # not part of every Triton

    launcher = compiled.run
    if type(launcher) is not driver.CudaLauncher or launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    launch, metas = launcher.launch, ()
    if hasattr(launch, "__code__"):  # `wrap_handle_tensordesc` has wrapped it
        inside = inspect.getclosurevars(launch).nonlocals
        if inside.keys() != {"launcher", "tensordesc_indices", "tensordesc_meta"}:
            return None
        launch, metas = inside["launcher"], inside["tensordesc_meta"]
        if any(meta is None or meta.keys() != _META or meta["fp4_padded"] for meta in metas):
            return None
    active: Any = triton.runtime.driver.active
    fill = active.utils.fill_tma_descriptor_tiled if NESTED else active.utils.fill_tma_descriptor
    boxes = tuple(
        Box(
            fill=fill,
            architecture=compiled.metadata.target.arch,
            swizzle=meta["swizzle"],
            element_bytes=meta["elem_size"],
            element_type=driver.TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]],
            block=tuple(meta["block_size"]),
        )
        for meta in metas
    )
    options = launcher.launch_cooperative_grid, launcher.launch_pdl
    metadata, scratch = (compiled.packed_metadata, None, None, None), (None, None)  # no launch metadata, no hooks
    if NESTED:
        fixed = *options, *metadata, *scratch, launcher.arg_annotations, launcher.kernel_signature
    else:
        fixed = *options, *scratch, *metadata
    return Native(launch, (compiled.function, *fixed), boxes)


class Encoding:
    """All of a tensor map but its address. Equal to itself alone: `encoding` gives the same one for the same facts."""

    __slots__ = ("_after", "_fill")

    def __init__(self, box: Box, shape: tuple[int, ...], strides: tuple[int, ...]):
        self._fill, _, *fields = box
        self._after = *fields, shape, strides, 0  # past the tensor's bounds: zeros

    def at(self, address: int) -> Any:
        return self._fill(address, *self._after)


@lru_cache(maxsize=4096)
def encoding(box: Box, shape: tuple[int, ...], strides: tuple[int, ...]) -> Encoding:
    return Encoding(box, shape, strides)


@lru_cache(maxsize=16384)
def tensor_map(encoding: Encoding, address: int) -> Any:
    """A TMA descriptor. The driver takes 2 us to make one; a training step comes back to the same addresses."""
    return encoding.at(address)
