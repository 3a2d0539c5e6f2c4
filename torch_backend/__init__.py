"""xmoe for PyTorch: grouped GEMMs, the weight wrapper and ``quantize_``, an MoE layer."""

from xmoe.torch_backend.grouped_mm import (
    _to_fp8_rowwise_then_scaled_grouped_mm,
    _to_mxfp8_then_scaled_grouped_mm,
    scaled_grouped_mm,
    to_fp8_rowwise_then_scaled_grouped_mm,
    to_mxfp8_then_scaled_grouped_mm,
)
from xmoe.torch_backend.utils import generate_jagged_offs

__all__ = [
    "_to_fp8_rowwise_then_scaled_grouped_mm",
    "_to_mxfp8_then_scaled_grouped_mm",
    "generate_jagged_offs",
    "scaled_grouped_mm",
    "to_fp8_rowwise_then_scaled_grouped_mm",
    "to_mxfp8_then_scaled_grouped_mm",
]
