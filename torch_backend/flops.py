"""What ``torch.utils.flop_counter`` counts for the ops: the multiplications and additions of their GEMMs.

M = rows, K, N = features in and out, D = model width, H = hidden width of an expert.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import xmoe.torch_backend.experts_ops  # noqa: F401 (defines the ops)

Shape = Sequence[int]
_OPS = torch.ops.xmoe


@register_flop_formula(_OPS.grouped_mm_forward)
def _forward(A: Shape, B: Shape, *_: Any, **__: Any) -> int:
    return 2 * A[0] * B[1] * B[2]


@register_flop_formula(_OPS.grouped_mm_backward)
def _backward(
    dOut: Shape, A_saved: Any, B: Shape, offs: Shape, config_key: str, dtype: Any, need_dA: bool, need_dB: bool,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * dOut[0] * B[1] * B[2] * (need_dA + need_dB)


@register_flop_formula(_OPS.swiglu_experts_forward)
def _experts_forward(
    x: Shape, w1: Shape, w2: Shape, w3: Shape, offs: Shape, config_key: str, save: bool, order: Shape | None = None,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 3 * 2 * (x[0] if order is None else order[0]) * w1[1] * w1[2]


@register_flop_formula(_OPS.swiglu_experts_dgrad)
def _experts_dgrad(d: Shape, d_scale: Shape, w1: Shape, *_: Any, **__: Any) -> int:
    return 2 * 2 * d[0] * w1[1] * w1[2]


@register_flop_formula(_OPS.swiglu_experts_wgrad)
def _experts_wgrad(
    d_tokens: Shape, d_scale: Shape, x_saved: Any, w1: Shape, offs: Shape, config_key: str, dtype: Any, maps: Any,
    M: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * 2 * M * w1[1] * w1[2]
