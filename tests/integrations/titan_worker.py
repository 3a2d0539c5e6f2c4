"""One rank of torchtitan's own trainer, on a CPU: ``python titan_worker.py <torchtitan's arguments>``.

torchtitan looks for an accelerator and asks it things that a CPU does not know. What is missing is given to it here,
before it is imported; everything else, from the config manager to the checkpointer, is torchtitan's code.
"""

import importlib.util
import types
from typing import Any

import torch
import torch._utils
from torch.distributed.fsdp import FSDPModule


class CpuDevice(types.ModuleType):
    """``torch.cpu`` with what torchtitan asks of ``torch.cuda``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return "CPU"

    @staticmethod
    def get_device_properties(device: Any = None) -> Any:
        return types.SimpleNamespace(total_memory=2**34)

    @staticmethod
    def memory_stats(device: Any = None) -> dict[str, int]:
        return {}

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None: ...

    @staticmethod
    def empty_cache() -> None: ...


def find_cpu() -> None:
    """Lets torchtitan find a CPU where it looks for an accelerator."""
    original = torch._utils._get_available_device_type, torch._utils._get_device_module
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda device_type: CpuDevice(device_type)
    import torchtitan.tools.utils  # keeps what it finds

    assert torchtitan.tools.utils.device_type == "cpu", "torchtitan looks for its device elsewhere"
    torchtitan.tools.utils.has_cuda_capability = lambda *_: True  # 0.2: without it, experts are a loop
    torch._utils._get_available_device_type, torch._utils._get_device_module = original


def count_integers() -> None:
    """``torch.histc`` counts integers on a GPU only; the router counts the tokens of its experts with it."""
    histc = torch.histc
    torch.histc = lambda x, **kwargs: histc(x.float(), **kwargs).to(x.dtype)


def sum_over_gloo() -> None:
    """gloo has no reduction with a factor: FSDP divides by itself."""
    set_factor = FSDPModule.set_gradient_divide_factor

    def set_gradient_divide_factor(self: FSDPModule, factor: float) -> None:
        set_factor(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = set_gradient_divide_factor


def set_timeouts() -> None:
    """torchtitan 0.3 is written for a torch with this function, newer than 2.13."""
    if not hasattr(torch.distributed, "set_timeout"):
        torch.distributed.set_timeout = lambda timeout, group: None


def attend_densely() -> None:
    """FlexAttention has no backward on a CPU; torchtitan 0.3 uses nothing else."""
    from torch.nn.attention.flex_attention import create_mask
    from torch.nn.functional import scaled_dot_product_attention
    from torchtitan.models.common.attention import FlexAttention

    def dense(q: Any, k: Any, v: Any, *, block_mask: Any, scale: Any, enable_gqa: bool, **_: Any) -> Any:
        (B, _, Q, _), KV = q.shape, k.shape[2]
        mask = create_mask(block_mask.mask_mod, B, 1, Q, KV, device="cpu")
        return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa), None

    FlexAttention.compiled_flex_attn = staticmethod(dense)


def main() -> None:
    """Runs torchtitan's trainer with this process's arguments."""
    find_cpu()
    count_integers()
    sum_over_gloo()
    if importlib.util.find_spec("torchtitan.trainer") is None:  # 0.2
        from torchtitan.train import Trainer
        from torchtitan.train import main as train

        train(Trainer)
    else:
        attend_densely()
        set_timeouts()
        from torchtitan.train import main as train

        train()


if __name__ == "__main__":
    main()
