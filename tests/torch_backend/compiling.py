"""The backend that the tests of ``torch.compile`` use, and what they ask of it."""

import torch
from torch import Tensor

from xmoe import oracle

BACKEND = "aot_eager" if torch.__version__ >= "2.12" else "inductor"
"""Everything but code generation. Before 2.12 aot_eager's checks of custom ops reject every tensor subclass."""


def assert_compiled_close(compiled: Tensor, eager: Tensor) -> None:
    """aot_eager runs the same kernels; inductor's fused ops round elsewhere, and e4m3 steps follow."""
    if BACKEND == "aot_eager":
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    else:
        assert oracle.sqnr(eager.detach().float().cpu().numpy(), compiled.detach().float().cpu().numpy()) >= 30
