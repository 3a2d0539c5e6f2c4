"""Linears under tensor parallelism: the product of DTensors, each device's share of it in low precision.

DTensor takes an operation apart before its local tensors see any of it, so a wrapped weight inside a DTensor would be
multiplied as a plain one. Here the local product is a whole linear, low-precision GEMMs of the backward included.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from xmoe.torch_backend.linear import ScaledLinearTensor, linear_by_key
from xmoe.torch_backend.parameters import unquantize_


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, config_key: str) -> Tensor:
    """`scaled_linear` with the config as its key; where input [..., K] and weight [N, K] are DTensors, so is [..., N].

    Scales are those of each device's share. Raises ValueError for a weight that is a DTensor when the input is none.
    """
    if not isinstance(weight, DTensor):
        return linear_by_key(input, weight, bias, config_key)
    if not isinstance(input, DTensor):
        raise ValueError("input is a plain tensor and the weight a DTensor; give the module a tensor-parallel style")
    last = input.ndim - 1
    layouts = [_layout(x, w, last) for x, w in zip(input.placements, weight.placements, strict=True)]
    x_placements, out_placements, x_grad, weight_grad = map(list, zip(*layouts, strict=True))
    x = input.redistribute(placements=x_placements).to_local(grad_placements=x_grad)
    local = linear_by_key(x, weight.to_local(grad_placements=weight_grad), None, config_key)
    shape = torch.Size((*input.shape[:-1], weight.shape[0]))
    out = DTensor.from_local(local, input.device_mesh, out_placements, shape=shape, stride=_strides(shape))
    return out if bias is None else out + bias


def _layout(x: Placement, weight: Placement, last: int) -> tuple[Placement, Placement, Placement, Placement]:
    """On one mesh dimension, from the placements of the input and of the weight: those of the input as it is needed, of
    the output, of the input's gradient and of the weight's."""
    if weight == Shard(0):  # output features: each device adds to the input's gradient
        return Replicate(), Shard(last), Partial(), weight
    if weight == Shard(1):  # input features: each device adds to the output
        return Shard(last), Partial(), Shard(last), weight
    if isinstance(x, Shard) and x.dim != last:  # rows: each device adds to the weight's gradient
        return x, x, x, Partial()
    return Replicate(), Replicate(), Replicate(), weight


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def run_local(model: nn.Module) -> None:
    """Makes the converted linears of `model` multiply by `linear`; their weights are plain again, for DTensor to shard.

    For models that tensor parallelism will reach: one that it does not reach computes as before.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, ScaledLinearTensor):
            key = type(module.weight).config_key
            unquantize_(module)
            module.forward = partial(_forward, module, key)


def _forward(module: nn.Linear, config_key: str, input: Tensor) -> Tensor:
    return linear(input, module.weight, module.bias, config_key)
