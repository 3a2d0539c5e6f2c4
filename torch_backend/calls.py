"""How the ops are called: without the dispatcher where nobody would see it, and what derivatives of gradients say."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


def unseen(*tensors: Tensor) -> bool:
    """Whether a call of an op on `tensors` is seen by nobody but its implementation: no compiler, mode (tracing,
    selective checkpointing), transform, tensor subclass or tensor without data. It may then be made without the
    dispatcher, which takes 6 us to get from Python to Python."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for x in tensors:  # noqa: SIM110 (a generator takes longer)
        if type(x) not in _PLAIN or x.is_meta:
            return False
    return True


def direct(op: Callable[..., Any], implementation: Callable[..., Any], *args: Any) -> Any:
    """``op(*args)``, inside an autograd function: the call of its `implementation` where it is `unseen` and nobody asks
    for the derivative of a derivative."""
    plain = not torch.is_grad_enabled() and unseen(*[x for x in args if isinstance(x, Tensor)])
    return implementation(*args) if plain else op(*args)


class _NoDerivative(torch.autograd.Function):
    """Lets a gradient through that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(f"the gradients of {ctx.name} have no derivative; drop create_graph=True")


def differentiable_once(name: str, gradients: Callable[[], tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """The `gradients` of the op called `name`, inside its autograd function; with a graph, where one is asked for, that
    raises NotImplementedError when it is used."""
    if not torch.is_grad_enabled():
        return gradients()
    with torch.no_grad():
        found = gradients()
    return tuple(None if x is None else _NoDerivative.apply(x.detach().requires_grad_(), name) for x in found)
