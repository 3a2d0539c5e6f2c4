"""Grouped GEMMs of which an operand, or both, are quantized before.

M = tokens, K = contraction, N = output features, G = groups.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xmoe.config import GroupedMMConfig, config_from_key
from xmoe.kernels import pipeline
from xmoe.operands import QuantizedOperand
from xmoe.torch_backend import ops
from xmoe.torch_backend.calls import differentiable_once, direct
from xmoe.torch_backend.checks import refuse_transforms
from xmoe.torch_backend.operands import Operand, check_operand, values
from xmoe.torch_backend.ops import LIBRARY

LIBRARY.define(
    "grouped_mm_of_operands(Tensor? A, Tensor? a_data, Tensor? a_scale, Tensor? B, Tensor? b_data, Tensor? b_scale, "
    "Tensor offs, str[] keys) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def grouped_mm_of_operands(A: Tensor | Operand, B_t: Tensor | Operand, offs: Tensor, config: GroupedMMConfig) -> Tensor:
    """`scaled_grouped_mm` where A [M, K] or B_t [G, K, N], as data [G, N, K], comes quantized."""
    if isinstance(A, QuantizedOperand):
        check_operand("A", A, config, 2, False)
    if isinstance(B_t, QuantizedOperand):
        check_operand("B_t", B_t, config, 3, True)
    return multiply(A, B_t, offs, (config.to_key(),) * 3)


def multiply(A: Tensor | Operand, B: Tensor | Operand, offs: Tensor, keys: Sequence[str]) -> Tensor:
    """The same of checked operands, one at least, under the keys of the configs of the forward, dgrad and wgrad."""
    parts = *split(A), *split(B)
    refuse_transforms(*(x for x in parts if x is not None))
    return torch.ops.xmoe.grouped_mm_of_operands(*parts, offs, keys)


def split(x: Tensor | Operand) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(values, data, scale), those that there are."""
    return (None, x.data, x.scale) if isinstance(x, QuantizedOperand) else (x, None, None)


def unread(shape: Sequence[int], like: Tensor) -> Tensor:
    """In place of the values of an operand, which nobody reads: bf16, one element for all."""
    return like.new_empty((), dtype=torch.bfloat16).expand(shape)


@torch.library.impl(LIBRARY, "grouped_mm_of_operands", "Autograd")
@torch._disable_dynamo
def _(*args: Any) -> Tensor:
    if needs_gradient(args[0], args[3]):
        return _OfOperands.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.xmoe.grouped_mm_of_operands(*args)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is to know of a call with these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


@torch.library.impl(LIBRARY, "grouped_mm_of_operands", "CompositeExplicitAutograd")
@torch._disable_dynamo
def _(*args: Any) -> Tensor:
    return _forward(*args)[0]


@torch.library.register_fake("xmoe::grouped_mm_of_operands", lib=LIBRARY)
def _(*args: Any) -> Tensor:
    return _forward(*args)[0]


def _forward(
    A: Tensor | None,
    a_data: Tensor | None,
    a_scale: Tensor | None,
    B: Tensor | None,
    b_data: Tensor | None,
    b_scale: Tensor | None,
    offs: Tensor,
    keys: Sequence[str],
    save_tokens: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `ops.grouped_mm_forward` gives."""
    a = b = None
    if a_data is not None and a_scale is not None:
        a, A = [a_data, a_scale], unread(a_data.shape, a_data)
        if save_tokens:
            A = values(QuantizedOperand(a_data, a_scale, "K", config_from_key(keys[0]).format))
    if b_data is not None and b_scale is not None:
        b, B = [b_data, b_scale], unread(b_data.mT.shape, b_data)
    args = A, B, offs, keys[0], save_tokens, None, None, False, a, b
    return direct(ops._forward_op, ops.grouped_mm_forward, *args)


class _OfOperands(torch.autograd.Function):
    """The gradient of what is not quantized: of B from A's tokens, quantized anew from its values in bf16; of A from
    the weights along N, quantized from theirs, which are made for the time of the backward alone."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor | None,
        a_data: Tensor | None,
        a_scale: Tensor | None,
        B: Tensor | None,
        b_data: Tensor | None,
        b_scale: Tensor | None,
        offs: Tensor,
        keys: Sequence[str],
    ) -> Tensor:
        need_dB = ctx.needs_input_grad[3]
        saves_input = need_dB and pipeline.saves_input(config_from_key(keys[2]))
        save_tokens = need_dB and not saves_input
        out, *tokens, _ = _forward(A, a_data, a_scale, B, b_data, b_scale, offs, keys, save_tokens)
        ctx.set_materialize_grads(False)
        ctx.keys, ctx.format, ctx.saves_input = keys, config_from_key(keys[0]).format, saves_input
        ctx.A_dtype = torch.bfloat16 if A is None else A.dtype
        saved = tokens if save_tokens else (a_data, a_scale) if saves_input else (b_data, b_scale)
        ctx.save_for_backward(offs, B if need_dB else None, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dOut = gradients[0]
        if dOut is None:
            return (None,) * 8
        dA, dB = differentiable_once("xmoe::grouped_mm", lambda: _OfOperands._gradients(ctx, dOut))
        return dA, None, None, dB, *(None,) * 4

    @staticmethod
    def _gradients(ctx: Any, dOut: Tensor) -> tuple[Tensor | None, Tensor | None]:
        offs, B, *saved = ctx.saved_tensors
        if B is None:
            B = values(QuantizedOperand(saved[0], saved[1], "K", ctx.format)).mT
            return ops.backward(dOut, (), B, offs, ctx.keys[1], ctx.A_dtype, True, False)[0], None
        if ctx.saves_input:
            saved = [values(QuantizedOperand(saved[0], saved[1], "K", ctx.format))]
        return None, ops.backward(dOut, saved, B, offs, ctx.keys[2], ctx.A_dtype, False, True)[1]
