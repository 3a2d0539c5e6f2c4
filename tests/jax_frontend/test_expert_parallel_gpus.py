"""Expert parallelism on two GPUs or more: the results of a single one, by each exchange."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.jax_frontend.values import bytes_of
from xmoe import oracle
from xmoe.jax_frontend import ExpertParallel, combine, swiglu_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two GPUs"),
]

T, D, H, E, k = 1024, 256, 512, 16, 4
"""T: of all devices together."""


def alone(weights: Any, x: jax.Array, scores: jax.Array, chosen: jax.Array, recipe: str) -> jax.Array:
    slots = chosen.reshape(-1)
    sizes, order = (slots[:, None] == jnp.arange(E)).sum(0, dtype=jnp.int32), jnp.argsort(slots, stable=True)
    return combine(swiglu_experts(x, **weights, group_sizes=sizes, config=recipe, order=order), scores, order)


def with_gradients(f: Any) -> Any:
    """(weights, x, scores, chosen, dy) → y and the gradients of the first three, by name."""

    def run(weights: Any, x: jax.Array, scores: jax.Array, chosen: jax.Array, dy: jax.Array) -> dict[str, jax.Array]:
        y, vjp = jax.vjp(lambda *a: f(*a, chosen), weights, x, scores)
        dweights, dx, dscores = vjp(dy.astype(y.dtype))
        return {"y": y, "x": dx, "scores": dscores, **dweights}

    return jax.jit(run)


def inputs(seed: int) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(seed), 7)
    shapes = {"w1": (E, H, D), "w2": (E, D, H), "w3": (E, H, D)}
    weights = {
        name: jax.random.normal(key, shape, jnp.bfloat16) / 16
        for (name, shape), key in zip(shapes.items(), keys[:3], strict=True)
    }
    x, dy = (jax.random.normal(key, (T, D), jnp.bfloat16) for key in keys[3:5])
    chosen = jax.lax.top_k(jax.random.normal(keys[5], (T, E)) + jnp.arange(E) / 8, k)[1]  # uneven
    scores = 2.0 ** -jax.random.randint(keys[6], (T, k), 0, 3).astype(jnp.float32)  # products with them are exact
    return weights, x, scores, chosen, dy


@pytest.mark.parametrize("how", ["ragged_all_to_all", "all_to_all", "all_gather"])
@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise"])
def test_results_and_gradients_are_those_of_a_single_gpu(recipe: str, how: Any) -> None:
    """The same bits, but for those that `all_gather` adds up in another order. Several runs, on changing data, so that
    XLA replays recorded launches."""
    inexact = {"y": 140, "scores": 125, "x": 45} if how == "all_gather" else {}
    devices = jax.devices()[: max(p for p in (2, 4, 8) if p <= jax.device_count())]
    mesh = jax.make_mesh((len(devices),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    parallel = ExpertParallel(mesh=mesh, exchange=how, capacity=None)

    def sharded(weights: Any, x: jax.Array, scores: jax.Array, chosen: jax.Array) -> jax.Array:
        return parallel.swiglu_experts(x, chosen, scores, **weights, config=recipe).y

    on_mesh, on_one = with_gradients(sharded), with_gradients(functools.partial(alone, recipe=recipe))
    for seed in range(3):
        want, got = on_one(*inputs(seed)), on_mesh(*inputs(seed))
        for name, value in want.items():
            if not np.array_equal(bytes_of(got[name]), bytes_of(value)):
                assert oracle.sqnr(np.asarray(value), np.asarray(got[name])) >= inexact.get(name, np.inf), (name, seed)
