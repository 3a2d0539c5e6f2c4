"""Operands that are quantized before their GEMM: made, taken back, and multiplied.

M = tokens, K = contraction, N = output features, G = groups.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from xmoe.config import GemmConfig, GroupedMMConfig, any_config, config_from_key
from xmoe.kernels import operands, pipeline, tensorwise
from xmoe.operands import QuantizedOperand
from xmoe.torch_backend import ops
from xmoe.torch_backend.calls import differentiable_once, direct
from xmoe.torch_backend.checks import DTYPES, refuse_transforms
from xmoe.torch_backend.ops import LIBRARY

Operand = QuantizedOperand[Tensor]
TENSORWISE = "fp8_tensorwise"
"""The format of linears with one scale a tensor."""

LIBRARY.define("quantize(Tensor x, str format, bool weights) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
LIBRARY.define(
    "grouped_mm_of_operands(Tensor? A, Tensor? a_data, Tensor? a_scale, Tensor? B, Tensor? b_data, Tensor? b_scale, "
    "Tensor offs, str[] keys) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "dequantize(Tensor data, Tensor scale, str format, ScalarType dtype) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)

# ------------------------------------------------------------------------------------------------------- made and taken


def quantize_activations(x: Tensor, config: GemmConfig | StrEnum | str) -> Operand:
    """x [..., K] along K, as `config` quantizes the activations of its forward.

    Data are e4m3 in the shape of x; scales float32 [...] (rowwise), [..., ceil(K/128)] (blockwise), [] (tensorwise), or
    E8M0 [..., ceil(K/32)] (MX).

    For A of `scaled_grouped_mm`, the input of `scaled_linear` and x of `swiglu_experts`: tokens that are exchanged
    in 8 bits, or multiplied several times. No gradient goes back to x.

    Raises ValueError for a config that quantizes nothing, an x that is not bf16 or fp32, or a scalar.
    """
    config = _quantizing(config)
    if x.ndim < 1:
        raise ValueError("x is a scalar; give activations [..., K]")
    _check_dtype("x", x)
    rows = x.detach().reshape(-1, x.shape[-1])
    if config.format == TENSORWISE:
        data, scale = _cast_whole(rows)
        return QuantizedOperand(data.view(x.shape), scale, "K", TENSORWISE)
    data, scale = torch.ops.xmoe.quantize(rows, config.format, False)
    return QuantizedOperand(data.view(x.shape), scale.view((*x.shape[:-1], *scale.shape[1:])), "K", config.format)


def quantize_weights(weight: Tensor, config: GemmConfig | StrEnum | str) -> Operand:
    """Weights along the contraction of the forward, as `config` quantizes them there.

    Args:
        weight: bf16 or fp32; of experts B_t [G, K, N], any strides, of a linear [N, K].
        config: a config or a recipe (enum member or name).

    Returns:
        e4m3 data [G, N, K] or [N, K], and scales: float32 [G, N] (rowwise), [G, ceil(N/128), ceil(K/128)] (blockwise),
        [] (tensorwise), or E8M0 [G, N, ceil(K/32)] (MX); of a linear without G.

    No gradient goes back to the weight. Raises ValueError for a config that quantizes nothing, or weights that are
    none of this.
    """
    config = _quantizing(config)
    _check_dtype("weight", weight)
    ndim = 3 if isinstance(config, GroupedMMConfig) else 2
    if weight.ndim != ndim:
        shape = "B_t [G, K, N] of experts" if ndim == 3 else "[N, K] of a linear"
        raise ValueError(f"weight has shape {tuple(weight.shape)}; {config.recipe} quantizes weights {shape}")
    weight = weight.detach()
    if config.format == TENSORWISE:
        return QuantizedOperand(*_cast_whole(weight), "K", TENSORWISE)
    data, scale = torch.ops.xmoe.quantize(weight if ndim == 3 else weight.mT[None], config.format, True)
    return QuantizedOperand(*((data, scale) if ndim == 3 else (data[0], scale[0])), "K", config.format)


def dequantize(operand: Operand, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """data * scale, rounded once to bf16 or fp32 `dtype`, in the shape of the data: of weights of experts [G, N, K]."""
    data, scale = operand.data, operand.scale
    if operand.format == TENSORWISE:
        return (data.float() * scale).to(dtype)
    if _is_square(operand):
        data, scale = (data, scale) if data.ndim == 3 else (data[None], scale[None])
    else:
        data, scale = data.reshape(-1, data.shape[-1]), scale.reshape(-1, *scale.shape[data.ndim - 1 :])
    return torch.ops.xmoe.dequantize(data, scale, operand.format, dtype).view(operand.data.shape)


def _is_square(operand: Operand) -> bool:
    """Whether its blocks are those of a weight, of 128 rows each."""
    data, scale = operand.data, operand.scale
    return operand.format == "fp8_blockwise" and data.ndim > 1 and scale.shape[-2] != data.shape[-2]


def _quantizing(config: GemmConfig | StrEnum | str) -> GemmConfig:
    config = any_config(config)
    if config.format == "bf16":
        raise ValueError(f"config={config.recipe} quantizes nothing; give one of another recipe")
    return config


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}; cast it to torch.bfloat16 or torch.float32")


def _cast_whole(x: Tensor) -> tuple[Tensor, Tensor]:
    """Data and scale of all of x [R, C], e4m3."""
    x = x.contiguous()
    maxima = tensorwise.find_maxima(x, plain=torch.compiler.is_compiling()) if x.numel() else x.new_zeros(1).float()
    data, _, scale = torch.ops.xmoe.cast_tensor(x, maxima, False, True, False, False)
    return data, scale


# ------------------------------------------------------------------------------------------------------------------ ops


@torch.library.impl(LIBRARY, "quantize", "CompositeExplicitAutograd")
@torch._disable_dynamo
def _(x: Tensor, format: str, weights: bool) -> tuple[Tensor, Tensor]:
    operand = (operands.quantize_weights if weights else operands.quantize_rows)(x, format)
    return operand.data, operand.scale


@torch.library.register_fake("xmoe::quantize", lib=LIBRARY)
def _(x: Tensor, format: str, weights: bool) -> tuple[Tensor, Tensor]:
    shape = x.mT.shape if weights else x.shape
    scale = operands.scale_shape(tuple(shape), format, weights)
    return x.new_empty(shape, dtype=torch.float8_e4m3fn), x.new_empty(scale, dtype=operands.scale_dtype(format))


@torch.library.impl(LIBRARY, "dequantize", "CompositeExplicitAutograd")
@torch._disable_dynamo
def _(data: Tensor, scale: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    return operands.dequantize(QuantizedOperand(data, scale, "K", format), dtype)


@torch.library.register_fake("xmoe::dequantize", lib=LIBRARY)
def _(data: Tensor, scale: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    return data.new_empty(data.shape, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------- multiply


def check_operand(name: str, operand: Operand, config: GemmConfig, ndim: int | None, square: bool) -> None:
    """Raises ValueError, naming the argument, its value and the fix, unless it is data of so many dimensions along K,
    with the scales of the config's format; `square` where it is a weight."""
    data, scale, format = operand.data, operand.scale, config.format
    if format == "bf16":
        raise ValueError(f"{name} is quantized and config={config.recipe} is not; give dequantize({name})")
    if operand.format != format:
        raise ValueError(
            f"{name}.format is {operand.format!r} and the config's {format!r}; quantize it with one recipe"
        )
    if operand.axis != "K":
        raise ValueError(f"{name}.axis is {operand.axis!r}; quantize it along K, the contraction of the forward")
    if data.dtype != torch.float8_e4m3fn or (ndim is not None and data.ndim != ndim):
        shape = "" if ndim is None else f" of {ndim} dimensions"
        raise ValueError(f"{name}.data is {data.dtype} {tuple(data.shape)}; give torch.float8_e4m3fn{shape}")
    expected = () if format == TENSORWISE else operands.scale_shape(tuple(data.shape), format, square)
    if scale.dtype != operands.scale_dtype(format) or scale.shape != expected:
        raise ValueError(
            f"{name}.scale is {scale.dtype} {tuple(scale.shape)}; give {operands.scale_dtype(format)} {expected}, for "
            f"data {tuple(data.shape)} in the format {format}"
        )
    if data.device != scale.device:
        raise ValueError(f"{name}.data is on {data.device} and its scale on {scale.device}; move them to one device")


def grouped_mm_of_operands(A: Tensor | Operand, B_t: Tensor | Operand, offs: Tensor, config: GroupedMMConfig) -> Tensor:
    """`scaled_grouped_mm` where A [M, K] or B_t [G, K, N], as data [G, N, K], comes quantized."""
    if isinstance(A, QuantizedOperand):
        check_operand("A", A, config, 2, False)
    if isinstance(B_t, QuantizedOperand):
        check_operand("B_t", B_t, config, 3, True)
    return multiply(A, B_t, offs, (config.to_key(),) * 3)


def multiply(A: Tensor | Operand, B: Tensor | Operand, offs: Tensor, keys: Sequence[str | None]) -> Tensor:
    """The same of checked operands, under the keys of the configs of the forward, dgrad and wgrad."""
    refuse_transforms(*(x for x in (A, B) if isinstance(x, Tensor)))
    return torch.ops.xmoe.grouped_mm_of_operands(*split(A), *split(B), offs, keys)


def split(x: Tensor | Operand) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(values, data, scale), those that there are."""
    return (None, x.data, x.scale) if isinstance(x, QuantizedOperand) else (x, None, None)


def unread(shape: Sequence[int], like: Tensor) -> Tensor:
    """In place of the values of an operand, which nobody reads: bf16, one element for all."""
    return like.new_empty((), dtype=torch.bfloat16).expand(shape)


@torch.library.impl(LIBRARY, "grouped_mm_of_operands", "Autograd")
@torch._disable_dynamo
def _(*args: Any) -> Tensor:
    return _OfOperands.apply(*args)


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
    save_amax: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `ops.grouped_mm_forward` gives."""
    a = b = None
    if a_data is not None and a_scale is not None:
        a, A = [a_data, a_scale], unread(a_data.shape, a_data)
        if save_tokens:
            A = dequantize(QuantizedOperand(a_data, a_scale, "K", config_from_key(keys[0]).format))
    if b_data is not None and b_scale is not None:
        b, B = [b_data, b_scale], unread(b_data.mT.shape, b_data)
    args = A, B, offs, keys[0], save_tokens, None, None, save_amax and b is None, a, b
    return direct(ops._forward_op, ops.grouped_mm_forward, *args)


class _OfOperands(torch.autograd.Function):
    """The gradients of what is not quantized. dB multiplies A's tokens, quantized anew from its values in bf16; dA the
    weights, quantized along N from theirs, which are made for the time of the backward alone."""

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
        need_dA, need_dB = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        saves_input = need_dB and pipeline.saves_input(config_from_key(keys[2]))
        args = A, a_data, a_scale, B, b_data, b_scale, offs, keys, need_dB and not saves_input, need_dA
        out, a_tokens, a_tokens_scale, b_amax = _forward(*args)
        ctx.set_materialize_grads(False)
        ctx.keys, ctx.format, ctx.saves_input = keys, config_from_key(keys[0]).format, saves_input
        ctx.A_dtype = torch.bfloat16 if A is None else A.dtype
        saved_A = (A, a_data, a_scale) if saves_input else (None, a_tokens, a_tokens_scale)
        ctx.save_for_backward(offs, *(saved_A if need_dB else (None,) * 3), B, b_data, b_scale, b_amax)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dOut, need_dA, need_dB = gradients[0], ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        if dOut is None or not (need_dA or need_dB):
            return (None,) * 8
        dA, dB = differentiable_once("xmoe::grouped_mm", lambda: _OfOperands._gradients(ctx, dOut, need_dA, need_dB))
        return dA, None, None, dB, *(None,) * 4

    @staticmethod
    def _gradients(ctx: Any, dOut: Tensor, need_dA: bool, need_dB: bool) -> tuple[Tensor | None, Tensor | None]:
        offs, A, a, a_scale, B, b_data, b_scale, b_amax = ctx.saved_tensors
        saved: tuple[Tensor, ...] = ()
        if need_dB and ctx.saves_input:
            saved = (dequantize(QuantizedOperand(a, a_scale, "K", ctx.format)) if A is None else A,)
        elif need_dB:
            saved = (a, a_scale)
        if B is None:
            B = dequantize(QuantizedOperand(b_data, b_scale, "K", ctx.format)).mT
        amax = b_amax if b_amax.numel() else None

        def gradients(key: str, need_dA: bool, need_dB: bool) -> tuple[Tensor, Tensor]:
            return ops.backward(dOut, saved, B, offs, key, ctx.A_dtype, need_dA, need_dB, (), amax)

        _, dgrad, wgrad = ctx.keys
        if dgrad == wgrad or not (need_dA and need_dB):
            dA, dB = gradients(dgrad if need_dA else wgrad, need_dA, need_dB)
        else:
            dA, dB = gradients(dgrad, True, False)[0], gradients(wgrad, False, True)[1]
        return dA if need_dA else None, dB if need_dB else None
