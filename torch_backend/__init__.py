"""xmoe for PyTorch: grouped GEMMs, linears, their weight wrappers and ``quantize_``, an MoE layer."""

from xmoe.operands import QuantizedOperand
from xmoe.torch_backend import flops as _flops  # noqa: F401
from xmoe.torch_backend.auto_filter import auto_filter
from xmoe.torch_backend.combine import combine, permute_tokens
from xmoe.torch_backend.experts import swiglu_experts
from xmoe.torch_backend.grouped_gemm import (
    _to_fp8_rowwise_then_scaled_grouped_mm,
    _to_mxfp8_then_scaled_grouped_mm,
    scaled_grouped_mm,
    to_fp8_rowwise_then_scaled_grouped_mm,
    to_mxfp8_then_scaled_grouped_mm,
)
from xmoe.torch_backend.linear import ScaledLinearTensor, scaled_linear
from xmoe.torch_backend.linear_filter import filter_fqns
from xmoe.torch_backend.moe import MoE
from xmoe.torch_backend.monitor import Monitor, monitor
from xmoe.torch_backend.operands import dequantize, quantize_activations, quantize_weights
from xmoe.torch_backend.parameters import unquantize_
from xmoe.torch_backend.quantize import quantize_
from xmoe.torch_backend.summary import summary
from xmoe.torch_backend.tensor import ScaledGroupedMMTensor
from xmoe.torch_backend.utils import generate_jagged_offs
from xmoe.torch_backend.weight_cache import cache_weights

grouped_mm = scaled_grouped_mm
"""The name by which training stacks call their grouped GEMM."""

__all__ = [
    "MoE",
    "Monitor",
    "QuantizedOperand",
    "ScaledGroupedMMTensor",
    "ScaledLinearTensor",
    "_to_fp8_rowwise_then_scaled_grouped_mm",
    "_to_mxfp8_then_scaled_grouped_mm",
    "auto_filter",
    "cache_weights",
    "combine",
    "dequantize",
    "filter_fqns",
    "generate_jagged_offs",
    "grouped_mm",
    "monitor",
    "permute_tokens",
    "quantize_",
    "quantize_activations",
    "quantize_weights",
    "scaled_grouped_mm",
    "scaled_linear",
    "summary",
    "swiglu_experts",
    "to_fp8_rowwise_then_scaled_grouped_mm",
    "to_mxfp8_then_scaled_grouped_mm",
    "unquantize_",
]
