"""Converted parameters while ``torch.export`` traces: it puts tensors of its own in their place."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from xmoe.torch_backend.wrapper import WRAPPED, WrappedWeight

TRACERS = (FakeTensor, FunctionalTensor)


@cache
def traced_class(weight: type[WrappedWeight], tracer: type[Tensor]) -> type[WrappedWeight]:
    """A `weight` that is a `tracer` (one of `TRACERS`), too.

    ``Tensor.as_subclass``, which gives wrapped weights of plain tensors, has none of those: classes are set instead.
    """

    class Traced(weight, tracer):
        @classmethod
        def __torch_function__(
            cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            handler = cls.handlers.get(func)
            with torch._C.DisableTorchFunctionSubclass():
                if handler is not None and (out := handler(cls, func, *args, **kwargs)) is not NotImplemented:
                    return out
                out = func(*args, **kwargs)
                for x in out if isinstance(out, tuple | list) else [out]:
                    if func in WRAPPED and type(x) is tracer:
                        x.__class__ = cls
                return out

    members: Any = Traced
    members.weight, members.tracer = weight, tracer
    return Traced
