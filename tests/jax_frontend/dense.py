"""A mixture of experts without grouped GEMMs: every expert on every token, times gates that are mostly zero.

T tokens, E experts, k experts of each token, D model width, H width of an expert.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def dense_gates(
    logits: jax.Array,
    k: int,
    *,
    bias: jax.Array | None = None,
    score_function: str = "softmax",
    normalize: bool = True,
    scaling_factor: float = 1.0,
    num_expert_groups: int | None = None,
    num_limited_groups: int | None = None,
    group_score: str = "top2_sum",
    capacity_factor: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(gates float32 [T, E], each expert's place [T, E] in its token's ranking), by comparing all experts with all."""
    T, E = logits.shape
    affinity = jax.nn.softmax(logits, axis=1) if score_function == "softmax" else 1 / (1 + jnp.exp(-logits))
    choice = affinity if bias is None else affinity + bias
    if num_expert_groups is not None and num_limited_groups is not None:
        grouped = jnp.sort(choice.reshape(T, num_expert_groups, -1), axis=-1)[:, :, ::-1]
        worth = grouped[:, :, 0] if group_score == "max" else grouped[:, :, :2].sum(axis=-1)
        best = jnp.repeat(ranking(worth) < num_limited_groups, E // num_expert_groups, axis=1)
        choice = jnp.where(best, choice, -jnp.inf)
    rank = ranking(choice)
    gates = jnp.where(rank < k, affinity, 0)
    if normalize:
        gates = gates / gates.sum(axis=1, keepdims=True)
    if capacity_factor is not None:
        priority = jnp.where(rank < k, rank * T + jnp.arange(T)[:, None], T * E)
        before = (priority[None, :, :] < priority[:, None, :]).sum(axis=1)
        gates = jnp.where(before < math.ceil(T * k * capacity_factor / E), gates, 0)
    return gates * scaling_factor, rank


def ranking(x: jax.Array) -> jax.Array:
    """[T, E]: how many values of its row are larger than each of x [T, E], or as large and further to the left."""
    E = x.shape[1]
    earlier = jnp.arange(E)[None, :] < jnp.arange(E)[:, None]
    larger = (x[:, None, :] > x[:, :, None]) | ((x[:, None, :] == x[:, :, None]) & earlier)
    return larger.sum(axis=-1)


def dense_moe(weights: Any, x: jax.Array, k: int, act: Callable[[jax.Array], jax.Array], **options: Any) -> jax.Array:
    """y [T, D] float32 of x [T, D] and the nested dict of a layer's parameters."""
    gates, _ = dense_gates(x @ weights["router"]["weight"].T, k, **options)

    def feed_forward(w1: jax.Array, w2: jax.Array, w3: jax.Array | None) -> jax.Array:
        hidden = act(x @ w1.T)
        return (hidden if w3 is None else hidden * (x @ w3.T)) @ w2.T

    def each(part: str) -> list[Any]:
        return [weights[part].get(f"w{i}") for i in (1, 2, 3)]

    outputs = jnp.stack(
        [feed_forward(*(w if w is None else w[e] for w in each("experts"))) for e in range(gates.shape[1])]
    )
    y = jnp.einsum("te,etd->td", gates, outputs)
    if "shared" in weights:
        y = y + feed_forward(*(w if w is None else w["weight"] for w in each("shared")))
    return y
