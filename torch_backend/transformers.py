"""SwiGLU experts of transformers as one op: the experts implementation "xmoe".

T = tokens, D = model width, H = hidden width of one expert, E = experts, k = experts that each token goes to.

The first wrapped weight registers it; `xmoe.torch_backend.quantize_` chooses it for models that run "grouped_mm", which
it gives every module that it does not recognise. ``model.set_experts_implementation("grouped_mm")`` takes it back.
"""

import logging
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from xmoe.torch_backend.combine import combine
from xmoe.torch_backend.tensor import ScaledGroupedMMTensor, wrapped_swiglu_experts

NAME = "xmoe"

logger = logging.getLogger(__name__)


def register() -> None:
    """Gives transformers, which has been imported, the implementation."""
    sys.modules["transformers.integrations.moe"].ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def adopt(modules: Iterable[nn.Module]) -> None:
    """Makes recognised experts among the converted modules run as one op, if they would run "grouped_mm"."""
    if "transformers.integrations.moe" not in sys.modules:
        return
    for module in modules:
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) == "grouped_mm" and _is_swiglu(module):
            config._experts_implementation = NAME  # type: ignore[union-attr]
            logger.info("experts_implementation is now %r: permutation, SwiGLU and quantization are fused", NAME)


def release(module: nn.Module) -> None:
    """Undoes `adopt`."""
    config = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) == NAME:
        config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Of an experts module of transformers: hidden_states [T, D], top_k_index [T, k] and its weights → [T, D].

    An expert of ``num_experts`` or above is on another rank, and gives nothing.
    """
    moe = sys.modules["transformers.integrations.moe"]
    w13, w2 = getattr(self, "gate_up_proj", None), self.down_proj
    E = self.num_experts
    fused = isinstance(w13, ScaledGroupedMMTensor) and type(w13) is type(w2) and _is_swiglu(self)
    if w13 is None or not fused or w13.dtype == torch.float16:
        return moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    if not torch.is_grad_enabled() and top_k_index.numel() < E:  # generation: the weights of few experts
        return moe.batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    experts = top_k_index.flatten().clamp(max=E)
    narrow = torch.uint8 if E < 256 else torch.int32  # a radix sort takes a pass a byte
    by_expert, order = experts.to(narrow).sort(stable=True)
    ends = torch.searchsorted(
        by_expert, torch.arange(E, dtype=narrow, device=experts.device), right=True, out_int32=True
    )
    x = hidden_states.to(w13.dtype)
    w1, w3 = w13.chunk(2, dim=1)
    routed = wrapped_swiglu_experts(x, w1, w2, w3, ends, order)
    return combine(routed, top_k_weights.float(), order, hidden_states.dtype)


def _is_swiglu(module: nn.Module) -> bool:
    """Whether it computes w2 (silu(w1 x) * w3 x) with w1 and w3 stored as one [E, 2H, D]."""
    moe: Any = sys.modules["transformers.integrations.moe"]
    flags = {"has_gate": True, "is_concatenated": True, "has_bias": False, "is_transposed": False}
    return (
        all(getattr(module, name, None) is value for name, value in flags.items())
        and not getattr(module, "has_post_expert_norm", False)
        and getattr(type(module), "_apply_gate", None) is getattr(moe, "_default_apply_gate", False)
        and _name(getattr(module, "act_fn", None)) in ("silu", "SiLU", "SiLUActivation")
    )


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
