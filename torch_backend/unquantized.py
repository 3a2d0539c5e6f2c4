"""Warns, once per model, of a converted weight that meets a product which runs in high precision."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket

PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    [
        *(torch.einsum, torch.tensordot, torch.inner, torch.mv, torch.chain_matmul, torch.linalg.multi_dot),
        *(torch.mm, torch.bmm, torch.matmul, torch.linalg.matmul, torch.nn.functional.linear),
        *(torch.addmm, torch.addbmm, torch.baddbmm, torch.addmv, torch.nn.functional.bilinear),
        *(Tensor.mm, Tensor.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.inner, Tensor.mv),
        *(Tensor.addmm, Tensor.addbmm, Tensor.baddbmm, Tensor.addmv),
    ]
)
"""Those that a wrapper may be an operand of."""

_KNOWN = frozenset(
    [
        *("aten", "prims", "prim", "xmoe", "inductor", "profiler", "streams"),
        *("c10d", "_c10d_functional", "_c10d_functional_autograd", "fsdp", "symm_mem"),
    ]
)
"""Namespaces of ops that are not products, or have been thought of."""


def is_foreign(func: Callable[..., Any]) -> bool:
    """Whether `func` is an op of another library: one that may multiply by the weight."""
    return isinstance(func, OpOverload | OpOverloadPacket) and _namespace(func) not in _KNOWN


def _namespace(op: OpOverload | OpOverloadPacket) -> str:
    return str(op).partition(".")[0]


_KERNELS = frozenset({"deepgemm", "sonicmoe"})


class _Origin(NamedTuple):
    fqn: str
    warned: set[str]
    """Shared by the parameters of a model: what it has warned of."""


ORIGIN = "_xmoe_origin"
"""The attribute of a converted parameter: weak references would be in the way of ``torch.utils.swap_tensors``."""


def remember(parameters: dict[str, Tensor]) -> None:
    """Takes down the names of the converted parameters of one model."""
    warned: set[str] = set()
    for fqn, parameter in parameters.items():
        setattr(parameter, ORIGIN, _Origin(fqn, warned))


def warn_of_kernels(converted: dict[str, nn.Module]) -> None:
    """Warns where transformers would give the weights of a module to kernels that ask no tensor subclass.

    `converted`: modules by the name of a converted weight. A model has one setting, so the first of them is named.
    """
    for fqn, module in converted.items():
        chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if chosen in _KERNELS:
            warnings.warn(
                f"experts_implementation={chosen!r} multiplies by {fqn!r} with its own kernels, in their precision; "
                "call model.set_experts_implementation('grouped_mm')",
                stacklevel=3,
            )
            return


def in_high_precision(cls: Any, func: Callable[..., Any], args: Any) -> None:
    """Warns of ``func(*args)``, unless all of its tensors are weights, as in a penalty on them."""
    tensors = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else (arg,)) if isinstance(x, Tensor)]
    if all(isinstance(x, cls) for x in tensors):
        return
    name = getattr(func, "__name__", str(func)) if not is_foreign(func) else str(func)
    if torch.compiler.is_compiling():
        _warn_at_compile_time(name, cls.kind, cls.remedy)
        return
    origin = next((found for x in tensors if isinstance(x, cls) and (found := _origin(x))), None)
    if origin is None:
        _warn(name, cls.kind, cls.remedy)
    elif name not in origin.warned:
        origin.warned.add(name)
        _warn(name, f"{cls.kind} {origin.fqn!r}", cls.remedy)


def _warn(func: str, weights: str, remedy: str) -> None:
    message = f"{func} of the converted {weights} runs in high precision; {remedy}, or leave them out of quantize_"
    warnings.warn(message, stacklevel=5)


@torch.compiler.assume_constant_result
def _warn_at_compile_time(func: str, weights: str, remedy: str) -> None:
    _warn(func, weights, remedy)


def _origin(weight: Tensor) -> _Origin | None:
    """Of the parameter that `weight` is, or is a view or a cast of."""
    node = weight.grad_fn
    while node is not None and not hasattr(node, "variable"):
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    for x in (weight, weight._base, getattr(node, "variable", None)):
        if x is not None and (origin := getattr(x, ORIGIN, None)):
            return origin
    return None
