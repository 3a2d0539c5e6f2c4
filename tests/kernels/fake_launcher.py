"""Triton's own launcher over a GPU that is none: `CudaLauncher` of triton/backends/nvidia/driver.py as it is, with the
functions in C that it ends in replaced by ones that note what they are given, as far as the real ones read it."""

import re
from collections import namedtuple
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia

from tests.kernels.fake_cuda import Driver

launched: list[tuple[Any, ...]] = []
"""(everything before a kernel's arguments, those that its parameters get) of each launch."""
NESTED = triton.__version__.startswith("3.7.")
KernelArg = namedtuple("KernelArg", "nested_tuple type")


class TensorMap(NamedTuple):
    """What the driver was given to encode."""

    facts: tuple[Any, ...]


def fill(
    address: int, swizzle: int, size: int, kind: int, block: Any, shape: Any, strides: Any, padding: int
) -> TensorMap:
    assert len(block) == len(shape) == len(strides), "the driver would refuse it"
    return TensorMap((address, swizzle, size, kind, tuple(block), tuple(shape), tuple(strides), padding))


def plain(x: Any) -> Any:
    """Tensors as C sees them; chains of hooks without a hook in them, as nothing."""
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    return None if isinstance(x, knobs.HookChain) and not x.calls else x


def check(kind: str, x: Any) -> None:
    """Raises AssertionError unless C takes x for a parameter of a kind."""
    pointer = isinstance(x, int) or x is None or hasattr(x, "data_ptr")
    fits = pointer if kind[0] == "*" else isinstance(x, TensorMap) if kind == "nvTmaDesc" else isinstance(x, int)
    assert fits, f"{x} for a parameter {kind}"


def launch_nested(*args: Any) -> None:
    """3.7: one function for all kernels, told what they take (driver.c, `launchKernel`)."""
    *head, annotations, signature, arguments = args
    assert len(args) == 16, "the number of arguments is wrong"
    assert len(arguments) == len(annotations), "the number of the kernel's arguments is wrong"
    taken = [x for x, annotation in zip(arguments, annotations, strict=True) if annotation.type == "kernel"]
    for kind, x in zip(signature, taken, strict=True):
        check(kind, x)
    launched.append((tuple(map(plain, head)), tuple(annotations), signature, tuple(map(plain, taken))))


def compiled_module(src: str, **_: Any) -> SimpleNamespace:
    """3.6: a function for each signature; `src` is its source."""
    units = re.search(r'PyArg_ParseTuple\(args, "(\w+)"', src)[1]
    pointers = {int(i) for i in re.findall(r"= getPointer\(_arg(\d+)", src)}
    maps = {int(i) for i in re.findall(r"= getTmaDesc\(_arg(\d+)", src)}

    def launch(*args: Any) -> None:
        assert len(args) == len(units), "the number of arguments is wrong"
        taken = []
        for i, (unit, x) in enumerate(zip(units[13:], args[13:], strict=True)):
            if unit == "O" and i not in pointers | maps:  # a constant
                continue
            check("*" if i in pointers else "nvTmaDesc" if i in maps else unit, x)
            taken.append(plain(x))
        launched.append((tuple(map(plain, args[:13])), tuple(taken)))

    return SimpleNamespace(launch=partial(launch))  # which shows no code, like a function in C


class Launching(Driver):
    """The driver, as far as launchers go."""

    utils = SimpleNamespace(
        launch=partial(launch_nested),
        build_signature_metadata=tuple,
        fill_tma_descriptor_tiled=fill,
        fill_tma_descriptor=fill,
    )


def pretend() -> None:
    """Replace what is in C, for good."""
    triton.runtime.driver.set_active(Launching())
    if NESTED:
        nvidia.PyKernelArg = KernelArg
        nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = "constant", "kernel", "tuple"
    else:
        nvidia.compile_module_from_src, nvidia.library_dirs = compiled_module, tuple


def launcher(kernel: Any, signature: dict[str, str], options: dict[str, Any], scratch: int) -> nvidia.CudaLauncher:
    """Of a kernel compiled for a signature. `scratch`: bytes that each of its programs asks for."""
    blocks = [re.match(r"tensordesc<\w+\[([\d, ]+)\]", kind) for kind in signature.values() if "tensordesc" in kind]
    src = SimpleNamespace(fn=kernel, signature=signature, constants={})
    metadata = SimpleNamespace(
        tensordesc_meta=[described(i, block[1]) for i, block in enumerate(blocks)],
        num_ctas=1,
        global_scratch_size=scratch,
        global_scratch_align=16,
        profile_scratch_size=0,
        profile_scratch_align=1,
        launch_cooperative_grid=options.get("launch_cooperative_grid", False),
        launch_pdl=options.get("launch_pdl", False),
    )
    return nvidia.CudaLauncher(src, metadata)


def described(i: int, block: str) -> dict[str, Any]:
    """What the compiler tells of a descriptor; another thing of each."""
    sizes = [int(size) for size in block.split(",")]
    return {"swizzle": i, "elem_size": 1 + i, "elem_type": 8 + i, "block_size": sizes, "fp4_padded": False}
