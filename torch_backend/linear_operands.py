"""Linears whose input or weight is quantized before their GEMM.

M = rows of the input, K = in_features, N = out_features.
"""

from typing import Any

import torch
from torch import Tensor

from xmoe.config import LinearConfig
from xmoe.kernels import operands, tensorwise
from xmoe.operands import QuantizedOperand
from xmoe.torch_backend.calls import differentiable_once, unseen
from xmoe.torch_backend.checks import refuse_transforms
from xmoe.torch_backend.linear_ops import Forward, Grouped, Tensorwise, as_group, check_linear, one_group, scheme
from xmoe.torch_backend.operand_gemm import multiply, needs_gradient, split, unread
from xmoe.torch_backend.operands import TENSORWISE, Operand, check_operand, flattened, values
from xmoe.torch_backend.ops import LIBRARY


def linear_of_operands(
    input: Tensor | Operand, weight: Tensor | Operand, bias: Tensor | None, config: LinearConfig
) -> Tensor:
    """`scaled_linear` where the input [..., K] or the weight [N, K] comes quantized."""
    if isinstance(input, QuantizedOperand):
        check_operand("input", input, config, None, False)
    if isinstance(weight, QuantizedOperand):
        check_operand("weight", weight, config, 2, True)
    half = isinstance(input, Tensor) and input.dtype == torch.float16
    input, weight = _float32_of_half(input), _float32_of_half(weight)
    shape, dtype, device = _facts(input)
    (N, K), w_dtype, w_device = _facts(weight)
    check_linear(shape, dtype, (N, K), w_dtype, (device, w_device))
    rows = input.reshape(-1, K) if isinstance(input, Tensor) else flattened(input)
    if keys := _grouped_keys(config.to_key()):
        offs = one_group(rows.data if isinstance(rows, QuantizedOperand) else rows)
        out = multiply(rows, _as_group(weight), offs, keys)
    else:
        parts = *split(rows), *split(weight)
        refuse_transforms(*(x for x in parts if x is not None))
        out = torch.ops.xmoe.linear_of_operands(*parts, config.to_key())
    out = out.reshape(*shape[:-1], N)
    out = out.half() if half else out
    return out if bias is None else (out + bias).to(out.dtype)


def _float32_of_half(x: Tensor | Operand) -> Tensor | Operand:
    """fp16 is exact in float32, which the kernels read."""
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.float16 else x


@torch.compiler.assume_constant_result
def _grouped_keys(config_key: str) -> list[str]:
    """Of the grouped GEMMs of the forward, dgrad and wgrad; none of a tensorwise linear."""
    how = scheme(config_key)
    return [key for key in how.keys if key is not None] if isinstance(how, Grouped) else []


def _facts(x: Tensor | Operand) -> tuple[torch.Size, torch.dtype, torch.device]:
    if isinstance(x, QuantizedOperand):
        return x.data.shape, torch.bfloat16, x.data.device
    return x.shape, x.dtype, x.device


def _as_group(weight: Tensor | Operand) -> Tensor | Operand:
    """[N, K] as [1, K, N]."""
    if isinstance(weight, Tensor):
        return as_group(weight)
    return weight.map(lambda x: x.unsqueeze(0))


LIBRARY.define(
    "linear_of_operands(Tensor? x, Tensor? x_data, Tensor? x_scale, Tensor? weight, Tensor? w_data, Tensor? w_scale, "
    "str config_key) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(LIBRARY, "linear_of_operands", "Autograd")
@torch._disable_dynamo
def _(*args: Any) -> Tensor:
    if needs_gradient(args[0], args[3]):
        return _TensorwiseOfOperands.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.xmoe.linear_of_operands(*args)


@torch.library.impl(LIBRARY, "linear_of_operands", "CompositeExplicitAutograd")
@torch._disable_dynamo
def _forward(
    x: Tensor | None,
    x_data: Tensor | None,
    x_scale: Tensor | None,
    weight: Tensor | None,
    w_data: Tensor | None,
    w_scale: Tensor | None,
    config_key: str,
) -> Tensor:
    given = prepared = None
    if x_data is not None and x_scale is not None:
        given, x = [_readable(x_data), x_scale], unread(x_data.shape, x_data)
    if w_data is not None and w_scale is not None:
        prepared, weight = [_readable(w_data), w_scale], unread(w_data.shape, w_data)
    assert x is not None, "an input comes as it is or quantized"
    assert weight is not None, "a weight comes as it is or quantized"
    return _tensorwise(config_key).forward(x, weight, False, False, prepared, given).out


@torch.library.register_fake("xmoe::linear_of_operands", lib=LIBRARY)
def _(
    x: Tensor | None,
    x_data: Tensor | None,
    x_scale: Tensor | None,
    weight: Tensor | None,
    w_data: Tensor | None,
    w_scale: Tensor | None,
    config_key: str,
) -> Tensor:
    like, N = (x_data, weight) if x is None else (x, w_data if weight is None else weight)
    assert like is not None, "an input comes as it is or quantized"
    N = w_data if N is None else N
    assert N is not None, "a weight comes as it is or quantized"
    return like.new_empty(like.shape[0], N.shape[0], dtype=torch.bfloat16 if x is None else x.dtype)


def _readable(x: Tensor) -> Tensor:
    return operands.readable(x) if unseen(x) else x.contiguous()


def _tensorwise(config_key: str) -> Tensorwise:
    how = scheme(config_key)
    assert isinstance(how, Tensorwise), f"{config_key}: grouped GEMMs have an op of their own"
    return how


class _TensorwiseOfOperands(torch.autograd.Function):
    """The gradient of what is not quantized. An operand's other orientation has the same bytes, transposed."""

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
        ctx.set_materialize_grads(False)
        ctx.config_key, ctx.x_dtype = config_key, torch.bfloat16 if x is None else x.dtype
        ctx.save_for_backward(weight, *((w_data, w_scale) if weight is None else (x_data, x_scale)))
        return _forward(x, x_data, x_scale, weight, w_data, w_scale, config_key)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dOut = gradients[0]
        if dOut is None:
            return (None,) * 7
        dx, dw = differentiable_once("xmoe::linear", lambda: _TensorwiseOfOperands._gradients(ctx, dOut))
        return dx, None, None, dw, None, None, None

    @staticmethod
    def _gradients(ctx: Any, dOut: Tensor) -> tuple[Tensor | None, Tensor | None]:
        how, (weight, data, scale) = _tensorwise(ctx.config_key), ctx.saved_tensors
        columns = tensorwise.transposed(data), scale
        if weight is None:
            weight, found = unread(data.shape, data), Forward(dOut)
            return how.backward(dOut, weight, found, ctx.x_dtype, True, False, columns)
        if how.hp_key is not None:
            columns = (values(QuantizedOperand(data, scale, "K", TENSORWISE)),)
        return how.backward(dOut, weight, Forward(dOut, columns), ctx.x_dtype, False, True, None)
