"""SwiGLU experts sharded over all devices, beside one device that has all of them.

As a program it is one of two processes: ``sharded_experts.py RANK PORT`` prints what `lowest` finds for every exchange
between processes and every recipe, as JSON.
"""

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from xmoe import oracle
from xmoe.comparison import as_numpy
from xmoe.jax_frontend import ExpertParallel, combine, swiglu_experts

T, D, H, E, k = 1024, 256, 512, 16, 4
"""T: of all devices together."""
RECIPES = ("bf16", "fp8_rowwise")
PROCESSES = 2
BETWEEN_PROCESSES = ("all_to_all", "all_gather")


def lowest(recipe: str, exchange: Any) -> dict[str, float]:
    """dB by result, the lowest of three runs on changing data, so that XLA replays recorded launches; inf: its bits."""
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,))
    parallel = ExpertParallel(mesh=mesh, exchange=exchange, capacity=None)

    def sharded(weights: Any, x: Any, scores: Any, chosen: Any) -> jax.Array:
        return parallel.swiglu_experts(x, chosen, scores, **weights, config=recipe).y

    on_mesh = jax.jit(with_gradients(sharded), out_shardings=NamedSharding(mesh, P()))
    on_one = jax.jit(with_gradients(functools.partial(alone, recipe=recipe)))
    found: dict[str, float] = {}
    for seed in range(3):
        want, got = on_one(*inputs(seed)), on_mesh(*inputs(seed))
        for name, value in want.items():
            a, b = as_numpy(value), as_numpy(got[name])
            found[name] = min(found.get(name, np.inf), np.inf if a.tobytes() == b.tobytes() else oracle.sqnr(a, b))
    return found


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

    return run


def inputs(seed: int) -> tuple[Any, ...]:
    """On the host: every process has all of them."""
    keys = jax.random.split(jax.random.key(seed), 7)
    shapes = {"w1": (E, H, D), "w2": (E, D, H), "w3": (E, H, D)}
    weights = {
        name: jax.random.normal(key, shape, jnp.bfloat16) / 16
        for (name, shape), key in zip(shapes.items(), keys[:3], strict=True)
    }
    x, dy = (jax.random.normal(key, (T, D), jnp.bfloat16) for key in keys[3:5])
    chosen = jax.lax.top_k(jax.random.normal(keys[5], (T, E)) + jnp.arange(E) / 8, k)[1]  # uneven
    scores = 2.0 ** -jax.random.randint(keys[6], (T, k), 0, 3).astype(jnp.float32)  # products with them are exact
    return jax.tree.map(np.asarray, (weights, x, scores, chosen, dy))


def main(rank: int, port: int) -> None:
    on_gpu = jax.config.jax_platforms != "cpu"  # type: ignore[attr-defined]
    if not on_gpu:
        jax.config.update("jax_num_cpu_devices", 2)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, rank, local_device_ids=[rank] if on_gpu else None)
    assert (jax.process_count(), jax.device_count()) == (PROCESSES, PROCESSES if on_gpu else 2 * PROCESSES)
    found = {name: {recipe: lowest(recipe, name) for recipe in RECIPES} for name in BETWEEN_PROCESSES}
    print(json.dumps(found))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
