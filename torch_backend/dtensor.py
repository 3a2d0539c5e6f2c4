"""Converted parameters that are DTensors: expert and tensor parallel shards, and what FSDP2 gathers of them."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from xmoe.torch_backend.wrapper import WRAPPED, WrappedWeight


class WrappedDTensor(DTensor):
    """A DTensor whose local part, taken by ``to_local()``, is a wrapped weight.

    A product with the DTensor itself raises ValueError: which part of it is quantized together, and where gradients are
    summed, is for the caller to say. To everything else it is a DTensor.
    """

    weight: ClassVar[type[WrappedWeight]]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in cls.weight.handlers:
            raise ValueError(
                f"{getattr(func, '__name__', func)} got a DTensor that is a converted weight {tuple(args[1].shape)}; "
                "multiply its local part, weight.to_local(), which runs in low precision, or unquantize_ the model"
            )
        out = torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        return _as(cls, out) if func in WRAPPED and isinstance(args[0], cls) else out

    def to_local(self, **options: Any) -> Tensor:
        if isinstance(self._local_tensor, FakeTensor):
            raise NotImplementedError(
                "the local part of a DTensor that is a converted weight would lose its config in compiled code; call "
                "to_local() outside, and compile what takes the local weights"
            )
        return super().to_local(**options).as_subclass(self.weight)

    def full_tensor(self, **options: Any) -> Tensor:
        return super().full_tensor(**options).as_subclass(self.weight)

    def redistribute(self, *args: Any, **options: Any) -> DTensor:
        return _as(type(self), super().redistribute(*args, **options))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _as(type(self), copy.deepcopy(self._plain(), memo))
        return memo[id(self)]

    def _plain(self) -> DTensor:
        """A DTensor, or parameter, on the same storage."""
        plain = plain_dtensor(self.detach())
        return nn.Parameter(plain, self.requires_grad) if isinstance(self, nn.Parameter) else plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)


@cache
def dtensor_class(weight: type[WrappedWeight]) -> type[WrappedDTensor]:
    """The class of DTensors whose local parts are `weight`s."""

    class Class(WrappedDTensor):
        @staticmethod
        def __tensor_unflatten__(*args: Any) -> DTensor:  # a compiler makes its fake one
            return _as(Class, DTensor.__tensor_unflatten__(*args))

    Class.weight, Class.__name__, Class.__qualname__ = weight, WrappedDTensor.__name__, WrappedDTensor.__qualname__
    return Class


def plain_dtensor(x: DTensor) -> DTensor:
    """x itself, no longer wrapped."""
    if isinstance(x, WrappedDTensor):
        x.__class__ = DTensor
    return x


def _as(cls: type[WrappedDTensor], out: Any) -> Any:
    if isinstance(out, tuple | list):
        return type(out)([_as(cls, x) for x in out])
    if type(out) is DTensor:
        out.__class__ = cls
    return out
