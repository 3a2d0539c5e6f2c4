"""The weight wrapper: a parameter that makes ``torch._grouped_mm`` run in low precision and is plain to all else."""

import copy
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xmoe.config import GroupedMMConfig, config_from_key
from xmoe.torch_backend.experts import swiglu_experts_by_key
from xmoe.torch_backend.grouped_mm import grouped_mm_by_key, key_with_out_dtype

_GROUPED_MM: frozenset[Callable[..., Any]] = frozenset(
    {torch._grouped_mm, torch.ops.aten._grouped_mm, torch.ops.aten._grouped_mm.default}
)
"""``torch.nn.functional.grouped_mm`` has no ``__torch_function__`` hook of its own and reaches the first."""

_VIEWS = (
    *("adjoint", "as_strided", "chunk", "contiguous", "detach", "expand", "expand_as", "flatten", "movedim", "narrow"),
    *("permute", "reshape", "select", "split", "squeeze", "swapaxes", "swapdims", "tensor_split", "transpose"),
    *("unbind", "unflatten", "unsqueeze", "view", "view_as"),
)
_COPIES = (
    *("bfloat16", "clone", "cpu", "cuda", "double", "float", "half", "index_select", "pin_memory", "to", "type"),
    *("type_as", "empty_like"),  # the last is what Module.to_empty calls
)
_WRAPPED: frozenset[Callable[..., Any]] = frozenset(
    [
        *(getattr(torch.Tensor, name) for name in _VIEWS + _COPIES if hasattr(torch.Tensor, name)),
        *(getattr(torch, name) for name in _VIEWS if hasattr(torch, name)),
        *(torch.clone, torch.empty_like, torch.index_select),
        *(getattr(torch.Tensor, name).__get__ for name in ("data", "mH", "mT")),
        torch.Tensor.__getitem__,
        *(torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default),
    ]
)
"""What gives a wrapped weight again: the same values in another shape, dtype or place. The rest gives plain tensors."""

_JOINS: frozenset[Callable[..., Any]] = frozenset([torch.cat, torch.concat, torch.concatenate, torch.stack])
"""What gives a wrapped weight when all of the tensors are wrapped with one config: fused weights."""


class ScaledGroupedMMTensor(torch.Tensor):
    """Expert weights whose grouped GEMMs run in the precision of a config.

    ``torch._grouped_mm(A, w, offs)`` and ``torch.nn.functional.grouped_mm`` with ``w`` [G, K, N] as the second operand
    become `xmoe.torch_backend.scaled_grouped_mm`. To every other operation the weight is a plain tensor on its own
    storage: views, casts, copies and moves keep the wrapper, and so does joining weights of one config; arithmetic
    gives plain tensors, and so gradients and optimizer state are plain. A ``state_dict`` saves plain tensors; a
    pickled module keeps its wrapped parameters.

    The config is part of the type (one subclass each), so that autograd, ``torch.compile`` and copies carry it.
    """

    config_key: ClassVar[str]

    @staticmethod
    def __new__(cls, data: Tensor, config: GroupedMMConfig) -> "ScaledGroupedMMTensor":
        """Wraps `data`, sharing its storage; ``requires_grad`` is kept, the autograd history is not.

        Raises ValueError unless `data` is a floating-point tensor with three dimensions and `config` a config.
        """
        if not isinstance(config, GroupedMMConfig):
            raise ValueError(f"config is {config!r}; give a GroupedMMConfig, such as config_from_recipe('fp8_rowwise')")
        if data.ndim != 3:
            raise ValueError(
                f"data has shape {tuple(data.shape)}; only expert weights with 3 dimensions can be wrapped"
            )
        if not data.is_floating_point():
            raise ValueError(f"data is {data.dtype}; only floating-point expert weights can be wrapped")
        return torch.Tensor._make_subclass(wrapper_class(config), unwrap(data).detach(), data.requires_grad)

    @property
    def config(self) -> GroupedMMConfig:
        """The config that this weight's grouped GEMMs run under."""
        return config_from_key(self.config_key)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _GROUPED_MM:
            return _grouped_mm(cls, func, *args, **kwargs)
        if func is torch.autograd.grad:
            return _grad(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            # `cls`, not type(args[0]): the one that torch.compile can trace.
            if func in _JOINS:
                joined = args[0] if args else kwargs["tensors"]
                return out.as_subclass(cls) if all(isinstance(x, cls) for x in joined) else out
            if func not in _WRAPPED or not isinstance(args[0], cls):
                return out
            if isinstance(out, tuple | list):
                return type(out)([x.as_subclass(cls) for x in out])
            return out.as_subclass(cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("only leaf tensors can be deep-copied; detach the wrapped weight first")
        # copy.deepcopy, not the method: it keeps the temporaries alive whose ids are in memo.
        twin = copy.deepcopy(unwrap(self).detach(), memo).as_subclass(type(self)).requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=self.requires_grad)
        if self.grad is not None:
            twin.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A state_dict holds detached values: plain ones load anywhere, with weights_only=True too.
        if not isinstance(self, nn.Parameter):
            return unwrap(self).__reduce_ex__(protocol)
        return _rebuild_parameter, (unwrap(self).detach(), self.config_key, self.requires_grad)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        kind = "Parameter, " if isinstance(self, nn.Parameter) else ""
        return f"ScaledGroupedMMTensor({kind}{self.config_key}, {unwrap(self).detach()!r})"


@cache
def wrapper_class(config: GroupedMMConfig) -> type[ScaledGroupedMMTensor]:
    """The subclass of `ScaledGroupedMMTensor` that carries `config`."""
    _teach_compile()
    return type("ScaledGroupedMMTensor", (ScaledGroupedMMTensor,), {"config_key": config.to_key()})


@cache
def _teach_compile() -> None:
    """Makes ``torch.compile`` ask ``__torch_function__`` about ``torch._grouped_mm``, as eager mode does.

    Dynamo asks about the functions of ``torch.overrides`` only, and that list leaves out names with an underscore.
    Called with the first wrapped weight, not at import: this loads torch._dynamo (as any optimizer does), a second.
    """
    from torch._dynamo.variables.torch import get_overridable_functions

    get_overridable_functions().add(torch._grouped_mm)


def unwrap(x: Tensor) -> Tensor:
    """x as a plain tensor, on the same storage and in the same autograd graph."""
    if not isinstance(x, ScaledGroupedMMTensor):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(torch.Tensor)


def _rebuild_parameter(data: Tensor, config_key: str, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(ScaledGroupedMMTensor(data, config_from_key(config_key)), requires_grad)


def _grouped_mm(
    wrapper: type[ScaledGroupedMMTensor],
    func: Callable[..., Any],
    self: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch._grouped_mm`` with a wrapped operand; anything but A [M, K] @ wrapped [G, K, N] is the plain op.

    A 3D weight that gets the plain op warns (in eager mode), once per place by Python's default filter.
    """
    with torch._C.DisableTorchFunctionSubclass():
        wrapped = isinstance(mat2, ScaledGroupedMMTensor)
        if not wrapped or self.ndim != 2 or mat2.ndim != 3 or offs is None or bias is not None:
            if wrapped and mat2.ndim == 3 and not torch.compiler.is_compiling():
                warnings.warn(
                    f"torch._grouped_mm of a wrapped weight with {self.ndim}D A, {'no ' * (offs is None)}offs and "
                    f"{'no ' * (bias is None)}bias runs in high precision; give A [M, K], offs and no bias",
                    stacklevel=3,
                )
            return func(self, mat2, offs=offs, bias=bias, out_dtype=out_dtype)
        key = wrapper.config_key if isinstance(mat2, wrapper) else type(mat2).config_key
        if out_dtype is not None:
            key = key_with_out_dtype(key, out_dtype)
        if not torch.compiler.is_compiling():  # what the ops save for the backward is plain
            self, mat2 = unwrap(self), unwrap(mat2)
        return grouped_mm_by_key(self, mat2, offs, key)


def wrapped_swiglu_experts(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor, order: Tensor | None = None
) -> Tensor:
    """`xmoe.torch_backend.swiglu_experts` of weights that are wrapped with one config."""
    key = type(w1).config_key  # type: ignore[attr-defined]
    with torch._C.DisableTorchFunctionSubclass():
        if not torch.compiler.is_compiling():
            x, w1, w2, w3 = unwrap(x), unwrap(w1), unwrap(w2), unwrap(w3)
        return swiglu_experts_by_key(x, w1, w2, w3, offs, key, order)


def _grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **kwargs: Any) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` with wrapped tensors among its arguments, which it may not see: it would then run with
    ``__torch_function__`` off, and so would a forward that activation checkpointing recomputes in it."""

    def plain(xs: Any) -> Any:
        if isinstance(xs, list | tuple):
            return [plain(x) for x in xs]
        return unwrap(xs) if isinstance(xs, Tensor) else xs

    def edge(x: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return torch.autograd.graph.get_gradient_edge(x) if isinstance(x, ScaledGroupedMMTensor) else x

    edges = edge(inputs) if isinstance(inputs, Tensor) else [edge(x) for x in inputs]
    return torch.autograd.grad(plain(outputs), edges, plain(grad_outputs), **kwargs)
