"""The permutation of an MoE layer as differentiable ops: ``xmoe::permute_tokens`` takes tokens to the rows of their
experts, ``xmoe::combine`` weighs the experts' rows of each token and adds them up.

T = tokens, k = experts that each token goes to, M = T*k rows sorted by expert, D = model width. The permutation and the
kernels are those of `xmoe.kernels.permute`.
"""

from typing import Any

import torch
from torch import Tensor

from xmoe.kernels import emulation, pipeline
from xmoe.kernels.call import on_device
from xmoe.torch_backend.calls import direct, unseen
from xmoe.torch_backend.ops import LIBRARY

if pipeline.HAS_TRITON:
    from xmoe.kernels import permute


DTYPES = torch.bfloat16, torch.float16, torch.float32


def combine(x: Tensor, scores: Tensor, order: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Takes the outputs of experts back to the order of the tokens: out[t] = sum over j of scores[t, j] * its row of x.

    Products and sums are float32, in the order of j, and rounded once, so the result does not depend on the device; the
    gradients need no atomics either. The backward keeps x, for the gradient of the scores, and 4 bytes a row. Nothing
    waits for the device.

    Args:
        x: bf16, fp16 or fp32 [M, D], the rows that the experts gave, sorted by expert.
        scores: float32 [T, k], with T * k = M.
        order: int64 or int32 [M], the slot of each row of x: row r belongs to token ``order[r] // k``, as its expert
            number ``order[r] % k``. From chosen experts [T, k] it is ``torch.argsort(experts.flatten(), stable=True)``.
            Other than a permutation gives wrong numbers, but reads and writes nothing outside of these tensors.
        dtype: of the result; None is that of x.

    Returns:
        [T, D].

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    for name, tensor in (("x", x), ("scores", scores), ("order", order)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is {'None' if tensor is None else type(tensor).__name__}; give a torch.Tensor")
    op = _combine_with_autograd if unseen(x, scores, order) else _combine_op
    return op(x, scores, order, dtype)[0]


def permute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Takes tokens to the rows of their experts: row r is x[order[r] // k], with k = M // T.

    The gradients of a token's k rows are added up in float32, in the order of its experts, without atomics. Experts
    that quantize their input need no such copy: `swiglu_experts` takes ``order``.

    Args:
        x: bf16, fp16 or fp32 [T, D].
        order: as in `combine`.

    Returns:
        [M, D], in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    for name, tensor in (("x", x), ("order", order)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is {'None' if tensor is None else type(tensor).__name__}; give a torch.Tensor")
    op = _permute_with_autograd if unseen(x, order) else _permute_op
    return op(x, order)[0]


def _check_tokens(x: Tensor, order: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; give the tokens, [T, D]")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; cast it to torch.bfloat16, torch.float16 or torch.float32")
    check_order(x.shape[0], order.shape, order.dtype)
    if x.device != order.device:
        raise ValueError(f"x is on {x.device} and order on {order.device}; move them to one device")


def check_order(T: int, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raises ValueError unless an ``order`` of that shape and dtype holds T * k slots."""
    if dtype not in (torch.int32, torch.int64):
        raise ValueError(f"order is {dtype}; give torch.int64 or torch.int32, as torch.argsort does")
    if len(shape) != 1:
        raise ValueError(f"order has shape {tuple(shape)}; give [M], the slot of each row")
    M = shape[0]
    if (M < T or M % T) if T else M:
        raise ValueError(f"order has M={M} slots and x T={T} tokens; give T*k slots, k for each token")
    if M >= 2**31:
        raise ValueError(f"order has M={M} slots; give fewer than 2**31")


def _check(x: Tensor, scores: Tensor, order: Tensor, dtype: torch.dtype | None) -> None:
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; give the experts' rows, [M, D]")
    if scores.ndim != 2 or scores.shape[1] < 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; give the k scores of each token, [T, k]")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; cast it to torch.bfloat16, torch.float16 or torch.float32")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"dtype is {dtype}; give torch.bfloat16, torch.float16 or torch.float32, or None for that of x"
        )
    if scores.dtype != torch.float32:
        raise ValueError(f"scores is {scores.dtype}; cast it with scores.float()")
    if order.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"order is {order.dtype}; give torch.int64 or torch.int32, as torch.argsort does")
    (M, _), (T, k) = x.shape, scores.shape
    if T * k != M:
        raise ValueError(f"x has M={M} rows and scores {(T, k)} T*k={T * k} slots; give a row of x for each slot")
    if tuple(order.shape) != (M,):
        raise ValueError(f"order has shape {tuple(order.shape)}; give the slot of each of the M={M} rows of x, ({M},)")
    if M >= 2**31:
        raise ValueError(f"x has M={M} rows; give fewer than 2**31")
    if not x.device == scores.device == order.device:
        devices = ", ".join(str(tensor.device) for tensor in (x, scores, order))
        raise ValueError(f"x, scores and order are on {devices}; move them to one device")


# ----------------------------------------------------------------------------------------------------------------- ops

LIBRARY.define(
    "combine(Tensor x, Tensor scores, Tensor order, ScalarType? dtype=None) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "combine_backward(Tensor dout, Tensor? x, Tensor scores, Tensor place, ScalarType? dx_dtype) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


LIBRARY.define("permute_tokens(Tensor x, Tensor order) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
LIBRARY.define(
    "permute_tokens_backward(Tensor dout, Tensor place, SymInt T) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)


def _has_kernels(x: Tensor) -> bool:
    """bfloat16 takes an sm_80."""
    if not x.is_cuda or not pipeline.HAS_TRITON:
        return False
    capability = pipeline.device_of("cuda", x.device.index).capability
    return capability is not None and capability >= (8, 0)


@torch.library.impl(LIBRARY, "combine", "CompositeExplicitAutograd")
@torch._disable_dynamo
def _combine(x: Tensor, scores: Tensor, order: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """``(out [T, D], place int32 [M])``, place the row of each slot."""
    _check(x, scores, order, dtype)
    k = scores.shape[1]
    if not _has_kernels(x):
        _, place = emulation.invert(order, k)
        return emulation.combine(x, scores, place, dtype), place
    out, place = _empty(x, scores, dtype)
    with on_device(x):
        permute.invert(order.contiguous(), k, None, place)
        permute.combine(x.contiguous(), scores.contiguous(), place, out)
    return out, place


def _empty(x: Tensor, scores: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    out = x.new_empty(scores.shape[0], x.shape[1], dtype=dtype or x.dtype)
    return out, x.new_empty(x.shape[0], dtype=torch.int32)


@torch.library.register_fake("xmoe::combine", lib=LIBRARY)
def _(x: Tensor, scores: Tensor, order: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    _check(x, scores, order, dtype)
    return _empty(x, scores, dtype)


@torch.library.impl(LIBRARY, "combine_backward", "CompositeExplicitAutograd")
@torch._disable_dynamo
def _combine_backward(
    dout: Tensor, x: Tensor | None, scores: Tensor, place: Tensor, dx_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """``(dx [M, D], dscores float32 [T, k])``; empty [0] without `dx_dtype`, and without x [M, D]."""
    if not _has_kernels(dout):
        dx, dscores = emulation.combine_backward(dout, x, scores, place, dx_dtype)
        return dout.new_empty(0) if dx is None else dx, scores.new_empty(0) if dscores is None else dscores
    dx, dscores = _empty_gradients(dout, x, scores, place, dx_dtype)
    with on_device(dout):
        permute.combine_backward(
            dout.contiguous(), None if x is None else x.contiguous(), scores.contiguous(), place,
            None if dx_dtype is None else dx, None if x is None else dscores,
        )  # fmt: skip
    return dx, dscores


@torch.library.register_fake("xmoe::combine_backward", lib=LIBRARY)
def _empty_gradients(
    dout: Tensor, x: Tensor | None, scores: Tensor, place: Tensor, dx_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    dx_shape = (0,) if dx_dtype is None else (place.shape[0], dout.shape[1])
    return dout.new_empty(dx_shape, dtype=dx_dtype), scores.new_empty((0,) if x is None else scores.shape)


@torch.library.impl(LIBRARY, "permute_tokens", "CompositeExplicitAutograd")
@torch._disable_dynamo
def _permute(x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """``(out [M, D], place int32 [M])``, place the row of each slot."""
    _check_tokens(x, order)
    k = order.shape[0] // max(1, x.shape[0])
    if not _has_kernels(x):
        tokens, place = emulation.invert(order, max(1, k))
        return emulation.gather(x, tokens), place
    out, place = _empty_rows(x, order)
    with on_device(x):
        permute.invert(order.contiguous(), max(1, k), None, place)
        permute.scatter(x.contiguous(), place, out)
    return out, place


@torch.library.register_fake("xmoe::permute_tokens", lib=LIBRARY)
def _(x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    _check_tokens(x, order)
    return _empty_rows(x, order)


def _empty_rows(x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    M = order.shape[0]
    return x.new_empty(M, x.shape[1]), x.new_empty(M, dtype=torch.int32)


@torch.library.impl(LIBRARY, "permute_tokens_backward", "CompositeExplicitAutograd")
@torch._disable_dynamo
def _permute_backward(dout: Tensor, place: Tensor, T: int) -> Tensor:
    """dx [T, D]."""
    if not _has_kernels(dout):
        return emulation.gather_sum(dout, place, place.shape[0] // T) if T else dout.new_empty(0, dout.shape[1])
    dx = dout.new_empty(T, dout.shape[1])
    with on_device(dout):
        permute.gather_sum(dout.contiguous(), place, dx)
    return dx


@torch.library.register_fake("xmoe::permute_tokens_backward", lib=LIBRARY)
def _(dout: Tensor, place: Tensor, T: int) -> Tensor:
    return dout.new_empty(T, dout.shape[1])


# ------------------------------------------------------------------------------------------------------------ autograd

_permute_op = torch.ops.xmoe.permute_tokens.default
_permute_backward_op = torch.ops.xmoe.permute_tokens_backward.default
_combine_op = torch.ops.xmoe.combine.default
_backward_op = torch.ops.xmoe.combine_backward.default


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, order: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        out, place = direct(_combine_op, _combine, x, scores, order, dtype)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(place)
        need_dx, need_dscores = ctx.needs_input_grad[:2]
        ctx.dx_dtype = x.dtype if need_dx else None
        ctx.save_for_backward(x if need_dscores else None, scores, place)
        return out, place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dout, (need_dx, need_dscores) = gradients[0], ctx.needs_input_grad[:2]
        if dout is None:
            return (None,) * 4

        x, scores, place = ctx.saved_tensors
        if torch.is_grad_enabled():  # for the derivative of the derivative
            return *_differentiable(dout, x, scores, place, ctx.dx_dtype), None, None
        dx, dscores = direct(_backward_op, _combine_backward, dout, x, scores, place, ctx.dx_dtype)
        return dx if need_dx else None, dscores if need_dscores else None, None, None


def _differentiable(
    dout: Tensor, x: Tensor | None, scores: Tensor, place: Tensor, dx_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """`combine_backward` in operations of torch, None where that is empty."""
    each, dx, dscores = dout.float().unsqueeze(1), None, None
    if dx_dtype is not None:
        slots = (each * scores.unsqueeze(-1)).flatten(0, 1)
        dx = slots[place.argsort()].to(dx_dtype)
    if x is not None:
        dscores = (each * x[place.long()].float().view(*scores.shape, x.shape[1])).sum(-1)
    return dx, dscores


@torch.library.impl(LIBRARY, "combine", "Autograd")
@torch._disable_dynamo
def _combine_with_autograd(
    x: Tensor, scores: Tensor, order: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (x.requires_grad or scores.requires_grad):
        return _Combine.apply(x, scores, order, dtype)
    with torch._C._AutoDispatchBelowAutograd():
        return _combine_op(x, scores, order, dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        out, place = direct(_permute_op, _permute, x, order)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(place)
        ctx.T = x.shape[0]
        ctx.save_for_backward(place)
        return out, place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dout = gradients[0]
        if dout is None:
            return None, None

        (place,), T = ctx.saved_tensors, ctx.T
        if torch.is_grad_enabled():  # for the derivative of the derivative
            slots = dout[place.long()].float()
            return slots.unflatten(0, (T, -1)).sum(1).to(dout.dtype) if T else dout, None
        return direct(_permute_backward_op, _permute_backward, dout, place, T), None


@torch.library.impl(LIBRARY, "permute_tokens", "Autograd")
@torch._disable_dynamo
def _permute_with_autograd(x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Permute.apply(x, order)
    with torch._C._AutoDispatchBelowAutograd():
        return _permute_op(x, order)
