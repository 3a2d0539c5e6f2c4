"""SwiGLU experts as one differentiable op.

M = rows, D = model width, H = hidden width of an expert, G = experts, T = tokens that go to k experts each. What the
stages do, and what they save beside three grouped GEMMs, is in `xmoe.kernels.experts`.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe.config import GroupedMMConfig, as_config, config_from_key
from xmoe.kernels import experts, pipeline
from xmoe.operands import FEATURE_MULTIPLE, SCALE_BLOCKS, QuantizedOperand
from xmoe.torch_backend.calls import differentiable_once, direct, unseen
from xmoe.torch_backend.checks import refuse_transforms
from xmoe.torch_backend.combine import check_order, permute_tokens
from xmoe.torch_backend.experts_ops import (
    GRADIENT,
    SAVED,
    Argument,
    arguments,
    by_rows,
    check,
    experts_of,
    swiglu,
    swiglu_experts_dgrad,
    swiglu_experts_forward,
    swiglu_experts_gradient,
    swiglu_experts_wgrad,
)
from xmoe.torch_backend.grouped_gemm import grouped_mm_by_key, scaled_grouped_mm
from xmoe.torch_backend.operands import Operand, check_operand
from xmoe.torch_backend.ops import DTYPES, LIBRARY, backward, fake_implementation, pack
from xmoe.torch_backend.weight_cache import cached


def swiglu_experts(
    x: Tensor | Operand,
    w1: Tensor | Operand,
    w2: Tensor | Operand,
    w3: Tensor | Operand,
    offs: Tensor,
    config: GroupedMMConfig | StrEnum | str | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """w2 (silu(w1 x) * w3 x) of every row with the weights of its expert, and the gradients, in one op.

    The forward's GEMMs have the numbers of `scaled_grouped_mm`; the SwiGLU between them is computed in float32 and
    rounded once; the gradient of x is one GEMM over the gradients of both halves. Where D or H is not a multiple of 16,
    or the blocks of the format do not divide H (32 in MX formats, 128 in ``fp8_blockwise``), and only there, it is
    three `scaled_grouped_mm`. The backward overwrites what the forward saved, unless the graph is retained: a
    saved-tensor hook that keeps it will see that.

    With ``order`` the tokens come as the router saw them, and are quantized through the permutation: no sorted copy of
    them is made. The result is sorted by expert either way; `combine` takes it back.

    Any of x and the weights may be a `QuantizedOperand`: it gets no gradient, and the whole is three
    `scaled_grouped_mm`. Of x (`quantize_activations`) in the layouts of its tensor; weights are those of
    ``quantize_weights(w.mT, config)``, data in the shape of w.

    Args:
        x: bf16 or fp32 [M, D], sorted: expert g owns the rows ``offs[g-1]:offs[g]``; with ``order`` [T, D].
        w1, w3: bf16 or fp32 [G, H, D], gate and up.
        w2: [G, D, H], down, in the dtype of w1 and w3.
        offs: int32 [G], the end row of each expert (not its size); rows past the last one come out as zeros. Its values
            are not checked, nor are those of ``order``: wrong ones give wrong numbers, and touch no other memory.
        config: what to quantize: a config, or a recipe (enum member or name); None is the bf16 baseline.
        order: int64 or int32 [M], M = T * k, the slot of each row: row r is token ``order[r] // k``. From chosen
            experts [T, k] it is ``torch.argsort(experts.flatten(), stable=True)``.

    Returns:
        [M, D] in ``config.out_dtype``, or in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device that does not fit; a config that the device cannot run under its kernel
            preference.
    """
    for name, tensor in (("x", x), ("w1", w1), ("w2", w2), ("w3", w3), ("offs", offs), ("order", order)):
        if isinstance(tensor, QuantizedOperand) and name in ("x", "w1", "w2", "w3"):
            continue
        if not isinstance(tensor, Tensor) and not (name == "order" and tensor is None):
            raise ValueError(f"{name} is {'None' if tensor is None else type(tensor).__name__}; give a torch.Tensor")
    if not (isinstance(x, Tensor) and isinstance(w1, Tensor) and isinstance(w2, Tensor) and isinstance(w3, Tensor)):
        return _of_operands(x, w1, w2, w3, offs, as_config(config), order)
    return swiglu_experts_by_key(x, w1, w2, w3, offs, as_config(config).to_key(), order)


def swiglu_experts_by_key(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor, config_key: str, order: Tensor | None = None
) -> Tensor:
    """`swiglu_experts` with the config as its key, the form that the ops carry."""
    if w1.ndim == 3 and not fuses(config_key, w1.shape[1], w1.shape[2]):
        check(*arguments(x, w1, w2, w3, offs, order), multiple=1)
        x = x if order is None else permute_tokens(x, order)
        return _three(x, w1, w2, w3, lambda a, w: grouped_mm_by_key(a, w.mT, offs, config_key))
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, w1, w2, w3))
    prepared = cached(lambda: _prepare(x, w1, w2, w3, offs, config_key), (config_key, x.dtype), w1, w2, w3) or ()
    op = torch.ops.xmoe.swiglu_experts_forward.default
    if unseen(*(tensor for tensor in (x, w1, w2, w3, offs, order) if tensor is not None)):
        op = swiglu_experts_with_autograd
    else:
        refuse_transforms(x, w1, w2, w3)
    return op(x, w1, w2, w3, offs, config_key, save, order, *prepared)[0]


def _three(x: Any, w1: Any, w2: Any, w3: Any, multiply: Callable[[Any, Any], Tensor]) -> Tensor:
    """`swiglu_experts` of sorted x, by three calls of `multiply` with rows and a weight."""
    return multiply(F.silu(multiply(x, w1)) * multiply(x, w3), w2)


def _of_operands(
    x: Tensor | Operand,
    w1: Tensor | Operand,
    w2: Tensor | Operand,
    w3: Tensor | Operand,
    offs: Tensor,
    config: GroupedMMConfig,
    order: Tensor | None,
) -> Tensor:
    """`swiglu_experts` where some come quantized."""
    for name, operand in (("x", x), ("w1", w1), ("w2", w2), ("w3", w3)):
        if isinstance(operand, QuantizedOperand):
            check_operand(name, operand, config, 2 if name == "x" else 3, name != "x")
    dtype = next((w.dtype for w in (w1, w2, w3) if isinstance(w, Tensor)), torch.bfloat16)
    facts = [
        Argument(v.data.shape, dtype if v is not x else torch.bfloat16, v.data.device)
        if isinstance(v, QuantizedOperand)
        else Argument(v.shape, v.dtype, v.device)
        for v in (x, w1, w2, w3, offs)
    ]
    check(facts[0], facts[1], facts[2], facts[3], facts[4], *arguments(order))
    if order is not None:
        x = permute_tokens(x, order) if isinstance(x, Tensor) else _permuted(x, order)
    return _three(x, w1, w2, w3, lambda a, w: scaled_grouped_mm(a, w.mT if isinstance(w, Tensor) else w, offs, config))


def _permuted(x: Operand, order: Tensor) -> Operand:
    """The rows of x in the ``order`` of their slots; as bytes, which indexing takes."""
    M, T = order.shape[0], x.data.shape[0]
    check_order(T, order.shape, order.dtype)
    tokens = (order // max(M // max(T, 1), 1)).clamp(0, max(T - 1, 0))
    return x.map(lambda part: (part.view(torch.uint8) if part.element_size() == 1 else part)[tokens].view(part.dtype))


def _prepare(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor, config_key: str
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights quantized for the forward and for the backward; nothing in the bf16 format."""
    config = config_from_key(config_key)
    if config.format == "bf16":
        return [], []
    check(*arguments(x, w1, w2, w3, offs))
    e = experts_of(0, w1.shape, x.dtype, w1.dtype, config)
    view = pipeline.device_of(x.device.type, x.device.index)
    weights = map(by_rows, (w1, w2, w3))
    packed = [pack(operand) for operand in experts.prepare_weights(e, config, view, *weights)]
    of_forward, of_backward = ([tensor for pair in half for tensor in pair] for half in (packed[:3], packed[3:]))
    return of_forward, of_backward


def fuses(config_key: str, H: int, D: int) -> bool:
    """Whether `swiglu_experts` of these sizes is one op."""
    return H % _multiple_of_h(config_key) == 0 and D % FEATURE_MULTIPLE == 0


@torch.compiler.assume_constant_result
def _multiple_of_h(config_key: str) -> int:
    """What divides H where the stages are fused: 8-bit rows are whole, and so are the blocks that share a scale."""
    return max(FEATURE_MULTIPLE, SCALE_BLOCKS.get(config_from_key(config_key).format, 1))


# ------------------------------------------------------------------------------------------------------------ autograd


_forward_op = torch.ops.xmoe.swiglu_experts_forward.default
_gradient_op = torch.ops.xmoe.swiglu_experts_gradient.default
_dgrad_op = torch.ops.xmoe.swiglu_experts_dgrad.default
_wgrad_op = torch.ops.xmoe.swiglu_experts_wgrad.default
_swiglu_op = torch.ops.xmoe.swiglu.default


@torch.compiler.assume_constant_result
@lru_cache(maxsize=4096)
def _places(config_key: str, device: torch.device, x_dtype: torch.dtype) -> experts.Places:
    config = config_from_key(config_key)
    return experts.places(config, fake_implementation(config, device), DTYPES[x_dtype])


class _SwigluExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        offs: Tensor,
        config_key: str,
        order: Tensor | None,
        prepared: Sequence[Tensor] | None,
        prepared_dgrad: Sequence[Tensor] | None,
    ) -> Any:
        args = x, w1, w2, w3, offs, config_key, True, order, prepared
        out, *saved = direct(_forward_op, swiglu_experts_forward, *args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        got: dict[str, Tensor] = dict(zip(SAVED, saved, strict=True))
        ctx.config_key, ctx.takes_input = config_key, pipeline.saves_input(config_from_key(config_key))
        ctx.k = 0 if order is None else out.shape[0] // max(1, x.shape[0])
        need_x, need_h = ctx.needs_input_grad[1] or ctx.needs_input_grad[3], ctx.needs_input_grad[2]
        names = ["gate_up", *(["place"] if ctx.k else [])]
        if ctx.takes_input:
            names += ["tokens"] if ctx.k and need_x else []
        else:
            names += ["x_tokens", "x_tokens_scale"] if need_x else []
            names += ["h_tokens", "h_tokens_scale"] if need_h else []
        # Not saved tensors, whose number and shapes must not depend on a cache. The weights are saved, and autograd
        # checks that nothing has changed them since.
        ctx.prepared = tuple(prepared_dgrad or ())
        ctx.w13_amax, ctx.w2_amax = (got[name] if got[name].numel() else None for name in ("w13_amax", "w2_amax"))
        ctx.names = names
        ctx.save_for_backward(w1, w2, w3, offs, x if need_x and ctx.takes_input else None, *(got[n] for n in names))
        return out, *saved

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dout = gradients[0]
        if dout is None or not any(ctx.needs_input_grad):
            return (None,) * 9
        found = differentiable_once("swiglu_experts", lambda: _SwigluExperts._backward(ctx, dout))
        return *found, *(None,) * 5

    @staticmethod
    def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        need_dx, need_dw1, need_dw2, need_dw3 = ctx.needs_input_grad[:4]
        w1, w2, w3, offs, x, *tensors = ctx.saved_tensors
        saved = dict(zip(ctx.names, tensors, strict=True))
        del tensors
        each, key, k = len(ctx.prepared) // 2, ctx.config_key, ctx.k
        of_w2, of_w13 = ctx.prepared[:each], ctx.prepared[each:]
        gate_up, place, tokens = saved.pop("gate_up"), saved.get("place"), saved.get("tokens")
        # What becomes of gate_up takes its place: the largest tensor here, and free after this, unless the graph stays.
        if torch._C._autograd._get_current_graph_task_keep_graph():  # pyright: ignore[reportAttributeAccessIssue]
            gate_up = gate_up.clone()
        else:
            ctx.maybe_clear_saved_tensors()
        M, x_dtype = gate_up.shape[0], gate_up.dtype
        need_dw13, dx, dw1, dw3 = need_dw1 or need_dw3, None, None, None
        h_saved: Sequence[Tensor] = ()
        if need_dw2:
            h_saved = [direct(_swiglu_op, swiglu, gate_up)] if ctx.takes_input else _operand(saved, "h_tokens")
        need_dh = need_dx or need_dw13
        dh, dw2 = backward(dout, h_saved, w2.mT, offs, key, x_dtype, need_dh, need_dw2, of_w2, ctx.w2_amax)
        del h_saved
        if need_dh:
            args = dh, gate_up, w1, offs, key, need_dx, need_dw13
            left = dict(zip(GRADIENT, direct(_gradient_op, swiglu_experts_gradient, *args), strict=True))
            left |= {"dh": dh, "gate_up": gate_up}
            where = _places(key, gate_up.device, x_dtype)
            d, d_scale = left[where.rows], left["d_scale"]
            d_tokens, d_tokens_scale = left[where.tokens], left["d_tokens_scale"]
            maps = [left[name] for name in experts.MAPS]
            del dh, gate_up, args, left
            if need_dx:
                args = d, d_scale, w1, w3, offs, key, x_dtype, maps, k, place, of_w13, ctx.w13_amax
                dx = direct(_dgrad_op, swiglu_experts_dgrad, *args)
                del args
            del d, d_scale
            if need_dw13:
                x_saved = [x] if ctx.takes_input else _operand(saved, "x_tokens")
                args = d_tokens, d_tokens_scale, x_saved, w1, offs, key, x_dtype, maps, M, tokens
                dw1, dw3 = direct(_wgrad_op, swiglu_experts_wgrad, *args)
        return (
            dx if need_dx else None, dw1 if need_dw1 else None, dw2.mT if need_dw2 else None, dw3 if need_dw3 else None,
        )  # fmt: skip


def _operand(saved: dict[str, Tensor], name: str) -> Sequence[Tensor]:
    """It and its scale, which are then the caller's alone."""
    return [saved.pop(name), saved.pop(f"{name}_scale")]


@torch.library.impl(LIBRARY, "swiglu_experts_forward", "Autograd")
@torch._disable_dynamo
def swiglu_experts_with_autograd(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    offs: Tensor,
    config_key: str,
    save: bool,
    order: Tensor | None = None,
    prepared: Sequence[Tensor] | None = None,
    prepared_dgrad: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, w1, w2, w3)):
        return _SwigluExperts.apply(x, w1, w2, w3, offs, config_key, order, prepared, prepared_dgrad)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(x, w1, w2, w3, offs, config_key, save, order, prepared)
