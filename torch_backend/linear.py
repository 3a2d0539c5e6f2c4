"""Linears in low precision: the function, and the wrapper that makes a weight's products run so."""

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xmoe.config import LINEAR_RECIPES, GemmConfig, LinearConfig
from xmoe.operands import FEATURE_MULTIPLE, QuantizedOperand
from xmoe.torch_backend.calls import unseen
from xmoe.torch_backend.checks import refuse_transforms
from xmoe.torch_backend.linear_operands import linear_of_operands
from xmoe.torch_backend.linear_ops import scheme, unseen_linear
from xmoe.torch_backend.observe import observed_linear, observers
from xmoe.torch_backend.operands import Operand
from xmoe.torch_backend.weight_cache import cached
from xmoe.torch_backend.wrapper import WrappedWeight, config_key, follow_autocast, unwrap

Product = Callable[[Tensor, Tensor, str], Tensor]
"""[M, N] of [M, K] and [N, K], under the config with a key."""

_linear_op = torch.ops.xmoe.linear.default


def scaled_linear(
    input: Tensor | Operand,
    weight: Tensor | Operand,
    bias: Tensor | None = None,
    config: LinearConfig | StrEnum | str = "rowwise",
) -> Tensor:
    """``torch.nn.functional.linear``, and its gradients, in the precision of `config`.

    Args:
        input: bf16, fp16 or fp32 [..., K]. fp16 is computed in fp32. Or a `QuantizedOperand` along K
            (`quantize_activations`), which gets no gradient.
        weight: bf16, fp16 or fp32 [N, K], or a `QuantizedOperand` (`quantize_weights`), which gets no gradient.
        bias: [N], added in its own precision.
        config: a config, or a recipe (enum member or name).

    Returns:
        [..., N] in the dtype of the input, whatever autocast says; bf16 where the input is quantized.

    Raises:
        ValueError: a shape, dtype or device that does not fit; K or N not a multiple of 16, unless the config pads; a
            config that is none of linears, or that the device cannot run under its kernel preference.
    """
    if not isinstance(config, LinearConfig):
        if isinstance(config, GemmConfig):
            raise ValueError(f"config is a {type(config).__name__}, for experts; give a LinearConfig")
        if not isinstance(config, str):
            known = ", ".join(LINEAR_RECIPES)
            raise ValueError(f"config={config!r} is not a config; give a LinearConfig or one of {known}")
        config = LinearConfig.from_recipe(config)
    for name, x in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(x, Tensor | QuantizedOperand) and not (name == "bias" and x is None):
            given = f"{name} is {'None' if x is None else type(x).__name__}"
            raise ValueError(f"{given}; give a torch.Tensor" + (", and config=… by keyword" if name == "bias" else ""))
    N = _check_shapes(input, weight)
    if isinstance(bias, Tensor) and bias.shape != (N,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; give ({N},), as weight has out_features={N}")
    if isinstance(input, QuantizedOperand) or isinstance(weight, QuantizedOperand):
        return linear_of_operands(input, weight, bias, config)
    return linear_by_key(input, weight, bias, config.to_key())


def _check_shapes(input: Tensor | Operand, weight: Tensor | Operand) -> int:
    """N. Raises ValueError for an input or a weight of other dimensions."""
    x, w = (t.data if isinstance(t, QuantizedOperand) else t for t in (input, weight))
    if x.ndim < 1:
        raise ValueError("input is a scalar; give [..., K]")
    if w.ndim != 2:
        raise ValueError(f"weight has shape {tuple(w.shape)}; give that of a linear, [N, K]")
    return w.shape[0]


def linear_by_key(
    input: Tensor, weight: Tensor, bias: Tensor | None, key: str, product: Product | None = None
) -> Tensor:
    """`scaled_linear` with the config as its key, the form that the op carries. `product` computes it of matrices."""
    dtype, N = input.dtype, weight.shape[0]
    if torch.float16 in (dtype, weight.dtype):  # exact in float32, which the kernels read
        input, weight = (x.float() if x.dtype == torch.float16 else x for x in (input, weight))
    if ";pad_inner_dim=true" in key:
        input, weight = _padded(input, weight)
    rows = input if input.ndim == 2 else input.reshape(-1, input.shape[-1])
    out = (product or _product)(rows, weight, key)
    if out.shape[1] != N:
        out = out[:, :N]
    if input.ndim != 2:
        out = out.reshape(*input.shape[:-1], N)
    out = out if out.dtype == dtype else out.to(dtype)
    return out if bias is None else (out + bias).to(dtype)


def _product(rows: Tensor, weight: Tensor, key: str) -> Tensor:
    prepared = cached(lambda: scheme(key).prepare(rows, weight), (key, rows.dtype), weight) or ()
    if unseen(rows, weight):
        return unseen_linear(rows, weight, key, *prepared)
    refuse_transforms(rows, weight)
    return _linear_op(rows, weight, key, *prepared)


def _padded(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both with zeros up to multiples of 16; as they are where they fit. (F.pad cannot be traced with a wrapper.)"""
    N, K = weight.shape
    n, k = -N % FEATURE_MULTIPLE, -K % FEATURE_MULTIPLE
    if k:
        input = torch.constant_pad_nd(input, (0, k))
    return input, torch.constant_pad_nd(weight, (0, k, 0, n)) if n or k else weight


class ScaledLinearTensor(WrappedWeight):
    """The weight [N, K] of an ``nn.Linear`` whose GEMMs run in the precision of a config: those of

    - ``torch.nn.functional.linear(x, w, bias)``;
    - ``torch.mm``, ``torch.addmm``, ``torch.matmul`` and ``@`` with w or its transpose on either side.

    A bias is added in its own precision. The output has the dtype that the operation on a plain weight would give,
    autocast included. See `WrappedWeight` for everything else.
    """

    ndims = 2
    kind = "linear weights"
    remedy = "compute it with linear, mm, addmm or matmul"
    config_type = LinearConfig


def _linear(
    cls: type[ScaledLinearTensor], func: Callable[..., Any], input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    if not isinstance(weight, ScaledLinearTensor) or weight.ndim != 2:
        return NotImplemented
    return _product_of(input, weight, bias, config_key(cls, weight))


def _product_of(input: Tensor, weight: Tensor, bias: Tensor | None, key: str) -> Tensor:
    """``linear`` of a weight [N, K] with this key."""
    input, weight, bias = follow_autocast(input, weight, bias)
    product = None
    if not torch.compiler.is_compiling():  # what the op saves for the backward is plain
        input, weight = unwrap(input), unwrap(weight)
        if observers:
            product = partial(observed_linear, product=_product, parameter=weight)
    return linear_by_key(input, weight, bias, key, product)


def _matmul(cls: type[ScaledLinearTensor], func: Callable[..., Any], input: Tensor, other: Tensor) -> Any:
    """``mm``, ``matmul`` and ``@``, with the weight on either side."""
    if isinstance(other, ScaledLinearTensor):
        if other.ndim != 2 or input.ndim < 1 or isinstance(input, ScaledLinearTensor):
            return NotImplemented
        return _product_of(input, other.mT, None, config_key(cls, other))
    if input.ndim != 2 or other.ndim != 2:
        return NotImplemented
    return _product_of(other.mT, input, None, config_key(cls, input)).mT


def _addmm(
    cls: type[ScaledLinearTensor],
    func: Callable[..., Any],
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Any:
    product = _matmul(cls, func, mat1, mat2)
    if product is NotImplemented or isinstance(input, ScaledLinearTensor):
        return NotImplemented
    product = product if alpha == 1 else product * alpha
    if beta == 0:  # in which case NaN in input is ignored, too
        return product.expand(torch.broadcast_shapes(product.shape, input.shape))
    bias = input.to(product.dtype)
    return product + (bias if beta == 1 else bias * beta)


ScaledLinearTensor.handlers = {
    torch.nn.functional.linear: _linear,
    **dict.fromkeys(
        (
            *(torch.mm, torch.matmul, torch.linalg.matmul),
            *(Tensor.mm, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__),
        ),
        _matmul,
    ),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
}
