"""Converted parameters that are DTensors: expert and tensor parallel shards, and what FSDP2 gathers of them."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from xmoe.torch_backend.wrapper import WRAPPED, WrappedWeight, set_class


class WrappedDTensor(DTensor):
    """A DTensor whose local part, taken by ``to_local()``, is a wrapped weight.

    A product with the DTensor itself raises ValueError: which part of it is quantized together, and where gradients are
    summed, is for the caller to say. To everything else it is a DTensor.
    """

    carries: ClassVar[type[WrappedWeight]]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in cls.carries.handlers:
            weight = next(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, cls))
            raise ValueError(
                f"{getattr(func, '__name__', func)} got a converted weight that is a DTensor, with placements "
                f"{weight.placements}; multiply its local part, weight.to_local(), which runs in low precision"
            )
        out = torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        return _as(cls, out) if func in WRAPPED and isinstance(args[0], cls) else out

    def to_local(self, **options: Any) -> Tensor:
        if isinstance(self._local_tensor, FakeTensor):
            raise NotImplementedError(
                "the local part of a DTensor that is a converted weight would lose its config in compiled code; call "
                "to_local() outside, and compile what takes the local weights"
            )
        return super().to_local(**options).as_subclass(self.carries)

    def full_tensor(self, **options: Any) -> Tensor:
        return super().full_tensor(**options).as_subclass(self.carries)

    def redistribute(self, *args: Any, **options: Any) -> DTensor:
        return _as(type(self), super().redistribute(*args, **options))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _as(type(self), copy.deepcopy(self._plain(), memo))
        return memo[id(self)]

    def _plain(self) -> Any:
        """A DTensor, or parameter, on the same storage."""
        plain = self.detach()
        set_class(plain, DTensor)
        return nn.Parameter(plain, self.requires_grad) if isinstance(self, nn.Parameter) else plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)


@cache
def dtensor_class(weight: type[WrappedWeight]) -> type[WrappedDTensor]:
    """The class of DTensors whose local parts are `weight`s."""

    class Class(WrappedDTensor):
        carries = weight

        @staticmethod
        def __tensor_unflatten__(*args: Any) -> DTensor:  # a compiler makes its fake one
            return _as(Class, DTensor.__tensor_unflatten__(*args))

    Class.__name__, Class.__qualname__ = WrappedDTensor.__name__, WrappedDTensor.__qualname__
    return Class


def _as(cls: type[WrappedDTensor], out: Any) -> Any:
    if isinstance(out, tuple | list):
        return type(out)([_as(cls, x) for x in out])
    if type(out) is DTensor:
        set_class(out, cls)
    return out
