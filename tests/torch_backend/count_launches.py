"""Run by test_launches.py in a process without the interpreter: the kernels that PyTorch's ops launch on an sm_90,
forward and backward, beside the table of docs/design.md. Nothing is compiled or run; exit status 1 names what
differs."""

import sys
from pathlib import Path
from typing import Any

import torch
from triton.runtime import jit

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.kernels.fake_cuda import pretend
from xmoe import config_from_recipe
from xmoe.kernels import pipeline
from xmoe.kernels.dispatch import Device
from xmoe.torch_backend import cache_weights, scaled_grouped_mm, swiglu_experts

M, K, N, G = 100, 64, 48, 4
LAUNCHES = {
    "bf16": ((2, 3), (2, 3), (5, 9)),
    "fp8_rowwise": ((5, 6), (6, 6), (11, 15)),
    "fp8_blockwise": ((4, 6), (4, 6), (9, 13)),
    "mxfp8_rceil": ((4, 7), (4, 7), (9, 16)),
}
"""By recipe, (forward, backward) of a grouped GEMM of weights stored [G, N, K], one of [G, K, N], and of experts."""
launched: list[str] = []


def tensor(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)


def counts(call: Any, *inputs: torch.Tensor) -> tuple[int, int]:
    """Of the forward and the backward, which launches `_prepare` first."""
    launched.clear()
    out = call()
    forward = len(launched)
    assert (launched[0], launched.count("_prepare")) == ("_prepare", 1), launched
    torch.autograd.grad(out, inputs, torch.zeros_like(out))
    return forward, len(launched) - forward


pretend()
jit.JITFunction.run = lambda self, *args, grid, warmup, **options: launched.append(self.fn.__name__)
pipeline.device_of = lambda *_: Device("cuda", (9, 0))
offs, wrong = torch.full((G,), M, dtype=torch.int32), []
for recipe, expected in LAUNCHES.items():
    config, A, by_k, by_n = config_from_recipe(recipe), tensor(M, K), tensor(G, N, K), tensor(G, K, N)
    H = 128  # whole blocks of every format
    w1, w2, w3 = tensor(G, H, K), tensor(G, K, H), tensor(G, H, K)
    got = (
        counts(lambda config=config, A=A, W=by_k: scaled_grouped_mm(A, W.mT, offs, config), A, by_k),
        counts(lambda config=config, A=A, B=by_n: scaled_grouped_mm(A, B, offs, config), A, by_n),
        counts(lambda *_, config=config, args=(A, w1, w2, w3): swiglu_experts(*args, offs, config), A, w1, w2, w3),
    )
    if got != expected:
        wrong.append(f"{recipe}: {got} launches, {expected} expected")

# A pass for the maxima of weights is made only where the forward has not been there before.
for name, weights, passes in (("stored [G, N, K]", tensor(G, N, K).mT, 0), ("stored [G, K, N]", tensor(G, K, N), 1)):
    launched.clear()
    scaled_grouped_mm(tensor(M, K), weights, offs, "fp8_rowwise").sum().backward()
    if launched.count("columns_amax") != passes:
        wrong.append(f"{name}: {launched.count('columns_amax')} passes, {passes} expected")
W = tensor(G, N, K)
launched.clear()
with cache_weights():
    scaled_grouped_mm(tensor(M, K), W.mT, offs, "fp8_rowwise").sum().backward()
if "columns_amax" in launched:
    wrong.append("both orientations of cached weights: a pass for their maxima")
stale = scaled_grouped_mm(tensor(M, K), W.mT, offs, "fp8_rowwise")
with torch.no_grad():
    W.add_(1.0)
try:
    stale.sum().backward()
    wrong.append("maxima of weights that have changed are used")
except RuntimeError as error:
    if "modified by an inplace operation" not in str(error):
        raise
print(*wrong, sep="\n")
sys.exit(bool(wrong))
