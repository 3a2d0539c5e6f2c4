"""What the weight wrappers share: a parameter that carries a config, and is a plain tensor to all that it ignores."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from xmoe.config import GemmConfig, GroupedMMConfig, config_from_key, recipes
from xmoe.kernels.emulation import is_autocast_enabled
from xmoe.torch_backend.unquantized import PRODUCTS, in_high_precision, is_foreign

_VIEWS = (
    *(
        "adjoint",
        "as_strided",
        "chunk",
        "contiguous",
        "detach",
        "expand",
        "expand_as",
        "flatten",
        "moveaxis",
        "movedim",
    ),
    *("narrow",),
    *("permute", "reshape", "select", "split", "squeeze", "swapaxes", "swapdims", "tensor_split", "transpose"),
    *("t", "unbind", "unflatten", "unsqueeze", "view", "view_as"),
)
_COPIES = (
    *("bfloat16", "clone", "cpu", "cuda", "double", "float", "half", "index_select", "pin_memory", "to", "type"),
    *("type_as", "empty_like"),  # the last is what Module.to_empty calls
)
WRAPPED: frozenset[Callable[..., Any]] = frozenset(
    [
        *(getattr(torch.Tensor, name) for name in _VIEWS + _COPIES if hasattr(torch.Tensor, name)),
        *(getattr(torch, name) for name in _VIEWS if hasattr(torch, name)),
        *(torch.clone, torch.empty_like, torch.index_select),
        *(getattr(torch.Tensor, name).__get__ for name in ("data", "H", "mH", "mT", "T")),
        torch.Tensor.__getitem__,
        *(torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default),
    ]
)
"""What gives a wrapped weight again: the same values in another shape, dtype or place. The rest gives plain tensors."""

_TRANSPOSED: frozenset[Callable[..., Any]] = frozenset(getattr(torch.Tensor, name).__get__ for name in ("mH", "mT"))
_REVERSED: frozenset[Callable[..., Any]] = frozenset(getattr(torch.Tensor, name).__get__ for name in ("H", "T"))
_DATA: frozenset[Callable[..., Any]] = frozenset([getattr(torch.Tensor, "data").__get__])  # noqa: B009 (a getter)
"""Attributes, of which torch.compile cannot make wrapped weights: methods take their place."""

_JOINS: frozenset[Callable[..., Any]] = frozenset([torch.cat, torch.concat, torch.concatenate, torch.stack])
"""What gives a wrapped weight when all of the tensors are wrapped with one config: fused weights."""

Handler = Callable[..., Any]
"""``handler(cls, func, *args, **kwargs)``: what an intercepted ``func(*args, **kwargs)`` gives, called without
``__torch_function__``; ``NotImplemented`` for the plain operation."""


class WrappedWeight(torch.Tensor):
    """A weight whose products run in the precision of a config; which ones is a subclass's ``handlers``.

    To every other operation the weight is a plain tensor on its own storage: views, casts, copies and moves keep the
    wrapper, and so does joining weights of one config; arithmetic gives plain tensors, and so gradients and optimizer
    state are plain. A ``state_dict`` saves plain tensors; a pickled module keeps its wrapped parameters.

    The config is part of the type (one subclass each), so that autograd, ``torch.compile`` and copies carry it.
    """

    config_key: ClassVar[str]
    handlers: ClassVar[dict[Callable[..., Any], Handler]] = {}
    ndims: ClassVar[int]
    """The dimensions of a parameter of this class; its views may have others."""
    kind: ClassVar[str]
    """What such a parameter is, in messages."""
    remedy: ClassVar[str]
    """What to compute instead of a product that is not intercepted."""
    config_type: ClassVar[type[GemmConfig]] = GroupedMMConfig

    @staticmethod
    def __new__(cls, data: Tensor, config: GemmConfig) -> Any:
        """Wraps `data`, sharing its storage; ``requires_grad`` is kept, the autograd history is not.

        Raises ValueError unless `data` is a floating-point tensor with the dimensions of such a weight and `config` a
        config.
        """
        if not isinstance(config, cls.config_type):
            kind = cls.config_type
            raise ValueError(f"config is {config!r}; give a {kind.__name__}, such as that of {recipes(kind)[1]!r}")
        if data.ndim != cls.ndims:
            raise ValueError(
                f"data has shape {tuple(data.shape)}; only {cls.kind} with {cls.ndims} dimensions can be wrapped"
            )
        if not data.is_floating_point():
            raise ValueError(f"data is {data.dtype}; only floating-point {cls.kind} can be wrapped")
        return torch.Tensor._make_subclass(cls.with_key(config.to_key()), unwrap(data).detach(), data.requires_grad)

    @classmethod
    def with_key(cls, key: str) -> type[Self]:
        """The subclass that carries the config of this key."""
        return _with_key(cls, key)

    @property
    def config(self) -> GemmConfig:
        """The config that this weight's products run under."""
        return config_from_key(self.config_key)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            return _grad(*args, **kwargs)
        handler = cls.handlers.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            if handler is not None and (out := handler(cls, func, *args, **kwargs)) is not NotImplemented:
                return out
            if func in PRODUCTS or is_foreign(func):
                in_high_precision(cls, func, args)
            if func in _TRANSPOSED:
                return args[0].transpose(-2, -1).as_subclass(cls)
            if func in _REVERSED and args[0].ndim == 2:
                return args[0].t().as_subclass(cls)
            if torch.compiler.is_compiling() and func in _DATA:
                return args[0].detach().as_subclass(cls)
            out = func(*args, **kwargs)
            # `cls`, not type(args[0]): the one that torch.compile can trace.
            if func in _JOINS:
                joined = args[0] if args else kwargs["tensors"]
                return out.as_subclass(cls) if all(isinstance(x, cls) for x in joined) else out
            if func not in WRAPPED or not isinstance(args[0], cls):
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
        return _rebuild_parameter, (type(self).__base__, unwrap(self).detach(), self.config_key, self.requires_grad)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        kind = "Parameter, " if isinstance(self, nn.Parameter) else ""
        return f"{type(self).__name__}({kind}{self.config_key}, {unwrap(self).detach()!r})"


@cache
def _with_key(base: type[WrappedWeight], key: str) -> Any:
    teach_compile(torch._grouped_mm)
    return type(base.__name__, (base,), {"config_key": key, "__module__": base.__module__})


def teach_compile(func: Callable[..., Any]) -> None:
    """Makes ``torch.compile`` ask ``__torch_function__`` about `func`, as eager mode does.

    Dynamo asks about the functions of ``torch.overrides`` only, and that list leaves out names with an underscore.
    Called with the first wrapped weight, not at import: this loads torch._dynamo (as any optimizer does), a second.
    """
    from torch._dynamo.variables.torch import get_overridable_functions

    get_overridable_functions().add(func)


def config_key(cls: type[WrappedWeight], weight: Tensor) -> str:
    """Of the weight among two wrapped operands, one of which is a `cls`, which torch.compile can read."""
    return cls.config_key if isinstance(weight, cls) else type(weight).config_key  # type: ignore[attr-defined]


def follow_autocast(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the dtype that autocast gives to matrix products. (It leaves the grouped GEMM alone.)"""
    kind = input.device.type
    if not is_autocast_enabled(kind):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def unwrap(x: Tensor) -> Tensor:
    """x as a plain tensor, on the same storage and in the same autograd graph."""
    if not isinstance(x, WrappedWeight):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(torch.Tensor)


def weight_class(x: Any) -> type[WrappedWeight] | None:
    """The class of wrapped weights that x is one of, or, of a converted DTensor, its local part; else None."""
    cls = getattr(type(x), "carries", type(x))
    return cls if issubclass(cls, WrappedWeight) else None


def set_class(x: Any, cls: type) -> None:
    """Makes x, the object that it is, a `cls`: of a tensor a subclass of tensors without slots of its own."""
    x.__class__ = cls


def _rebuild_parameter(base: type[WrappedWeight], data: Tensor, config_key: str, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(base(data, config_from_key(config_key)), requires_grad)


def _grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **kwargs: Any) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` with wrapped tensors among its arguments, which it may not see: it would then run with
    ``__torch_function__`` off, and so would a forward that activation checkpointing recomputes in it."""

    def plain(xs: Any) -> Any:
        if isinstance(xs, list | tuple):
            return [plain(x) for x in xs]
        return unwrap(xs) if isinstance(xs, Tensor) else xs

    def edge(x: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return torch.autograd.graph.get_gradient_edge(x) if isinstance(x, WrappedWeight) else x

    edges = edge(inputs) if isinstance(inputs, Tensor) else [edge(x) for x in inputs]
    return torch.autograd.grad(plain(outputs), edges, plain(grad_outputs), **kwargs)
