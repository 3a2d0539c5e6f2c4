"""`route` against gates [T, E] made by ranking every expert of every token; its losses, metrics and bias."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.jax_frontend.dense import dense_gates
from xmoe import oracle
from xmoe.jax_frontend import load_balance_loss, route, update_bias
from xmoe.jax_frontend.router import RouterOptions, Routing

T, E, k = 33, 8, 3


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


V2 = {"num_expert_groups": 4, "num_limited_groups": 2, "group_score": "max", "normalize": False, "scaling_factor": 16.0}
V3 = {"score_function": "sigmoid", "num_expert_groups": 4, "num_limited_groups": 2, "scaling_factor": 2.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "bias": {"bias": 0.1 * normal(E, seed=2)},
    "sigmoid": {"score_function": "sigmoid", "normalize": False, "scaling_factor": 0.5},
    "DeepSeek-V2": V2,
    "DeepSeek-V3": {**V3, "bias": 0.3 * normal(E, seed=2)},
    "groups of one expert": {"num_expert_groups": 8, "num_limited_groups": 4},
    "capacity": {"capacity_factor": 0.7},
    "capacity, DeepSeek-V3": {**V3, "capacity_factor": 1.1, "bias": -0.3 * normal(E, seed=2)},
}


def run(logits: jax.Array, k: int = k, *, bias: jax.Array | None = None, **options: Any) -> Routing:
    """`route` under jit."""
    return jax.jit(functools.partial(route, k=k, **options))(logits, bias=bias)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_against_gates_of_every_expert(options: dict[str, Any]) -> None:
    options, bias = {**options}, options.get("bias")
    options.pop("bias", None)
    logits, weights = normal(T, E), normal(T, E, seed=1)

    def loss(logits: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, Routing]:
        routing = route(logits, k, bias=bias, **options)
        return (routing.scores * jnp.take_along_axis(weights, routing.experts, axis=1)).sum(), routing

    def dense_loss(logits: jax.Array) -> tuple[jax.Array, Any]:
        gates, rank = dense_gates(logits, k, bias=bias, **options)
        return (gates * weights).sum(), (gates, rank)

    @jax.jit
    def both(logits: jax.Array, bias: jax.Array | None) -> Any:
        return jax.grad(loss, (0, 1), has_aux=True)(logits, bias), jax.grad(dense_loss, has_aux=True)(logits)

    ((grad, bias_grad), routing), (want_grad, (gates, rank)) = both(logits, bias)
    assert bias is None or not np.any(bias_grad)
    assert oracle.sqnr(want_grad, grad) >= 120
    scores, experts = np.asarray(routing.scores), np.asarray(routing.experts)
    assert (scores.dtype, experts.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(rank), experts, axis=1), [range(k)] * T)  # best first
    got = np.zeros((T, E), np.float32)
    np.put_along_axis(got, experts, scores, axis=1)
    np.testing.assert_allclose(got, gates, rtol=1e-6, atol=0)

    counts = np.bincount(experts.reshape(-1), minlength=E)
    kept = np.bincount(experts[scores != 0], minlength=E)
    np.testing.assert_array_equal(routing.tokens_per_expert, counts)
    np.testing.assert_array_equal(routing.group_sizes, kept)
    order, ends = np.asarray(routing.order), np.cumsum(kept)
    np.testing.assert_array_equal(np.sort(order), np.arange(T * k))
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        np.testing.assert_array_equal(order[start:end], np.flatnonzero((experts == e) & (scores != 0)))  # in order
    assert not scores.reshape(-1)[order[ends[-1] :]].any()
    np.testing.assert_allclose(routing.probabilities.sum(axis=-1), 1, rtol=1e-6)


def test_equal_scores_go_to_the_lower_index() -> None:
    np.testing.assert_array_equal(run(jnp.zeros((2, E)), 2).experts, [[0, 1]] * 2)
    got = run(jnp.zeros((2, E)), 2, num_expert_groups=4, num_limited_groups=2, bias=jnp.zeros(E).at[3].set(1))
    np.testing.assert_array_equal(got.experts, [[3, 0]] * 2)  # groups 1 and 0


def test_only_the_best_groups_have_candidates() -> None:
    """Whatever the bias: with it all scores may be negative."""
    bias = jnp.full(E, -5.0).at[:4].set(-9)
    got = run(normal(T, E), 2, bias=bias, score_function="sigmoid", num_expert_groups=4, num_limited_groups=1)
    groups = np.asarray(got.experts) // 2
    assert (groups[:, 0] == groups[:, 1]).all()
    assert groups.min() == 2


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_scores_far_from_zero_stay_finite(score_function: Any) -> None:
    def total(logits: jax.Array) -> tuple[jax.Array, Routing]:
        routing = route(logits, k, score_function=score_function)
        return (routing.scores**2).sum() + (routing.probabilities**2).sum() + routing.metrics["router_entropy"], routing

    logits = jnp.array([[-1000.0], [-100], [-40], [-20], [100]]) + jnp.arange(float(E)) / E
    grad, routing = jax.jit(jax.grad(total, has_aux=True))(logits)
    assert jnp.isfinite(grad).all()
    assert jnp.isfinite(routing.probabilities).all()
    np.testing.assert_allclose(routing.scores.sum(axis=1)[2:], 1, rtol=1e-6)


def test_capacity_is_the_ceiling_of_the_exact_product() -> None:
    def capacity(T: int, E: int, k: int, factor: float) -> int | None:
        return RouterOptions(num_experts=E, top_k=k, capacity_factor=factor).capacity(T)

    assert capacity(40, 4, 1, 1.1) == 11  # 40 * 1.1 / 4 in floating point is more
    assert capacity(10, 4, 1, 1.0) == 3
    assert capacity(4, 8, 2, 0.25) == 1
    assert RouterOptions(num_experts=4, top_k=1).capacity(40) is None


def test_first_choices_come_before_second_ones() -> None:
    """Two experts, each token's first choice expert 0, and room for half of the slots."""
    got = run(jnp.tile(jnp.array([2.0, 1.0]), (4, 1)), 2, capacity_factor=0.5)
    np.testing.assert_array_equal(got.scores > 0, [[True, True]] * 2 + [[False, False]] * 2)
    mixed = jnp.array([[1.0, 2.0], [2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
    got = run(mixed, 2, capacity_factor=0.5)
    np.testing.assert_array_equal(got.scores > 0, [[True, False]] * 4)
    np.testing.assert_array_equal(got.group_sizes, [2, 2])
    np.testing.assert_array_equal(got.order[:4], [2, 4, 0, 6])


def test_metrics_and_losses() -> None:
    logits = normal(T, E)
    metrics = jax.jit(lambda logits: route(logits, k, capacity_factor=1.0).metrics)(logits)
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(axis=1, keepdims=True)
    counts = np.bincount(np.argsort(-p, axis=1)[:, :k].reshape(-1), minlength=E)
    capacity = -(-T * k // E)
    want = {
        "tokens_per_expert": counts,
        "max_load": counts.max() / (T * k / E),
        "drop_fraction": np.maximum(counts - capacity, 0).sum() / (T * k),
        "router_entropy": -(p * np.log(p)).sum(axis=1).mean(),
        "load_balance_loss": E * (counts / (T * k) * p.mean(axis=0)).sum(),
        "router_z_loss": np.square(np.log(np.exp(np.asarray(logits, np.float64)).sum(axis=1))).mean(),
    }
    assert metrics.keys() == want.keys()
    assert {(x.dtype.name, x.weak_type) for x in metrics.values()} == {("int32", False), ("float32", False)}
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    even = load_balance_loss(jnp.full((T, E), 1 / E), jnp.full(E, T * k / E), k)
    np.testing.assert_allclose(even, 1, rtol=1e-6)
    empty = jax.jit(lambda: route(jnp.zeros((0, E)), k, capacity_factor=1.0).metrics)()
    assert not any(np.asarray(value).any() for value in empty.values())


def test_the_bias_evens_the_load() -> None:
    """Of a router that prefers some experts: the bias levels it within 100 steps."""
    logits = normal(512, E) + jnp.linspace(0, 2, E)

    def step(bias: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        routing = route(logits, 2, bias=bias, score_function="sigmoid")
        return update_bias(bias, routing.tokens_per_expert, 0.01), routing.metrics["max_load"]

    _, loads = jax.jit(lambda bias: jax.lax.scan(step, bias, length=100))(jnp.zeros(E))
    assert loads[0] > 1.8
    assert loads[-1] < 1.15


def test_the_update_is_a_sign() -> None:
    got = update_bias(jnp.zeros(4), jnp.array([3, 5, 4, 4]), 0.001)
    np.testing.assert_array_equal(got, np.float32([0.001, -0.001, 0, 0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 9}, r"top_k=9 .* num_experts=8"),
        ({"k": 0}, r"top_k=0"),
        ({"score_function": "tanh"}, r"score_function='tanh' .* 'softmax' or 'sigmoid'"),
        ({"num_expert_groups": 4}, r"num_expert_groups=4 and num_limited_groups=None go together"),
        ({"num_expert_groups": 3, "num_limited_groups": 1}, r"num_expert_groups=3 does not divide num_experts=8"),
        ({"num_expert_groups": 4, "num_limited_groups": 5}, r"num_limited_groups=5 .* num_expert_groups=4"),
        ({"num_expert_groups": 4, "num_limited_groups": 1}, r"top_k=3 exceeds the 2 experts"),
        ({"group_score": "mean"}, r"group_score='mean' .* 'max' or 'top2_sum'"),
        ({"capacity_factor": 0.0}, r"capacity_factor=0.0"),
        ({"capacity_factor": float("nan")}, r"capacity_factor=nan"),
        ({"scaling_factor": 0}, r"scaling_factor=0 is not a positive number; use 1.0"),
        ({"scaling_factor": float("inf")}, r"scaling_factor=inf is not"),
        ({"k": 2.0}, r"top_k=2.0 is not an integer"),
        ({"logits": jnp.zeros((T, 0))}, r"num_experts=0 is not positive"),
        ({"bias": jnp.zeros(3)}, r"bias has shape \(3,\); give \(8,\)"),
        ({"logits": jnp.zeros(E)}, r"logits has shape \(8,\); give \[T, E\]"),
        ({"logits": [[0.0] * E]}, r"logits is a list; give an array, jnp.asarray\(logits\)"),
        ({"logits": jnp.zeros((T, E), jnp.int32)}, r"logits is int32; give floating-point logits"),
        ({"bias": [0.0] * E}, r"bias is a list; give an array"),
        ({"k": True}, r"top_k=True is not an integer"),
        ({"normalize": "no"}, r"normalize='no' is not a boolean"),
        ({"scaling_factor": "2"}, r"scaling_factor='2' is not a positive number"),
        ({"num_expert_groups": 4.0, "num_limited_groups": 2}, r"num_expert_groups=4.0 is not an integer"),
        ({"num_expert_groups": 4, "num_limited_groups": True}, r"num_limited_groups=True is not an integer"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(**{"logits": jnp.zeros((T, E)), "k": k, **options})
    with pytest.raises(ValueError, match=r"logits has shape \(2, 3\); give \[T, 4\]"):
        RouterOptions(num_experts=4, top_k=1).route(jnp.zeros((2, 3)))


def test_lists_are_no_counts() -> None:
    with pytest.raises(ValueError, match="tokens_per_expert is a list; give an array"):
        update_bias(jnp.zeros(4), [1, 2, 3, 4], 0.001)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf"), "x", None, True])
def test_a_rate_that_is_none(rate: Any) -> None:
    with pytest.raises(ValueError, match=f"rate={rate!r} would not even the load; give 0 or a small positive number"):
        update_bias(jnp.zeros(4), jnp.ones(4), rate)
