"""A measured rule for which experts gain from 8 bits, as a ``filter_fn`` for ``quantize_``."""

from torch import nn

from xmoe.torch_backend.quantize import FilterFn

FLOPS = {"bf16": 640e12, "fp8_rowwise": 1300e12, "fp8_blockwise": 1090e12}
"""Operations a second of the grouped GEMMs, over forward and backward."""
BYTES = 4.0e12
"""Bytes a second of the quantizers."""


def expected_speedup(N: int, K: int, tokens_per_expert: float, format: str = "fp8_rowwise") -> float:
    """Forward and backward of a grouped GEMM [tokens, K] @ [experts, K, N] over that of bf16, on an H200.

    3 GEMMs of 2 · tokens · N · K operations; 6 bytes of quantizers for each element of A, of the gradient of the output
    and of the weights. The constants are fitted to ``benchmarks/results/2026-11-21-grouped_mm-4``: within 4% of it in
    fp8_rowwise, 8% in fp8_blockwise. With 512 tokens an expert the measured speed was up to 20% below the rule, and
    calls of less than a millisecond wait for the host in eager mode.

    Raises ValueError for another format than fp8_rowwise and fp8_blockwise.
    """
    _check("format", format)
    operations = 6.0 * tokens_per_expert * N * K
    quantized = 6.0 * (tokens_per_expert * (N + K) + N * K)
    bf16 = operations / FLOPS["bf16"]
    return bf16 / (operations / FLOPS[format] + quantized / BYTES)


def _check(name: str, value: str) -> None:
    if value == "bf16" or value not in FLOPS:
        raise ValueError(f"{name}={value!r} has no measured rule; use fp8_rowwise or fp8_blockwise")


def auto_filter(tokens_per_expert: float, recipe: str = "fp8_rowwise", *, least: float = 1.05) -> FilterFn:
    """A ``filter_fn`` that takes the modules whose expert weights are all expected to be faster than in bf16:

        quantize_(model, "fp8_rowwise", filter_fn=auto_filter(tokens_per_expert=4096))

    The rest stays in bf16. `quantize_` raises if that is everything.

    Args:
        tokens_per_expert: rows that an expert multiplies in one step, on average.
        recipe: "fp8_rowwise" or "fp8_blockwise". The rule knows their defaults alone; and MXFP8's numerics are not
            there for speed on such a GPU.
        least: the speedup below which it does not pay (`expected_speedup`).

    Raises:
        ValueError: another recipe; tokens_per_expert not positive.
    """
    _check("recipe", recipe)
    if not tokens_per_expert > 0:
        raise ValueError(f"tokens_per_expert={tokens_per_expert}; give the rows of an expert in one step, above 0")

    def pays(module: nn.Module, fqn: str) -> bool:
        weights = [p.shape for p in module.parameters(recurse=False) if p.ndim == 3]
        speedups = (expected_speedup(N, K, tokens_per_expert, recipe) for _, N, K in weights)
        return bool(weights) and min(speedups) >= least

    return pays
