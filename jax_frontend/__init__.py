"""xmoe for JAX: grouped GEMMs with a quantized backward, Flax MoE layers, expert parallelism, and the conversion of
models of others.

`MoE` needs flax (``pip install "xmoe[flax]"``), the bridge to the kernels needs torch; both load on first use.
"""

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise ImportError(f'xmoe.jax_frontend needs jax ({error}): pip install "xmoe[jax]"') from error

from typing import TYPE_CHECKING, Any

from xmoe.jax_frontend.autodiff import OUTPUT_NAME as OUTPUT_NAME
from xmoe.jax_frontend.autodiff import RESIDUAL_NAMES as RESIDUAL_NAMES
from xmoe.jax_frontend.convert import quantize as quantize
from xmoe.jax_frontend.expert_parallel import ExpertParallel as ExpertParallel
from xmoe.jax_frontend.expert_parallel import expert_parallel as expert_parallel
from xmoe.jax_frontend.expert_parallel import parallel_experts as parallel_experts
from xmoe.jax_frontend.experts import swiglu_experts as swiglu_experts
from xmoe.jax_frontend.hf import from_hf as from_hf
from xmoe.jax_frontend.hf import to_hf as to_hf
from xmoe.jax_frontend.permute import combine as combine
from xmoe.jax_frontend.permute import permute_tokens as permute_tokens
from xmoe.jax_frontend.qwix_rules import from_qwix_rules as from_qwix_rules
from xmoe.jax_frontend.ragged_dot import ragged_dot as ragged_dot
from xmoe.jax_frontend.router import load_balance_loss as load_balance_loss
from xmoe.jax_frontend.router import route as route
from xmoe.jax_frontend.router import router_z_loss as router_z_loss
from xmoe.jax_frontend.router import update_bias as update_bias
from xmoe.jax_frontend.weights import from_torch as from_torch
from xmoe.jax_frontend.weights import to_torch as to_torch
from xmoe.jax_frontend.wgrad import ragged_dot_wgrad as ragged_dot_wgrad

if TYPE_CHECKING:
    from xmoe.jax_frontend.moe import MoE as MoE

__all__ = [
    "OUTPUT_NAME",
    "RESIDUAL_NAMES",
    "ExpertParallel",
    "MoE",
    "combine",
    "expert_parallel",
    "from_hf",
    "from_qwix_rules",
    "from_torch",
    "load_balance_loss",
    "parallel_experts",
    "permute_tokens",
    "quantize",
    "ragged_dot",
    "ragged_dot_wgrad",
    "route",
    "router_z_loss",
    "swiglu_experts",
    "to_hf",
    "to_torch",
    "update_bias",
]


def __getattr__(name: str) -> Any:
    if name == "MoE":
        from xmoe.jax_frontend.moe import MoE

        return MoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
