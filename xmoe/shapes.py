"""The one table of grouped-GEMM shapes and group patterns: tests, benchmarks and the tuner all read it.

M = tokens, N = output features, K = contraction of the forward GEMM, G = groups (experts held here).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Shape(NamedTuple):
    """One grouped GEMM: A [M, K] @ B [G, K, N]."""

    name: str
    M: int
    N: int
    K: int
    G: int

    @property
    def flops(self) -> int:
        """Floating-point operations of one of the three GEMMs (fwd, dgrad, wgrad) with every token in a group."""
        return 2 * self.M * self.N * self.K


class LinearShape(NamedTuple):
    """One linear: x [M, K] @ weight [N, K]^T."""

    name: str
    M: int
    K: int
    N: int

    @property
    def flops(self) -> int:
        """Floating-point operations of one of the three GEMMs (fwd, dgrad, wgrad)."""
        return 2 * self.M * self.K * self.N


class LayerShape(NamedTuple):
    """One SwiGLU MoE layer: ``tokens`` of width ``dim`` go to ``top_k`` each of ``experts`` of width ``hidden``."""

    name: str
    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int

    @property
    def rows(self) -> int:
        """Rows that the experts multiply: one for each token and expert it goes to."""
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """Floating-point operations of the experts' three GEMMs (w1, w3, w2), forward."""
        return 3 * 2 * self.rows * self.dim * self.hidden


class StackShape(NamedTuple):
    """A model of ``layers`` SwiGLU MoE layers, one after the other; the rest as in `LayerShape`."""

    name: str
    layers: int
    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int

    @property
    def flops(self) -> int:
        """Floating-point operations of all experts' three GEMMs (w1, w3, w2), forward."""
        return self.layers * 3 * 2 * self.tokens * self.top_k * self.dim * self.hidden


LLAMA4 = tuple(Shape(f"llama4_g{G}", 128000, 8192, 5120, G) for G in (1, 2, 4, 8, 16))
DEEPSEEK_V3 = tuple(Shape(f"deepseek_v3_g{G}", 128000, 2048, 7168, G) for G in (1, 4, 8, 32))
QWEN3_30B_A3B = (Shape("qwen3_30b_a3b", 131072, 768, 2048, 128),)
DEEPSEEK_V2_LITE = (Shape("deepseek_v2_lite", 131072, 1408, 2048, 64),)

MODELS: tuple[Shape, ...] = (*LLAMA4, *DEEPSEEK_V3, *QWEN3_30B_A3B, *DEEPSEEK_V2_LITE)
"""Expert layers of published models, at the tokens of one training step."""

SMALL: tuple[Shape, ...] = (
    Shape("one_tile", 128, 128, 128, 1),
    Shape("blocks_of_32", 96, 64, 96, 3),
    Shape("short_last_block", 100, 80, 48, 4),
    Shape("short_block_of_128", 300, 144, 272, 2),
    Shape("least_features", 40, 16, 16, 5),
    Shape("more_groups_than_tokens", 3, 32, 64, 8),
    Shape("no_tokens", 0, 32, 32, 2),
)
"""For the CPU: every way that a size can miss a tile or a block of scales, in well under a second each."""

LAYERS: dict[str, LayerShape] = {
    layer.name: layer
    for layer in (
        LayerShape("llama4_scout", 131072, 5120, 8192, 8, 1),
        LayerShape("deepseek_v3", 16384, 7168, 2048, 8, 8),
        LayerShape("qwen3_30b_a3b", 16384, 2048, 768, 128, 8),
    )
}
"""MoE layers of published models, by name, 131072 rows each; the first two with the 8 experts that one GPU holds."""

OVERHEADS: tuple[Shape | StackShape, ...] = (
    Shape("tiny", 128, 128, 128, 4),
    StackShape("moe_16_layers", 16, 4096, 1024, 512, 16, 2),
)
"""What shows the cost of launching: one op with next to nothing to do, and a small model of many layers."""

LINEARS: tuple[LinearShape, ...] = (
    *(
        LinearShape(f"linear_{K}_{N}", 16384, K, N)
        for K, N in ((4096, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672))
    ),
    *(LinearShape(f"sweep_{K}_{N}", 16384, K, N) for K in (1024, 2048, 4096) for N in (1024, 2048, 4096)),
)
"""Linears of large models (of Llama 3, 8B and 70B), and a sweep over smaller ones: where 8 bits begin to pay."""

ALL: dict[str, Shape] = {shape.name: shape for shape in (*MODELS, *SMALL)}
"""By name, for command lines."""


def _even(M: int, G: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return M // G + (np.arange(G) < M % G)


def _uneven(M: int, G: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return np.diff(np.sort(rng.integers(0, M + 1, G - 1)), prepend=0, append=M)


def _empty(M: int, G: int, rng: np.random.Generator) -> NDArray[np.int64]:
    sizes = np.zeros(G, np.int64)
    sizes[1::2] = _uneven(M, G // 2, rng) if G > 1 else 0
    return sizes


def _one(M: int, G: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return np.where(np.arange(G) == G // 2, M, 0)


def _short(M: int, G: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return _uneven(M - -(-M // 5), G, rng)


def _single_rows(M: int, G: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return (np.arange(G) < M).astype(np.int64)


PATTERNS: dict[str, Callable[[int, int, np.random.Generator], NDArray[np.int64]]] = {
    "even": _even,  # as equal as M allows
    "uneven": _uneven,  # uniform random cuts, aligned to nothing
    "empty": _empty,  # every other group, the first one included
    "one": _one,  # the middle group has every token
    "short": _short,  # uneven over four fifths of M: the last rows belong to nobody
    "single_rows": _single_rows,  # one token a group, while they last: most rows belong to nobody
}


def group_sizes(pattern: str, M: int, G: int, *, seed: int = 0) -> NDArray[np.int32]:
    """int32 [G], the tokens of every group: non-negative, at most M in all, the same on every machine.

    Raises ValueError for an unknown pattern, or for M < 0 or G < 1.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern={pattern!r} is not known; use one of {', '.join(PATTERNS)}")
    if M < 0 or G < 1:
        raise ValueError(f"M={M}, G={G}: give M of 0 or more and G of 1 or more")
    return PATTERNS[pattern](M, G, np.random.default_rng(seed)).astype(np.int32)


def offsets(pattern: str, M: int, G: int, *, seed: int = 0) -> NDArray[np.int32]:
    """int32 [G], the cumulative group ends (``offs``) of ``group_sizes``."""
    return np.cumsum(group_sizes(pattern, M, G, seed=seed), dtype=np.int32)
