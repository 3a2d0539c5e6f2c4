"""Linears whose input or weight is quantized before their GEMM.

M = rows of the input, K = in_features, N = out_features.
"""

from typing import Any

import torch
from torch import Tensor

from xmoe.config import LinearConfig
from xmoe.kernels import tensorwise
from xmoe.operands import QuantizedOperand
from xmoe.torch_backend.calls import differentiable_once
from xmoe.torch_backend.checks import refuse_transforms
from xmoe.torch_backend.linear_ops import Forward, Grouped, Tensorwise, check_linear, one_group, scheme
from xmoe.torch_backend.operands import TENSORWISE, Operand, check_operand, dequantize, multiply, split, unread
from xmoe.torch_backend.ops import LIBRARY


def linear_of_operands(
    input: Tensor | Operand, weight: Tensor | Operand, bias: Tensor | None, config: LinearConfig
) -> Tensor:
    """`scaled_linear` where the input [..., K] or the weight [N, K] comes quantized."""
    if isinstance(input, QuantizedOperand):
        check_operand("input", input, config, None, False)
    if isinstance(weight, QuantizedOperand):
        check_operand("weight", weight, config, 2, True)
    shape, dtype, device = _facts(input)
    (N, K), w_dtype, w_device = _facts(weight)
    check_linear(shape, dtype, (N, K), w_dtype, (device, w_device))
    rows = _rows(input, config.format)
    how = scheme(config.to_key())
    if isinstance(how, Grouped):
        offs = one_group(rows.data if isinstance(rows, QuantizedOperand) else rows)
        out = multiply(rows, _as_group(weight), offs, how.keys)
    else:
        refuse_transforms(*(x for x in (rows, weight) if isinstance(x, Tensor)))
        out = torch.ops.xmoe.linear_of_operands(*split(rows), *split(weight), config.to_key())
    out = out.reshape(*shape[:-1], N)
    return out if bias is None else out + bias


def _facts(x: Tensor | Operand) -> tuple[torch.Size, torch.dtype, torch.device]:
    if isinstance(x, QuantizedOperand):
        return x.data.shape, torch.bfloat16, x.data.device
    return x.shape, x.dtype, x.device


def _rows(x: Tensor | Operand, format: str) -> Tensor | Operand:
    """[M, K] of [..., K]."""
    if isinstance(x, Tensor):
        return x.reshape(-1, x.shape[-1])
    data, scale = x.data.reshape(-1, x.data.shape[-1]), x.scale
    if format != TENSORWISE:
        scale = scale.reshape(-1, *scale.shape[x.data.ndim - 1 :])
    return QuantizedOperand(data, scale, x.axis, x.format)


def _as_group(weight: Tensor | Operand) -> Tensor | Operand:
    """[N, K] as [1, K, N]."""
    if isinstance(weight, Tensor):
        return weight.mT.unsqueeze(0)
    return weight.map(lambda x: x.unsqueeze(0))


LIBRARY.define(
    "linear_of_operands(Tensor? x, Tensor? x_data, Tensor? x_scale, Tensor? weight, Tensor? w_data, Tensor? w_scale, "
    "str config_key) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(LIBRARY, "linear_of_operands", "Autograd")
@torch._disable_dynamo
def _(*args: Any) -> Tensor:
    return _TensorwiseOfOperands.apply(*args)


@torch.library.impl(LIBRARY, "linear_of_operands", "CompositeExplicitAutograd")
@torch._disable_dynamo
def _(*args: Any) -> Tensor:
    return _forward(*args)[0].out


@torch.library.register_fake("xmoe::linear_of_operands", lib=LIBRARY)
def _(*args: Any) -> Tensor:
    return _forward(*args)[0].out


def _forward(
    x: Tensor | None,
    x_data: Tensor | None,
    x_scale: Tensor | None,
    weight: Tensor | None,
    w_data: Tensor | None,
    w_scale: Tensor | None,
    config_key: str,
    need_dx: bool = False,
    need_dw: bool = False,
) -> tuple[Forward, torch.dtype]:
    """And the dtype of the input."""
    how, given, prepared = _tensorwise(config_key), None, None
    if x_data is not None and x_scale is not None:
        given, hp = [x_data, x_scale], need_dw and how.hp_key is not None
        x = dequantize(QuantizedOperand(x_data, x_scale, "K", TENSORWISE)) if hp else unread(x_data.shape, x_data)
    if w_data is not None and w_scale is not None:
        prepared, weight = [w_data, w_scale], unread(w_data.shape, w_data)
    assert x is not None, "an input comes as it is or quantized"
    assert weight is not None, "a weight comes as it is or quantized"
    return how.forward(x, weight, need_dx, need_dw, prepared, given), x.dtype


def _tensorwise(config_key: str) -> Tensorwise:
    how = scheme(config_key)
    assert isinstance(how, Tensorwise), f"{config_key}: grouped GEMMs have an op of their own"
    return how


class _TensorwiseOfOperands(torch.autograd.Function):
    """An operand's other orientation has the same bytes, transposed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        x_data: Tensor | None,
        x_scale: Tensor | None,
        weight: Tensor | None,
        w_data: Tensor | None,
        w_scale: Tensor | None,
        config_key: str,
    ) -> Tensor:
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        found, ctx.x_dtype = _forward(x, x_data, x_scale, weight, w_data, w_scale, config_key, *needs)
        ctx.set_materialize_grads(False)
        ctx.config_key = config_key
        ctx.save_for_backward(weight, w_data, w_scale, found.maxima, *found.saved)
        return found.out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dOut, need_dx, need_dw = gradients[0], ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        if dOut is None or not (need_dx or need_dw):
            return (None,) * 7
        weight, w_data, w_scale, maxima, *saved = ctx.saved_tensors
        prepared = None
        if weight is None:
            prepared = [tensorwise.transposed(w_data), w_scale]
            weight = unread(w_data.shape, w_data)
        found = Forward(dOut, tuple(saved), maxima)
        args = dOut, weight, found, ctx.x_dtype, need_dx, need_dw, prepared
        dx, dw = differentiable_once("xmoe::linear", lambda: _tensorwise(ctx.config_key).backward(*args))
        return dx, None, None, dw, None, None, None
