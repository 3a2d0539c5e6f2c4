"""The model in numbers: its parameters, their initial values and its rotary tables, the same for both frameworks.

A decoder-only transformer over bytes: pre-norm blocks of causal attention with rotary positions (Su et al. 2021) and
a mixture-of-experts feed-forward layer, RMSNorm (Zhang and Sennrich 2019), an output head of its own.
Legend: D = dim, H = hidden_dim, E = num_experts, S = seq_len, V = 256 byte values.
"""

import math
import zlib

import numpy as np

from xmoe.train.config import VOCABULARY, TrainConfig

ROPE_BASE = 10_000.0
NORM_EPSILON = 1e-6
ADAM_EPSILON = 1e-8


def parameter_shapes(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape; the names are the torch model's and, joined by dots, the Flax model's."""
    D, H, E = config.dim, config.hidden_dim, config.num_experts
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (VOCABULARY, D)}
    for i in range(config.layers):
        block = {
            "attention_norm.weight": (D,),
            "attention.qkv.weight": (3 * D, D),
            "attention.out.weight": (D, D),
            "moe_norm.weight": (D,),
            "moe.router.weight": (E, D),
            "moe.experts.w1": (E, H, D),
            "moe.experts.w2": (E, D, H),
            "moe.experts.w3": (E, H, D),
        }
        if Hs := config.shared_hidden_dim:
            block |= {"moe.shared.w1.weight": (Hs, D), "moe.shared.w2.weight": (D, Hs), "moe.shared.w3.weight": (Hs, D)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes | {"norm.weight": (D,), "head.weight": (VOCABULARY, D)}


def initial_weights(config: TrainConfig) -> dict[str, np.ndarray]:
    """Initial float32 parameters, a pure function of the seed and each parameter's name and shape.

    Norms start at 1. The rest is normal with variance 1/fan_in, over 2 × layers where a parameter writes into the
    residual stream, so that the stream's variance does not grow with depth.
    """
    weights = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
            continue
        std = 1 / math.sqrt(shape[-1])
        if name.endswith(("attention.out.weight", ".w2", ".w2.weight")):
            std /= math.sqrt(2 * config.layers)
        random = np.random.default_rng([config.seed, zlib.crc32(name.encode())])
        weights[name] = std * random.standard_normal(shape, np.float32)
    return weights


def is_decayed(shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies: to matrices, not to norms."""
    return len(shape) > 1


def rotary_tables(config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position × frequency, float32 [S, head width / 2]; they rotate the two halves of each head."""
    width = config.dim // config.heads
    frequencies = ROPE_BASE ** (-np.arange(0, width, 2) / width)
    angles = np.arange(config.seq_len)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
