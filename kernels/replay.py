"""Replaying: what a call launched, launched again for other tensors.

Around its launches a call works out shapes, schedules and views, which takes longer than launching. All of it follows
from static facts: when the same call comes again, on tensors of the same layouts, its kernels, grids and integers are
the same, and only the addresses differ. `replayed` runs a call the first time, runs and records it the second, and from
then on goes through the record, with the addresses of the day.

A record is made only of a call that can be told again in full: each address that a kernel was given lies in one of the
call's tensors, no two of which overlap unless they start at one address, and torch did nothing but make views. A call
of which this is not true is run each time. Nothing is replayed while launch hooks are set.

On the CPU that this was written on, the host time of an 8-bit forward of nine launches, without the driver's part, fell
from 284 us (launched by Triton) to 151 (`launch`) to 58, of which 29 were the op's own; docs/design.md tells on.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import pairwise
from operator import add, attrgetter, itemgetter, or_
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xmoe.kernels.specs import HAS_TRITON, Arena, Tensors, Weights

if HAS_TRITON:
    from xmoe.kernels import launch
    from xmoe.kernels.launch import (
        Address,
        Compiled,
        Descriptor,
        current_device,
        current_stream,
        expanded,
        hooked,
        recorder,
    )
    from xmoe.kernels.native_launch import tensor_map

LIMIT = 1024
"""Calls that are remembered; the oldest goes first."""


class _Steps(NamedTuple):
    """The launches of a call. Each takes its arguments from one list of values: the stream, addresses, what is made of
    addresses, and all that is the same in each replay."""

    tensors: Callable[[Sequence[int]], tuple[int, ...]]
    """Of the addresses of the call's tensors, those that addresses are told by,"""
    offsets: tuple[int, ...]
    """and the bytes from there."""
    made: tuple[tuple[Callable[[int], Any], int], ...]
    """(what makes a descriptor of an address, where among the values that address is)."""
    rest: tuple[Any, ...]
    launches: tuple[tuple[Callable[..., Any], Callable[[Sequence[Any]], tuple[Any, ...]], int], ...]
    """(a function to call, what picks its arguments, how many of them come before those that it takes as one)."""
    kernels: tuple[Any, ...]


class _Call:
    """What is known of a call: nothing but that it came once, or its steps, or (None) that it cannot be replayed."""

    __slots__ = ("recorded", "steps")

    def __init__(self) -> None:
        self.recorded = False
        self.steps: _Steps | None = None


_calls: dict[tuple[Any, ...], _Call] = {}
_dtype_and_shape = attrgetter("dtype", "shape")


def replayed(
    facts: tuple[Any, ...], inputs: Sequence[Weights | None], named: Sequence[Tensors], run: Callable[[], None]
) -> None:
    """Do what `run` launches, by running or by replaying it.

    Args:
        facts: hashable; with the layouts of the tensors and the names of the named ones, they determine every launch
            but for the addresses.
        inputs, named: all memory that the launches read and write, on the current device. An input is a tensor,
            several, prepared weights or None.
        run: does the call.
    """
    if not launch.DIRECT:
        run()
        return
    device = current_device()
    tensors, names, memories = [], [], []
    for some in inputs:
        if isinstance(some, Tensor):
            tensors.append(some)
        else:
            parts = [x for x in some or () if x is not None]
            names.append((type(some), len(tensors), len(parts)))
            tensors += parts
    for some in named:
        if isinstance(some, Arena):  # whose layout tells all of its memory
            memories.append(some.memory)
            names.append(some.layout)
        else:
            tensors += some.values()
            names += some
    layouts = *map(_dtype_and_shape, tensors), *map(Tensor.stride, tensors)
    tensors += memories
    addresses = [*map(Tensor.data_ptr, tensors)]
    remainder = reduce(or_, addresses, 0) & 15
    if remainder:  # of which tensors is a fact, too, as is what follows
        names.append(tuple(address & 15 for address in addresses))
    if len({*addresses}) < len(addresses):  # a tensor that comes twice
        names.append(tuple(map(addresses.index, addresses)))
    key = facts, device, remainder, tuple(names), layouts
    call = _calls.get(key)
    if call is None:
        if len(_calls) >= LIMIT:
            _calls.pop(list(_calls)[0], None)  # noqa: RUF015 (other threads may be at it)
        _calls[key] = _Call()
        run()
    elif hooked(*call.steps.kernels if call.steps is not None else ()):
        run()
    elif not call.recorded:
        call.recorded = True
        launches = _record(run, tensors[0])
        if launches is not None:
            call.steps = _steps(launches, tensors)
    elif call.steps is None:
        run()
    else:
        _replay(call.steps, addresses, current_stream(device))


def _replay(steps: _Steps, addresses: Sequence[int], stream: int) -> None:
    tensors, offsets, made, rest, launches, _ = steps
    values = [stream, *map(add, tensors(addresses), offsets)]
    values += [make(values[index]) for make, index in made]
    values += rest
    for start, pick, before in launches:
        arguments = pick(values)
        if before:
            start(*arguments[:before], arguments[before:])
        else:
            start(*arguments)


# ------------------------------------------------------------------------------------------------------------ recording


_Launched = tuple["Compiled", tuple[int, ...], tuple[Any, ...]]
"""What was launched, its grid and its arguments."""


class _Foreign(TorchDispatchMode):
    """Notes whether torch is asked for anything, and for anything but views."""

    awake = seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.awake, returns = True, func._schema.returns
        self.seen |= not (returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns))
        return func(*args, **(kwargs or {}))


def _record(run: Callable[[], None], some: Tensor) -> list[_Launched] | None:
    """What `run` launches, or None if there is more to it. `some`: any tensor, to see that torch tells of views."""
    if recorder.launches is not None:  # part of a call that is being recorded
        run()
        return None
    recorder.launches, foreign = [], _Foreign()
    try:
        with foreign:
            some.detach()
            run()
        launches = [(compiled, grid, args) for compiled, grid, args in recorder.launches if compiled is not None]
        whole = len(launches) == len(recorder.launches)
    finally:
        recorder.launches = None
    return launches if whole and foreign.awake and not foreign.seen else None


class _Address(NamedTuple):
    """In place of an address: the index of the tensor that it lies in, and the bytes from its start."""

    tensor: int
    offset: int


class _Made(NamedTuple):
    make: Callable[[int], Any]
    address: _Address


_STREAM = object()


def _steps(launches: Sequence[_Launched], tensors: Sequence[Tensor]) -> _Steps | None:
    """The launches with their addresses as places in `tensors`, or None if that cannot be."""
    spans = _spans(tensors)
    if spans is None:
        return None
    told = []
    for compiled, grid, args in launches:
        values = [_placed(arg, spans) for arg in args]
        if any(isinstance(value, Tensor) for value in values):
            return None
        arguments = expanded(compiled, values, lambda encoding, x: _Made(partial(tensor_map, encoding), x.base))
        arguments = [_Made(partial(_moved, x), x.base) if type(x) is Descriptor else x for x in arguments]
        told.append((compiled, (*grid, _STREAM, *compiled.fixed), arguments))
    everything = [x for _, head, arguments in told for x in (*head, *arguments)]
    made = [x for x in everything if type(x) is _Made]
    places = list(dict.fromkeys([x for x in everything if type(x) is _Address] + [x.address for x in made]))
    rest = {_name(x): x for x in everything if x is not _STREAM and type(x) not in (_Address, _Made)}
    where = {_name(x): index for index, x in enumerate((_STREAM, *places, *made, *rest.values()))}
    calls = [
        (compiled.launch, itemgetter(*(where[_name(x)] for x in (*head, *arguments))), len(head) * compiled.nested)
        for compiled, head, arguments in told
    ]
    return _Steps(
        itemgetter(*(place.tensor for place in places), 0, 0),  # of one index it would not give a tuple
        tuple(place.offset for place in places),
        tuple((x.make, where[x.address]) for x in made),
        tuple(rest.values()),
        tuple(calls),
        tuple({id(compiled.kernel): compiled.kernel for compiled, _, _ in launches}.values()),
    )


def _name(x: Any) -> Any:
    """Equal addresses are one value; of all else, equal ones need not be the same (1 and True)."""
    return x if type(x) is _Address else id(x)


def _placed(arg: Any, spans: Sequence[tuple[int, int, int]]) -> Any:
    """An argument without its tensor, or that tensor if it lies in none of `spans`."""
    if not isinstance(arg, Tensor | Descriptor):
        return arg
    x = arg if isinstance(arg, Tensor) else arg.base
    first, last = _span(x)
    place = next((_Address(tensor, first - start) for start, end, tensor in spans if start <= first and last <= end), x)
    return place if isinstance(arg, Tensor) or place is x else arg._replace(base=place)


def _moved(x: Descriptor, address: int) -> Descriptor:
    return x._replace(base=Address(address))


def _spans(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]] | None:
    """(first byte, byte past the last, index) of the longest tensor at each address; None if they overlap."""
    longest: dict[int, tuple[int, int, int]] = {}
    for index, x in enumerate(tensors):
        start, end = _span(x)
        if end > longest.get(start, (start, start))[1]:
            longest[start] = start, end, index
    spans = sorted(longest.values())
    return None if any(end > start for (_, end, _), (start, _, _) in pairwise(spans)) else spans


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses of its first byte and past its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    elements = last + 1 if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + elements * x.element_size()
