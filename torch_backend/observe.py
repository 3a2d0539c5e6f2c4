"""Where a monitor sees the products of wrapped weights: while one samples, they run through here.

M = tokens, K = contraction of the forward, N = output features, G = groups, D = model width, H = hidden width.

An observed product gives the bits that it gives otherwise. All measuring is in its backward, which runs once whatever
activation checkpointing does, so that a product counts once; what is measured is saved as autograd saves, so that
checkpointing recomputes it. No product is observed without a gradient, under ``torch.compile`` and in CUDA graphs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xmoe.config import BF16GroupedMMRecipe, config_from_key, config_from_recipe
from xmoe.kernels import emulation
from xmoe.torch_backend.combine import permute_tokens
from xmoe.torch_backend.experts import fuses, swiglu_experts_by_key
from xmoe.torch_backend.grouped_gemm import grouped_mm_by_key, key_with_out_dtype
from xmoe.torch_backend.numerics import Gemm, Results, measure
from xmoe.torch_backend.weight_cache import paused

_BF16 = config_from_recipe(BF16GroupedMMRecipe.BF16).to_key()


class Observer(Protocol):
    """What a monitor is to this module."""

    def name_of(self, weight: Tensor) -> str | None:
        """The parameter that `weight`, a plain tensor, is made of; None if it is none of this observer's model."""

    def record(self, name: str, config_key: str, gemms: dict[str, Gemm]) -> None:
        """Takes what was measured of one product of this parameter."""


observers: list[Observer] = []
"""Those that sample now. The handlers of the wrappers look here before each product: an empty list is all they pay."""


def observed_grouped_mm(A: Tensor, B: Tensor, offs: Tensor, config_key: str, weight: Tensor) -> Tensor:
    """``grouped_mm_by_key`` of the first four, measured for the observer that knows `weight`, which B is made of."""
    observer, name = _find(weight)
    if observer is None or name is None:
        return grouped_mm_by_key(A, B, offs, config_key)

    def backward(saved: Sequence[Tensor], dOut: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        A, B, offs = saved
        (gemms,), (_, dA, dB) = _measured(A, B, offs, dOut, config_key, needs[0], needs[1])
        observer.record(name, config_key, gemms)
        return dA, dB, None

    return _Observed.apply(lambda A, B, offs: grouped_mm_by_key(A, B, offs, config_key), backward, A, B, offs)


def observed_linear(
    x: Tensor, weight: Tensor, config_key: str, product: Callable[[Tensor, Tensor, str], Tensor], parameter: Tensor
) -> Tensor:
    """``product(x, weight, config_key)``, [M, N] of x [M, K] and a linear's `weight` [N, K], which is made of
    `parameter`; measured as a grouped GEMM of one group."""
    observer, name = _find(parameter)
    if observer is None or name is None:
        return product(x, weight, config_key)

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return product(x, weight, config_key)

    def backward(saved: Sequence[Tensor], dOut: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        x, weight = saved
        out, (dx, dw) = _differentiated(call, saved, dOut, needs)
        B, offs = weight.mT.unsqueeze(0), torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
        reference = _results(x, B, offs, dOut, key_with_out_dtype(_BF16, out.dtype), *needs)
        results = out, dx, None if dw is None else dw.mT.unsqueeze(0)
        (gemms,) = measure(x, B, offs, dOut, config_from_key(config_key), results, reference)
        observer.record(name, config_key, gemms)
        return dx, dw

    return _Observed.apply(call, backward, x, weight)


def observed_swiglu_experts(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor, config_key: str, order: Tensor | None = None
) -> Tensor:
    """``swiglu_experts_by_key`` of the same arguments, its GEMMs measured one by one."""
    found = [_find(w) for w in (w1, w2, w3)]
    if all(observer is None for observer, _ in found):
        return swiglu_experts_by_key(x, w1, w2, w3, offs, config_key, order)

    def call(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor, order: Tensor | None) -> Tensor:
        return swiglu_experts_by_key(x, w1, w2, w3, offs, config_key, order)

    def backward(saved: Sequence[Tensor], dOut: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        _, gradients = _differentiated(call, saved, dOut, needs)
        measured = _measured_experts(saved, dOut, config_key, needs)
        for (observer, name), gemms in zip(found, measured, strict=True):
            if observer is not None and name is not None:
                observer.record(name, config_key, gemms)
        return gradients

    return _Observed.apply(call, backward, x, w1, w2, w3, offs, order)


def _find(weight: Tensor) -> tuple[Observer | None, str | None]:
    """The first observer that knows `weight`, and the parameter's name; Nones where nothing can be measured."""
    if not torch.is_grad_enabled() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None, None
    for observer in observers:
        if (name := observer.name_of(weight)) is not None:
            return observer, name
    return None, None


class _Observed(torch.autograd.Function):
    """``call(*tensors)``, whose gradients are ``backward(tensors, dOut, needs)``."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], backward: Callable[..., Any], *tensors: Tensor | None) -> Tensor:
        ctx.backward_of = backward
        ctx.save_for_backward(*tensors)
        return call(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with paused():  # what is detached here would fill the cache, to no use
            return None, None, *ctx.backward_of(ctx.saved_tensors, gradients[0], ctx.needs_input_grad[2:])


def _differentiated(
    call: Callable[..., Tensor], tensors: Sequence[Tensor | None], dOut: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """``call(*tensors)`` and its gradients, where they are needed."""
    leaves = [None if x is None else x.detach() for x in tensors]
    wanted = [x.requires_grad_() for x, need in zip(leaves, needs, strict=True) if need and x is not None]
    with torch.enable_grad():
        out = call(*leaves)
        gradients = iter(torch.autograd.grad(out, wanted, dOut) if wanted else ())
    return out.detach(), tuple(next(gradients) if need else None for need in needs)


def _measured(
    A: Tensor,
    B: Tensor,
    offs: Tensor,
    dOut: Tensor,
    config_key: str,
    need_dA: bool,
    need_dB: bool,
    parts: Sequence[slice] = (slice(None),),
) -> tuple[list[dict[str, Gemm]], Results]:
    """What `measure` finds of a grouped GEMM that is run here, and its results."""

    found, config = _results(A, B, offs, dOut, config_key, need_dA, need_dB), config_from_key(config_key)
    bf16 = key_with_out_dtype(_BF16, found[0].dtype)
    reference = found if config.format == "bf16" else _results(A, B, offs, dOut, bf16, need_dA, need_dB)
    return measure(A, B, offs, dOut, config, found, reference, parts), found


def _results(A: Tensor, B: Tensor, offs: Tensor, dOut: Tensor, key: str, need_dA: bool, need_dB: bool) -> Results:
    out, (dA, dB, _) = _differentiated(
        lambda A, B, offs: grouped_mm_by_key(A, B, offs, key), (A, B, offs), dOut, (need_dA, need_dB, False)
    )
    return out, dA, dB


def _measured_experts(
    saved: Sequence[Tensor], dOut: Tensor, config_key: str, needs: Sequence[bool]
) -> tuple[dict[str, Gemm], dict[str, Gemm], dict[str, Gemm]]:
    """Of w1, w2 and w3. Where one op computes all (``swiglu_experts``), gate and up are one GEMM with weights
    [w1 | w3], whose gradient shares its scales."""
    x, w1, w2, w3, offs, order = saved
    need_x, need_w1, need_w2, need_w3 = needs[:4]
    _, H, D = w1.shape
    fused = fuses(config_key, H, D)
    inner = key_with_out_dtype(config_key, x.dtype) if fused else config_key
    x = x if order is None else permute_tokens(x, order)
    halves = [torch.cat([w1.mT, w3.mT], 2)] if fused else [w1.mT, w3.mT]
    gate_up = torch.cat([grouped_mm_by_key(x, B, offs, inner) for B in halves], 1)
    need_d = need_x or need_w1 or need_w3
    if fused:
        h = torch.ops.xmoe.swiglu(gate_up)
    else:
        g, u = gate_up.chunk(2, 1)
        h = F.silu(g) * u
    (of_w2,), (_, dh, _) = _measured(h, w2.mT, offs, dOut, config_key, need_d, need_w2)
    if dh is None:
        d = torch.zeros_like(gate_up)
    elif fused:
        d = emulation.swiglu_gradient(dh, gate_up)
    else:
        leaf = gate_up.detach().requires_grad_()
        with torch.enable_grad():
            g, u = leaf.chunk(2, 1)
            (d,) = torch.autograd.grad(F.silu(g) * u, leaf, dh)
    if fused:
        parts = slice(0, H), slice(H, 2 * H)
        (of_w1, of_w3), _ = _measured(x, halves[0], offs, d, inner, need_x, need_w1 or need_w3, parts)
        for gemms, need in ((of_w1, need_w1), (of_w3, need_w3)):
            if not need:
                gemms.pop("wgrad", None)
        return of_w1, of_w2, of_w3
    needed = zip(halves, d.chunk(2, 1), (need_w1, need_w3), strict=True)
    of_w1, of_w3 = (
        _measured(x, B, offs, gradient.contiguous(), inner, need_x, need_B)[0][0] for B, gradient, need_B in needed
    )
    return of_w1, of_w2, of_w3
