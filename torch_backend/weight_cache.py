"""Expert weights quantized once for several forwards and backwards: the micro-batches of one optimizer step."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class _Cache:
    entries: dict[Any, tuple[tuple[Tensor, ...], tuple[int, ...], Any]] = field(default_factory=dict)
    """By views of leaf tensors: these (held, so that their ids stay theirs), their versions, the operands."""


class _Thread(threading.local):
    paused = False


_active: _Cache | None = None
_thread = _Thread()


@contextlib.contextmanager
def cache_weights() -> Iterator[None]:
    """Within it a weight is quantized once, along both of its axes, whatever the number of forwards and backwards,
    recomputation under activation checkpointing included:

        with xmoe.torch_backend.cache_weights():
            for batch in micro_batches:
                loss(model(batch)).backward()
        optimizer.step()

    It costs the memory of the 8-bit operands (2 bytes a weight; 4 where an MX format is multiplied in bf16) until the
    block ends. An in-place change of a parameter in the block is noticed by its version, and the weight quantized anew;
    what moves no version (``parameter.data``, FSDP gathering new values) is not, so end the block before the optimizer
    steps. Only parameters that take a gradient are cached, in their own dtype: a weight that is cast or joined on the
    way to its GEMM is quantized every time. ``torch.compile`` and CUDA graphs leave the cache aside.

    Blocks may be nested: the outermost counts. For the whole process, because autograd recomputes on threads of its
    own.
    """
    global _active
    if _active is not None:
        yield
        return
    _active = _Cache()
    try:
        yield
    finally:
        _active = None


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Within it `cached` gives None on this thread: for products of passing tensors that look like weights."""
    before, _thread.paused = _thread.paused, True
    try:
        yield
    finally:
        _thread.paused = before


def cached(make: Callable[[], Any], key: Any, *weights: Tensor) -> Any:
    """``make()``, or what it gave before for the same `key` and the same values of these views of leaf tensors; None
    outside `cache_weights`, inside `paused` and for weights that it leaves alone."""
    if _active is None or _thread.paused or torch.compiler.is_compiling():
        return None
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None  # a replay would go on with these values, or with memory that has been freed
    bases = tuple(w if w._base is None else w._base for w in weights)
    if not all(base.is_leaf for base in bases):
        return None
    views = tuple((id(base), w.storage_offset(), w.shape, w.stride()) for base, w in zip(bases, weights, strict=True))
    versions = tuple(base._version for base in bases)
    found = _active.entries.get((key, views))
    if found is None or found[1] != versions:
        if not (torch.is_grad_enabled() and all(w.requires_grad for w in weights)):
            return None  # without a graph a passing tensor looks like a leaf
        with torch.no_grad():
            found = bases, versions, make()
        _active.entries[key, views] = found
    return found[2]
