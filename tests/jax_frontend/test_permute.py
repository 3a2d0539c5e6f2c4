"""The permutation of an MoE layer in JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmoe.jax_frontend import combine, permute_tokens

T, K, D = 12, 3, 16


def problem() -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [T, D], scores [T, K] and an order."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, scores = jax.random.normal(keys[0], (T, D)), jax.random.uniform(keys[1], (T, K))
    return x, scores, jax.random.permutation(keys[2], T * K)


def test_there_and_back() -> None:
    """Values and gradients beside NumPy's."""
    x, scores, order = problem()

    @jax.jit
    def run(x: jax.Array, scores: jax.Array) -> jax.Array:
        return combine(jnp.sin(permute_tokens(x, order)), scores, order)

    y, vjp = jax.vjp(run, x, scores)
    dx, dscores = vjp(jnp.ones_like(y))
    rows = np.sin(np.asarray(x, np.float64))
    total = np.asarray(scores, np.float64).sum(1, keepdims=True)
    np.testing.assert_allclose(y, rows * total, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, np.cos(np.asarray(x, np.float64)) * total, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dscores, np.repeat(rows.sum(1, keepdims=True), K, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(permute_tokens(x, order), np.asarray(x)[np.asarray(order) // K])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": lambda x: x[:, 0]}, r"x has shape \(36,\) and scores \(12, 3\); give \[T \* k, D\] and \[T, k\]"),
        ({"rows": lambda x: x[1:]}, r"x has shape \(35, 16\) and scores \(12, 3\)"),
        ({"scores": lambda s: s.astype(jnp.bfloat16)}, "scores is bfloat16; give scores.astype"),
        ({"scores": lambda s: None}, "scores is a NoneType; give an array"),
        ({"order": lambda o: o.astype(jnp.float32)}, "order is float32; give integers"),
        ({"order": lambda o: o[1:]}, r"order has shape \(35,\); give the slot of each row of x, \(36,\)"),
        ({"order": lambda o: o.tolist()}, "order is a list; give an array"),
    ],
)
def test_bad_arguments_of_combine(change: dict[str, Any], message: str) -> None:
    x, scores, order = problem()
    args = {"rows": jnp.repeat(x, K, 0), "scores": scores, "order": order}
    args |= {name: f(args[name]) for name, f in change.items()}
    with pytest.raises(ValueError, match=message):
        combine(*args.values())


@pytest.mark.parametrize(
    ("x", "order", "message"),
    [
        (jnp.zeros((2, 3, 16)), jnp.arange(4), r"x has shape \(2, 3, 16\); give the tokens"),
        (jnp.zeros((3, 16)), jnp.arange(7), r"order has shape \(7,\) and x T=3 tokens; give \[T \* k\]"),
        (jnp.zeros((3, 16)), None, "order is a NoneType; give an array"),
    ],
)
def test_bad_arguments_of_permute_tokens(x: jax.Array, order: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        permute_tokens(x, order)
