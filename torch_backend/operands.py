"""Operands that are quantized before their GEMM: made, taken back, and checked.

M = tokens, K = contraction, N = output features, G = groups.
"""

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

from xmoe.config import GemmConfig, GroupedMMConfig, KernelPreference, any_config
from xmoe.kernels import operands, tensorwise
from xmoe.operands import FEATURE_MULTIPLE, FORMATS, QuantizedOperand
from xmoe.torch_backend.calls import unseen
from xmoe.torch_backend.checks import DTYPES, refuse_transforms
from xmoe.torch_backend.ops import LIBRARY

Operand = QuantizedOperand[Tensor]
TENSORWISE = "fp8_tensorwise"
"""The format of linears with one scale a tensor."""
SCALE_OF_ZEROS = 2.0**-48
"""That of the least magnitude that has one in fp8, 1e-12."""

LIBRARY.define("quantize(Tensor x, str format, bool weights) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
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

    Raises ValueError for a config that quantizes nothing, an x that is not bf16 or fp32, or a K that is no multiple of
    16.
    """
    config = _quantizing(config)
    _check_values("x", x, "K")
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
    ndim = 3 if isinstance(config, GroupedMMConfig) else 2
    if weight.ndim != ndim:
        shape = "B_t [G, K, N] of experts" if ndim == 3 else "[N, K] of a linear"
        raise ValueError(f"weight has shape {tuple(weight.shape)}; {config.recipe} quantizes weights {shape}")
    _check_values("weight", weight, "KN" if ndim == 3 else "NK")
    weight = weight.detach()
    if config.format == TENSORWISE:
        return QuantizedOperand(*_cast_whole(weight), "K", TENSORWISE)
    data, scale = torch.ops.xmoe.quantize(weight if ndim == 3 else weight.mT[None], config.format, True)
    return QuantizedOperand(*((data, scale) if ndim == 3 else (data[0], scale[0])), "K", config.format)


def dequantize(operand: Operand, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """data * scale, rounded once to bf16 or fp32 `dtype`, in the shape of the data: of weights of experts [G, N, K].

    Raises ValueError for data and scales that do not fit, and another `dtype`.
    """
    if not isinstance(operand, QuantizedOperand):
        raise ValueError(f"operand is {type(operand).__name__}; give a QuantizedOperand")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; give torch.bfloat16 or torch.float32")
    if operand.axis != "K":
        raise ValueError(f"operand.axis is {operand.axis!r}; only those along K can be taken back")
    data, scale = operand.data, operand.scale
    square = operand.format == "fp8_blockwise" and data.ndim > 1 and scale.shape[-2:-1] != data.shape[-2:-1]
    check_layout("operand", operand, None, square)
    return values(operand if square else flattened(operand), dtype).view(data.shape)


def values(operand: Operand, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`dequantize` of rows [M, K] or of a weight [N, K] or [G, N, K], as they are."""
    data, scale = operand.data, operand.scale
    if operand.format == TENSORWISE:
        return (data.float() * scale).to(dtype)
    group = operand.format == "fp8_blockwise" and data.ndim == 2 and scale.shape[0] != data.shape[0]
    data, scale = (data[None], scale[None]) if group else (data, scale)
    return torch.ops.xmoe.dequantize(data, scale, operand.format, dtype).view(operand.data.shape)


def flattened(operand: Operand) -> Operand:
    """Rows [..., K] as [M, K]."""
    data, scale = operand.data.reshape(-1, operand.data.shape[-1]), operand.scale
    if operand.format != TENSORWISE:
        scale = scale.reshape(-1, *scale.shape[operand.data.ndim - 1 :])
    return QuantizedOperand(data, scale, operand.axis, operand.format)


# --------------------------------------------------------------------------------------------------------------- checks


def check_operand(name: str, operand: Operand, config: GemmConfig, ndim: int | None, square: bool) -> None:
    """Raises ValueError, naming the argument, its value and the fix, unless it is in the config's format along K, and
    of the layout that `check_layout` asks for."""
    if config.format == "bf16":
        raise ValueError(f"{name} is quantized and config={config.recipe} is not; give dequantize({name})")
    if operand.format != config.format:
        raise ValueError(
            f"{name}.format is {operand.format!r} and the config's {config.format!r}; quantize it with one recipe"
        )
    if operand.axis != "K":
        raise ValueError(f"{name}.axis is {operand.axis!r}; quantize it along K, the contraction of the forward")
    check_layout(name, operand, ndim, square)


def check_layout(name: str, operand: Operand, ndim: int | None, square: bool) -> None:
    """The same unless it is data of so many dimensions, with the scales of its format; `square` where a weight."""
    data, scale, format = operand.data, operand.scale, operand.format
    for part, x in (("data", data), ("scale", scale)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}.{part} is {type(x).__name__}; give a torch.Tensor")
    if format not in (*FORMATS, TENSORWISE):
        raise ValueError(f"{name}.format is {format!r}; give one of {', '.join((*FORMATS, TENSORWISE))}")
    if data.dtype != torch.float8_e4m3fn or data.ndim < 1 or (ndim is not None and data.ndim != ndim):
        shape = "" if ndim is None else f" of {ndim} dimensions"
        raise ValueError(f"{name}.data is {data.dtype} {tuple(data.shape)}; give torch.float8_e4m3fn{shape}")
    _check_sizes(name, data.shape, "NK" if square else "K")
    expected = () if format == TENSORWISE else operands.scale_shape(tuple(data.shape), format, square)
    if scale.dtype != operands.scale_dtype(format) or scale.shape != expected:
        raise ValueError(
            f"{name}.scale is {scale.dtype} {tuple(scale.shape)}; give {operands.scale_dtype(format)} {expected}, for "
            f"data {tuple(data.shape)} in the format {format}"
        )
    if data.device != scale.device:
        raise ValueError(f"{name}.data is on {data.device} and its scale on {scale.device}; move them to one device")


def _check_values(name: str, x: Tensor, axes: str) -> None:
    """Of what is to be quantized, whose last dimensions are called `axes`."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}; cast it to torch.bfloat16 or torch.float32")
    if x.ndim < 1:
        raise ValueError(f"{name} is a scalar; give activations [..., K]")
    _check_sizes(name, x.shape, axes)
    refuse_transforms(x)


def _check_sizes(name: str, shape: Sequence[int], axes: str) -> None:
    for axis, size in zip(reversed(axes), reversed(shape), strict=False):
        if size < 1 or size % FEATURE_MULTIPLE:
            raise ValueError(
                f"{axis}={size} of {name} is not a positive multiple of {FEATURE_MULTIPLE}; pad it with zeros"
            )


def _quantizing(config: GemmConfig | StrEnum | str) -> GemmConfig:
    config = any_config(config)
    if config.format == "bf16":
        raise ValueError(f"config={config.recipe} quantizes nothing; give one of another recipe")
    return config


# ------------------------------------------------------------------------------------------------------------------ ops


def _cast_whole(x: Tensor) -> tuple[Tensor, Tensor]:
    """Data and scale of all of x [R, C], e4m3."""
    if not x.numel():
        return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_full((), SCALE_OF_ZEROS, dtype=torch.float32)
    x = x.contiguous()
    maxima = tensorwise.find_maxima(x, plain=not unseen(x))
    data, _, scale = torch.ops.xmoe.cast_tensor(x, maxima, False, True, False, _is_emulated(x.device))
    return data, scale


@torch.compiler.assume_constant_result
def _is_emulated(device: torch.device) -> bool:
    return tensorwise.emulated_on(KernelPreference.AUTO, device)


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
