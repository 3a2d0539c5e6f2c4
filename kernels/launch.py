"""Launching: Triton compiles; this calls what it compiled.

A launch through Triton's `JITFunction` takes 25-40 us of host time: it binds and specialises 15 to 25 arguments, looks
at environment variables, calls its hooks. `launch` lets it do so when it first sees a kernel with arguments of a kind,
and keeps what comes back. From then on arguments of that kind go straight to the function in C that Triton's launcher
ends in (`native_launch`), on the current stream of the current device.

The kind is the key, so it tells apart all that Triton compiles apart: the device, every constant and option, whether an
argument is None, and

- of a tensor: the dtype, and whether its address is a multiple of 16;
- of an integer: whether it is 1, whether it is a multiple of 16, and the width that it needs;
- of a descriptor: the dtype, the block and the layout.

(It tells more apart for integers that a kernel does not specialise.) `TRITON_DEBUG` and the other knobs count as they
were when a kind was first seen. Whatever Triton does not document is used in this file and in `native_launch` alone:
with a version that is not KNOWN, with hooks set (a profiler's), or with anything else unexpected, every launch is
Triton's own.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.language import constexpr
from triton.runtime import JITFunction
from triton.runtime import driver as _driver
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from xmoe.kernels.native_launch import NESTED, Box, Encoding, encoding, native, tensor_map

KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
"""Whether this is a Triton whose `CompiledKernel.run` takes (grid x, y, z, stream, function, packed metadata, launch
metadata, hook on entry, hook on exit, every parameter in order), where None stands for no metadata and no hook, an
integer for a tensor at that address, and anything for a parameter that was compiled in."""

DIRECT = KNOWN and not knobs.runtime.interpret
"""Whether kernels are launched from here at all: not by Triton, and not interpreted."""

driver: Any = _driver  # whose drivers of GPUs have more than their base class
_log = logging.getLogger(__name__)
if not KNOWN:
    _log.debug("every kernel is launched by Triton, whose version %s is not known here", triton.__version__)


class Address(int):
    """An address in place of a descriptor's tensor."""

    def data_ptr(self) -> int:
        return self


class Descriptor(NamedTuple):
    """A tensor as TMA sees it: what Triton's `TensorDescriptor` holds. That checks its fields each time it is made; the
    driver checks them when it encodes them."""

    base: Any
    """A tensor, or (for `start`) its `Address`."""
    shape: tuple[int, ...]
    """In elements, as are the strides, of which the last is 1."""
    strides: tuple[int, ...]
    block: tuple[int, ...]
    """Elements of one copy."""
    layout: Any = None
    """Of a copy in shared memory, for a Gluon kernel: it says so where Triton's compiler finds out by itself."""

    padding = "zero"  # which Triton's launcher reads, too
    round_f32_to_tf32 = False


_ragged: dict[tuple[Any, ...], tuple[tuple[int, ...], ...]] = {}


def ragged_descriptor(x: Tensor, block: tuple[int, int], layout: Any = None) -> Descriptor:
    """Of x [R, C] as `triton.tools.ragged_tma` stores to it: rows that start and end anywhere."""
    R, C = x.shape
    key = C, x.stride(), x.dtype, block
    fields = _ragged.get(key) if R <= 2**30 else None  # more rows are an error
    if fields is None:
        ragged = create_ragged_descriptor(x, block)
        fields = _ragged[key] = tuple(ragged.shape), tuple(ragged.strides), tuple(ragged.block_shape)
    shape, strides, box = fields
    return Descriptor(x, shape, strides, box, layout)


class Compiled(NamedTuple):
    """What a kind of arguments was compiled to: ``launch(*grid, stream, *fixed, *arguments)``, or, if they are nested,
    ``launch(*grid, stream, *fixed, arguments)``."""

    launch: Callable[..., Any]
    fixed: tuple[Any, ...]
    nested: bool
    boxes: tuple[Box, ...]
    """One for each descriptor, in order; none if `launch` takes a `Descriptor`."""
    constants: tuple[None, ...]
    """One for each parameter that was given as a constant: the launcher skips them."""
    kernel: JITFunction[Any]
    """Which its id in the key keeps alive."""


_compiled: dict[tuple[Any, ...], Compiled | None] = {}  # None: a kind that Triton launches itself


class Launch(NamedTuple):
    """What `launch` did; `compiled` is None if Triton did it."""

    compiled: Compiled | None
    grid: tuple[int, ...]
    args: tuple[Any, ...]


class _Recorder(threading.local):
    launches: list[Launch] | None = None


recorder = _Recorder()
"""Where each thread's launches are noted, if it has put a list there."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a `triton.jit` or `gluon.jit` function on the current stream of the current device.

    Args:
        kernel: whose `tl.constexpr` parameters come after all others.
        grid: programs along one to three axes.
        args: one for each of the others: a tensor on the current device, an int, None or a `Descriptor`.
        constants: its constants, and Triton's options (`num_warps`, ...), by name; hashable.
    """
    if not KNOWN or not isinstance(kernel, JITFunction) or hooked(kernel):
        _launch_by_triton(kernel, grid, args, constants)
        return
    device = current_device()
    key: list[Any] = [id(kernel), device, *constants, *constants.values()]
    values: list[Any] = []
    for arg in args:
        if type(arg) is int:
            key.append(not arg & 15 if 1 < arg < 2**31 else int_kind(arg))
        elif isinstance(arg, Tensor):
            dtype, arg = arg.dtype, arg.data_ptr()
            key.append((dtype,) if arg & 15 else dtype)
        elif type(arg) is Descriptor:
            key.append((arg.base.dtype, arg.block, arg.layout))
        elif arg is not None:
            _launch_by_triton(kernel, grid, args, constants)
            return
        else:
            key.append(None)
        values.append(arg)
    kind = tuple(key)
    found = _compiled.get(kind)
    if found is None:
        result = _launch_by_triton(kernel, grid, args, constants)
        if kind not in _compiled:
            _compiled[kind] = _launchable(kernel, len(args), result)
        return
    grid = (*grid, 1, 1)[:3]
    start(found, grid, current_stream(device), values)
    if recorder.launches is not None:
        recorder.launches.append(Launch(found, grid, args))


def start(compiled: Compiled, grid: tuple[int, ...], stream: int, values: Sequence[Any]) -> None:
    """A launch and nothing else.

    Args:
        grid: three axes.
        values: the arguments, with addresses in place of tensors.
    """
    arguments = expanded(compiled, values, _mapped)
    if compiled.nested:
        compiled.launch(*grid, stream, *compiled.fixed, arguments)
    else:
        compiled.launch(*grid, stream, *compiled.fixed, *arguments)


def expanded(
    compiled: Compiled, values: Sequence[Any], mapped: Callable[[Encoding, Descriptor], Any]
) -> tuple[Any, ...]:
    """The arguments of a launch: `values` and, after them, the constants; in place of a descriptor, where there is a
    box for each, its tensor map (what `mapped` gives), its shape and its strides."""
    if not compiled.boxes:
        return *values, *compiled.constants
    arguments, boxes = [], iter(compiled.boxes)
    for value in values:
        if type(value) is Descriptor:
            shape, strides = value.shape, value.strides
            arguments += mapped(encoding(next(boxes), shape, strides), value), *shape, *strides
        else:
            arguments.append(value)
    return *arguments, *compiled.constants


def _mapped(encoding: Encoding, x: Descriptor) -> Any:
    return tensor_map(encoding, x.base.data_ptr())


def current_device() -> int:
    return driver.active.get_current_device()


def current_stream(device: int) -> int:
    return driver.active.get_current_stream(device)


def int_kind(value: int) -> bool | str:
    """What of an integer Triton compiles in, as part of a key."""
    if value == 1:
        return "1"
    if -(2**31) <= value < 2**31:
        return not value & 15
    return f"{'i64' if value < 2**63 else 'u64'} {not value & 15}"


def hooked(*kernels: Any) -> bool:
    """Whether something wants to know of each launch of `kernels`."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):  # a chain of them, or one
            return True
    for kernel in kernels:  # noqa: SIM110 (a generator takes longer)
        if kernel.pre_run_hooks:
            return True
    return False


def _launch_by_triton(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    if recorder.launches is not None:
        recorder.launches.append(Launch(None, grid, args))
    return kernel[grid](*(described(arg) if type(arg) is Descriptor else arg for arg in args), **constants)


def described(x: Descriptor) -> Any:
    """The descriptor as Triton, or Gluon, wants it."""
    fields = x.base, [*x.shape], [*x.strides], [*x.block]
    if x.layout is None:
        return TensorDescriptor(*fields)
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    return GluonDescriptor(*fields, x.layout)


def _launchable(kernel: JITFunction[Any], count: int, result: Any) -> Compiled | None:
    """How to launch what Triton compiled for `count` arguments by itself; None, and a line in the log, if that cannot
    be known."""
    if not isinstance(result, CompiledKernel):
        why = f"a launch gave {type(result).__name__}"
    elif result.function is None:
        why = "a launch did not load it"
    elif result.metadata.target.backend != "cuda":
        why = f"the backend is {result.metadata.target.backend}"
    elif [param.is_constexpr for param in kernel.params] != [False] * count + [True] * (len(kernel.params) - count):
        why = "its constants are not its last parameters"
    elif not all(isinstance(value, constexpr) for value, _ in kernel.used_global_vals.values()):
        why = "it reads globals that may change"
    else:
        return _compiled_to(kernel, result, (None,) * (len(kernel.params) - count))
    _log.debug("%s is launched by Triton: %s", kernel.__name__, why)
    return None


def _compiled_to(kernel: JITFunction[Any], result: CompiledKernel, constants: tuple[None, ...]) -> Compiled:
    found = native(result)
    if found is not None:
        return Compiled(found.launch, found.fixed, NESTED, found.boxes, constants, kernel)
    _log.debug("%s is launched through its launcher, which is not as it is known here", kernel.__name__)
    metadata = result.packed_metadata, None, None, None  # no launch metadata, no hooks
    return Compiled(result.run, (result.function, *metadata), False, (), constants, kernel)
