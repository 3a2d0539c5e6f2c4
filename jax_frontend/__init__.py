"""xmoe for JAX: `ragged_dot` with a quantized backward, and a Flax MoE layer.

`MoE` needs flax (``pip install "xmoe[flax]"``), the bridge to the kernels needs torch; both load on first use.
"""

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise ImportError(f'xmoe.jax_frontend needs jax ({error}): pip install "xmoe[jax]"') from error

from typing import TYPE_CHECKING, Any

from xmoe.jax_frontend.convert import quantize as quantize
from xmoe.jax_frontend.experts import swiglu_experts as swiglu_experts
from xmoe.jax_frontend.permute import combine as combine
from xmoe.jax_frontend.permute import permute_tokens as permute_tokens
from xmoe.jax_frontend.qwix_rules import from_qwix_rules as from_qwix_rules
from xmoe.jax_frontend.ragged_dot import ragged_dot as ragged_dot
from xmoe.jax_frontend.weights import from_torch as from_torch
from xmoe.jax_frontend.weights import to_torch as to_torch

if TYPE_CHECKING:
    from xmoe.jax_frontend.moe import MoE as MoE

__all__ = [
    "MoE", "combine", "from_qwix_rules", "from_torch", "permute_tokens", "quantize", "ragged_dot", "swiglu_experts",
    "to_torch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "MoE":
        from xmoe.jax_frontend.moe import MoE

        return MoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
